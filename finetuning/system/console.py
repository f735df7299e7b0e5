"""Output of a run: the log on standard output, status messages and progress bars on standard error."""

import errno
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm

BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
REFRESH_SECONDS = 0.1
EVALUATION_BAR_DELAY = 2  # seconds


def print_status(message: str) -> None:
    """Print a message that is not part of the published log, above any progress bars."""
    write(message, sys.stderr)


def log(text: str) -> None:
    """Print lines of the published log, above any progress bars."""
    write(text, sys.stdout)


def write(text: str, stream: TextIO) -> None:
    """Print text above any progress bars; discard it if it goes to a terminal that was closed."""
    try:
        with tqdm.external_write_mode():
            print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def progress_bar(iterable: Sequence | None = None, **settings: Any) -> tqdm:
    """Return a tqdm bar that is shown only if standard error is a terminal."""
    return tqdm(
        iterable,
        bar_format=BAR_FORMAT,
        mininterval=REFRESH_SECONDS,
        disable=None,
        leave=False,
        dynamic_ncols=True,
        **settings,
    )


def evaluation_bar(batches: Sequence) -> tqdm:
    """Iterate over batches, with a bar if that takes longer than EVALUATION_BAR_DELAY."""
    return progress_bar(batches, desc="Evaluating", unit=" batches", delay=EVALUATION_BAR_DELAY)
