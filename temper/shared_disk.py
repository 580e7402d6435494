"""Whether a lock that is held on one node of a cluster is seen on the others.

Folders are locked by flock (temper/folders.py). Linux carries that to an NFS server, unless the disk is mounted with
`nolock` or `local_lock`; other shared file systems have options of their own. Where it is not carried, each node sees
its own locks only: two jobs would work on one folder, and one would remove the temporary folder of the other.

So the command that sends jobs to a cluster holds a lock for as long as it runs, and counts in a file beside it. A job
that can take this lock while the count goes on ends in one line, before it touches anything.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from temper.errors import UserError
from temper.files import write_whole
from temper.folders import held_file, is_held

HELD = "TEMPER_HELD_LOCK"  # environment variable: the file that the command holds
BEAT = 5.0  # seconds between two counts


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a lock in `folder` while the block runs, and name it to all processes that are started."""
    path, ended = folder / f"{uuid.uuid4().hex}.lock", threading.Event()

    def count() -> None:
        number = 0
        while not ended.wait(BEAT):
            number += 1
            with contextlib.suppress(OSError):  # a full disk: jobs then take this command for a killed one
                write_whole(_count_of(path), str(number))

    with held_file(path):
        os.environ[HELD] = str(path)
        threading.Thread(target=count, daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            del os.environ[HELD]
            _count_of(path).unlink(missing_ok=True)


def is_far() -> bool:
    """Whether a command on perhaps another machine has sent this job."""
    return HELD in os.environ


def check() -> None:
    """Nothing, if the command that sent this job holds its lock, or has ended.

    Raises:
        UserError: the command runs, and its lock can be taken here.
    """
    named = os.environ.get(HELD)
    if not named or not Path(named).is_file() or is_held(Path(named)):
        return
    before = _read(_count_of(Path(named)))
    time.sleep(3 * BEAT)
    if _read(_count_of(Path(named))) != before:
        raise UserError(
            f"{Path(named).parent}: a lock that is held on another node is not seen on this one, so jobs would work on "
            "the same folders: mount the disk with locks for all nodes (docs/clusters.md), or use another"
        )


def _count_of(path: Path) -> Path:
    return path.with_suffix(".count")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
