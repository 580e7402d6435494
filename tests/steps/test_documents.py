"""Raw text (data.layout=text) from rows to figures, against plain transformers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk

from steps import evaluate_model, format_prompts, merge_adapter, tokenize_splits, train_adapter
from temper.data.batches import collate
from temper.data.documents import apart, beginning
from temper.evaluation.figures import read_figures
from temper.model.loading import load_model
from temper.model.predictions import SupervisedLoss
from temper.training.trainers import TemperTrainer
from tests.support.asking import complaint, lines_of
from tests.support.tiny import gradients, tiny_tokenizer

LOAD = {"dtype": "float32", "attn_implementation": "eager"}
DATA = {"layout": "text", "splits": {"validation": 0.2, "test": 0.2}}
CONFIG = ["experiment=smoke", "sweep=none", "eval=documents", "prompt.system=null", "model.load.dtype=float32"]
CONFIG += ["data=editorials", "~data.limit", "merge.dtype=float32", "num_threads=1"]
TOKENIZER = tiny_tokenizer()


def text(number: int) -> str:
    return f"Of number {number}. " + "It goes on and on. " * (number % 9)


def write(rows: list[dict], **data) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = json.dumps({"data": {**DATA, **data}, "prompt": {"system": None}})
    format_prompts.main(["--raw", "rows.jsonl", "--output", "prompts", "--config", config])


def tokenize(model, *overrides: str):
    shutil.rmtree("splits", ignore_errors=True)
    tokenize_splits.main(["--prompts", "prompts", "--model", str(model), "--output", "splits", *CONFIG, *overrides])
    return load_from_disk("splits"), json.loads(Path("splits/audit.json").read_text())["splits"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """A folder with prompts, splits of at most 48 tokens, and a model."""
    import contextlib

    folder = tmp_path_factory.mktemp("documents")
    with contextlib.chdir(folder):
        write([{"text": text(number)} for number in range(100)])
        shutil.copytree(tiny_model, "model")
        tokenize("model", "tokenize.max_length=48")
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def documents_of(split: str) -> list[str]:
    return [row["messages"][0]["content"] for row in lines_of(f"prompts/{split}.jsonl")]


def whole(said: str) -> list[int]:
    return [*TOKENIZER(said, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]


def test_a_hash_of_the_text_splits_documents_and_equal_ones_stay_together(workspace):
    write([{"text": text(number % 40)} for number in range(80)])
    splits = {split: documents_of(split) for split in tokenize_splits.SPLITS}
    assert all(splits.values())
    assert not {*splits["train"]} & {*splits["test"]} and not {*splits["train"]} & {*splits["validation"]}
    stats = json.loads(Path("prompts/stats.json").read_text())
    assert (stats["prompts"], stats["duplicates"]) == (40, 40)


def test_every_token_of_every_document_is_learned_once(here):
    splits, audit = load_from_disk("splits"), json.loads(Path("splits/audit.json").read_text())["splits"]
    train = [part for row in splits["train"] for part in apart(row)]
    learned = sorted(token for part in train for token in part["labels"] if token != -100)
    assert learned == sorted(token for said in documents_of("train") for token in whole(said))
    assert all(len(row["input_ids"]) <= 48 for row in splits["train"])
    assert len(splits["train"]) < len(train), "several share a row"
    lengths = [1 + len(whole(said)) for said in documents_of("train")]
    assert audit["train"]["continued"] == sum(length > 48 for length in lengths) > 0
    assert (audit["train"]["rows"], audit["train"]["longest"]) == (len(lengths), max(lengths))
    assert audit["train"]["learned_tokens"] == len(learned)


def test_what_is_judged_is_a_row_for_each_document_or_part_of_one(here):
    rows = load_from_disk("splits")["validation"]
    by_document: dict[int, str] = {}
    for row in rows:
        by_document[row["id"]] = by_document.get(row["id"], "") + row["reference"]
        assert row["group"] == str(row["id"]), "parts of a document are no independent rows"
    assert list(by_document.values()) == documents_of("validation")


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_longer_documents_may_be_treated_like_other_rows(workspace, tiny_model, capsys, policy):
    write([{"text": text(number)} for number in range(60)])
    options = ["tokenize.max_length=48", f"tokenize.max_length_policy={policy}"]
    options += ["tokenize.max_share.dropped=1", "tokenize.max_share.truncated=1"]
    long = [said for said in documents_of("train") if 1 + len(whole(said)) > 48]
    if policy == "error":
        assert "tokenize.max_length is 48; raise it" in complaint(capsys, lambda _: tokenize(tiny_model, *options))
        return
    splits, audit = tokenize(tiny_model, *options)
    found = "dropped" if policy == "drop" else "truncated"
    assert audit["train"][found] == len(long) > 0
    assert audit["train"]["end_not_learned"] == (len(long) if policy == "truncate" else 0)
    parts = [part["input_ids"][1:] for row in splits["train"] for part in apart(row)]
    kept = [said for said in documents_of("train") if policy == "truncate" or said not in long]
    assert sorted(parts) == sorted(whole(said)[:47] for said in kept)


def plain_loss(model, row: dict):
    """transformers' own, of a document by itself, summed over its tokens."""
    ids = torch.tensor([row["input_ids"]])
    return model(input_ids=ids, labels=ids).loss * (len(row["input_ids"]) - 1)


def test_documents_that_share_a_row_compute_what_each_does_alone(here):
    row = max(load_from_disk("splits")["train"], key=lambda row: len(row["documents"]))
    assert len(row["documents"]) > 2
    model = load_model(Path("model"), LOAD).train()
    loss, count = SupervisedLoss()(model, TemperTrainer.batch_of([row], 0))
    alone = [plain_loss(model, part) for part in apart(row)]
    torch.testing.assert_close(loss, sum(alone), rtol=1e-5, atol=1e-5)
    assert count == sum(row["documents"]) - len(row["documents"])
    mine = gradients(model, loss)
    theirs = gradients(model, sum(alone))
    for name in theirs:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5 * scale)
    together = collate([{name: row[name] for name in ("input_ids", "labels")}], 0)
    contaminated = model(**together).loss * count
    assert abs(contaminated.item() - loss.item()) > 1e-3, "this test could not fail"


def test_figures_are_those_of_plain_transformers_and_no_answers_are_asked_for(here):
    train_adapter.main(["--splits", "splits", "--model", "model", "--output", "adapter", *CONFIG, "adapter.r=4"])
    merge_adapter.main(["--model", "model", "--adapter", "adapter", "--output", "merged", *CONFIG])
    for model, more in (("model", []), ("merged", ["--adapter", "adapter", "--base-report", "report-model"])):
        inputs = ["--model", model, "--splits", "splits", "--output", f"report-{model}", *more]
        evaluate_model.main([*inputs, *CONFIG])
        found = read_figures(Path(f"report-{model}"))
        network = load_model(Path(model), LOAD).eval()
        rows = list(load_from_disk("splits")["validation"])
        with torch.no_grad():
            nats = sum(plain_loss(network, row).item() for row in rows)
        size = sum(len(said.encode()) for said in documents_of("validation"))
        tokens = sum(len(whole(said)) for said in documents_of("validation"))
        assert found.values["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert found.values["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert (found.metric, found.generated_tokens, found.rows) == ("bits_per_byte", 0, len(rows))
    assert found.values["bits_per_byte"] < found.base["bits_per_byte"]
    page = Path("report-merged/report.html").read_text()
    assert "likelier than to the base model" in page and "bits per byte" in page
    assert "cut off" not in page
    assert {"prediction", "finished"}.isdisjoint(lines_of("report-merged/predictions.jsonl")[0])


def test_the_page_says_what_the_documents_did_before(here):
    """And what that alone did to the rows that are judged."""
    if not Path("report-merged").is_dir():
        test_figures_are_those_of_plain_transformers_and_no_answers_are_asked_for(here)
    inputs = ["--model", "merged", "--splits", "splits", "--adapter", "adapter", "--base-report", "report-model"]
    before = ["--first-report", "report-merged", "--start-report", "report-merged"]
    evaluate_model.main([*inputs, *before, "--output", "report-after", *CONFIG])
    found, first = read_figures(Path("report-after")), read_figures(Path("report-merged"))
    assert found.first.model_dump() == {
        "report": "report-merged",
        "metric": "bits_per_byte",
        "rows": first.rows,
        "value": first.values["bits_per_byte"],
        "base": first.base["bits_per_byte"],
    }
    assert found.start.name == "after the documents"
    page = Path("report-after/report.html").read_text()
    assert "First the model was trained on documents" in page and 'href="../report-merged/report.html"' in page


def test_a_system_message_has_no_place(workspace, capsys):
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    config = json.dumps({"data": DATA, "prompt": {"system": "Be short."}})
    step = ["--raw", "rows.jsonl", "--output", "prompts", "--config", config]
    assert "layout 'text' is documents, which have no messages" in complaint(capsys, format_prompts.main, *step)


def test_the_beginning_is_what_ends_a_text_where_there_is_no_other():
    tokenizer = tiny_tokenizer()
    assert beginning(tokenizer) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert beginning(tokenizer) == tokenizer.eos_token_id


def test_a_tokenizer_without_a_token_that_begins_texts(workspace, tiny_model):
    """Between two documents of a row the token that ends texts comes twice, which is as it should be."""
    write([{"text": text(number)} for number in range(60)])
    shutil.copytree(tiny_model, "model")
    for path in Path("model").glob("*token*.json"):
        if "bos_token" in (content := json.loads(path.read_text())):
            path.write_text(json.dumps(content | {"bos_token": None}))
    splits, audit = tokenize("model")
    end = TOKENIZER.eos_token_id
    row = max(splits["train"], key=lambda row: len(row["documents"]))
    assert row["input_ids"][0] == end
    assert sum(pair == (end, end) for pair in zip(row["input_ids"], row["input_ids"][1:], strict=False)) > 1
    assert audit["train"]["doubled_end"] == 0
    assert max(map(sum, splits["train"]["documents"])) > 256, "a row may be longer than the model's context"


def test_a_document_longer_than_the_context_is_an_error(workspace, tiny_model, capsys):
    write([{"text": text(number) + "more " * 300 * (number == 20)} for number in range(60)])
    said = complaint(capsys, lambda _: tokenize(tiny_model))
    assert (
        "row 21 of the raw data: it has " in said and "but the model's context is 256: set tokenize.max_length" in said
    )
    tokenize(tiny_model, "tokenize.max_length=256")


def test_the_audit_page_shows_documents_that_share_rows(here):
    page, splits = Path("splits/audit.html").read_text(), load_from_disk("splits")
    count = len(documents_of("train"))
    assert f"{count} training documents with" in page
    assert f"They share {len(splits['train'])} rows" in page
    assert "the documents and their ends" in page
