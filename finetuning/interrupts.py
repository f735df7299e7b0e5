"""Ctrl-C and SIGTERM: put off to a moment when nothing is lost."""

import os
import signal
import sys
from contextlib import contextmanager

PUT_OFF = b"Stopping after this update; once more stops at once, and loses what came after the last checkpoint\n"


class Terminated(KeyboardInterrupt):
    """What Ctrl-C is to the keyboard, for SIGTERM: a scheduler or `kill` asks the program to stop."""


def interrupt(number):
    """The exception a signal stands for."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def exit_status(error):
    """The status with which a shell expects a program to end that was stopped by Ctrl-C or SIGTERM."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def raise_terminated(number, frame):
    """A signal handler; an exception unwinds the stack, so that `finally` blocks remove temporary files."""
    raise interrupt(number)


@contextmanager
def put_off():
    """Yield the list of the interrupts that came while the block runs, instead of raising them.

    Only the first one waits, for the block to look at the list, and is raised at the block's end;
    the second is raised at once.
    """
    came = []

    def handler(number, frame):
        if came:
            raise interrupt(number)
        came.append(interrupt(number))
        os.write(sys.__stderr__.fileno(), PUT_OFF)  # a print may not interrupt another one
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
    if came:
        raise came[0]
