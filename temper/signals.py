"""What a process does when asked to end: by Ctrl-C, a scheduler, or a closing terminal."""

import contextlib
import os
import signal
import sys
import threading
import time

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_ONCE = 0.5  # seconds in which signals count as one request


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end. `code` is the exit code that shells expect."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def on_ending(first, again) -> dict:
    """Call `first` with the number of the first signal that asks to end, and `again` on a repeated one.

    Two different signals count as one request: Ctrl-C reaches a job from the terminal and then through the workflow.
    Signals that are ignored (nohup, a background job) stay ignored.

    Returns:
        signal -> its handler before
    """
    asked: dict[int, float] = {}  # signal -> its first time

    def handle(number, _frame):
        now = time.monotonic()
        if not asked:
            asked[number] = now
            first(number)
        elif now - asked.setdefault(number, now) > AT_ONCE:
            again(number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in heeded}


@contextlib.contextmanager
def as_interrupts():
    """Within the block, the first signal that asks to end raises `Interrupted`; a later one ends the process at once.

    Python drops exceptions during cleanup (in a weak reference's callback, say); then it is raised again.
    """

    def interrupt(number):
        raise Interrupted(number)

    def raise_anew(dropped):
        if isinstance(dropped.exc_value, Interrupted):
            signal.signal(signal.SIGALRM, lambda *_: interrupt(dropped.exc_value.code - 128))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(dropped)

    before, hook = on_ending(interrupt, lambda number: os._exit(128 + number)), sys.unraisablehook
    if before:
        sys.unraisablehook = raise_anew
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
