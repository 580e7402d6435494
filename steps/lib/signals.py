"""What a process does when it is asked to end: by Ctrl-C, by a scheduler, by a terminal that closes."""

import contextlib
import os
import signal
import threading
import time

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_ONCE = 0.5  # seconds: Ctrl-C and the main process tell a job both, and that is one wish


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end. `code` is the exit code that shells expect of it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def on_ending(first, again) -> dict:
    """Call `first` with the number of the first signal that asks to end, and `again` with that of each later one.

    A signal that is ignored (nohup, a job in the background) stays so.

    Returns:
        signal -> its handler before
    """
    asked = None

    def handle(number, _frame):
        nonlocal asked
        if asked is None:
            asked = time.monotonic()
            first(number)
        elif time.monotonic() - asked > AT_ONCE:
            again(number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in heeded}


@contextlib.contextmanager
def as_interrupts():
    """Within the block the first signal that asks to end raises `Interrupted`; a later one ends the process at once."""

    def interrupt(number):
        raise Interrupted(number)

    before = on_ending(interrupt, lambda number: os._exit(128 + number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
