"""What README.md, CONTRIBUTING.md and docs/ tell a reader to type exists: commands, targets, modules, choices."""

import importlib.util
import re

import pytest

from temper.__main__ import COMMANDS
from temper.commands.reference import pages
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
FENCED = re.findall(r"^```\w*\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
INDENTED = re.findall(r"^    .*", TEXT, flags=re.MULTILINE)
QUOTED = re.findall(r"`([^`\n]+)`", TEXT)
CODE = "\n".join([*FENCED, *INDENTED, *QUOTED])

GROUPS = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
# Files that the reader is shown how to write.
OWN = set(re.findall(r"^(?:# |`)conf/(\w+/[\w.]+)\.yaml", TEXT, flags=re.MULTILINE))


def _named(pattern: str) -> list[str]:
    found = sorted(set(re.findall(pattern, CODE, flags=re.MULTILINE)))
    assert found, f"no page names any {pattern}"
    return found


def _choices() -> list[str]:
    pairs = re.findall(rf"(?<![\w.])({'|'.join(sorted(GROUPS))})=([\w.]+(?:,[\w.]+)*)(?![\w.(])", CODE)
    pairs += [("experiment", name) for name in re.findall(r"--experiment (\w+)", CODE)]
    return sorted({f"{group}/{choice}" for group, choices in pairs for choice in choices.split(",")})


@pytest.mark.parametrize("name", _named(r"(?:^|[|$] |^ +)temper ([a-z]\w*)"))
def test_command(name):
    assert name in COMMANDS


@pytest.mark.parametrize("name", _named(r"^ *make ([a-z][a-z-]*)"))
def test_make_target(name):
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("name", _named(r"python -m ((?:steps|temper|tests)\.[\w.]*\w)"))
def test_module(name):
    assert importlib.util.find_spec(name)


@pytest.mark.parametrize("name", _choices())
def test_choice(name):
    assert name in OWN or (ROOT / "conf" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_what_is_written_from_parsers_and_schema_is_fresh(path):
    assert path.read_text(encoding="utf-8") == pages()[path], "run: python -m temper.commands.reference"
