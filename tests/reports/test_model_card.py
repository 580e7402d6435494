"""The model card as an attacker would have it: any text in any field, and the card keeps its form."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from yaml import safe_dump, safe_load

from temper.reports import model_card
from temper.runs import find as runs
from tests.support.finished import RUN

PLAIN = "plain"
TEXTS = [
    "two\nlines\r\n\n# heading\n\n---\nlicense: other\n---\n",
    "---",
    "](javascript:alert(1)) [x](javascript:alert(1)) ![x](http://127.0.0.1/a.png)",
    "<script>alert(1)</script><img src=x onerror=alert(1)> <!-- </details>",
    "<javascript:alert(1)> &lt;b&gt; &#60;b&#62;",
    "| a | b |\n|---|---|\\| **bold** _it_ ~~gone~~ $$x$$",
    "`` ` ``` ````\n```\n# code is over\n~~~",
    "`",
    "ends with a backslash \\",
    "'''\"\"\"\n{{ 7 * 7 }} {% raw %} '\" + 1",
    "\u202e\u2028\x85\x1b[31m \u0939\u093e\u0901 \U0001f600",
    "- [ ] 1. a: b #c & *d",
]
KEPT = ("peft_type", "kind", "loss_on", "task", "metric", "method", "dtype", "device", "date")


def planted(value, text: str):
    """The same with each text in it replaced."""
    if isinstance(value, dict):
        return {name: item if name in KEPT else planted(item, text) for name, item in value.items()}
    if isinstance(value, list):
        return [planted(item, text) for item in value]
    return text if isinstance(value, str) else value


def card_of(run, folder: Path, text: str, merged: bool) -> str:
    """The card of a run whose every text was chosen by somebody else."""
    parts = {}
    for stage in (*(stage for stage in model_card.CONFIGS if run.has(stage)), "model"):
        parts[stage] = shutil.copytree(run.parts[stage], folder / stage)
        config, made = planted(runs.read_config(parts[stage]), text), runs.read_provenance(parts[stage])
        if stage == "model":
            config["model"]["source"] = {"kind": "hub", "repository": text, "revision": text}
        if stage == "tokenize_splits":
            config["prompt"] |= {"apply_chat_template": False, "template": text, "system": text}
        made |= {"packages": {text: text}, "git": text, "commit": text, "inputs": dict.fromkeys(made["inputs"], text)}
        (parts[stage] / "config.yaml").write_text(safe_dump(config, allow_unicode=True))
        (parts[stage] / "provenance.json").write_text(json.dumps(made))
    file = parts["evaluate_model"] / "metrics.json"
    facts = {
        "published": [{"name": text, "metric": "accuracy", "value": 0.5, "source": text}],
        "baselines": [{"name": text, "accuracy": 0.5}],
        "start": {"name": text, "metric": "accuracy", "values": {"accuracy": 0.5}, "intervals": {}},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))
    pin = parts["fetch_data"] = folder / "pin-0123456789.json"
    source = {"kind": "hub", "repository": text, "split": text}
    pin.write_text(json.dumps({"source": source, "files": {}, "commit": text}))
    made = runs.FinishedRun(run.asked, parts)
    return model_card.model_card(made, model_card.Card(f"me/{text}", model_card.base_origin(made, None), merged, text))


def read(card: str) -> tuple[dict, str]:
    """(front matter, the rest), read as the hub reads it."""
    from huggingface_hub import ModelCard

    return safe_load(card[4 : card.index("\n---\n", 4)]), ModelCard(card).text


def form(markdown: str) -> list:
    """All that a page is made of but its texts."""
    found = []

    def walk(tokens):
        for token in tokens:
            raw = token.content if token.type in ("html_block", "html_inline") else None
            if token.type != "text":
                found.append((token.type, token.tag, token.info, sorted(token.attrs or {}), raw))
            walk(token.children or [])

    walk(MarkdownIt("gfm-like", {"linkify": False}).parse(markdown))
    return found


@pytest.mark.parametrize("merged", [True, False])
def test_any_text_in_any_field_leaves_the_card_its_form(project, tmp_path, merged):
    run = runs.find(RUN)
    plain_front, plain = read(card_of(run, tmp_path / "plain", PLAIN, merged))
    for number, text in enumerate(TEXTS[merged::2]):
        front, body = read(card_of(run, tmp_path / str(number), text, merged))
        assert front == json.loads(json.dumps(plain_front).replace(json.dumps(PLAIN), json.dumps(text))), text
        assert form(body) == form(plain), text
        [code] = [token.content for token in MarkdownIt().parse(body) if token.info == "python"]
        assert text in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert not any(char in body for char in "\x1b\u202e"), "nothing that a terminal acts upon"
