"""Each bad input of tests/bad_inputs/ is one line and exit code 2, within seconds, with nothing left behind."""

import contextlib
import importlib
import re
import signal

import pytest

from temper import __main__ as temper
from temper.__main__ import COMMANDS
from tests import bad_inputs

SECONDS = 60  # a hang, not a measure: the machines are shared
CASES = {f"{kind}: {case.name}": case for kind, found in bad_inputs.cases().items() for case in found}


def test_names_are_unique():
    assert len(CASES) == sum(map(len, bad_inputs.cases().values()))


@contextlib.contextmanager
def _no_longer_than(seconds: int):
    def stop(*_):
        raise TimeoutError(f"still working after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(command: str, arguments: list[str]) -> None:
    """A command of `temper`, or a step."""
    if command in COMMANDS:
        temper.main([command, *arguments])
    else:
        importlib.import_module(f"steps.{command}").main(arguments)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path, monkeypatch, capsys, tiny_model, tiny_splits, tiny_pairs, finished_run):
    case = CASES[name]
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    arguments = case.arguments(bad_inputs.World(folder, tiny_model, tiny_splits, tiny_pairs, finished_run))
    capsys.readouterr()
    with _no_longer_than(SECONDS), pytest.raises(SystemExit) as ended:
        run(case.command, arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.rstrip().splitlines()[-1] == errors[0], said
    assert re.search(case.says, errors[0]), errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["here"], "something was written elsewhere"
    assert not [str(path) for path in folder.rglob(".tmp-*")], "something half-made was left"
