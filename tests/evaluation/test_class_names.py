"""Which label a text is, and which one a model finds likeliest."""

import itertools
import unicodedata
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from steps import evaluate_model
from temper.config import evaluation as checks
from temper.config.schema import Eval
from temper.data.encoder import Encoder
from temper.errors import UserError
from temper.evaluation import choices, likelihoods
from temper.evaluation.class_names import check_class_names, gold_class, read_class
from temper.evaluation.class_tokens import class_answers
from temper.files import read_json, read_json_lines
from temper.model.loading import load_model, load_tokenizer
from tests.data import test_encoder
from tests.support import tiny

NUMBERS, INCOME, CODE = ["-1", "0", "1"], ["<=50K", ">50K"], ["C", "C++", "C#"]
GRADES, HINDI, THAI = ["A", "A-", "A+"], ["हाँ", "नहीं"], ["ไม่", "ใช่"]
THUMBS, CASES, TOKENS = ["👍", "👎"], ["May", "may"], ["<|yes|>", "<|no|>"]


@pytest.mark.parametrize(
    ("labels", "answer", "label"),
    [
        (NUMBERS, "-1", "-1"),
        (NUMBERS, "1.", "1"),
        (NUMBERS, "It is -1, I think", "-1"),
        (NUMBERS, "It is 1", "1"),
        (NUMBERS, "10", None),
        (INCOME, ">50k", ">50K"),
        (INCOME, "The income is <=50K.", "<=50K"),
        (INCOME, "50K", None),
        (CODE, "C++.", "C++"),
        (CODE, "c#", "C#"),
        (CODE, "It is written in C++", "C++"),
        (CODE, "It is written in C", "C"),
        (GRADES, "A-", "A-"),
        (GRADES, "A+.", "A+"),
        (GRADES, "**A**", "A"),
        (GRADES, "Grade: A- overall", "A-"),
        (GRADES, "a nice piece of work", None),
        (HINDI, "हाँ।", "हाँ"),
        (HINDI, "हो", None),
        (["दिन", "दान"], "दान", "दान"),
        (THAI, "ไม่", "ไม่"),
        (THAI, "ไม้", None),
        (THUMBS, "👍.", "👍"),
        (THUMBS, "👍 great", "👍"),
        (["❤", "💔"], "❤\ufe0f", "❤"),
        (CASES, "may", "may"),
        (CASES, "May.", "May"),
        (CASES, "MAY", None),
        (TOKENS, "<|yes|>", "<|yes|>"),
        (["+", "-"], " -\n", "-"),
        (["café", "thé"], unicodedata.normalize("NFD", "Café"), "café"),
        (["not_toxic", "toxic"], "not toxic", "not_toxic"),
        (["negative", "positive"], "", None),
    ],
)
def test_what_an_answer_reads_as(labels, answer, label):
    assert read_class(answer, labels) == label


@pytest.mark.parametrize("labels", [NUMBERS, INCOME, CODE, GRADES, HINDI, THAI, THUMBS, CASES, TOKENS, ["दिन", "दान"]])
def test_each_label_is_itself(labels):
    check_class_names(labels)
    for label in labels:
        for text in (label, f" {label}\n", unicodedata.normalize("NFD", label)):
            assert read_class(text, labels) == gold_class(text, labels, "here") == label


@pytest.mark.parametrize(
    ("text", "labels"),
    [("-1", ["0", "1"]), ("C++", ["C", "Java"]), (">50K", ["50K", "10K"]), ("1%", ["1", "2"]), ("²", ["1", "2"])],
)
def test_a_sign_that_no_label_has_makes_another_answer(text, labels):
    with pytest.raises(UserError, match="is not a label"):
        gold_class(text, labels, "here")
    assert read_class(text, labels) is None


def test_labels_that_nothing_tells_apart_are_refused():
    with pytest.raises(UserError, match="rename it"):
        check_class_names(["parsed", "unparsed"])
    with pytest.raises(UserError, match="are one: leave one out"):
        check_class_names(["café", unicodedata.normalize("NFD", "café")])
    with pytest.raises(UserError, match="an empty label"):
        check_class_names(["a", " "])


def test_a_gold_answer_is_read_as_strictly_as_the_labels_need():
    assert gold_class("Positive", ["positive", "negative"], "here") == "positive"
    with pytest.raises(UserError, match=r"^test row 7: the answer 'MAY' could be May or may"):
        gold_class("MAY", CASES, "test row 7")
    with pytest.raises(UserError, match=r"'it is positive' is not a label of eval.labels \(positive, negative\)"):
        gold_class("it is positive", ["positive", "negative"], "here")


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=4), min_size=2, max_size=5), st.text())
def test_any_labels_that_are_accepted_are_read_back(labels, answer):
    try:
        check_class_names(labels)
    except UserError:
        return
    for label in labels:
        assert read_class(label, labels) == gold_class(label, labels, "here") == label
    assert read_class(answer, labels) in (*labels, None)


# --- which label the model finds likeliest ----------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, {"dtype": "float32", "attn_implementation": "fastest"}).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [tiny.tiny_row(tokenizer, number, *row) for number, row in enumerate(tiny.tiny_rows(9))]


def one_by_one(model, row, answers):
    """Log-probability of each answer, each in a forward pass of its own."""
    prompt, logps = row["input_ids"][: row["prompt_length"]], []
    for answer in answers:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double()
        picked = logits.log_softmax(dim=1)[range(len(answer)), answer]
        logps.append(picked.sum().item())
    return logps


SETS = {
    "one token each": ["positive", "negative"],
    "a common first token": ["very good", "very bad", "very"],
    "28": [f"class {number}" for number in range(28)],
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_labels_are_judged_whole_with_their_end(model, tokenizer, rows, name, batch_size):
    answers = [tokenizer(label + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for label in SETS[name]]
    found = likelihoods.answer_losses(model, rows, answers, batch_size, tokenizer.pad_token_id)
    for row, losses in zip(rows, found, strict=True):
        logps = [answer.logp for answer in losses]
        assert logps == pytest.approx(one_by_one(model, row, answers), rel=1e-5)


def test_the_loss_of_rows_is_found_with_their_labels(model, tokenizer, rows, monkeypatch):
    """Rows whose answer is a label's are asked once; one that is spelt otherwise, or learns its prompt, by itself."""
    capital, prompt_too = tiny.tiny_row(tokenizer, 9, "so so", "Positive"), dict(rows[0], id=10)
    prompt_too["labels"] = prompt_too["input_ids"]
    asked, size = [*rows, capital, prompt_too], (4, tokenizer.pad_token_id)
    expected = likelihoods.row_losses(model, asked, *size)
    by_itself, text_losses = [], likelihoods.text_losses
    monkeypatch.setattr(
        likelihoods, "text_losses", lambda *all_: by_itself.extend(row["id"] for row in all_[1]) or text_losses(*all_)
    )
    splits = {"test": Dataset.from_list(asked)}
    found = choices.likeliest(model, splits, asked, ["negative", "positive"], tokenizer, size, ("model", "test")).losses
    assert by_itself == [9, 10]
    assert found.sums == pytest.approx(expected.sums, rel=1e-5)
    assert (found.tokens, found.matched) == (expected.tokens, expected.matched)


def report(model, splits, output, *overrides):
    arguments = ["--model", str(model), "--splits", str(splits), "--output", output, "experiment=smoke", "sweep=none"]
    evaluate_model.main(
        [
            *arguments,
            "eval.split=test",
            "eval.published=[]",
            "model.load.dtype=float32",
            "eval.max_new_tokens=4",
            *overrides,
        ]
    )
    return read_json(Path(output, "metrics.json")), read_json_lines(Path(output, "predictions.jsonl"))


def test_the_spelling_of_a_row_changes_no_other(workspace, tiny_model, model, tokenizer):
    """A capital letter, even in the first row, is one reference that is spelt otherwise, and nothing else."""
    first, *others = tiny.tiny_rows(12)
    spelt = [(first[0], first[1].capitalize()), *others]
    rows = {"train": spelt, "test": [*spelt, first, *others]}  # the test rows twice
    facts, found = report(tiny_model, tiny.make_tiny_splits(workspace / "splits", tiny_model, rows=rows), "report")
    after, before = found[: len(spelt)], found[len(spelt) :]
    assert [after[0]["reference"], before[0]["reference"]] == ["Positive", "positive"]
    assert [(row["choice"], row["score"]) for row in after] == [(row["choice"], row["score"]) for row in before]
    assert facts["values"]["accuracy"] == sum(row["score"] for row in before) / len(before)
    assert facts["accuracy_of"] == choices.ALONE
    labels = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in ("negative", "positive")]
    expected = [one_by_one(model, tiny.tiny_row(tokenizer, 0, *row), labels) for row in [first, *others]]
    for half in (after, before):
        assert [row["label_logps"] for row in half] == [pytest.approx(logps, abs=1e-3) for logps in expected]


def test_labels_that_begin_alike_are_judged_as_all_others(workspace, tiny_model, model, tokenizer):
    labels = {"positive": "very good", "negative": "very bad"}
    texts = [(prompt, labels[answer]) for prompt, answer in tiny.tiny_rows(30)]
    rows = {"train": texts[:20], "validation": 0, "test": texts[20:]}
    splits = tiny.make_tiny_splits(workspace / "splits", tiny_model, rows=rows)
    facts, rows = report(tiny_model, splits, "report", "eval.labels=[very good,very bad,neither]")
    assert {row["choice"] for row in rows} <= {"very good", "very bad", "neither"}
    answers = [
        tokenizer(label, add_special_tokens=False)["input_ids"] for label in ("very good", "very bad", "neither")
    ]
    for row, (prompt, reference) in zip(rows, texts[20:], strict=True):
        made = tiny.tiny_row(tokenizer, 0, prompt, reference)
        assert row["label_logps"] == pytest.approx(one_by_one(model, made, answers), abs=1e-3)
    right = [row["choice"] == row["reference"] for row in rows]
    assert facts["values"]["accuracy"] == sum(right) / len(right)


def test_where_a_label_begins_another_the_end_counts(workspace, tiny_model, model, tokenizer):
    """Else the shorter one would always be the likelier, and nobody could answer the longer one."""
    labels = {"positive": "good", "negative": "good enough"}
    texts = [(prompt, labels[answer]) for prompt, answer in tiny.tiny_rows(30)]
    rows = {"train": texts[:20], "validation": 0, "test": texts[20:]}
    splits = tiny.make_tiny_splits(workspace / "splits", tiny_model, rows=rows)
    facts, rows = report(tiny_model, splits, "report", "eval.labels=[good,good enough]")
    assert facts["accuracy_of"] == choices.WITH_END
    ends = [
        tokenizer(f"{label}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"] for label in labels.values()
    ]
    made = tiny.tiny_row(tokenizer, 0, *texts[20])
    assert rows[0]["label_logps"] == pytest.approx(one_by_one(model, made, ends), abs=1e-3)


def test_an_answer_that_opens_before_the_label(tokenizer):
    """Some templates put something in front of each answer: so it stands in front of each label."""
    head = tokenizer("<think>\n\n", add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    ids = {label: tokenizer(label, add_special_tokens=False)["input_ids"] for label in ("positive", "negative")}
    answer = [*head, *ids["positive"], *end]
    row = {"input_ids": [5, 6, *answer], "labels": [-100, -100, *answer], "prompt_length": 2, "reference": "positive"}
    rows = {"train": Dataset.from_list([row])}
    found = class_answers(["negative", "positive"], rows, tokenizer)
    assert found == [[*head, *ids["negative"], *end], answer]


ENDS = ["\n", "\n\n", ": ", "<|end|>", ""]  # of prompts; tokens cross some of them
THREE = [["positive", "negative", "neutral"], ["A", "A-", "B+"], ["1", "0", "-1"], ["yes\nno", "works", "it works"]]


@pytest.mark.parametrize("make", test_encoder.KINDS)
def test_a_label_without_rows_has_the_tokens_that_training_would_learn(make):
    """Where they cannot be told (does an answer behind a blank begin with another one?) it is refused."""
    told = 0
    for end, lead, labels in itertools.product(ENDS, ("", " "), THREE):
        tokenizer = test_encoder.tokenizer_with(make, None)
        free = {"apply_chat_template": False, "template": "{{ prompt }}" + end, "loss_on": "assistant"}
        *rows, unseen = _encoded(Encoder(tokenizer, [tokenizer.eos_token_id], free), labels, lead)
        if [row["reference"] for row in (*rows, unseen)] != labels:
            continue  # the tokenizer does not know its letters
        try:
            found = class_answers(labels, {"train": Dataset.from_list(rows)}, tokenizer)
        except UserError as error:
            assert end == ": " and f"no row has '{labels[2]}', and which tokens" in str(error)
        else:
            assert found[2] == unseen["labels"][unseen["prompt_length"] :]
            told += 1
    assert told >= 10


def _encoded(encoder, labels, lead):
    for number, label in enumerate(labels):
        prompt = {"role": "user", "content": f"The plot is {number}"}
        row = encoder.encode([prompt, {"role": "assistant", "content": lead + label}])
        one = {name: getattr(row, name) for name in ("input_ids", "labels", "prompt_length")}
        yield one | {"reference": encoder.text(row.answer)}


def test_a_loss_that_is_no_number_gives_no_figures(workspace, tiny_model, tiny_splits, capsys):
    from safetensors.torch import load_file, save_file

    broken = workspace / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # a number, whose products are none
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        report(broken, tiny_splits, "report")
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_proposed_for_text_that_rouge_does_not_see_works(workspace, tiny_model):
    texts = [(prompt, f"नमस्ते {number}") for number, (prompt, _) in enumerate(tiny.tiny_rows(12))]
    splits = tiny.make_tiny_splits(workspace / "splits", tiny_model, rows={"train": texts[:8], "test": texts[8:]})
    as_text = ["eval.task=text", "eval.labels=null"]  # what is proposed where labels would be ignored
    facts, _ = report(tiny_model, splits, "report", *as_text, "eval.metric=chrf")
    assert facts["metric"] == "chrf" and "rouge_l" not in facts["values"]


def test_what_rouge_misses_of_accented_text_is_said(tokenizer, caplog):
    part = Dataset.from_list([tiny.tiny_row(tokenizer, 1, "What is it?", "Un café très agréable, naturellement")])
    with caplog.at_level("INFO", "temper"):
        checks.check(Eval(task="text").model_dump(), Path("splits"), {"test": part}, tokenizer, ["test"])
    assert "and 9.7% of the test references is other: eval.metric=chrf sees all" in caplog.text
