"""What of a row is text for a template, and what is not: Python's own words for it would be learned.

Text and numbers go in as they are, dates as ISO writes them. Anything else (null, true, bytes, a list) is refused with
a way on: ``None``, ``True``, ``b'...'`` and ``['a']`` are how Python shows such a value, and nobody writes so.
"""

import datetime
import decimal
import functools
import math
from collections.abc import Callable

from steps.lib import templates

# Jinja's filters that make text of their value first.
OF_TEXT = ("capitalize", "center", "indent", "lower", "replace", "striptags", "title", "trim", "truncate", "upper")
OF_TEXT += ("urlencode", "wordcount", "wordwrap", "escape", "e", "forceescape")


class NotTextError(ValueError):
    """A value that is no text stands where a template wants one."""

    def __init__(self, value):
        super().__init__(f"{shown(value)} is {kind(value)}, not text: {way_on(value)}")
        self.value = value


def environment():
    """The sandbox for templates over a row's columns."""
    from jinja2.filters import FILTERS

    made = templates.environment(finalize=checked)
    made.code_generator_class = _generator()
    filters = {name: _of_text(FILTERS[name]) for name in OF_TEXT}
    filters |= {name: _strict_number(FILTERS[name]) for name in ("float", "int")}
    made.filters = {**made.filters, **filters, "join": _joined(FILTERS["join"])}
    return made


def checked(value):
    """`value` where it is text, or a number or a date, which are written as people write them.

    Raises:
        NotTextError: it is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal) or not math.isfinite(value):
        if type(value).__name__.endswith("Undefined"):
            return value  # which has an error of its own
        raise NotTextError(value)
    return value


def true(value) -> bool:
    """Whether a condition holds.

    Raises:
        ValueError: of a text that means no, but counts as true as every text does, or of nan.
    """
    if isinstance(value, str) and value.strip().lower() in ("false", "no", "n", "f", "off", "0", "null", "none", "nan"):
        raise ValueError(
            f"gives the text {shown(value)}, which counts as true, as any text does: compare it (== 'True', say), or "
            "write != '' to leave out empty texts only"
        )
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("gives nan, which counts as true: compare it with a number")
    return bool(value)


def kind(value) -> str:
    """What a value is, in a file's words."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "a missing value"
    names = {bool: "true or false", bytes: "bytes", list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def way_on(value) -> str:
    """What to write instead; COLUMN stands for the column."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "leave such rows out (data.where: \"COLUMN is not none\"), or write {{ COLUMN | default('', true) }}"
    if isinstance(value, bool):
        return "say it in words: {{ 'yes' if COLUMN else 'no' }}"
    if isinstance(value, list | tuple):
        return "write {{ COLUMN | join(', ') }}"
    if isinstance(value, dict):
        return "name what of it you want ({{ COLUMN.name }}), or write {{ COLUMN | tojson }}"
    if isinstance(value, bytes):
        return "write {{ COLUMN.decode() }}"
    return "make text of it in the file"


def shown(value) -> str:
    """A value for a message, in a few characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- Jinja ---------------------------------------------------------------------------------------


def _generator() -> type:
    from jinja2.compiler import CodeGenerator

    class Generator(CodeGenerator):
        """Compiles ``a ~ b`` so that both are checked like what is put into the text."""

        def visit_Concat(self, node, frame):  # noqa: N802 - Jinja's name
            self.write("str_join((")
            for part in node.nodes:
                self.write("environment.finalize(")
                self.visit(part, frame)
                self.write("), ")
            self.write("))")

    return Generator


def _of_text(apply: Callable) -> Callable:
    """A filter that refuses a value that is no text."""
    place = 1 if hasattr(apply, "jinja_pass_arg") else 0

    @functools.wraps(apply)
    def filtered(*arguments, **named):
        checked(arguments[place])
        return apply(*arguments, **named)

    return filtered


def _joined(join: Callable) -> Callable:
    @functools.wraps(join)
    def joined(eval_ctx, value, d="", attribute=None):
        items = list(value) if attribute is None else value
        return join(eval_ctx, [checked(item) for item in items] if attribute is None else items, d, attribute)

    return joined


def _strict_number(convert: Callable) -> Callable:
    """Jinja's filters float and int make 0 of any text; in a label that would be a silent error."""
    missing = object()

    def strict(value, default=missing, *arguments, **named):
        number = convert(value, default, *arguments, **named)
        if number is missing:
            raise ValueError(f"{shown(value)} is not a number")
        return number

    return strict
