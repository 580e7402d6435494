"""evaluate_model: its numbers against plain transformers, its files, its page."""

import json
import shutil

import pytest

from steps import evaluate_model
from temper.config.schema import Eval
from temper.evaluation import generation, likelihoods
from temper.evaluation.figures import read_figures
from temper.files import read_json_lines
from temper.model import serving
from temper.model.loading import load_model, load_tokenizer, stop_token_ids
from temper.reports import run_page
from tests.support.tiny import make_tiny_model, make_tiny_splits

LOAD = {"dtype": "float32", "attn_implementation": "eager"}
LABELS = ["negative", "positive"]
NASTY = "<script>alert('x')</script> & <b>bold</b>"


def config(task: str = "labels", **changes) -> dict:
    settings = {"labels": LABELS if task == "labels" else None, "max_new_tokens": 6, "batch_size": 3}
    settings |= {"split": "test", **changes}
    return {"eval": Eval(task=task, **settings).model_dump(mode="json"), "model": {"load": LOAD}, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ and splits/ that all tests here share, and only read."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_tiny_model(folder / "model")
    make_tiny_splits(folder / "splits", folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "model", LOAD).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder / "model")


@pytest.fixture(scope="module")
def rows(folder):
    from datasets import load_from_disk

    return list(load_from_disk(str(folder / "splits"))["test"])


# --- loss ----------------------------------------------------------------------------------------


def plain_losses(model, rows) -> list[float]:
    """transformers' own loss, a row at a time, summed over its supervised tokens."""
    import torch

    sums = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            sums.append(model(input_ids=ids, labels=labels).loss.item() * int((labels[:, 1:] != -100).sum()))
    return sums


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_loss_is_transformers_own_weighted_by_tokens(model, tokenizer, rows, batch_size):
    losses = likelihoods.row_losses(model, rows, batch_size, tokenizer.pad_token_id)
    assert losses.sums == pytest.approx(plain_losses(model, rows), rel=1e-5)
    assert losses.tokens == [sum(label != -100 for label in row["labels"]) for row in rows]
    assert len({row["prompt_length"] for row in rows}) > 1  # padding was at work


def test_logits_are_taken_in_chunks(model, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(likelihoods, "CHUNK", 2)
    losses = likelihoods.row_losses(model, rows, 100, tokenizer.pad_token_id)
    assert losses.sums == pytest.approx(plain_losses(model, rows), rel=1e-5)


def test_a_head_that_scales_its_logits_takes_the_plain_way(tokenizer, rows, caplog):
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 4, "initializer_range": 0.3, "logits_scaling": 8.0}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=len(tokenizer), **sizes, **heads)).eval()
    with caplog.at_level("INFO", "temper"):
        losses = likelihoods.row_losses(model, rows, 4, tokenizer.pad_token_id)
    assert "more than one product" in caplog.text
    assert losses.sums == pytest.approx(plain_losses(model, rows), rel=1e-5)


def test_tokens_of_the_answer_that_the_model_finds_likeliest_are_counted(model, tokenizer, rows):
    """Each row's reference becomes the model's own answer, cut off or changed at some token."""
    import torch

    changed, expected = [], []
    for number, row in enumerate(rows[:6]):
        ids = row["input_ids"][: row["prompt_length"]]
        for _ in range(5):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        agreed = min(number, 5)
        if agreed < 5:
            ids[row["prompt_length"] + agreed] ^= 1
        labels = [-100] * row["prompt_length"] + ids[row["prompt_length"] :]
        changed.append({**row, "input_ids": ids, "labels": labels})
        expected.append(agreed)
    losses = likelihoods.row_losses(model, changed, 3, tokenizer.pad_token_id)
    assert losses.matched == expected


# --- answers -------------------------------------------------------------------------------------


def ask(model, tokenizer, rows, folder, **changes):
    settings = config(max_new_tokens=16, **changes)["eval"]
    return generation.generate_answers(model, tokenizer, rows, settings, stop_token_ids(folder / "model", tokenizer))


def test_references_that_the_model_would_answer_need_no_generation(model, tokenizer, rows, folder):
    """Answers become the references of some rows: those are known from the loss, and are what generation gives."""
    stop_ids = [*stop_token_ids(folder / "model", tokenizer), *range(40, 400, 3)]
    settings = config(max_new_tokens=16)["eval"]
    answers = generation.generate_answers(model, tokenizer, rows, settings, stop_ids)
    assert sum(answers.finished) > 2
    own = []
    for row, ids in zip(rows, answers.ids, strict=True):
        prompt = row["input_ids"][: row["prompt_length"]]
        own.append({**row, "input_ids": [*prompt, *ids, 7], "labels": [-100] * len(prompt) + [*ids, 7]})
    losses = likelihoods.row_losses(model, own, 4, tokenizer.pad_token_id)
    known = generation.greedy_gold(own, losses.matched, settings, stop_ids)
    assert known == {row: ids for row, ids in enumerate(answers.ids) if answers.finished[row]}
    again = generation.generate_answers(model, tokenizer, own, settings, stop_ids, known)
    assert (again.ids, again.texts, again.finished) == (answers.ids, answers.texts, answers.finished)
    assert generation.greedy_gold(own, losses.matched, {**settings, "do_sample": True}, stop_ids) == {}
    short = generation.greedy_gold(own, losses.matched, {**settings, "max_new_tokens": 1}, stop_ids)
    assert all(len(ids) == 1 for ids in short.values())


def test_what_prompts_begin_with_is_read_once(model, tokenizer, rows, folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        generation,
        "_read",
        lambda model, ids, rows, real=generation._read: read.append((ids.shape[1], rows)) or real(model, ids, rows),
    )
    together = ask(model, tokenizer, rows, folder, batch_size=4)
    assert read and all(tokens >= 8 and count == 4 for tokens, count in read)
    monkeypatch.setattr(generation, "_common_start", lambda model, prompts: 0)
    assert ask(model, tokenizer, rows, folder, batch_size=4).ids == together.ids


def test_batches_answer_as_single_prompts_do(model, tokenizer, rows, folder):
    import torch

    together = ask(model, tokenizer, rows, folder, batch_size=5)
    for row, text in zip(rows, together.texts, strict=True):
        prompt = torch.tensor([row["input_ids"][: row["prompt_length"]]])
        alone = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, row["prompt_length"] :]
        assert text == tokenizer.decode(alone, skip_special_tokens=True).strip()
    assert len(set(together.texts)) > 1  # a model that says the same to all would prove nothing


def test_an_answer_ends_at_a_stop_token(model, tokenizer, rows, folder):
    import torch

    free = ask(model, tokenizer, rows, folder)
    assert free.tokens == [16] * len(rows)
    assert not any(free.finished)
    prompt = rows[0]["input_ids"][: rows[0]["prompt_length"]]
    said = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, len(prompt) :].tolist()
    settings = config(max_new_tokens=16)["eval"]
    stopped = generation.generate_answers(model, tokenizer, rows, settings, [said[2], tokenizer.eos_token_id])
    length = said.index(said[2])
    assert stopped.finished[0]
    assert stopped.tokens[0] == length + 1
    assert stopped.texts[0] == tokenizer.decode(said[:length]).strip()


def test_sampling_depends_on_the_row_alone(model, tokenizer, rows, folder):
    sampled = ask(model, tokenizer, rows, folder, do_sample=True, batch_size=8)
    backwards = ask(model, tokenizer, rows[::-1], folder, do_sample=True, batch_size=3)
    assert backwards.texts[::-1] == sampled.texts
    assert sampled.texts != ask(model, tokenizer, rows, folder).texts


def test_sampling_from_a_narrow_nucleus_is_greedy(model, tokenizer, rows, folder):
    narrow = ask(model, tokenizer, rows, folder, do_sample=True, top_p=1e-6)
    assert narrow.texts == ask(model, tokenizer, rows, folder).texts


def test_samples_follow_the_models_distribution():
    import torch

    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    sampler = generation._RowSampling(list(range(4000)))
    drawn = sampler(None, logits.expand(4000, 4)).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.03)


def test_the_models_own_generation_defaults_stay_out(model, tokenizer, rows, folder):
    plain = ask(model, tokenizer, rows, folder).texts
    own = model.generation_config
    own.do_sample, own.repetition_penalty = True, 5.0
    try:
        assert ask(model, tokenizer, rows, folder).texts == plain
        assert model.generation_config is own
    finally:
        own.do_sample, own.repetition_penalty = False, None


# --- the whole step ------------------------------------------------------------------------------


def evaluate(folder, output, settings, *flags, splits="splits"):
    model = folder / ("merged" if "--adapter" in flags else "model")
    arguments = ["--model", str(model), "--splits", str(folder / splits), "--output", str(output)]
    evaluate_model.main([*arguments, "--config", json.dumps(settings), *map(str, flags)])
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def adapter(folder):
    """The curves of a training, which came to merged/: the same model again, so that its figures are known."""
    adapter = folder / "adapter"
    shutil.copytree(folder / "model", folder / "merged")
    adapter.mkdir()
    lines = [{"step": step, "epoch": step / 10, "loss": 4.0 / step} for step in range(1, 11)]
    lines += [{"step": 10, "epoch": 1.0, "eval_loss": 0.5}, {"step": 11, "epoch": 1.1, "loss": None}]
    (adapter / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (adapter / "training.json").write_text(json.dumps({"train_seconds": 12.0, "trainable_parameters": 1024}))
    (adapter / "config.yaml").write_text("train: {learning_rate: 0.001}\n")
    for made in (adapter, folder / "merged"):
        serving.write(made, {**serving.of_folder(folder / "model"), serving.BASE: "of another model"})
    return adapter


@pytest.fixture(scope="module")
def reports(folder, adapter, tmp_path_factory):
    """(the base model's figures, the tuned model's, the folder of both)"""
    made = tmp_path_factory.mktemp("reports")
    nasty = {"test": [(NASTY, "positive"), ("fine film", "negative"), ("a bore", "negative")]}
    make_tiny_splits(folder / "nasty", folder / "model", rows=nasty)
    base = evaluate(folder, made / "base", config(), splits="nasty")
    flags = ("--adapter", adapter, "--base-report", made / "base")
    return base, evaluate(folder, made / "tuned", config(), *flags, splits="nasty"), made


def test_metrics_of_a_base_model(reports):
    base, _, _ = reports
    assert (base["task"], base["metric"], base["rows"]) == ("labels", "accuracy", 3)
    assert base["base"] is base["train"] is base["delta"] is None
    assert {"accuracy", "f1", "exact_match", "loss", "perplexity", "unparsed", "unfinished"} <= set(base["values"])
    assert base["interval"][0] <= base["values"]["accuracy"] <= base["interval"][1]
    assert base["baselines"][0]["name"] == "majority class"


def test_metrics_of_a_tuned_model(reports):
    base, tuned, _ = reports
    assert tuned["base"] == base["values"]
    assert tuned["values"]["loss"] == pytest.approx(base["values"]["loss"])  # it is the same model here
    assert tuned["delta"] == {"value": 0, "interval": [0, 0]}
    assert tuned["train"]["train_seconds"] == 12


def test_a_model_is_judged_on_the_split_that_is_named(folder, tmp_path):
    from datasets import load_from_disk

    rows = load_from_disk(str(folder / "splits"))
    assert list(rows["validation"]["id"]) != list(rows["test"]["id"])
    for split in ("validation", "test"):
        found = evaluate(folder, tmp_path / split, config(split=split))
        lines = [json.loads(line) for line in (tmp_path / split / "predictions.jsonl").read_text().splitlines()]
        assert (found["split"], [line["id"] for line in lines]) == (split, list(rows[split]["id"]))
        assert f"{split} rows" in (tmp_path / split / "report.html").read_text()


def test_predictions_are_in_the_order_of_the_split(reports):
    lines = [json.loads(line) for line in (reports[2] / "tuned" / "predictions.jsonl").read_text().splitlines()]
    assert [line["reference"] for line in lines] == ["positive", "negative", "negative"]
    assert lines[0]["prompt"] == NASTY
    assert all(line["prediction"] == line["base_prediction"] for line in lines)
    assert all(0 <= line["score"] <= 1 for line in lines)


def test_the_page_shows_html_in_a_prompt_as_text(reports):
    page = (reports[2] / "tuned" / "report.html").read_text()
    assert "&lt;script&gt;alert(" in page
    assert NASTY not in page
    assert "<script>alert" not in page


def test_the_page_needs_nothing_from_elsewhere(reports):
    page = (reports[2] / "tuned" / "report.html").read_text()
    assert page.count("<svg") == 2  # figures of merit, loss
    for outside in ('src="http', 'href="http', "@import", "url(http"):
        assert outside not in page
    assert "train.learning_rate" in page  # the config of the training


def test_the_page_is_the_same_each_time(reports, tmp_path):
    _, tuned, made = reports
    predictions = [json.loads(line) for line in (made / "tuned" / "predictions.jsonl").read_text().splitlines()]
    pages = []
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        run_page.write_page(
            tmp_path / name / "run", read_figures(made / "tuned"), predictions, [], config()["eval"], {}
        )
        pages.append((tmp_path / name / "run" / "report.html").read_text())
    assert pages[0] == pages[1]


def test_reasoning_is_told_apart_from_the_answer_that_is_judged(folder, tmp_path):
    """What ends the reasoning is here a text that the model says in one answer; all others begin with `start`."""
    from datasets import load_from_disk

    splits = load_from_disk(str(folder / "splits"))
    evaluate(folder, tmp_path / "plain", config("text"))
    full = [json.loads(line) for line in (tmp_path / "plain" / "predictions.jsonl").read_text().splitlines()]
    assert not any("reasoning" in line for line in full)
    end = full[0]["prediction"][2:4]
    assert end.strip()
    marks = {"reasoning_start": full[1]["prediction"][:1], "reasoning_end": end}
    shutil.copytree(folder / "splits", tmp_path / "splits")
    splits.map(lambda _row: marks, keep_in_memory=True).save_to_disk(str(tmp_path / "splits"))

    report = ("--base-report", tmp_path / "base")
    evaluate(folder, tmp_path / "base", config("text"), splits=tmp_path / "splits")
    evaluate(folder, tmp_path / "tuned", config("text"), *report, splits=tmp_path / "splits")
    found = [json.loads(line) for line in (tmp_path / "tuned" / "predictions.jsonl").read_text().splitlines()]
    for line, whole in zip(found, full, strict=True):
        before, mark, behind = whole["prediction"].rpartition(end)
        unfinished = not mark and behind.startswith(marks["reasoning_start"])
        assert line["finished"] == line["base_finished"]
        assert line["prediction"] == line["base_prediction"] == ("" if unfinished else behind.strip())
        assert line["reasoning"] == line["base_reasoning"] == (behind if unfinished else before + mark).strip()
    assert any(line["reasoning"] and line["prediction"] for line in found)
    assert any(line["reasoning"] and not line["prediction"] for line in found)
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert page.count("· cut off") == 2 * sum(not line["finished"] for line in found) > 0
    assert page.count("(nothing: the reasoning has not ended)") > 1
    assert "Reasoning is in grey" in page
    assert "Reasoning is in grey" not in (tmp_path / "plain" / "report.html").read_text()


def test_the_page_says_of_which_data_set_of_a_mixture_a_row_is(reports, tmp_path):
    made = reports[2] / "tuned"
    predictions = [json.loads(line) | {"source": "films"} for line in (made / "predictions.jsonl").open()]
    run_page.write_page(tmp_path, read_figures(made), predictions, [], config()["eval"], {})
    assert (tmp_path / "report.html").read_text().count(f"row {predictions[0]['id']} (films)") == 1
    assert " (films)" not in (made / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "figure", "reward", "pairs"),
    [
        ("dpo", "accuracies", "change of an answer's log-probability", True),
        ("kto", "margins", "change of an answer's log-probability", False),
        ("orpo", "accuracies", "mean log-probability of an answer's tokens", True),
        ("simpo", "accuracies", "mean log-probability of an answer's tokens", True),
    ],
)
def test_the_page_says_what_a_reward_is(reports, tmp_path, method, figure, reward, pairs):
    made = reports[2] / "tuned"
    predictions = [json.loads(line) for line in (made / "predictions.jsonl").open()]
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", f"rewards/{figure}")
    lines = [{"step": 1, "epoch": epoch, "loss": 1.0, **dict.fromkeys(names, 0.5)} for epoch in (0.5, 1.0)]
    pages = []
    for validation in ([], [{"step": 2, "epoch": 1.0, "eval_loss": 1.0, **{f"eval_{name}": 0.5 for name in names}}]):
        configs = {"train_adapter": {"method.name": method}}
        run_page.write_page(tmp_path, read_figures(made), predictions, [*lines, *validation], config()["eval"], configs)
        pages.append((tmp_path / "report.html").read_text())
    for page in pages:
        assert f"A reward is beta times the {reward}" in page
        assert ("a pair counts as right" in page) == pairs
    assert ["and on the validation split" in page for page in pages] == [False, True]


@pytest.mark.parametrize(("task", "answer"), [("tags", "love, life"), ("text", "Life is what happens.")])
def test_other_tasks(folder, tmp_path, task, answer):
    make_tiny_splits(tmp_path / "splits", folder / "model", rows={"test": [("Quote", answer), ("Another", answer)]})
    facts = evaluate(folder, tmp_path / "report", config(task), splits=tmp_path / "splits")
    assert facts["metric"] in facts["values"]
    assert "confusion" not in facts
    again = evaluate(
        folder, tmp_path / "tuned", config(task), "--base-report", tmp_path / "report", splits=tmp_path / "splits"
    )
    assert again["delta"]["value"] == 0
    assert "as good as the base model&#39;s" in (tmp_path / "tuned" / "report.html").read_text()


def test_rows_that_were_too_long_are_told(folder, tmp_path, reports):
    splits = tmp_path / "splits"
    make_tiny_splits(splits, folder / "model", rows={"train": 6, "test": [("Short", "positive")]})
    assert "left out" not in (reports[2] / "tuned" / "report.html").read_text().lower()
    audit = json.loads((splits / "audit.json").read_text())
    audit["splits"]["test"] |= {"dropped": 2, "read": 3}
    (splits / "audit.json").write_text(json.dumps(audit))
    facts = evaluate(folder, tmp_path / "report", config(), splits=splits)
    assert facts["left_out"]["test"] == {"dropped": 2, "read": 3}
    assert "2 of 3 test rows" in (tmp_path / "report" / "report.html").read_text()


def test_rows_that_stand_in_train_are_told_of_a_model_that_was_trained(folder, tmp_path, adapter):
    splits = tmp_path / "splits"
    rows = [("fine film", "positive"), ("a bore", "negative"), ("dull", "negative")]
    make_tiny_splits(splits, folder / "model", rows={"train": 6, "test": rows})
    without = evaluate(folder, tmp_path / "none", config(), "--adapter", adapter, splits=splits)
    assert without["without_train"] is None and without["data_report"] is None
    known = {"rows": {"test": {"near": [read_json_lines(tmp_path / "none/predictions.jsonl")[0]["id"]]}}}
    (splits / "overlap.json").write_text(json.dumps({**known, "report": "results/prompts/x/report.html"}))
    facts = evaluate(folder, tmp_path / "tuned", config(), "--adapter", adapter, splits=splits)
    scores = [row["score"] for row in read_json_lines(tmp_path / "tuned/predictions.jsonl")]
    assert facts["without_train"]["rows"] == 2 and facts["without_train"]["in_train"] == {"prompt": 0, "near": 1}
    assert facts["without_train"]["value"] == pytest.approx(sum(scores[1:]) / 2)
    page = (tmp_path / "tuned/report.html").read_text()
    assert "1 of 3 test rows also stands in train (1 with nearly the same); without them accuracy is" in page
    assert "results/prompts/x/report.html" in page
    evaluate(folder, tmp_path / "base", config(), splits=splits)
    assert "also stand" not in (tmp_path / "base/report.html").read_text()


# --- what a person can get wrong -----------------------------------------------------------------


def refused(capsys, *arguments, **keywords) -> str:
    with pytest.raises(SystemExit) as stopped:
        evaluate(*arguments, **keywords)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_unknown_metric(folder, tmp_path, capsys):
    assert "has no metric 'bleu'" in refused(capsys, folder, tmp_path / "report", config(metric="bleu"))
    assert not (tmp_path / "report").exists()


def test_base_report_of_other_rows(folder, tmp_path, reports, capsys):
    line = refused(capsys, folder, tmp_path / "report", config(), "--base-report", reports[2] / "base")
    assert "other rows" in line
    assert "eval.split=test" in line


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_rows_in_the_split(folder, tmp_path, capsys, split):
    make_tiny_splits(tmp_path / "splits", folder / "model", rows={split: 0})
    line = refused(capsys, folder, tmp_path / "r", config(split=split), splits=tmp_path / "splits")
    assert f"no rows in the {split} split" in line
    assert ("eval.split=test" in line) == (split == "validation")


# --- samples -------------------------------------------------------------------------------------


def rows_of(*scores) -> list[dict]:
    return [{"id": number, "score": ours, "base_score": base} for number, (ours, base) in enumerate(scores)]


def test_samples_are_counted_by_what_tuning_did():
    rows = rows_of((1, 0), (1, 0), (0, 1), (0, 0), (1, 1))
    groups = run_page.sample_groups(rows, "labels")
    counts = {name: len(rows) for name, rows in groups.items()}
    assert counts == {
        "fixed by tuning": 2,
        "broken by tuning": 1,
        "wrong before and after": 1,
        "right before and after": 1,
    }
    graded = run_page.sample_groups(rows_of((0.7, 0.2), (0.1, 0.2), (0.3, 0.3)), "text")
    assert [len(rows) for rows in graded.values()] == [1, 1, 1]


def test_samples_are_shared_out_fairly_and_spread():
    groups = {"many": list(range(100)), "few": [1], "none": [], "some": list(range(10))}
    chosen = run_page.choose_samples(groups, 11)
    assert chosen == {"many": [0, 20, 40, 60, 80], "few": [1], "some": [0, 2, 4, 6, 8]}
    assert run_page.choose_samples(groups, 0) == {}
    assert sum(map(len, run_page.choose_samples(groups, 1000).values())) == 111


def test_a_diverged_training_has_a_report_that_says_so(tmp_path, monkeypatch, tiny_model, tiny_splits):
    from steps import merge_adapter, train_adapter

    monkeypatch.chdir(tmp_path)
    options = ["experiment=smoke", "train.learning_rate=1e30", "train.max_grad_norm=0", "train.logging_steps=1"]
    options += ["train.num_train_epochs=2", "train.per_device_train_batch_size=4"]
    splits = ["--splits", str(tiny_splits)]
    train_adapter.main([*splits, "--model", str(tiny_model), "--output", "adapter", *options])
    merge_adapter.main(["--model", str(tiny_model), "--adapter", "adapter", "--output", "merged"])
    evaluate_model.main(
        [*splits, "--model", "merged", "--adapter", "adapter", "--output", "report", "experiment=smoke"]
    )
    facts = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert facts["diverged_at_step"] == facts["train"]["diverged_at_step"]
    assert "The training diverged" in (tmp_path / "report" / "report.html").read_text()
