"""Writes docs/commands.md from the parsers of `temper`.

python -m temper.commands.reference
"""

import argparse
from pathlib import Path

from temper.__main__ import COMMANDS, command_parser

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
HEAD = "# The commands\n\nWritten by `python -m temper.commands.reference`; `temper <command> --help` says the same.\n"


def page() -> str:
    """The text of docs/commands.md."""
    return "\n".join([HEAD, *(_section(name, text) for name, text in COMMANDS.items())])


def _section(name: str, text: str) -> str:
    rows = [_row(action) for action in command_parser(name)._actions if action.dest != "help"]
    return "\n".join([f"## `temper {name}`\n", f"{text}\n", "| argument | what it is |", "|---|---|", *rows, ""])


def _row(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or action.metavar or action.dest
    said = (action.help or "") % {**vars(action), "prog": "temper"}
    return f"| `{names}` | {said.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
