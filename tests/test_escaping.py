"""Texts of users wherever they are shown: figures, pages, tables, terminals, shells, model cards."""

import math
import re
import unicodedata
import warnings
from xml.etree import ElementTree

import pytest

from steps.lib import figures

HOSTILE = [
    r"costs $x and \frac{1$",
    "$\\alpha",
    "$a_$",
    "100 % of {} %s",
    "two\nlines\r\n\ttabbed",
    "\x1b[31mred\x1b]0;title\x07 \x9b2J\x00",
    "</svg></text><script>alert(1)</script>-->",
    '" onload="alert(1)',
    "_hidden",
    "שלום עולם العربية",
    "😀👨‍👩‍👧 漢字",
    "\ud800",
    "#010101",
    "long " * 300 + "end",
    "",
]


def texts_of(svg: str) -> list[str]:
    """The texts in an SVG, which has to be XML and nothing but figures' elements."""
    root = ElementTree.fromstring(re.sub(r"xlink:", "", svg))
    names = {element.tag.rpartition("}")[2] for element in root.iter() if isinstance(element.tag, str)}
    assert not names & {"script", "image", "foreignObject"}
    assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)
    return [element.text or "" for element in root.iter() if str(element.tag).endswith("text")]


def curves_of(rank: int) -> list[dict]:
    return [{"step": 1, "epoch": 0.5, "loss": 2.0 + rank}, {"step": 2, "epoch": 1.0, "loss": 1.0}]


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_label_is_one_line_of_bounded_length():
    for text in map(figures.label, HOSTILE):
        assert 0 < len(text.strip()) <= 60
        assert not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text)


def test_figures_show_any_text_and_lose_no_label(no_warnings):
    for texts in (HOSTILE[:8], HOSTILE[8:]):
        shown = set(map(figures.label, texts))
        assert shown <= set(texts_of(figures.sweep_curves([(text, curves_of(0)) for text in texts])))
        points = [{"x": text, "y": 0.5, "interval": [0.4, 0.6], "others": text, "best": False} for text in texts]
        drawn = set(texts_of(figures.axis_effect(points, texts[0], texts[1])))
        assert {figures.label(text, 8) for text in texts} | set(map(figures.label, texts[:2])) <= drawn
        entries = [{"name": text, "value": 0.5, "interval": None, "kind": "other"} for text in texts]
        assert shown <= set(texts_of(figures.comparison([{"title": texts[0], "entries": entries}])))


def test_long_texts_that_end_differently_stay_apart():
    assert figures.label("x" * 500 + "a") != figures.label("x" * 500 + "b")


def test_figures_that_are_no_finite_numbers_are_left_out():
    bad = [math.nan, math.inf, -math.inf, None]
    lines = [{"step": step, "loss": value} for step, value in enumerate([2.0, *bad, 1.0])]
    assert figures.curve(lines, "loss") == ([0, 5], [2.0, 1.0])
    entries = [{"name": str(value), "value": value, "interval": [0.1, value], "kind": "other"} for value in bad[:3]]
    texts = texts_of(figures.comparison([{"title": "perplexity", "entries": entries}]))
    assert {"nan", "inf", "-inf"} <= set(texts)
