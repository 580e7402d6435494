"""Pages: Jinja templates, names of metrics, and texts cut to fit."""

import functools
import re
from pathlib import Path

from temper.errors import visible
from temper.evaluation.metrics import TASKS, metrics_of
from temper.files import write_whole
from temper.units import count, figure, seconds, signed, size

TEMPLATES = Path(__file__).resolve().parent / "templates"
# What no page and no terminal shows: controls but the ends of lines and tabs, halves of characters.
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(value):
    """A text with its control characters as Python writes them; any other value, and HTML of our own, as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return CONTROLS.sub(lambda found: repr(found[0])[1:-1], value)


def render(template: str, output: Path, **context) -> None:
    """Write `output` from a template, whole or not at all."""
    write_whole(output, _environment().get_template(template).render(**context))


@functools.cache
def _environment():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "signed": signed,
        "metric": metric_name,
        "seconds": seconds,
        "size": size,
        "count": count,
        "cell": cell,
    }
    return environment


# --- how figures read ----------------------------------------------------------------------------


def metric_name(name: str) -> str:
    """A metric's title, which is the same in all tasks."""
    return next((metrics_of(task)[name].title for task in TASKS if name in metrics_of(task)), name)


def short(text: str, longest: int) -> str:
    """A text on one line, with its middle left out where it is too long."""
    line = visible(" ".join(text.split()) if "\n" in text else text) or "''"
    if len(line) <= longest:
        return line
    head = longest * 2 // 3
    return f"{line[:head]}…{line[len(line) - (longest - head - 1) :]}"


def distinct(texts: list[str], longest: int) -> list[str]:
    """As `short`, with a number where two would look the same."""
    lines = [short(text, longest) for text in texts]
    return [f"{line} ({index})" if lines.count(line) > 1 else line for index, line in enumerate(lines, 1)]


def cell(value) -> str:
    """A value of anybody's in a table, which may have a thousand rows."""
    return short(str(value), 300)
