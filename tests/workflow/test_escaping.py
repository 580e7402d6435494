"""Texts of users in a shell: the page's command for the best run, and overrides on their way to the plan."""

import subprocess
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from temper import workflow
from temper.config import compose
from temper.reports import sweep_page

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
    parsed = compose.parse_overrides(compose.split_overrides(texts.get("overrides", "")))
    assert not parsed.axes and not parsed.groups
    config = OmegaConf.create({})
    for override in parsed.values:
        OmegaConf.update(config, override.key_or_group, override.value())
    return compose.to_container(config)


@settings(max_examples=MOST, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b"]), VALUES))
@example({"a": "ends with a backslash\\", "b": "\\'"})
@example({"a": "x # no comment", "b": "y: z"})
@example({"a": "`id` $(id) $HOME !! ${a} \\${b}"})
@example({"a": "two\nlines\r\x1b[2J\x85\x07"})
@example({"a": "\u202e\u2066a\U000e0041b"})
@example({"a": "1e-4", "b": ["true", "null", True, None, 1e-4, "8"]})
@example({"a": '"quoted"', "b": "'quoted'"})
def test_the_command_pasted_into_bash_gives_the_same_values(point):
    command = sweep_page._command_for(point, {"experiment": "demo"})
    assert values_of(command) == point
    assert not any(unicodedata.category(char) == "Cc" for char in command)


def test_the_command_of_plain_values_is_easy_to_read():
    point = {"train.learning_rate": 1e-4, "adapter.target_modules": "all-linear", "adapter": "lora"}
    command = sweep_page._command_for(point, {})
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
    axes = compose._axes(config, compose.parse_overrides([]))
    assert [compose._parsed(f"k={text}").value() for text in axes["prompt.system"]] == values
