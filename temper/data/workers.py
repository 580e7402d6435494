"""A function over many items in several processes, its results in order.

The processes are forks, which have everything loaded already and share it. They end with this process, in whatever way
it ends, and one that is killed is an error of one line. `concurrent.futures` does the rest.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from temper.errors import LARGER, UserError
from temper.files import line_chunks

T = TypeVar("T")

THREADS = "RAYON_NUM_THREADS"  # environment variable: threads of tokenizers, which the workflow sets; else all cores
PARALLEL = "TOKENIZERS_PARALLELISM"  # whether tokenizers may use threads, which forks must not
WORTH = 2**20  # bytes of text that are worth a process: a second of tokenizing, where a fork takes a twentieth
WORTH_READING = 2**23  # the same of rows that are read, compared or written
LINES = 2**20  # bytes of lines that are an item
AHEAD = 2  # items per process that wait for their turn, or are made already and wait for an earlier one


def in_order(function: Callable[[Any], Any], items: Iterable, workers: int, what: Path) -> Generator:
    """`map(function, items)`, computed by so many processes; by this one, if they are less than two.

    Items are read as they are needed. Close it if it is not read to its end.

    Args:
        function: what it changes in its process stays there.
        items: like the results, they are pickled.
        what: is read, for an error.

    Raises:
        UserError: a process was killed; and whatever `function`, or reading `items`, raises first in their order.
    """
    if workers < 2:
        yield from map(function, items)
        return
    with _without_threads():
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (function,))
        try:
            for future in _ahead(pool, items, AHEAD * workers):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                f"{what}: one of the {workers} processes that read it was killed, as the system does when memory is "
                f"used up; {LARGER}"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def of_lines(path: Path, make: Callable[[list[bytes]], T]) -> Iterator[T]:
    """What `make` makes of the lines of a file, some at a time and in order, in several processes if they are many."""
    made = in_order(make, line_chunks(path, LINES), worth(path.stat().st_size, WORTH_READING), path)
    with contextlib.closing(made):
        yield from made


def _ahead(pool: ProcessPoolExecutor, items: Iterable, most: int) -> Iterator[Future]:
    """The results to come, in order, each when `most` more are asked for. An error of `items` comes in its turn."""
    waiting: collections.deque[Future] = collections.deque()
    failed = None
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > most:
                yield waiting.popleft()
    except Exception as error:
        failed = error
    yield from waiting
    if failed is not None:
        raise failed


def worth(size: int, each: int | None = None) -> int:
    """How many processes a text of so many bytes is worth, of as many as this one has cores.

    Args:
        each: bytes that are worth a process; None: those of tokenizing.
    """
    if sys.platform != "linux":  # other systems' libraries do not survive a fork
        return 1
    return max(1, min(_cores(), size // (each or WORTH)))


def _cores() -> int:
    given = os.environ.get(THREADS, "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """Forbid tokenizers its threads, which a fork does not have; it looks when it is forked and when it is called."""
    before = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLEL]
        else:
            os.environ[PARALLEL] = before


# --- in the processes --------------------------------------------------------------------------------

_FUNCTION: list[Callable] = []


def _begin(function: Callable) -> None:
    """Leave to the main process what Ctrl-C and a closing terminal ask of all, and end when it does."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _FUNCTION[:] = [function]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item):
    return _FUNCTION[0](item)
