"""docs/troubleshooting.md lists messages as the code has them."""

import ast
import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
# The first cell of a row, if it is a message: the sections before the last have nothing else there.
MESSAGES = re.findall(r"^\| `(.+?)` \|", PAGE.partition("## No message")[0], flags=re.MULTILINE)
VARIES = "…"


def _texts() -> list[str]:
    """All texts of the code, with what is filled in as `…`."""
    found = []
    for folder in ("temper", "steps"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else VARIES for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"\{\w*\}", VARIES, node.value))
    return found


TEXTS = _texts()


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message):
    """Each piece between two `…` is in a text; the longest is long enough to be found by."""
    pieces = [piece.strip() for piece in message.replace("\\|", "|").split(VARIES)]
    assert max(map(len, pieces)) >= 9
    for piece in pieces:
        assert any(piece in text for text in TEXTS), piece


def test_messages_are_found():
    assert len(MESSAGES) > 40
