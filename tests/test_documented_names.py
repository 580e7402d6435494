"""What README.md, CONTRIBUTING.md and docs/ name exists: commands, targets, modules, choices, files of a recipe."""

import html
import importlib.util
import itertools
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

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(
    re.findall(r"^### (A [a-z ]+: \d+ files?)\n(.*?)(?=^#|\Z)", CONTRIBUTING, flags=re.MULTILINE | re.DOTALL)
)
PLACE = r"`((?:conf|steps|temper|tests)/[^`\s]+|Snakefile)`"

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


# --- pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline", "rooms"])
def test_a_picture_has_the_arrows_of_its_source(name):
    """Graphviz, which draws it, need not be installed."""
    source, drawn = ((ROOT / f"docs/images/{name}.{ending}").read_text(encoding="utf-8") for ending in ("dot", "svg"))
    chains = [re.findall(r"\w+", chain) for chain in re.findall(r"\w+(?: -> \w+)+", source)]
    arrows = {f"{start}->{end}" for chain in chains for start, end in itertools.pairwise(chain)}
    assert {html.unescape(title) for title in re.findall(r"<title>(\S+?&#45;&gt;\S+?)</title>", drawn)} == arrows
    assert all(label.strip() in html.unescape(drawn) for label in re.findall(r'label="(.*?)"', source))


def test_the_picture_of_the_pipeline_has_each_stage():
    drawn = (ROOT / "docs/images/pipeline.svg").read_text(encoding="utf-8")
    stages = [path.stem for path in (ROOT / "steps").glob("[a-z]*.py")]
    assert [stage for stage in stages if f">{stage}</text>" not in drawn] == []


# --- recipes in CONTRIBUTING.md --------------------------------------------------------------------


def _files(place: str) -> list:
    """The files of a path in which <name> stands for any name."""
    return sorted(ROOT.glob(re.sub(r"<\w+>", "*", place)))


def test_recipes_are_those_that_people_ask_for():
    assert [title.partition(":")[0] for title in RECIPES] == [
        "A data set",
        "A model",
        "A method",
        "A metric",
        "A stage",
    ]


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_counts_its_files(title):
    steps = re.findall(r"^\d+\. (.*)", RECIPES[title], flags=re.MULTILINE)
    assert len(steps) == int(title.split()[-2])
    assert all(re.match(PLACE, step) for step in steps)


@pytest.mark.parametrize("place", sorted(set(re.findall(PLACE, CONTRIBUTING))))
def test_places_that_contributors_are_sent_to_exist(place):
    assert _files(place), f"CONTRIBUTING.md names {place}"


def _names() -> list[tuple[str, str]]:
    """(name in the code, the file that a recipe says it is in)."""
    found = []
    for text in RECIPES.values():
        for place, said in re.findall(rf"^\d+\. {PLACE}:((?:.|\n(?!\d+\. |\n))*)", text, flags=re.MULTILINE):
            found += [(name, place) for name in re.findall(r"`([A-Za-z_]\w+)`", said)]
        found += re.findall(r"`([A-Za-z_]\w+)` in `([^`]+)`", text)
    return sorted(set(found))


@pytest.mark.parametrize(("name", "place"), _names())
def test_names_in_recipes_are_in_the_code(name, place):
    assert any(re.search(rf"\b{name}\b", path.read_text(encoding="utf-8")) for path in _files(place))
