"""Raw data on disk: which files there are, and what identifies them.

``data/raw/<data>/`` holds the raw files and one ``pin-<key>.json`` with the source and the sha256 of each file. As long
as the files are as fetched, the pin identifies them; once one is edited, their content does. Of a source for each split
the files are named after their split, and the pin says which is of which.
"""

import collections
import glob
from collections.abc import Iterable
from pathlib import Path

from temper.data.rows import UTF_8, format_by_ending, format_of, refuse_unread
from temper.errors import UserError
from temper.files import read_json
from temper.hashing import HashCache, digest

RAW = Path("data/raw")


def pin_path(name: str, source: dict) -> Path:
    """The file that the fetch_data stage writes last."""
    return RAW / name / f"pin-{pin_key(source)}.json"


def pin_key(source: dict) -> str:
    """Key of a source.

    It does not include the code that fetches. A package's sha256 or a hub's revision fixes the files' content, and a
    new version of that code must not fetch files again that were edited since.
    """
    parts = {split: _with_absolute_paths(part, section_of(split)) for split, part in by_split(source).items()}
    return digest({"stage": "fetch_data", "source": parts.get(ALL) or parts})


ALL = ""  # in place of a split: the source is of all rows


def by_split(source: dict) -> dict[str, dict]:
    """Split -> its source; `ALL` -> the one source of all rows."""
    return {ALL: source} if "kind" in source else {split: part for split, part in source.items() if part}


def section_of(split: str, section: str = "data.source") -> str:
    """The config key of a split's source."""
    return section if split == ALL else f"{section}.{split}"


def _with_absolute_paths(source: dict, section: str) -> dict:
    if source["kind"] != "files":
        return source
    return {"kind": "files", "path": [str(path) for path in source_files(source, section).values()]}


def check_options(data: dict) -> None:
    """Refuse options for another format than that of the data's files, as far as that is known."""
    for split, source in by_split(data["source"]).items():
        _check_options(data, source, section_of(split))


def _check_options(data: dict, source: dict, section: str) -> None:
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
    names = _names(source, section)
    formats = {name: data["format"] or format_by_ending(name) for name in names}
    if "text" in formats.values() and {*formats.values()} - {"text", None}:
        name = next(name for name, found in formats.items() if found == "text")
        raise UserError(
            f"{section}.path: {name}: is one text, and others are files of rows: if it is no data, name these by a "
            "pattern, as FOLDER/*.jsonl"
        )
    for name in names:
        if found := formats[name]:
            refuse_unread(f"config: {name}", found, data["csv"], data["field"], data["encoding"])
        elif source["kind"] == "files":
            raise UserError(
                f"{section}.path: {name}: cannot tell the format by the ending: set data.format to json, jsonl, csv, "
                "parquet or text, or, if it is no data, name the others by a pattern, as FOLDER/*.jsonl"
            )


def _names(source: dict, section: str) -> list[str]:
    """The names of the data's files."""
    if source["kind"] == "hub":
        return [f"{source['repository']}.jsonl"]
    if source["kind"] == "files":
        return [str(file) for file in source_files(source, section).values()]
    return [source["member"] if isinstance(source["member"], str) else source["member"][-1]]


def source_files(source: dict, section: str = "data.source") -> dict[str, Path]:
    """The files of a `files` source: name in the data folder -> absolute path, sorted by that name.

    Files with the same name get their folders' names in front. Paths are not resolved, because the target of a link (a
    blob in a cache, say) may lack the file's extension.

    Raises:
        UserError: for the first path that names no file, a file twice, or what may be data or not.
    """
    paths = source["path"] if isinstance(source["path"], list) else [source["path"]]
    files = [file for path in paths for file in _files_of(path, f"{section}.path: {path}")]
    for file, times in collections.Counter(files).items():
        if times > 1:
            raise UserError(f"{section}.path: {file} is named twice: its rows would be there twice")
    named: dict[str, Path] = {}
    for file, name in _different_names(files).items():
        if name in named:
            raise UserError(f"{section}.path: {named[name]} and {file} would both be called {name}: rename one")
        named[name] = file
    return dict(sorted(named.items()))


def _files_of(path: str, what: str) -> list[Path]:
    """What a path names: the file itself, the files in the folder, or those that a pattern matches."""
    start = Path(path).expanduser().absolute()
    if start.is_dir():
        files = _in_folder(path, start, what)
    elif start.exists() or not glob.has_magic(path):
        files = [start]
        if is_no_data(start.name):
            raise UserError(f"{what}: hidden files, pin-*.json and marks such as _SUCCESS are not data: rename it")
    else:
        files = _matches(start, what)
    for file in files:
        if not file.is_file():
            found = "is not a regular file (a pipe or a device?): write its content to one"
            found = found if file.exists() else "no such file"
            which = "" if file == start else f"{file}: "
            raise UserError(f"{what}: {which}{found} (relative paths start at {Path.cwd()})")
    return files


def _in_folder(path: str, folder: Path, what: str) -> list[Path]:
    """The files right in a folder. Another folder in it is refused: what is in there may belong to the data or not."""
    if (folder / "_delta_log").is_dir():
        raise UserError(f"{what}: is a Delta table, some of whose files may hold old rows: write its rows to a file")
    files = sorted(file for file in folder.iterdir() if not file.is_dir() and not is_no_data(file.name))
    ending = "".join(files[0].suffixes[-1:]) if files else ".jsonl"
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.name.startswith("."):
            raise UserError(
                f"{what}: has the folder {inner.name} in it: name the files that are data by a pattern, "
                f"{Path(path) / '*'}{ending} (without that folder's) or {Path(path) / '**' / '*'}{ending} (with them)"
            )
    if not files:
        raise UserError(f"{what}: no data files in this folder (relative paths start at {Path.cwd()})")
    return files


def _matches(pattern: Path, what: str) -> list[Path]:
    """The files that match a pattern (``*``, ``?``, ``[...]``, ``**`` for folders of any depth)."""
    found = sorted(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207 - Path.glob finds hidden files
    files = [file for file in found if not file.is_dir() and not is_no_data(file.name)]
    folders = [] if "**" in pattern.parts else [file for file in found if file.is_dir()]
    if folders:
        raise UserError(
            f"{what}: matches the folder {folders[0]}: name its files as well ({folders[0].name}/*), or not it"
        )
    if not files:
        raise UserError(f"{what}: no file matches (relative paths start at {Path.cwd()})")
    return files


def _different_names(files: Iterable[Path]) -> dict[Path, str]:
    """File -> its name, with as many of its folders in front, by dashes, as tell it from the others."""
    names = {file: file.name for file in files}
    for depth in range(2, max((len(file.parts) for file in names), default=0)):
        twice = {name for name, times in collections.Counter(names.values()).items() if times > 1}
        names |= {file: "-".join(file.parts[-depth:]) for file, name in names.items() if name in twice}
    return names


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

    ``{"pin": key}`` if it is as fetched, or not fetched yet, else ``{"files": [sha256, ...]}`` by file name; with a
    source for each split ``{"splits": {split: one of these}}``.
    """
    pin, parts = pin_path(name, source), by_split(source)
    if pin.is_file() and any(part["kind"] != "files" for part in parts.values()):
        return _identity(pin, {path.name: hashes.sha256(path) for path in data_files(pin)})
    return _of_parts({split: _planned(part, section_of(split), hashes) for split, part in parts.items()})


def _planned(source: dict, section: str, hashes: HashCache) -> dict:
    if source["kind"] == "files":
        return {"files": [hashes.sha256(path) for path in source_files(source, section).values()]}
    return {"pin": pin_key(source)}


def _of_parts(identities: dict[str, dict]) -> dict:
    return identities.get(ALL) or {"splits": identities}


def identity_on_disk(raw: Path, hashes: HashCache | None = None) -> dict:
    """Like `planned_identity`, for the step that uses the files. Without `hashes` they are read."""
    known = hashes or HashCache()
    found = {path.name: known.sha256(path) for path in data_files(raw)}
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
    recorded.setdefault("splits", {})  # file -> its split; where one source has all rows, none
    for name in recorded["files"]:
        if name != Path(name).name:
            raise UserError(f"{pin}: damaged ('{name}' is in another folder); {remedy}")
    return recorded


def split_files(raw: Path) -> dict[str, list[Path]]:
    """Split -> its files, where the data has a source for each; else `ALL` -> all files.

    Raises:
        UserError: a file that is of no split.
    """
    files, pin = data_files(raw), _pin_of(raw)
    split_of = read_pin(pin)["splits"] if pin else {}
    if not split_of:
        return {ALL: files}
    found: dict[str, list[Path]] = {}
    for path in files:
        if path.name not in split_of:
            raise UserError(f"{path}: is of no split; move it away, or name it in data.source")
        found.setdefault(split_of[path.name], []).append(path)
    return found


def _pin_of(raw: Path) -> Path | None:
    """The pin of a data folder."""
    pins = [raw] if is_pin(raw) else list(raw.glob("pin-*.json"))
    return pins[0] if len(pins) == 1 else None


def kept_files(pin: dict) -> list[str]:
    """The files of a pin that are kept in its folder: of a `files` source there are only links."""
    parts = by_split(pin["source"])
    return [name for name in pin["files"] if parts[pin["splits"].get(name, ALL)]["kind"] != "files"]


def _identity(pin: Path, found: dict[str, str]) -> dict:
    recorded = read_pin(pin)
    split_of, parts = recorded["splits"], by_split(recorded["source"])
    if not {*found} <= {*split_of} and split_of:  # a file that was added is of no split, and is told where it is read
        return {"files": list(found.values())}
    identities = {}
    for split, source in parts.items():
        before = {name: sum_ for name, sum_ in recorded["files"].items() if split_of.get(name, ALL) == split}
        now = {name: sum_ for name, sum_ in found.items() if split_of.get(name, ALL) == split}
        as_fetched = source["kind"] != "files" and before == now
        key = pin.stem.removeprefix("pin-") if split == ALL else pin_key(source)
        identities[split] = {"pin": key} if as_fetched else {"files": list(now.values())}
    return _of_parts(identities)
