"""The commands in README.md and docs/ have choices, keys, values and arguments that exist.

Those of the workflow are planned; those of `temper` and of stages by hand are parsed, and planned where they name a
config.
"""

import importlib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from temper.__main__ import COMMANDS, command_parser
from temper.config.compose import split_overrides
from temper.errors import UserError
from temper.planning import planner
from temper.step import step_parser
from tests.conftest import ROOT
from tests.test_documented_names import OWN

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A line in which a quoted value may go on in the next one.
COMMAND = r"^ *(?:\$ )?(snakemake (?:[^\n\"]|\"[^\"]*\")*)"
REFUSED = {'snakemake --cores 2 --config experiment=demo overrides="train.lr=1e-3"': "unknown key 'train.lr'"}


def _commands() -> list[str]:
    """Commands with the experiments and files that come with Temper; `<name>` and `...` stand for the reader's own."""
    texts = [re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8")) for page in PAGES]
    found = {
        command.partition("  #")[0].strip()
        for text in texts
        for command in re.findall(COMMAND, text, flags=re.MULTILINE)
    }
    return sorted(command for command in found if "..." not in command and "<" not in command and not _own(command))


def _own(command: str) -> bool:
    """Whether a command chooses a file that the reader is shown how to write."""
    return any(f"{group}/{choice}" in OWN for group, choice in re.findall(r"(\w+)=([\w.]+)", command))


def _plan(command: str):
    words = shlex.split(command)
    after = itertools.takewhile(lambda word: not word.startswith("-"), words[words.index("--config") + 1 :])
    given = dict(word.split("=", 1) for word in after)
    assert given.keys() <= {"experiment", "sweep", "overrides"}
    overrides = split_overrides(given.get("overrides", ""))
    return planner.build(given.get("experiment"), given.get("sweep"), overrides)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the files that commands name as the reader's own."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.txt", "flipped.txt"):
        (tmp_path / name).write_text("1\t2.0\tA joy from start to end.\n", encoding="utf-8")


@pytest.mark.parametrize("command", _commands())
def test_a_command_of_the_docs_plans(command, folder):
    if command in REFUSED:
        with pytest.raises(UserError, match=re.escape(REFUSED[command])):
            _plan(command)
    else:
        assert _plan(command).runs


def test_commands_are_found():
    assert set(REFUSED) < set(_commands())
    assert len(_commands()) > 15


# --- commands of temper, and stages by hand -------------------------------------------------------

LINES = re.sub(r"\\\n\s*", " ", "\n".join(page.read_text(encoding="utf-8") for page in PAGES)).splitlines()
# At the beginning of a line of code, behind a prompt, in a pipe, or after another command.
CALL = re.compile(r"^(?: {4}|\$ |\w+\$ )?(?:.* [|] |.* && )?(temper|python -m steps\.\w+) ([^|&]*)")
PLACEHOLDERS = {"RUN": "best", "FILE": "receipt.json", "DIR": "conf"}


def _calls(program: str) -> list[str]:
    """What follows `program` in each line of code that calls it, without a remark behind it."""
    found = {" ".join(match.groups()).partition("  #")[0].strip() for line in LINES if (match := CALL.match(line))}
    return sorted(call for call in found if re.match(program, call) and "..." not in call and "<" not in call)


QUOTED = re.findall(r"`(temper [a-z]+ [^`<.]*--(?:run|sweep|experiment) [^`<]+)`", "\n".join(LINES))
TEMPER = sorted({call for call in [*_calls(r"temper [a-z]"), *QUOTED] if call.split()[1] in COMMANDS})
STAGES_BY_HAND = _calls(r"python -m steps\.")


@pytest.mark.parametrize("call", TEMPER)
def test_a_command_of_temper_has_these_arguments(call, project):
    _, name, *words = [PLACEHOLDERS.get(word, word) for word in shlex.split(call)]
    arguments = command_parser(name).parse_intermixed_args(words)
    if name in ("plan", "explain", "pull") and arguments.experiment != "reviews":  # which `temper init` writes
        assert planner.build(arguments.experiment, arguments.sweep, arguments.overrides).runs


@pytest.mark.parametrize("call", STAGES_BY_HAND)
def test_a_stage_by_hand_has_these_arguments(call, project):
    _, _, module, *words = shlex.split(call)
    arguments = step_parser(importlib.import_module(module)).parse_intermixed_args(words)
    overrides = [word for word in arguments.overrides if not word.startswith(("experiment=", "sweep="))]
    given = dict(word.split("=", 1) for word in arguments.overrides if word.startswith(("experiment=", "sweep=")))
    assert planner.build(given.get("experiment"), given.get("sweep"), overrides).runs


def test_calls_are_found():
    assert len(TEMPER) > 15
    assert len(STAGES_BY_HAND) > 8


# --- files that a page shows ----------------------------------------------------------------------

# A file that a page shows: its name on a line of its own, then what is in it; or the name in its first line.
FILE = re.compile(r"^`(conf/[\w./]+\.yaml)`[^\n]*\n\n```yaml\n(.*?)```", flags=re.MULTILINE | re.DOTALL)
NAMED_INSIDE = re.compile(r"^```yaml\n# (conf/[\w./]+\.yaml)\n(.*?)```", flags=re.MULTILINE | re.DOTALL)
CALLS = [{"type": "function", "function": {"name": "open_ticket", "arguments": {"id": 7}}}]
TALK = [{"role": "user", "content": "Open ticket 7."}, {"role": "assistant", "content": "", "tool_calls": CALLS}]
ROWS = {  # of the files that the pages name as the reader's own
    "tickets.csv": "message,reply\nWhy?,So.\nHow?,Thus.\n",
    "preferences.jsonl": json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}),
    "conversations.jsonl": json.dumps({"messages": TALK, "tools": []}),
    "manuals/one.md": "# How to begin\n",
}


def _shown() -> dict[str, str]:
    """The files that are shown, of each name the first."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    pairs = [pair for text in texts for pattern in (FILE, NAMED_INSIDE) for pair in pattern.findall(text)]
    return dict(reversed(pairs))


def _own_commands() -> list[str]:
    """Commands that choose files that are shown."""
    text = "\n".join(LINES)
    found = {command.partition("  #")[0].strip() for command in re.findall(COMMAND, text, flags=re.MULTILINE)}
    return sorted(
        command
        for command in found
        if _own(command) and "..." not in command and "<" not in command and "-s " not in command
    )


@pytest.fixture
def project(folder, monkeypatch):
    """`folder` with the files that the pages show."""
    monkeypatch.setenv("TEMPER_CONF", "conf")
    for name, text in {**_shown(), **ROWS}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text.replace("revision: main", f"revision: {'a' * 40}"))  # no hub is asked for it


@pytest.mark.parametrize("command", _own_commands())
def test_a_command_with_files_that_are_shown_plans(command, project):
    assert _plan(command).runs


def test_own_commands_are_found():
    assert len(_own_commands()) > 5


@pytest.mark.parametrize(("experiment", "model"), [("support_70b", "llama3.1_70b"), ("support_8b", "llama3.1_8b")])
def test_the_files_of_the_large_plans_plan(tmp_path, monkeypatch, experiment, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEMPER_CONF", str(tmp_path / "conf"))
    rows = "name: support\nsource: {kind: files, path: rows.jsonl}\nlayout: question_answer\n"
    Path("rows.jsonl").write_text('{"question": "Why?", "answer": "So."}\n')
    files = dict(FILE.findall((ROOT / "docs" / "scale.md").read_text(encoding="utf-8")))
    for name, text in {**files, "conf/data/support.yaml": rows}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text.replace("revision: main", f"revision: {'a' * 40}"))  # no hub is asked for it
    made = planner.build(experiment, None, [])
    (run,) = made.runs
    config = made.jobs[run.artefacts["train_adapter"]].config
    assert config["num_processes"] == 8
    assert model in run.artefacts["train_adapter"]
