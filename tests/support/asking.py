"""What asking commands say."""

import json
from pathlib import Path

import pytest

from temper import __main__ as temper


def complaint(capsys, call, *arguments) -> str:
    """The one line that a command fails with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call([str(argument) for argument in arguments])
    assert caught.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def command(name: str):
    """One command of `temper` in this process, as a function of its arguments."""
    return lambda arguments: temper.main([name, *arguments])
