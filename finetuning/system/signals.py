"""Ctrl-C, SIGTERM and a closed terminal, deferred until a checkpoint can be saved."""

import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

DEFERRED_MESSAGE = (
    b"Stopping after this step or evaluation batch, then saving a checkpoint. Press Ctrl-C again to stop now "
    b"and lose progress since the last one.\n"
)


class Terminated(KeyboardInterrupt):
    """Exception raised on SIGTERM, which a scheduler or `kill` sends."""


class Hangup(KeyboardInterrupt):
    """Exception raised on SIGHUP, which the processes of a terminal receive when it is closed."""


EXCEPTIONS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
if hasattr(signal, "SIGHUP"):  # not on Windows
    EXCEPTIONS[signal.SIGHUP] = Hangup

pending: list[KeyboardInterrupt] = []  # the interrupt that `defer_interrupts` holds


def signal_number(error: KeyboardInterrupt) -> int:
    """Return the number of the signal that raised an exception."""
    return next(number for number, exception in EXCEPTIONS.items() if type(error) is exception)


def raise_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise an exception, so that `finally` blocks remove temporary files.

    A signal that is already ignored, as under `nohup`, stays ignored.
    """
    for number in EXCEPTIONS.keys() - {signal.SIGINT}:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, raise_exception)


def raise_exception(number: int, frame: FrameType | None) -> NoReturn:
    """Handle a signal by raising its exception."""
    if EXCEPTIONS[number] is Hangup:
        discard_terminal_output()
    raise EXCEPTIONS[number]


def discard_terminal_output() -> None:
    """Ignore further SIGHUPs, of which a shell may send several, and discard output to a closed terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        with suppress(OSError, ValueError):  # closed
            number = stream.fileno()
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # writing to a closed terminal fails


@contextmanager
def defer_interrupts() -> Iterator[list[KeyboardInterrupt]]:
    """Yield a list that holds the first interrupt instead of raising it, until `raise_pending_interrupt` is called.

    A Ctrl-C after the first interrupt is raised immediately. A later SIGTERM or SIGHUP is ignored, because
    systemd sends both together. A pending interrupt is raised when the block ends.
    """

    def handler(number, frame):
        if EXCEPTIONS[number] is Hangup:
            discard_terminal_output()
        if pending:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        pending.append(EXCEPTIONS[number]())
        # stderr may be closed, or a pipe to a `tee` that the same Ctrl-C has ended.
        with suppress(OSError, AttributeError):
            os.write(sys.__stderr__.fileno(), DEFERRED_MESSAGE)  # print() is not reentrant in a signal handler

    handled = [number for number in EXCEPTIONS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield pending
    finally:
        for number, previous in before.items():
            if signal.getsignal(number) is handler:  # unless a SIGHUP is ignored by now
                signal.signal(number, previous)
        held = pending.copy()
        pending.clear()
    if held:
        raise held[0]


def raise_pending_interrupt() -> None:
    """Raise the interrupt that `defer_interrupts` holds, if any; call it where the run can resume."""
    if pending:
        raise pending[0]
