"""On-policy pairs: the model's own wrong answers are what is rejected."""

import json
from pathlib import Path

import pytest
from datasets import load_from_disk

from steps import reference_logprobs, sample_answers, train_adapter
from temper.config.stages import load_stage_config
from temper.planning import planner
from tests.support.tiny import make_tiny_splits, tiny_rows

OPTIONS = ["experiment=dpo", "model.load.dtype=float32", "method.own_answers={max_new_tokens: 6, do_sample: false}"]


def sample(splits, model, output, *overrides) -> dict[int, dict]:
    """Row number -> its line in answers.jsonl."""
    arguments = ["--splits", str(splits), "--model", str(model), "--output", str(output)]
    sample_answers.main([*arguments, *OPTIONS, *overrides])
    lines = [json.loads(line) for line in (Path(output) / "answers.jsonl").read_text().splitlines()]
    return {line["id"]: line for line in lines}


def test_wrong_answers_are_rejected_and_rows_without_one_left_out(workspace, tiny_model):
    rows = tiny_rows(24)
    plain = make_tiny_splits(workspace / "plain", tiny_model)
    said = sample(plain, tiny_model, "first")
    rows[4] = (rows[4][0], said[5]["answer"])  # row 5 wants what the model says anyway
    known = make_tiny_splits(workspace / "known", tiny_model, rows={"train": rows})
    again = sample(known, tiny_model, "second")
    assert [number for number, line in again.items() if line["right"]] == [5]
    pairs, splits = load_from_disk("second"), load_from_disk(known)
    assert pairs["train"]["id"][:] == [number for number in splits["train"]["id"] if number != 5]
    assert pairs["test"].to_dict() == splits["test"].to_dict(), "the test split stays as it is"
    for row in pairs["train"]:
        start = row["prompt_length"]
        assert row["rejected_input_ids"][:start] == row["input_ids"][:start]
        assert row["rejected_labels"] == [-100] * start + row["rejected_input_ids"][start:]
        assert row["rejected"] == again[row["id"]]["answer"] != row["reference"]
    counts = json.loads(Path("second/audit.json").read_text())["own_answers"]
    assert counts["train"] == {"read": 24, "rows": 23, "right": 1}


def test_what_is_rejected_is_what_the_model_generated_to_its_tokens(workspace, tiny_splits, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    sample(tiny_splits, tiny_model, "pairs")
    model, row = AutoModelForCausalLM.from_pretrained(tiny_model), load_from_disk("pairs")["train"][0]
    prompt = torch.tensor([row["input_ids"][: row["prompt_length"]]])
    assert row["rejected_input_ids"] == model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist()


def test_a_sampled_answer_depends_on_its_row_alone(workspace, tiny_splits, tiny_model):
    drawn = "method.own_answers={max_new_tokens: 6, do_sample: true, batch_size: 3}"
    everything = sample(tiny_splits, tiny_model, "all", drawn)
    few = make_tiny_splits(workspace / "few", tiny_model, rows={"train": 7, "validation": 0})
    for number, line in sample(few, tiny_model, "few-pairs", drawn.replace("3}", "5}")).items():
        assert line == everything[number]


def test_a_model_that_is_always_right_has_nothing_to_reject(workspace, tiny_splits, tiny_model, capsys):
    said = sample(tiny_splits, tiny_model, "first")
    rows = [(line["prompt"], line["answer"]) for line in said.values()][:24]
    splits = make_tiny_splits(workspace / "known", tiny_model, rows={"train": rows})
    with pytest.raises(SystemExit) as stopped:
        sample(splits, tiny_model, "second")
    assert stopped.value.code == 2
    assert "all its answers to the train split are right" in capsys.readouterr().err


def test_training_takes_the_pairs_as_it_takes_others(workspace, tiny_splits, tiny_model):
    sample(tiny_splits, tiny_model, "pairs")
    inputs = ["--splits", "pairs", "--model", str(tiny_model)]
    reference_logprobs.main([*inputs, "--output", "references", *OPTIONS])
    train_adapter.main([*inputs, "--references", "references", "--output", "adapter", *OPTIONS])
    assert json.loads(Path("adapter/training.json").read_text())["global_step"] == 2


def test_the_plan_samples_from_the_model_that_training_starts_from(workspace):
    own = "method.own_answers={max_new_tokens: 8}"
    plan = planner.build("sft_dpo", None, [own, "~data.rejected_from", "method.beta=0.1,0.3"])
    (pairs,) = (job for job in plan.jobs.values() if job.stage == "sample_answers")
    for run in plan.runs:
        training = plan.jobs[run.artefacts["train_adapter"]]
        assert training.inputs["splits"] == pairs.path
        assert training.inputs["model"] == pairs.inputs["model"]
        assert plan.jobs[training.inputs["references"]].inputs["splits"] == pairs.path
        report = plan.jobs[run.artefacts["evaluate_model"]]
        assert report.inputs["splits"] == pairs.inputs["splits"], "all models are judged on the same test split"
        assert "references" not in report.inputs, "the test split has no pairs"
    longer = planner.build("sft_dpo", None, [own.replace("8", "9"), "~data.rejected_from"])
    assert pairs.path not in longer.jobs


def test_a_misspelt_key_is_named(workspace):
    from temper.errors import UserError

    with pytest.raises(UserError, match="unknown key 'method.own_answers.max_tokens'; did you mean 'max_new_tokens'"):
        load_stage_config("sample_answers", None, ["experiment=dpo", "method.own_answers={max_tokens: 8}"])
