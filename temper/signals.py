"""What a process does when asked to end: by Ctrl-C, a scheduler, or a closing terminal."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AT_ONCE = 0.5  # seconds in which signals count as one request
PUT_OFF: list["Request"] = []  # those of the blocks that are running


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end. `code` is the exit code that shells expect."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Request:
    """Whether a signal has asked to end, in a block that heeds it where it can end well."""

    number: int | None = None  # of the signal

    def heed(self) -> None:
        """Raise `Interrupted` if asked to end."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextlib.contextmanager
def put_off() -> Iterator[Request]:
    """Within the block, the first signal that asks to end is noted only, and heeded at the block's end at the latest.

    A later one ends the process at once, as everywhere.
    """
    request = Request()
    PUT_OFF.append(request)
    try:
        yield request
    finally:
        PUT_OFF.remove(request)
    request.heed()


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

    Where it is put off (see `put_off`), it is raised later.

    Python drops exceptions during cleanup (in a weak reference's callback, say); then it is raised again.
    """

    def interrupt(number):
        if not PUT_OFF:
            raise Interrupted(number)
        PUT_OFF[-1].number = number

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
