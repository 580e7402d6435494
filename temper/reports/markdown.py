"""Markdown around anybody's text: whatever a field holds, a page shows it as it is and keeps its own form.

A plain text is escaped wherever it is filled in; what is Markdown already says so by its type.
"""

import re

from temper.errors import visible

# What opens something in the midst of a line; no template begins a line with a field. Within a word _ opens nothing.
SIGNS = re.compile(r"[\\`*\[\]<>|~$&#]|(?<![^\W_])_|_(?![^\W_])")


class Markdown(str):
    """A text that is Markdown."""


def escaped(value) -> Markdown:
    """A field on one line, in which nothing is markup."""
    return value if isinstance(value, Markdown) else Markdown(SIGNS.sub(r"\\\g<0>", visible(str(value))))


def fill(pattern: str, *fields) -> Markdown:
    """As ``pattern.format(*fields)``, with the fields escaped."""
    return Markdown(pattern.format(*map(escaped, fields)))


def code(text: str) -> Markdown:
    """A text on one line, as code."""
    text = visible(text)
    ticks = _ticks(text, 1)
    edge = " " if text.strip(" ") != text or text.startswith("`") or text.endswith("`") or not text else ""
    return Markdown(f"{ticks}{edge}{text}{edge}{ticks}")


def own(text: str) -> Markdown:
    """Lines that the author of the page wrote as Markdown."""
    return Markdown("\n".join(map(visible, text.strip().split("\n"))))


def block(text: str, language: str = "") -> Markdown:
    """Lines of code, between fences that are longer than any in them."""
    lines = "\n".join(map(visible, text.strip("\n").split("\n")))
    ticks = _ticks(text, 3)
    return Markdown(f"{ticks}{language}\n{lines}\n{ticks}")


def _ticks(text: str, least: int) -> str:
    """More backticks than stand side by side in the text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def render(template: str, **fields) -> str:
    """A text from a template in temper/reports/templates, with all fields escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from temper.reports.html import TEMPLATES

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, finalize=escaped, undefined=StrictUndefined)
    return environment.get_template(template).render(fields)
