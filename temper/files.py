"""Reading what an earlier command wrote, and what may be damaged by now: cut, emptied, edited, of another program.

Every such file is read here, so that each fault is one line that names the file and what to do. Writing one whole, too.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from temper.errors import UserError, lack, words
from temper.folders import made_again


def read_json(path: Path, shape=dict, remedy: str | None = None):
    """The content of a JSON file.

    Args:
        shape: what it must be: a type such as ``dict[str, int]``, or {name: type} for an object with these.
        remedy: what to do when it is damaged; by itself: to make its folder again.

    Raises:
        UserError: it is not there, cannot be read, is not JSON or of another shape.
    """
    return _parsed(path, json.loads, shape, remedy)


def known_json(path: Path) -> dict:
    """The entries of an object in a JSON file; none when there is no such thing in it, or no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: no JSON, or no text
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: Path, shape=dict, remedy: str | None = None) -> list:
    """The objects of a JSON lines file. Arguments and errors are those of `read_json`."""
    return list(each_json_line(path, shape, remedy))


def each_json_line(path: Path, shape=dict, remedy: str | None = None) -> Iterator:
    """The same one by one, for a file that may be larger than memory."""
    with _one_line(path, remedy), path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                content = json.loads(line)
                _check(content, shape)
                yield content


def known_json_lines(path: Path) -> list:
    """What a process wrote line by line until it was killed, perhaps: no file is no line, nor is one that was cut."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return lines


def read_yaml(path: Path, shape=dict, remedy: str | None = None):
    """The content of a YAML file that one of our commands wrote. Arguments and errors are those of `read_json`."""
    import yaml

    def parse(text: str):
        try:
            return yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(words(error)) from None

    return _parsed(path, parse, shape, remedy)


def load_rows(folder: Path):
    """The `datasets.DatasetDict` that a stage saved in `folder`.

    Raises:
        UserError: it is damaged.
    """
    from datasets import load_from_disk

    try:
        rows = load_from_disk(str(folder))
        if not isinstance(rows, dict):
            raise ValueError("it holds one split only")
    except Exception as error:  # whatever Arrow and datasets meet in a damaged file, down to bare Exceptions
        if lack(error, str(folder)):
            raise
        raise UserError(f"{folder}: cannot be read ({words(error)}); {made_again(folder)}") from None
    return rows


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well: nobody reads half of it, no failure leaves it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text by way of `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_lines(rows: list[dict]) -> str:
    """Rows as the text of a JSON lines file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _parsed(path: Path, parse, shape, remedy: str | None):
    with _one_line(path, remedy):
        content = parse(path.read_text(encoding="utf-8"))
        _check(content, shape)
        return content


@contextlib.contextmanager
def _one_line(path: Path, remedy: str | None):
    """What is wrong with a file that is read, in one line."""
    remedy = remedy or made_again(path.parent)
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it a readable file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({words(error)}); {remedy}") from None


def _check(content, shape) -> None:
    """Raise ValueError when `content` is not of this shape."""
    from pydantic import ValidationError

    if isinstance(shape, dict):
        if not isinstance(content, dict):
            raise ValueError("it is not an object of names and values")
        for name, kind in shape.items():
            if name not in content:
                raise ValueError(f"it has no '{name}'")
            _check_value(f"'{name}'", content[name], kind, ValidationError)
    else:
        _check_value("it", content, shape, ValidationError)


def _check_value(name: str, value, kind, invalid) -> None:
    try:
        _adapter(kind).validate_python(value)
    except invalid as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}{f' at {where}' if where else ''}: {first['msg']}") from None


@functools.cache
def _adapter(kind):
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(strict=True))
