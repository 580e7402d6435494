"""Texts of users wherever they are shown: figures, pages, tables, terminals, shells, model cards."""

import math
import re
import subprocess
import unicodedata
import warnings
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from steps import compare_runs
from steps.lib import config as conf
from steps.lib import figures, workflow

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


# --- the command that makes a run again ----------------------------------------------------------

MOST = 25  # examples: each starts a shell
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")  # no argument of a program holds a NUL
TEXTS = st.text(st.one_of(st.sampled_from("'\"\\`$(){}[]!#:,=~% \n\r\ta"), CHARACTERS), max_size=12)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS)
KEYS = st.from_regex(r"[a-z][a-z ,:{}\\]*[a-z]", fullmatch=True)  # Hydra has no way to write a quote in a key
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=4
)


def arguments_of(command: str) -> list[str]:
    """What bash hands to the program of a command."""
    stub = "snakemake() { printf '%s\\0' \"$@\"; }\n"
    done = subprocess.run(["bash", "-c", stub + command], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    return done.stdout.decode().split("\0")[:-1]


def values_of(command: str) -> dict:
    """The values that Temper reads when the command is pasted into bash: through Snakemake, Hydra and OmegaConf."""
    from snakemake.cli import parse_config

    arguments = arguments_of(command)
    arguments = arguments[arguments.index("--config") + 1 :]
    texts = workflow._as_written(parse_config(arguments), arguments)
    assert texts["sweep"] == "none"
    parsed = conf.parse_overrides(conf.split_overrides(texts.get("overrides", "")))
    assert not parsed.axes and not parsed.groups
    config = OmegaConf.create({})
    for override in parsed.values:
        OmegaConf.update(config, override.key_or_group, override.value())
    return conf.to_container(config)


@settings(max_examples=MOST, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b"]), VALUES))
@example({"a": "ends with a backslash\\", "b": "\\'"})
@example({"a": "x # no comment", "b": "y: z"})
@example({"a": "`id` $(id) $HOME !! ${a} \\${b}"})
@example({"a": "two\nlines\r\x1b[2J\x85\x07"})
@example({"a": "1e-4", "b": ["true", "null", True, None, 1e-4, "8"]})
@example({"a": '"quoted"', "b": "'quoted'"})
def test_the_command_pasted_into_bash_gives_the_same_values(point):
    command = compare_runs._command_for({"point": point}, {"experiment": "demo"})
    assert values_of(command) == point
    assert not any(unicodedata.category(char) == "Cc" for char in command)


def test_the_command_of_plain_values_is_easy_to_read():
    point = {"train.learning_rate": 1e-4, "adapter.target_modules": "all-linear", "adapter": "lora"}
    command = compare_runs._command_for({"point": point}, {})
    assert command == (
        "snakemake --cores all --config sweep=none "
        "overrides=\"train.learning_rate=0.0001 adapter.target_modules='all-linear' adapter=lora\""
    )


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("overrides=a='x # y'", "a='x # y'"),
        ("overrides=a='x: y'", "a='x: y'"),
        ("overrides='a=1 b=2'", "a=1 b=2"),
        ("overrides=a=0x10", "a=0x10"),
        ("overrides=num_threads=8", "num_threads=8"),
    ],
)
def test_an_override_reaches_the_plan_as_it_was_written(argument, text):
    from snakemake.cli import parse_config

    assert workflow._as_written(parse_config([argument]), [argument]) == {"overrides": text}


@settings(max_examples=MOST, deadline=None)
@given(st.lists(TEXTS.filter(lambda text: "${" not in text), min_size=2, max_size=3, unique=True))
@example(["a\\", "b\\'", "c'd"])
def test_a_list_in_a_sweep_file_keeps_its_texts(values):
    config = OmegaConf.create({"sweep": {"axes": {"prompt.system": values}}})
    axes = conf._axes(config, conf.parse_overrides([]))
    assert [conf._parsed(f"k={text}").value() for text in axes["prompt.system"]] == values
