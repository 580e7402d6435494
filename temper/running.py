"""Which sweeps commands are at work on at this moment.

A command holds a lock in `results/.plans/`, whose name has the sweep and the start, for as long as it lives: the system
frees it also when the command is killed.
"""

import contextlib
import os
import time
from collections.abc import Iterator

from temper.folders import held_file, is_held
from temper.hashing import digest
from temper.planning.plan import PLANS


@contextlib.contextmanager
def marked(sweep: str) -> Iterator[None]:
    """Say that this process is at work on a sweep while the block runs."""
    path = PLANS / f"{digest(sweep)}-{int(time.time())}-{os.getpid()}.lock"
    with held_file(path):
        yield


def begun(sweep: str) -> float | None:
    """When the first of the commands at work on a sweep began, in seconds since the epoch; None: there is none."""
    held = [path for path in PLANS.glob(f"{digest(sweep)}-*-*.lock") if is_held(path)]
    return min((float(path.name.split("-")[1]) for path in held), default=None)
