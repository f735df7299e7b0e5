"""Ctrl-C and SIGTERM, deferred until a checkpoint can be saved."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

DEFERRED_MESSAGE = (
    b"Finishing this step, then saving a checkpoint. Press Ctrl-C again to stop now "
    b"and lose progress since the last one.\n"
)


class Terminated(KeyboardInterrupt):
    """Exception for SIGTERM, which a scheduler or `kill` sends, as KeyboardInterrupt is for Ctrl-C."""


EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the exit status by which a shell recognizes a program that was stopped by Ctrl-C or SIGTERM."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def raise_terminated(number, frame):
    """Handle SIGTERM by raising, so that `finally` blocks remove temporary files."""
    raise Terminated


@contextmanager
def defer_interrupts() -> Iterator[list[KeyboardInterrupt]]:
    """Yield a list that collects the first interrupt instead of raising it; raise the second at once.

    The block polls the list. A pending interrupt is raised when the block ends.
    """
    pending: list[KeyboardInterrupt] = []

    def handler(number, frame):
        if pending:
            raise EXCEPTIONS[number]
        pending.append(EXCEPTIONS[number]())
        # stderr may be closed, or a pipe to a `tee` that the same Ctrl-C has ended.
        with suppress(OSError, AttributeError):
            os.write(sys.__stderr__.fileno(), DEFERRED_MESSAGE)  # print() is not reentrant in a signal handler

    before = {number: signal.signal(number, handler) for number in EXCEPTIONS}
    try:
        yield pending
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
    if pending:
        raise pending[0]
