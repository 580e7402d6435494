"""score_rows: its figures against plain transformers, where the rows stand, and inputs that are not of each other."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from steps import format_prompts, score_rows, tokenize_splits
from temper.data.places import Place, places
from temper.evaluation.suspects import Score, most_suspicious
from temper.files import load_rows, read_json_lines
from temper.model.loading import load_model
from temper.reports.suspects import csv_text
from tests.support.tiny import tiny_rows

LABELS = ["negative", "positive"]
LOAD = {"dtype": "float32", "attn_implementation": "eager"}
DATA = {"layout": "question_answer", "splits": {"validation": 0.2, "test": 0.2}}
LONG_ROW = '"A review of\n two lines.",positive\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """raw/ with two files, prompts/ and splits/ made of it by the steps, and the lines of each prompt."""
    folder = tmp_path_factory.mktemp("score")
    rows = tiny_rows(60)
    (folder / "raw").mkdir()
    body = "".join(f'"{question}",{answer}\n' for question, answer in rows[:30])
    (folder / "raw" / "a.csv").write_text("question,answer\n" + LONG_ROW + body)
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows[30:]]
    (folder / "raw" / "b.jsonl").write_text("\n\n".join(lines) + "\n")
    formatted = {"data": DATA, "prompt": {"system": None}}
    config = ["--config", json.dumps(formatted)]
    format_prompts.main(["--raw", str(folder / "raw"), "--output", str(folder / "prompts"), *config])
    config = ["--config", json.dumps({"prompt": {}, "tokenize": {}})]
    inputs = ["--prompts", str(folder / "prompts"), "--model", str(tiny_model)]
    tokenize_splits.main([*inputs, "--output", str(folder / "splits"), *config])
    return folder


def score(folder, model, output, **changes) -> None:
    inputs = {"splits": folder / "splits", "prompts": folder / "prompts", "raw": folder / "raw", "model": model}
    inputs |= {name: changes.pop(name) for name in list(changes) if name in inputs}
    settings = {"task": "labels", "labels": LABELS, "batch_size": 4, **changes}
    words = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    config = {"eval": settings, "model": {"load": LOAD}, "num_threads": 1}
    score_rows.main([*words, "--output", str(output), "--config", json.dumps(config)])


def plain_logp(model, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logps = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer))


def answers_of(rows) -> dict[str, list[int]]:
    """Label -> the tokens of an answer that is just it, with its end, as some row has them."""
    return {row["reference"]: row["input_ids"][row["prompt_length"] :] for part in rows.values() for row in part}


def test_margins_are_those_of_plain_transformers(folder, tiny_model, tmp_path):
    score(folder, tiny_model, tmp_path / "out")
    rows, model = load_rows(folder / "splits"), load_model(tiny_model, LOAD).eval()
    answers = answers_of(rows)
    expected = []
    for row in [*rows["train"], *rows["validation"]]:
        other = next(label for label in LABELS if label != row["reference"])
        prompt = row["input_ids"][: row["prompt_length"]]
        # without the token that ends an answer, as no label begins the other one
        given, others = (plain_logp(model, prompt, answers[label][:-1]) for label in (row["reference"], other))
        expected.append(others - given)
    found = read_json_lines(tmp_path / "out" / "scores.jsonl")
    assert [line["id"] for line in found] == [*rows["train"]["id"], *rows["validation"]["id"]]
    assert [line["suspicion"] for line in found] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_list_has_the_largest_first_with_the_line_of_its_raw_row(folder, tiny_model, tmp_path):
    score(folder, tiny_model, tmp_path / "out", suspects=15)
    listed = json.loads((tmp_path / "out" / "suspects.json").read_text())
    scores = read_json_lines(tmp_path / "out" / "scores.jsonl")
    assert listed["rows"]["train"] + listed["rows"]["validation"] == len(scores)
    best = sorted((line["suspicion"] for line in scores), reverse=True)[:15]
    assert [line["suspicion"] for line in listed["suspects"]] == best
    assert {line["file"].rpartition("/")[2] for line in listed["suspects"]} == {"a.csv", "b.jsonl"}
    for line in listed["suspects"]:
        text = Path(line["file"]).read_text().split("\n")[line["line"] - 1]
        assert line["prompt"].split("\n")[0] in text
        assert line["given"] in text or "A review of" in text
    with (tmp_path / "out" / "suspects.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["rank", "file", "line", "split", "given", "likelier", "margin", "prompt"]
    assert [int(row["line"]) for row in table] == [line["line"] for line in listed["suspects"]]
    assert {(row["given"], row["likelier"]) for row in table} <= {tuple(LABELS), tuple(reversed(LABELS))}


def test_the_loss_of_free_answers_is_per_token(folder, tiny_model, tmp_path):
    score(folder, tiny_model, tmp_path / "out", task="text", labels=None)
    rows, model = load_rows(folder / "splits"), load_model(tiny_model, LOAD).eval()
    expected = []
    for row in [*rows["train"], *rows["validation"]]:
        prompt, answer = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
        expected.append(-plain_logp(model, prompt, answer) / len(answer))
    found = read_json_lines(tmp_path / "out" / "scores.jsonl")
    assert [line["suspicion"] for line in found] == pytest.approx(expected, rel=1e-4)
    assert "likelier" not in (tmp_path / "out" / "suspects.csv").read_text()


def test_places_count_as_the_splits_do(folder):
    where = places(folder / "raw", DATA, {1, 2, 31, 32, 33, 999})
    assert where == {
        1: Place(str(folder / "raw" / "a.csv"), 2, False),
        2: Place(str(folder / "raw" / "a.csv"), 4, False),  # the first row has two lines
        31: Place(str(folder / "raw" / "a.csv"), 33, False),
        32: Place(str(folder / "raw" / "b.jsonl"), 1, False),
        33: Place(str(folder / "raw" / "b.jsonl"), 3, False),  # behind a blank line
    }


def test_rows_of_a_json_field_have_no_lines(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": [{"a": 1}, {"a": 2}]}')
    assert places(tmp_path / "x.json", {"field": "rows"}, [2]) == {2: Place(str(tmp_path / "x.json"), 2, True)}


def test_equal_rows_keep_their_order():
    made = [Score(number, "train", "", "", suspicion) for number, suspicion in ((1, 0.5), (2, 0.9), (3, 0.9))]
    assert [score.id for score in most_suspicious(made, 2)] == [2, 3]


def test_no_spreadsheet_computes_a_prompt():
    line = {"rank": 1, "file": "=f.csv", "line": 2, "given": "@a", "suspicion": 0.5, "prompt": "=1+1\nx", "id": 7}
    [row] = csv.DictReader(csv_text([line], "loss").splitlines())
    assert row == {"rank": "1", "file": "'=f.csv", "line": "2", "given": "'@a", "loss": "0.5", "prompt": "'=1+1 x"}


@pytest.mark.parametrize(
    ("flag", "said"),
    [("prompts", "was made of"), ("raw", "is not the raw data that --prompts"), ("suspects", "eval.suspects")],
)
def test_what_would_name_other_lines_is_refused(folder, tiny_model, tmp_path, capsys, flag, said):
    changed = {"suspects": 0}
    if flag != "suspects":
        changed = {flag: tmp_path / f"other-{flag}"}
        shutil.copytree(folder / flag, changed[flag])
    if flag == "raw":
        with (changed["raw"] / "b.jsonl").open("a") as file:
            file.write('{"question": "Well?", "answer": "positive"}\n')
    with pytest.raises(SystemExit) as stopped:
        score(folder, tiny_model, tmp_path / "out", **changed)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
