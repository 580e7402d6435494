"""Which values of a row may become text in a template.

Text and numbers go in as they are, dates in ISO format, true and false in JSON's spelling. Anything else (null, bytes,
a list) is refused with advice, because the model would learn Python's representation of it: ``None``, ``b'...'`` or
``['a']``.
"""

import datetime
import decimal
import functools
import json
import math
from collections.abc import Callable

from temper.data import templates

# Jinja's filters that convert their value to text first.
OF_TEXT = (
    *("capitalize", "center", "indent", "lower", "replace", "string", "striptags", "title", "trim", "truncate"),
    *("upper", "urlencode", "urlize", "wordcount", "wordwrap", "escape", "e", "forceescape", "safe"),
)
CHOOSING = ("select", "reject", "selectattr", "rejectattr")  # by truth value, unless a test is named
# Texts that mean false or unknown, besides all spellings of 0.
NO = ("false", "no", "n", "f", "off", "null", "none", "nan", "na", "n/a", "<na>", "nat")


class NotTextError(ValueError):
    """A template needs text but got another value."""

    def __init__(self, value):
        super().__init__(f"{shown(value)} is {kind(value)}, not text")
        self.value = value


class NoTruthError(ValueError):
    """A condition got a value whose truth value is misleading."""

    def __init__(self, value):
        super().__init__(value)
        self.value = value

    def said(self, column: str | None) -> str:
        """What is wrong and what to write. `column` holds the value, if any does."""
        name = column or "it"
        if _is_nan(self.value):
            return f"asks whether nan is true, which it is: compare it with a number, as in {name} > 0"
        return (
            f"asks whether the text {shown(self.value)} is true, as any text is: compare it, as in {name} == 'True', "
            f"or ask whether there is any by {name} | default('', true) != ''"
        )

    def __str__(self):
        return self.said(None)


def environment():
    """The sandbox for templates over a row's columns."""
    from jinja2.filters import FILTERS

    made = templates.environment(finalize=checked)
    made.code_generator_class = _generator()
    filters = {name: _of_text(FILTERS[name]) for name in OF_TEXT}
    filters |= {name: _strict_number(FILTERS[name]) for name in ("float", "int")}
    filters |= {name: _chosen(FILTERS[name]) for name in CHOOSING}
    filters |= {"join": _joined(FILTERS["join"]), "pprint": _no_pprint}
    filters |= {name: _formatted(FILTERS[name]) for name in ("format", "replace")}
    filters["tojson"] = _json  # Jinja's own is for web pages: it escapes apostrophes as \\u0027, and sorts
    made.filters = {**made.filters, **filters, _CHECKED: checked, _CONDITION: condition}
    made.intercepted_binops = frozenset("%")
    made.binop_table = {**made.binop_table, "%": _percent}
    made.wrap_str_format = functools.partial(_checking_format, made.wrap_str_format)
    return made


def checked(value):
    """`value` if it is text or a number; a date, true or false as text.

    Raises:
        NotTextError: it is anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, int | float | decimal.Decimal) or not math.isfinite(value):
        if type(value).__name__.endswith("Undefined"):
            return value  # which raises its own error
        raise NotTextError(value)
    return value


def condition(value):
    """`value`, unchanged, if it may be a condition.

    Raises:
        NoTruthError: it is a text that means false but is true as all texts are, or NaN.
    """
    means_no = isinstance(value, str) and (value.strip().lower() in NO or _is_zero(value))
    if means_no or _is_nan(value):
        raise NoTruthError(value)
    return value


def _is_zero(text: str) -> bool:
    """Whether a text is a number that means false (``0``, ``0.0``: in csv, numbers are texts)."""
    try:
        return float(text) == 0
    except ValueError:
        return False


def _is_nan(value) -> bool:
    return isinstance(value, float | decimal.Decimal) and math.isnan(value)


def kind(value) -> str:
    """The kind of a value, as files call it."""
    if value is None or _is_nan(value):
        return "a missing value"
    names = {bool: "true or false", bytes: "bytes", list: "a list", tuple: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def way_on(value, column: str | None) -> str:
    """What to do about a value that is not text.

    Args:
        column: the one that holds it, if any; otherwise it is part of a column, or made by a template.
    """
    name = column or "it"
    if value is None or isinstance(value, float | decimal.Decimal):
        if column is None:
            return "| select leaves missing items of a list out, | default('', true) makes an empty text of one"
        if value is None:
            empty = f"{{{{ {name} | default('', true) }}}}"
            return f'leave such rows out (set data.where to "{name} is not none"), or write {empty}'
        test = f"{name} == {name}" if _is_nan(value) else f"{name} | abs < 1e308"
        return f'leave such rows out: set data.where to "{test}"'
    if isinstance(value, list | tuple):
        made = "tojson" if any(map(_is_no_text, value)) else "join(', ')"
        return f"write {{{{ {name} | {made} }}}}"
    if isinstance(value, dict):
        return f"name what of it you want{_part(name, value)}, or write {{{{ {name} | tojson }}}}"
    if isinstance(value, bytes):
        return f"write {{{{ {name}.decode() }}}}"
    return "make text of it in the file"


def _is_no_text(value) -> bool:
    return isinstance(value, list | tuple | dict | bytes)


def _part(name: str, value: dict) -> str:
    """A text in an object, as a template names it: for SQuAD's answers, ``answers.text[0]``."""
    for key, part in value.items():
        first = part[0] if isinstance(part, list) and part else part
        if str(key).isidentifier() and isinstance(first, str):
            return f", as in {{{{ {name}.{key}{'' if first is part else '[0]'} }}}}"
    return ""


def shown(value) -> str:
    """A value for a message, in a few characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- Jinja ---------------------------------------------------------------------------------------


# Our own filters, under names that cannot be written in a template.
_CHECKED, _CONDITION = "text in ~", "condition"


def _generator() -> type:
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator

    def filtered(node, name):
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)

    class Generator(CodeGenerator):
        """Compiles templates such that operands of ``a ~ b`` and all conditions are checked."""

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
    """A filter that refuses a value that is not text."""
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


class _Texts(dict):
    """A mapping for ``%`` and ``format`` by name: its values if they are text, but never the whole mapping."""

    def __init__(self, value: dict):
        super().__init__(value)
        self.value = value

    def __getitem__(self, name):
        return _for_format(super().__getitem__(name))

    def __str__(self):
        raise NotTextError(self.value)

    __repr__ = __str__

    def __format__(self, _spec):
        raise NotTextError(self.value)


def _for_format(value):
    return _Texts(value) if isinstance(value, dict) else checked(value)


def _percent(left, right):
    """``left % right``: of numbers, or of a text and its values."""
    if isinstance(left, str):
        right = tuple(map(_for_format, right)) if isinstance(right, tuple) else _for_format(right)
    return left % right


def _checking_format(wrap: Callable, method) -> Callable | None:
    """The sandbox's ``str.format``, only for values that are text."""
    found = wrap(method)
    if found is None:
        return None

    @functools.wraps(found)
    def formatted(*arguments, **named):
        return found(*map(_for_format, arguments), **{name: _for_format(item) for name, item in named.items()})

    return formatted


def _no_pprint(_value):
    raise ValueError("'pprint' writes a value as Python does: use tojson")


def _chosen(choose: Callable) -> Callable:
    """A filter that selects items by their truth value, or that of an attribute."""
    from jinja2.filters import make_attrgetter

    before_test = 1 if choose.__name__.endswith("attr") else 0

    @functools.wraps(choose)
    def chosen(context, value, *arguments, **named):
        items = list(value)
        if len(arguments) == before_test:
            attribute = make_attrgetter(context.environment, arguments[0]) if before_test else lambda item: item
            for item in items:
                condition(attribute(item))
        return choose(context, items, *arguments, **named)

    return chosen


def _joined(join: Callable) -> Callable:
    from jinja2.filters import make_attrgetter

    @functools.wraps(join)
    def joined(eval_ctx, value, d="", attribute=None):
        items = value if attribute is None else map(make_attrgetter(eval_ctx.environment, attribute), value)
        return join(eval_ctx, [checked(item) for item in items], checked(d))

    return joined


def _json(value, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=_json_text)


def _json_text(value) -> str:
    """Values that files have and JSON has not, as text."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return str(value)
    raise NotTextError(value)


def _strict_number(convert: Callable) -> Callable:
    """Replace Jinja's filters float and int, which turn any text into 0: a silent error in a label."""
    missing = object()

    def strict(value, default=missing, *arguments, **named):
        number = convert(value, default, *arguments, **named)
        if number is missing:
            raise ValueError(f"{shown(value)} is not a number")
        return number

    return strict
