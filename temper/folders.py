"""A stage's folder appears complete, by one rename, and its provenance lists its files.

The steps, the workflow, `temper plan` and `temper explain` all check here whether a folder is complete.
"""

import contextlib
import errno
import json
import logging
import shutil
import tempfile
from pathlib import Path

from temper.errors import UserError

log = logging.getLogger("temper")
PROVENANCE = "provenance.json"
SNAKEMAKE = ".snakemake_timestamp"  # left by Snakemake in a rule's output folder
TEMPORARY = ".tmp-"
OWNER = ".temper"  # in a temporary folder: locked while its process works there
DAMAGED = ".damaged"
LOCKS = ".locks"
TEXTS = (".json", ".jsonl", ".yaml", ".txt", ".md", ".html", ".jinja")  # files that people edit
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
MOST_BYTES = 240  # of a name: file systems allow 255, and locks and logs add to it


# --- whole or not --------------------------------------------------------------------------------


def is_complete(folder: Path) -> bool:
    """Whether a folder exists as the step left it."""
    return fault(folder) is None


def fault(folder: Path, may_be_edited: bool = False) -> str | None:
    """What is wrong with a stage's folder, in a few words; None if it is complete.

    Files are compared by size, which is fast enough for thousands of folders and shows what a power cut, a full disk or
    a deletion took away.

    Args:
        may_be_edited: whether text files may have another size, but not be empty.
    """
    try:
        files = json.loads((folder / PROVENANCE).read_text(encoding="utf-8")).get("files", {})
        for name, size in files.items():
            found = (folder / name).stat().st_size
            by_hand = may_be_edited and found and Path(name).suffix in TEXTS
            if found != size and not by_hand:
                return f"{name} has {found} bytes, and had {size} when it was written"
    except PermissionError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable") from None
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return f"{PROVENANCE} is damaged"
    return None


def made_again(folder: Path) -> str:
    """What to do about a damaged folder, for the end of a message."""
    return (
        f"delete {folder} and make it again: in the workflow with snakemake --cores all {folder} --config ... "
        "(as for its sweep), by hand with the step that wrote it"
    )


def refuse_damaged(folder: Path, flag: str = "", may_be_edited: bool = False) -> None:
    """Refuse a step's folder that is no longer complete. Folders that no step wrote are not checked.

    Args:
        flag: the flag that named the folder, for the message.
        may_be_edited: as for `fault`.
    """
    if (folder / PROVENANCE).is_file() and (wrong := fault(folder, may_be_edited)):
        raise UserError(f"{flag}{folder}: not whole: {wrong}; {made_again(folder)}")


def sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and their sizes in bytes, for its provenance."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def made_by_a_step(folder: Path) -> bool:
    """Whether a folder may be replaced: it is empty, or holds a step's provenance."""
    return (folder / PROVENANCE).is_file() or all(path.name == SNAKEMAKE for path in folder.iterdir())


def set_aside(folder: Path) -> None:
    """Make way for a folder that is made again. It may hold a user's files, so it is moved, not deleted.

    Only the last one of each name is kept.
    """
    if all(path.name == SNAKEMAKE for path in folder.iterdir()):
        (folder / SNAKEMAKE).unlink(missing_ok=True)
        folder.rmdir()
        return
    target = folder.parent / DAMAGED / folder.name
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    log.info("%s was not whole: moved to %s", folder, target)


# --- making one ----------------------------------------------------------------------------------


def check_name(path: Path, what: str) -> None:
    """Refuse a path with a name that is too long for the file system or for a lock beside it."""
    for part in path.parts:
        if len(part.encode(errors="surrogateescape")) > MOST_BYTES:
            raise UserError(
                f"{what}: the name {part[:40]}... has {len(part.encode(errors='surrogateescape'))} bytes, and a file's "
                f"name may have {MOST_BYTES}: choose shorter names"
            )


def locked(output: Path):
    """Hold the output's lock, so that no second command or orphan of a killed one works on it at the same time."""
    return _holding(_lock_of(output), f"another process is making {output}: waiting for it")


def _temporary_locked(parent: Path):
    """Hold the lock on making and removing temporary folders, so that a new one is not taken for a leftover."""
    return _holding(parent / LOCKS / "temporary", f"another process tidies {parent}: waiting for it")


def _lock_of(output: Path) -> Path:
    return output.parent / LOCKS / f"{output.name}.lock"


def lock_at(path: Path):
    """A lock of the operating system, which ends with its process. There is none that would not (a file that is there).

    On a shared disk, that holds for other nodes if the disk carries locks (see temper/shared_disk.py).
    """
    import filelock

    return filelock.FileLock(path, fallback_to_soft=False)


@contextlib.contextmanager
def held_file(path: Path):
    """Hold the lock at `path`, a file that is there while the block runs, so that others see that this process does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_at(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _holding(path: Path, waiting: str):
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_at(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("%s", waiting)
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise UserError(
            f"{path}: cannot be locked ({error.strerror}): the disk has no locks; mount it with locks, or use another"
        ) from None
    try:
        yield
    finally:
        lock.release()


def working(results: Path) -> Path | None:
    """A folder below `results` that a step is making at this moment, if there is one."""
    outputs = (path.parent.parent / path.name.removesuffix(".lock") for path in results.glob(f"*/{LOCKS}/*.lock"))
    return next(filter(is_locked, sorted(outputs)), None)


def is_locked(output: Path) -> bool:
    """Whether a process works on `output` at this moment."""
    path = _lock_of(output)
    return path.is_file() and is_held(path)


def is_held(path: Path) -> bool:
    """Whether a process has the lock at `path` at this moment."""
    import filelock

    lock = lock_at(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def delete(folder: Path) -> None:
    """Delete a folder that no step is making: it disappears by one rename, so that no half of it can be left."""
    with locked(folder), own_place(folder.parent) as place:
        folder.rename(place / folder.name)


@contextlib.contextmanager
def temporary_folder(output: Path):
    """A fresh folder that becomes `output` if the block succeeds, and is removed if it fails.

    It has the name of `output` and is inside a new folder beside it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with own_place(output.parent) as place:
        folder = place / output.name
        folder.mkdir()
        yield folder
        if output.exists():
            set_aside(output)
        folder.rename(output)


@contextlib.contextmanager
def own_place(parent: Path):
    """A new folder in `parent` that goes away with its content at the end, or else with the leftovers of the killed."""
    with _temporary_locked(parent):
        _remove_leftovers(parent)
        place = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
        owner = lock_at(place / OWNER)
        owner.acquire()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        owner.release()


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary folders of processes that were killed."""
    if any(parent.glob(f"{TEMPORARY}*")):
        with _temporary_locked(parent):
            _remove_leftovers(parent)


def _remove_leftovers(parent: Path) -> None:
    import filelock

    for owner in parent.glob(f"{TEMPORARY}*/{OWNER}"):
        lock = lock_at(owner)
        with contextlib.suppress(filelock.Timeout, OSError):  # in use, or another user's
            lock.acquire(timeout=0)
            shutil.rmtree(owner.parent, ignore_errors=True)
            lock.release()
