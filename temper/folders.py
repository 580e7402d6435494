"""A stage's folder: it appears by one rename, whole, and its provenance says which files belong to it.

Whether a folder is whole is asked here only: by the steps, by the workflow, by `temper plan` and `temper explain`.
"""

import contextlib
import json
import logging
import shutil
import tempfile
from pathlib import Path

from temper.errors import UserError

log = logging.getLogger("temper")
PROVENANCE = "provenance.json"
SNAKEMAKE = ".snakemake_timestamp"  # left by Snakemake in a folder that a rule was to make
TEMPORARY = ".tmp-"
OWNER = ".temper"  # in a temporary folder of ours: locked as long as somebody works there
DAMAGED = ".damaged"
TEXTS = (".json", ".jsonl", ".yaml", ".txt", ".md", ".html", ".jinja")  # what people edit
MOST_BYTES = 240  # of a name: file systems take 255, and locks and logs add some of their own


# --- whole or not --------------------------------------------------------------------------------


def is_complete(folder: Path) -> bool:
    """Whether a folder is there as the step left it."""
    return fault(folder) is None


def fault(folder: Path, may_be_edited: bool = False) -> str | None:
    """What is wrong with a stage's folder, in a few words; None when it is whole.

    The files are compared by size, so that thousands of folders are looked at in no time: that shows what a power
    cut, a full disk or somebody's hand took away.

    Args:
        may_be_edited: whether a text may have another size, as long as there is something in it.
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
    """What to do about a folder that is damaged: words for the end of a message."""
    return (
        f"delete {folder} and make it again: in the workflow with snakemake --cores all {folder} --config ... "
        "(as for its sweep), by hand with the step that wrote it"
    )


def refuse_damaged(folder: Path, flag: str = "", may_be_edited: bool = False) -> None:
    """Refuse a step's folder that is not whole any more. One that no step wrote is as its owner has it.

    Args:
        flag: what named the folder, for the line.
        may_be_edited: as for `fault`.
    """
    if (folder / PROVENANCE).is_file() and (wrong := fault(folder, may_be_edited)):
        raise UserError(f"{flag}{folder}: not whole: {wrong}; {made_again(folder)}")


def sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and their bytes, as its provenance records them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def made_by_a_step(folder: Path) -> bool:
    """Whether a folder has nothing that is somebody's own: it is empty, or a step's provenance is in it."""
    return (folder / PROVENANCE).is_file() or all(path.name == SNAKEMAKE for path in folder.iterdir())


def set_aside(folder: Path) -> None:
    """Make way for a folder that is made again. What is in it may be somebody's, so it is moved and not deleted.

    The last one of each name is kept, in place of the one before.
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
    """Refuse a path with a name in it that the file system, or a lock beside it, would not take."""
    for part in path.parts:
        if len(part.encode(errors="surrogateescape")) > MOST_BYTES:
            raise UserError(
                f"{what}: the name {part[:40]}... has {len(part.encode(errors='surrogateescape'))} bytes, and a file's "
                f"name may have {MOST_BYTES}: choose shorter names"
            )


def locked(output: Path):
    """Hold the output's lock, so that a second command, or the orphan of a killed one, never works on it too."""
    lock = _locks(output.parent) / f"{output.name}.lock"
    return _holding(lock, f"another process is making {output}: waiting for it")


def _temporary_locked(parent: Path):
    """Hold the lock on making and removing temporary folders, so that nobody takes a new one for one that was left."""
    return _holding(_locks(parent) / "temporary", f"another process tidies {parent}: waiting for it")


def _locks(parent: Path) -> Path:
    folder = parent / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _holding(path: Path, waiting: str):
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("%s", waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def temporary_folder(output: Path):
    """A fresh folder that becomes `output` when the block ends well, and goes when it fails.

    It is called as `output` is, and lies in one beside it that nobody else can have made.
    """
    import filelock

    output.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_locked(output.parent):
        _remove_leftovers(output.parent)
        place = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=output.parent))
        owner = filelock.FileLock(place / OWNER)
        owner.acquire()
    try:
        folder = place / output.name
        folder.mkdir()
        yield folder
        if output.exists():
            set_aside(output)
        folder.rename(output)
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
        lock = filelock.FileLock(owner)
        with contextlib.suppress(filelock.Timeout, OSError):  # somebody works there, or it is another user's
            lock.acquire(timeout=0)
            shutil.rmtree(owner.parent, ignore_errors=True)
            lock.release()
