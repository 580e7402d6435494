"""Each workflow command in README.md and docs/ can be planned: its choices, keys and values exist and go together."""

import re
import shlex
from pathlib import Path

import pytest

from temper.config.compose import split_overrides
from temper.errors import UserError
from temper.planning import planner
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
    given = dict(word.split("=", 1) for word in words[words.index("--config") + 1 :])
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


# A file that a page shows: its name on a line of its own, then what is in it.
FILE = re.compile(r"^`(conf/[\w./]+\.yaml)`[^\n]*\n\n```yaml\n(.*?)```", flags=re.MULTILINE | re.DOTALL)


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
