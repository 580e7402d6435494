"""Raw data on disk: which files there are, and what identifies them.

``data/raw/<data>/`` holds the raw files and one ``pin-<key>.json`` with the source and the sha256 of each file. As long
as the files are as fetched, the pin identifies them; once one is edited, their content does.
"""

import collections
from pathlib import Path

from temper.data.rows import UTF_8, format_of, refuse_unread
from temper.errors import UserError
from temper.files import read_json
from temper.hashing import HashCache, digest, file_sha256

RAW = Path("data/raw")


def pin_path(name: str, source: dict) -> Path:
    """The file that the fetch_data stage writes last."""
    return RAW / name / f"pin-{pin_key(source)}.json"


def pin_key(source: dict) -> str:
    """Key of a source.

    It does not include the code that fetches. A package's sha256 or a hub's revision fixes the files' content, and a
    new version of that code must not fetch files again that were edited since.
    """
    if source["kind"] == "files":
        source = {"kind": "files", "path": [str(path) for path in source_files(source).values()]}
    return digest({"stage": "fetch_data", "source": source})


def check_options(data: dict) -> None:
    """Refuse options for another format than that of the data's files, as far as that is known."""
    source = data["source"]
    if source["kind"] == "hub" and data["format"] not in (None, "jsonl"):
        raise UserError(
            f"config: 'data.format': {data['format']} is for files, and rows of the hub are kept as jsonl: "
            "leave it out (~data.format)"
        )
    if source["kind"] == "hub" and data["encoding"] != UTF_8:
        raise UserError(
            f"config: 'data.encoding': {data['encoding']} is for files, and rows of the hub are kept as UTF-8: "
            "leave it out (~data.encoding)"
        )
    for name in _names(source):
        if found := data["format"] or format_of(name):
            refuse_unread(f"config: {name}", found, data["csv"], data["field"], data["encoding"])


def _names(source: dict) -> list[str]:
    """The names of the data's files."""
    if source["kind"] == "hub":
        return [f"{source['repository']}.jsonl"]
    if source["kind"] == "files":
        return [source["path"]] if isinstance(source["path"], str) else source["path"]
    return [source["member"] if isinstance(source["member"], str) else source["member"][-1]]


def source_files(source: dict) -> dict[str, Path]:
    """The files of a `files` source: name in the data folder -> absolute path, sorted by that name.

    Files with the same name get their folder's name in front. Paths are not resolved, because the target of a link (a
    blob in a cache, say) may lack the file's extension.

    Raises:
        UserError: for the first path that is not a file, or whose name equals another's.
    """
    paths = source["path"] if isinstance(source["path"], list) else [source["path"]]
    files = [Path(path).expanduser().absolute() for path in paths]
    for path, file in zip(paths, files, strict=True):
        if not file.is_file():
            found = "is a folder: name the files in it" if file.is_dir() else "no such file"
            if file.exists() and not file.is_dir():
                found = "is not a regular file (a pipe or a device?): write its content to one"
            raise UserError(f"data.source.path: {path}: {found} (relative paths start at {Path.cwd()})")
    counts = collections.Counter(file.name for file in files)
    named: dict[str, Path] = {}
    for file in files:
        name = file.name if counts[file.name] == 1 else f"{file.parent.name}-{file.name}"
        if name in named:
            raise UserError(f"data.source.path: {named[name]} and {file} would both be called {name}: rename one")
        if is_no_data(name):
            raise UserError(
                f"data.source.path: {file}: hidden files, pin-*.json and marks such as _SUCCESS are not data: rename it"
            )
        named[name] = file
    return dict(sorted(named.items()))


def data_files(raw: Path) -> list[Path]:
    """The raw files of a data folder, or `raw` itself if it is a file; a UserError if there are none."""
    if raw.is_file() and not is_pin(raw):
        return [raw]
    folder = raw.parent if is_pin(raw) else raw
    if not folder.is_dir():
        raise UserError(f"{raw}: is neither a file nor a folder (a pipe or a device?): write its content to a file")
    files = sorted(path for path in folder.iterdir() if not path.is_dir() and not is_no_data(path.name))
    for path in files:
        if not path.exists():
            raise UserError(f"{path}: links to {path.readlink()}, which does not exist any more")
    if not files:
        raise UserError(f"{folder}: no data files in it; delete the folder to fetch them again")
    return files


def is_pin(path: Path) -> bool:
    """Whether `path` is named like a pin."""
    return path.name.startswith("pin-") and path.suffix == ".json"


def is_no_data(name: str) -> bool:
    """Whether a file of this name in a data folder is no raw file: hidden, a pin, or a mark as Spark's _SUCCESS."""
    return name.startswith(".") or is_pin(Path(name)) or (name.startswith("_") and format_of(name) is None)


def planned_identity(name: str, source: dict, hashes: HashCache) -> dict:
    """What identifies the raw data now.

    ``{"pin": key}`` if it is as fetched, or not fetched yet, else ``{"files": [sha256, ...]}`` by file name.
    """
    if source["kind"] == "files":
        return {"files": [hashes.sha256(path) for path in source_files(source).values()]}
    pin = pin_path(name, source)
    if not pin.is_file():
        return {"pin": pin_key(source)}
    return _identity(pin, {path.name: hashes.sha256(path) for path in data_files(pin)})


def identity_on_disk(raw: Path) -> dict:
    """Like `planned_identity`, but without the cache, for the step that uses the files."""
    found = {path.name: file_sha256(path) for path in data_files(raw)}
    if not is_pin(raw):
        return {"files": list(found.values())}
    return _identity(raw, found)


def refuse_other_identity(raw: Path, found: dict, planned: dict | None, what: str = "the raw files") -> None:
    """Refuse files that are not those of the plan. `planned`: their identity then; None: there was no plan."""
    if planned not in (None, found):
        raise UserError(f"{raw}: {what} changed since the plan was made: run again, to plan with the new content")


def read_pin(pin: Path) -> dict:
    """The content of a pin file.

    Raises:
        UserError: it is damaged.
    """
    remedy = "delete it, and the data is fetched again (edited files are kept)"
    recorded = read_json(pin, {"source": dict, "files": dict[str, str]}, remedy)
    for name in recorded["files"]:
        if name != Path(name).name:
            raise UserError(f"{pin}: damaged ('{name}' is in another folder); {remedy}")
    return recorded


def _identity(pin: Path, found: dict[str, str]) -> dict:
    recorded = read_pin(pin)
    if recorded["source"]["kind"] != "files" and recorded["files"] == found:
        return {"pin": pin.stem.removeprefix("pin-")}
    return {"files": list(found.values())}
