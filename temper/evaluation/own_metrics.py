"""Metrics of your own (`eval.metrics`): Python functions, regular expressions and JSON schemas, asked row by row."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Callable, Iterator
from typing import Any

from temper.errors import UserError, lack, suggest, words
from temper.progress import Progress
from temper.sources import own_code

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a dictionary of figures, and what MLflow takes in a name
Check = Callable[[dict], Any]  # a row, with `prediction` -> its figure, or a dictionary of figures


def code(settings: dict) -> dict[str, str]:
    """What stands for own metrics in keys: file -> hash, of functions, of what they import of yours, and of files.

    Args:
        settings: the config section `eval`.

    Raises:
        UserError: a module, function or file that is not there, or a JSON schema that is none.
    """
    found: dict[str, str] = {}
    for metric in settings.get("metrics") or []:
        place = _place(metric)
        if metric["function"]:
            found |= own_code.hashes(metric["function"], place)
        if metric["json_schema"] is not None:
            _validator(metric["json_schema"], place)
        schema = [metric["json_schema"]] if isinstance(metric["json_schema"], str) else []
        for file in [*metric["files"], *schema]:
            found |= own_code.file_hash(file, place)
    return found


def values(settings: dict, rows: list[dict]) -> dict[str, list[float]]:
    """Name -> the figure of each row.

    A function that returns a dictionary gives a metric for each of its keys, ``name/key``.

    Args:
        settings: the config section `eval`.
        rows: what functions get: `id`, `prompt`, `reference`, `prediction` and more.

    Raises:
        UserError: a function fails, or returns what is not a finite number, or other keys than for the row before.
    """
    found: dict[str, list[float]] = {}
    for metric in settings.get("metrics") or []:
        with Progress(len(rows), metric["name"], "rows") as progress:
            lines = []
            for line in _lines(metric, rows):
                lines.append(line)
                progress.update()
        found |= {name: [line[name] for line in lines] for name in lines[0]}
    return found


def _lines(metric: dict, rows: list[dict]) -> Iterator[dict[str, float]]:
    """The figures of each row, which have the same names in all of them."""
    check, first = _check(metric), None
    for row in rows:
        line = _figures(metric, check(row), row)
        first = first or line
        if line.keys() != first.keys():
            before, now = (", ".join(map(repr, names)) for names in (first, line))
            raise _wrong(metric, row, f"gives {now} for this row, and {before} for the first one")
        yield line


def try_out(settings: dict, row: dict) -> None:
    """Ask own metrics about one row whose answer is the reference, before any model is trained for them.

    Raises:
        UserError: as `values`; a metric that the config asks for is not among their keys.
    """
    if not settings.get("metrics"):
        return
    known = names(settings, row)
    asked = [("eval.metric", settings["metric"])]
    asked += [("eval.published", figure["metric"]) for figure in settings["published"]]
    for key, name in asked:
        if name and is_own(settings, name) and name not in known:
            raise UserError(f"config: '{key}': no metric '{name}'; {suggest(name, known)}")


def names(settings: dict, row: dict) -> list[str]:
    """The names of all figures, by a row whose answer is the reference."""
    rows = answered([row], prediction=[row["reference"]], finished=[True])
    return [name for metric in settings["metrics"] for line in _lines(metric, rows) for name in line]


def is_own(settings: dict, name: str) -> bool:
    """Whether a metric's name is that of an own metric, or of a figure of one that gives several."""
    return name.partition("/")[0] in [metric["name"] for metric in settings.get("metrics") or []]


def answered(rows: list[dict], **columns: list) -> list[dict]:
    """What a function gets to know of the rows of a split: of each its own columns, and what a model made of it."""
    known = [{name: row[name] for name in ("id", "prompt", "reference", "rejected") if name in row} for row in rows]
    made = zip(*columns.values(), strict=True)
    return [row | dict(zip(columns, values, strict=True)) for row, values in zip(known, made, strict=True)]


def _place(metric: dict) -> str:
    return f"config: 'eval.metrics': '{metric['name']}'"


# --- checks --------------------------------------------------------------------------------------


def _check(metric: dict) -> Check:
    place = _place(metric)
    if metric["regex"] is not None:
        pattern = re.compile(metric["regex"])
        return lambda row: pattern.search(row["prediction"].strip()) is not None
    if metric["json_schema"] is not None:
        validator = _validator(metric["json_schema"], place)
        return lambda row: _is_valid(row["prediction"], validator)
    return _asked(metric, own_code.load(metric["function"], place), place)


def _asked(metric: dict, function: Callable, place: str) -> Check:
    """A function, whose failure is one line with the row and the line of its file."""

    def check(row: dict):
        rest = {name: value for name, value in row.items() if name != "prediction"}
        try:
            return function(row["prediction"], row["reference"], rest, **metric["arguments"])
        except (Exception, SystemExit) as error:
            if lack(error, metric["function"]):
                raise
            at = own_code.failed_at(error, metric["function"], place)
            what = f"{type(error).__name__}: {words(error)}" if str(error) else type(error).__name__
            raise UserError(f"{at}: eval.metrics '{metric['name']}' fails on row {row['id']}: {what}") from error

    return check


def _validator(schema: dict | str, place: str):
    """The jsonschema validator of a schema, or of the one in a file. Nothing is ever fetched for it.

    Raises:
        UserError: it is no JSON Schema, or refers to what is not in it.
    """
    import jsonschema
    from jsonschema_specifications import REGISTRY

    if isinstance(schema, str):
        path = own_code.find_file(schema, place)
        place = f"{place}: {own_code.shown(path)}"
        try:
            schema = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: is not JSON: {words(error)}") from None
        if not isinstance(schema, dict):
            raise UserError(f"{place}: is no JSON Schema, which is an object")
    cls = jsonschema.validators.validator_for(schema, default=None)
    if "$schema" not in schema:
        cls = jsonschema.Draft202012Validator
    if cls is None:
        raise UserError(f"{place}: $schema {schema['$schema']!r:.80} is not known; leave it out for draft 2020-12")
    try:
        cls.check_schema(schema)
    except jsonschema.SchemaError as error:
        at = error.json_path
        raise UserError(f"{place}: is no JSON Schema: at {at}: {words(error.message)}") from None
    _check_references(schema, cls, place)
    return cls(schema, registry=REGISTRY)


def _check_references(schema: dict, cls, place: str) -> None:
    import referencing.exceptions
    from jsonschema_specifications import REGISTRY
    from referencing.jsonschema import specification_with

    resource = specification_with(cls.META_SCHEMA["$schema"]).create_resource(schema)
    resolver = REGISTRY.with_resource(resource.id() or "", resource).resolver_with_root(resource)
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except (referencing.exceptions.Unresolvable, referencing.exceptions.CannotDetermineSpecification) as error:
            raise UserError(
                f"{place}: $ref {reference!r:.80} leads nowhere ({type(error).__name__}): what it names must be in the "
                "schema itself, see $defs"
            ) from None


def _references(part) -> list[str]:
    if isinstance(part, list):
        return [found for item in part for found in _references(item)]
    if not isinstance(part, dict):
        return []
    own = [value for name, value in part.items() if name in ("$ref", "$dynamicRef") and isinstance(value, str)]
    return own + [found for item in part.values() for found in _references(item)]


def _is_valid(text: str, validator) -> bool:
    try:
        return validator.is_valid(json.loads(text, parse_constant=_no_constant))
    except (ValueError, RecursionError):
        return False


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


# --- what a check returns ------------------------------------------------------------------------


def _figures(metric: dict, found, row: dict) -> dict[str, float]:
    """Name -> figure of a row."""
    name = metric["name"]
    if not isinstance(found, dict):
        return {name: _number(metric, found, row, "returns")}
    if not found:
        raise _wrong(metric, row, "returns an empty dictionary: a number, or a dictionary of numbers is needed")
    for key in found:
        if not isinstance(key, str) or not KEY.fullmatch(key) or key.endswith(("_low", "_high")):
            rule = "letters, digits, _ . and -, and not _low or _high at its end"
            raise _wrong(metric, row, f"returns the key {key!r:.60}: a key has {rule}")
    return {f"{name}/{key}": _number(metric, value, row, f"returns '{key}':") for key, value in found.items()}


def _number(metric: dict, value, row: dict, what: str) -> float:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if not isinstance(value, numbers.Real):
        kind = "None" if value is None else f"{type(value).__name__} {value!r:.60}"
        raise _wrong(metric, row, f"{what} {kind}: a number, or a dictionary of numbers is needed")
    try:
        figure = float(value)
    except OverflowError:
        figure = math.inf
    if not math.isfinite(figure):
        raise _wrong(metric, row, f"{what} {value!r:.60}: a finite number is needed")
    return figure


def _wrong(metric: dict, row: dict, what: str) -> UserError:
    who = f" ({metric['function']})" if metric["function"] else ""
    return UserError(f"eval.metrics '{metric['name']}'{who}, row {row['id']}: {' '.join(what.split())}")
