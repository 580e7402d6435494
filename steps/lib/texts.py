"""What of a row is text for a template, and what is not: Python's own words for it would be learned.

Text and numbers go in as they are, dates as ISO writes them. Anything else (null, true, bytes, a list) is refused with
a way on: ``None``, ``True``, ``b'...'`` and ``['a']`` are how Python shows such a value, and nobody writes so.
"""

import datetime
import decimal
import functools
import json
import math
from collections.abc import Callable

from steps.lib import templates

# Jinja's filters that make text of their value first.
OF_TEXT = ("capitalize", "center", "indent", "lower", "replace", "string", "striptags", "title", "trim", "truncate")
OF_TEXT += ("upper", "urlencode", "wordcount", "wordwrap", "escape", "e", "forceescape")
NO = ("false", "no", "n", "f", "off", "0", "null", "none", "nan")  # texts that mean no


class NotTextError(ValueError):
    """A value that is no text stands where a template wants one."""

    def __init__(self, value):
        super().__init__(f"{shown(value)} is {kind(value)}, not text")
        self.value = value


def environment():
    """The sandbox for templates over a row's columns."""
    from jinja2.filters import FILTERS

    made = templates.environment(finalize=checked)
    made.code_generator_class = _generator()
    filters = {name: _of_text(FILTERS[name]) for name in OF_TEXT}
    filters |= {name: _strict_number(FILTERS[name]) for name in ("float", "int")}
    filters |= {"join": _joined(FILTERS["join"]), "format": _formatted(FILTERS["format"])}
    filters["tojson"] = _json  # Jinja's own is for web pages: it writes \\u0027 for an apostrophe, and sorts
    made.filters = {**made.filters, **filters, _CHECKED: checked, _CONDITION: condition}
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


def condition(value):
    """`value`, which decides something, as it is.

    Raises:
        ValueError: it is a text that means no, but counts as true as every text does; or nan.
    """
    if isinstance(value, str) and value.strip().lower() in NO:
        raise ValueError(
            f"asks whether the text {shown(value)} is true, as any text is: compare it (== 'True', say), or write "
            "!= '' to ask for a text that is not empty"
        )
    if _is_nan(value):
        raise ValueError("asks whether nan is true, which it is: compare it with a number")
    return value


def _is_nan(value) -> bool:
    return isinstance(value, float | decimal.Decimal) and math.isnan(value)


def kind(value) -> str:
    """What a value is, in a file's words."""
    if value is None or _is_nan(value):
        return "a missing value"
    names = {bool: "true or false", bytes: "bytes", list: "a list", tuple: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def way_on(value, column: str | None) -> str:
    """What to do about a value that is no text.

    Args:
        column: the one that holds it, if any does; else it stands inside of one, or a template made it.
    """
    name = column or "it"
    if value is None or isinstance(value, float | decimal.Decimal):
        if column is None:
            return "| select leaves missing items of a list out, | default('', true) makes an empty text of one"
        if value is None:
            empty = f"{{{{ {name} | default('', true) }}}}"
            return f'leave such rows out (data.where="{name} is not none"), or write {empty}'
        test = f"{name} == {name}" if _is_nan(value) else f"{name} | abs < 1e308"
        return f'leave such rows out: data.where="{test}"'
    if isinstance(value, bool):
        return f"say it in words: {{{{ 'yes' if {name} else 'no' }}}}"
    if isinstance(value, list | tuple):
        return f"write {{{{ {name} | join(', ') }}}}"
    if isinstance(value, dict):
        return f"write {{{{ {name} | tojson }}}}, or name what of it you want"
    if isinstance(value, bytes):
        return f"write {{{{ {name}.decode() }}}}"
    return "make text of it in the file"


def shown(value) -> str:
    """A value for a message, in a few characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- Jinja ---------------------------------------------------------------------------------------


# Filters of our own, which nobody can write into a template by these names.
_CHECKED, _CONDITION = "text in ~", "condition"


def _generator() -> type:
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator

    def filtered(node, name):
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)

    class Generator(CodeGenerator):
        """Compiles templates in which the parts of ``a ~ b``, and all that decides something, are checked."""

        def visit_Template(self, node, frame=None):  # noqa: N802 - Jinja's name
            for found in [*node.find_all((nodes.If, nodes.CondExpr, nodes.For))]:
                if found.test is not None:
                    found.test = filtered(found.test, _CONDITION)
            for found in [*node.find_all((nodes.And, nodes.Or))]:
                found.left = filtered(found.left, _CONDITION)
            for found in [*node.find_all(nodes.Not)]:
                found.node = filtered(found.node, _CONDITION)
            for found in [*node.find_all(nodes.Concat)]:
                found.nodes = [filtered(part, _CHECKED) for part in found.nodes]
            super().visit_Template(node, frame)

    return Generator


def _of_text(apply: Callable) -> Callable:
    """A filter that refuses a value that is no text."""
    place = 1 if hasattr(apply, "jinja_pass_arg") else 0

    @functools.wraps(apply)
    def filtered(*arguments, **named):
        return apply(*arguments[:place], checked(arguments[place]), *arguments[place + 1 :], **named)

    return filtered


def _formatted(apply: Callable) -> Callable:
    @functools.wraps(apply)
    def formatted(value, *arguments, **named):
        return apply(value, *map(checked, arguments), **{name: checked(item) for name, item in named.items()})

    return formatted


def _joined(join: Callable) -> Callable:
    from jinja2.filters import make_attrgetter

    @functools.wraps(join)
    def joined(eval_ctx, value, d="", attribute=None):
        items = value if attribute is None else map(make_attrgetter(eval_ctx.environment, attribute), value)
        return join(eval_ctx, [checked(item) for item in items], d)

    return joined


def _json(value, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def _strict_number(convert: Callable) -> Callable:
    """Jinja's filters float and int make 0 of any text; in a label that would be a silent error."""
    missing = object()

    def strict(value, default=missing, *arguments, **named):
        number = convert(value, default, *arguments, **named)
        if number is missing:
            raise ValueError(f"{shown(value)} is not a number")
        return number

    return strict
