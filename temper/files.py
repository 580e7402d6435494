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
        shape: what it must be: a type such as ``dict[str, int]``, {name: type} for an object with these, or a pydantic
            model, which is then returned.
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
                yield _check(json.loads(line), shape)


def line_chunks(path: Path, most: int) -> Iterator[list[bytes]]:
    """The lines of a file in chunks that end with the line that brings their size to so many bytes."""
    with path.open("rb") as file:
        while lines := file.readlines(most):
            yield lines


def json_of(lines: list[bytes], path: Path) -> list[dict]:
    """The objects of some lines of a JSON lines file. Errors are those of `read_json`."""
    with _one_line(path, None):
        return [_check(json.loads(line.decode()), dict) for line in lines if line.strip()]


def known_json_lines(path: Path) -> list:
    """What a process wrote line by line until it was killed, perhaps: no file is no line, nor is one that was cut."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
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


def json_text(value) -> str:
    """A value as the text of a JSON file that people read, too."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def json_lines(rows: list[dict]) -> str:
    """Rows as the text of a JSON lines file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _parsed(path: Path, parse, shape, remedy: str | None):
    with _one_line(path, remedy):
        return _check(parse(path.read_text(encoding="utf-8")), shape)


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


def _check(content, shape):
    """`content`, or what a model makes of it; raises ValueError when it is not of this shape."""
    if shape is dict and isinstance(content, dict):
        return content  # as of each line of a large file
    if (isinstance(shape, dict) or _is_model(shape)) and not isinstance(content, dict):
        raise ValueError("it is not an object of names and values")
    if _is_model(shape):
        return _checked(shape.model_validate, content)
    if not isinstance(shape, dict):
        return _checked(_adapter(shape).validate_python, content, "it")
    for name, kind in shape.items():
        if name not in content:
            raise ValueError(f"it has no '{name}'")
        _checked(_adapter(kind).validate_python, content[name], f"'{name}'")
    return content


def _is_model(shape) -> bool:
    from pydantic import BaseModel

    return isinstance(shape, type) and issubclass(shape, BaseModel)


def _checked(validate, value, name: str | None = None):
    """What `validate` returns. `name`: of the value, for the message; None where the place of the fault tells it."""
    from pydantic import ValidationError

    try:
        return validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = [str(part) for part in first["loc"]]
        if name is None:
            if first["type"] == "missing":
                raise ValueError(f"it has no '{'.'.join(where)}'") from None
            name = f"'{where.pop(0)}'"
        place = f" at {'.'.join(where)}" if where else ""
        raise ValueError(f"{name}{place}: {first['msg']}") from None


@functools.cache
def _adapter(kind):
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(strict=True))
