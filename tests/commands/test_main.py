"""The command `temper`: its list of commands, what it completes, how fast it answers."""

import importlib
import os
import subprocess
import sys

import pytest

from temper import __main__ as temper
from tests.conftest import ROOT


def test_every_command_is_a_module_with_arguments_and_a_run():
    assert sorted(temper.COMMANDS) == sorted(
        path.stem
        for path in (ROOT / "temper" / "commands").glob("*.py")
        if path.stem not in ("__init__", "flags", "reference")
    )
    for name in temper.COMMANDS:
        module = importlib.import_module(f"temper.commands.{name}")
        assert module.__doc__ and module.run.__doc__
        assert temper.command_parser(name).format_help().startswith(f"usage: temper {name}")


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["--version"], 0), (["chta"], 2)])
def test_without_a_command_it_says_what_there_is(words, code, capsys):
    with pytest.raises(SystemExit) as ended:
        temper.main(words)
    assert ended.value.code == code
    said = "".join(capsys.readouterr())
    assert "temper 0." in said if words == ["--version"] else "leaderboard" in said or "<command>" in said


@pytest.mark.parametrize(
    ("line", "expected"),
    [("temper ch", "chat"), ("temper plan --exp", "--experiment"), ("temper explain --experiment sft", "sft_dpo")],
)
def test_a_shell_completes_commands_flags_and_experiments(tmp_path, line, expected):
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    environment = {
        **os.environ,
        **asked,
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found"),
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([sys.executable, "-m", "temper"], env=environment, check=True, cwd=tmp_path)
    assert (tmp_path / "found").read_text().split() == [expected]


def test_it_answers_without_the_libraries_that_learn():
    code = (
        "import sys; from temper.__main__ import build_parser, command_parser; build_parser(); command_parser('chat')"
    )
    code += "; assert not {'torch', 'transformers', 'mlflow', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
