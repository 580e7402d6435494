"""Raw data on disk: which files there are, and what identifies them.

``data/raw/<data>/`` holds the raw files and one ``pin-<key>.json``, which says what was fetched and
the sha256 of each file. As long as the files are as fetched, the pin is their identity; once
somebody edits one, its content is.
"""

import json
from pathlib import Path

from steps.lib.errors import UserError
from steps.lib.keys import HashCache, digest, file_sha256, stage_key

RAW = Path("data/raw")


def pin_path(name: str, source: dict) -> Path:
    """The file that the fetch_data stage writes last."""
    return RAW / name / f"pin-{pin_key(source)}.json"


def pin_key(source: dict) -> str:
    """Key of a fetched source: what was asked for, and the code that fetches it."""
    if source["kind"] == "files":
        source = {"kind": "files", "path": [str(path) for path in source_files(source)]}
    return stage_key("fetch_data", {"source": source}, {})


def source_files(source: dict) -> list[Path]:
    """Absolute paths of a `files` source; a UserError names the first that does not exist."""
    paths = source["path"] if isinstance(source["path"], list) else [source["path"]]
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"data.source.path: {path}: no such file (relative paths start at {Path.cwd()})")
    return [Path(path).resolve() for path in paths]


def data_files(raw: Path) -> list[Path]:
    """The raw files of a data folder, or the file itself when `raw` is one."""
    if raw.is_file() and not _is_pin(raw):
        return [raw]
    folder = raw.parent if raw.is_file() else raw
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith((".", "pin-")))
    if not files:
        raise UserError(f"{folder}: no data files in it; delete the folder to fetch them again")
    return files


def _is_pin(path: Path) -> bool:
    return path.name.startswith("pin-") and path.suffix == ".json"


def planned_identity(name: str, source: dict, hashes: HashCache) -> dict:
    """What identifies the raw data now: ``{"pin": key}`` as fetched (or still to fetch), else ``{"files": [sha256, ...]}``."""
    if source["kind"] == "files":
        return {"files": [hashes.sha256(path) for path in source_files(source)]}
    pin = pin_path(name, source)
    if not pin.is_file():
        return {"pin": pin_key(source)}
    return _identity(pin, {path.name: hashes.sha256(path) for path in data_files(pin)})


def identity_on_disk(raw: Path) -> dict:
    """The same as `planned_identity`, read afresh, for the step that uses the files."""
    found = {path.name: file_sha256(path) for path in data_files(raw)}
    if not _is_pin(raw):
        return {"files": list(found.values())}
    return _identity(raw, found)


def _identity(pin: Path, found: dict[str, str]) -> dict:
    recorded = json.loads(pin.read_text())
    if recorded["source"]["kind"] != "files" and recorded["files"] == found:
        return {"pin": pin.stem.removeprefix("pin-")}
    return {"files": list(found.values())}


def identity_key(identity: dict) -> str:
    """An identity as an upstream key."""
    return digest(identity)
