"""Answers that choose the checkpoint: judged as plain transformers would, and nothing else moves for it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from steps import train_adapter
from temper import keys
from temper.config.best import JUDGING
from temper.config.stages import load_stage_config
from temper.evaluation.class_names import read_class
from temper.files import read_json_lines
from temper.model.adapters import put_on
from temper.model.loading import load_model, load_tokenizer, stop_token_ids
from temper.planning import planner
from tests.conftest import rarely
from tests.support.trainings import SMALL, assert_equal, train

BEST = ["train.load_best_model_at_end=true", "train.save_total_limit=20", "train.num_train_epochs=4"]
FAST = ["train.learning_rate=2e-2", "train.warmup_steps=0", "eval.max_new_tokens=4"]
OWN = "def my_loss(prediction, reference, row):\n    return prediction.count('t') / (1 + len(prediction))\n"


def chosen_by(name, *more):
    return [*BEST, *FAST, f"train.metric_for_best_model=eval_{name}", *more]


def curve(folder, name):
    return {line["step"]: line[name] for line in read_json_lines(Path(folder, "metrics.jsonl")) if name in line}


def facts(folder):
    return json.loads(Path(folder, "training.json").read_text())


def answers(splits, folder, adapter):
    """Greedy answers to the validation rows by transformers alone, a row at a time."""
    model = put_on(load_model(folder, {"dtype": "float32", "attn_implementation": "eager"}), adapter).eval()
    tokenizer, found = load_tokenizer(folder), []
    stop = stop_token_ids(folder, tokenizer)
    for row in load_from_disk(splits)["validation"]:
        ids = torch.tensor([row["input_ids"][: row["prompt_length"]]])
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": stop, "pad_token_id": stop[0]}
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        found.append((row["reference"], tokenizer.decode(new, skip_special_tokens=True)))
    return found


def test_the_figures_are_those_of_plain_generation(workspace, tiny_splits, tiny_model, caplog):
    Path("mine.py").write_text(OWN)
    with caplog.at_level("INFO", "temper"):
        train(tiny_splits, tiny_model, "out", *chosen_by("my_loss", "eval.metrics=[mine:my_loss]"), trunk="one")
    found = curve("out", "eval_my_loss")
    assert list(found) == list(curve("out", "eval_loss")) and len(set(found.values())) > 2, found
    for step, value in found.items():
        texts = answers(tiny_splits, tiny_model, Path(f"results/.state/one/checkpoint-{step}"))
        assert value == pytest.approx(sum(text.count("t") / (1 + len(text)) for _, text in texts) / len(texts))
    best = max(found, key=found.get)  # the first of equals; not the lowest, whatever the metric's name ends in
    assert facts("out")["best_step"] == best and facts("out")["eval_my_loss"] == found[best]
    assert_equal(
        load_file("out/adapter_model.safetensors"),
        load_file(f"results/.state/one/checkpoint-{best}/adapter_model.safetensors"),
    )
    said = caplog.text
    assert "eval_my_loss chooses the checkpoint: each of about 4 evaluations takes an answer of up to 4 tokens" in said
    assert "3 more make about" in said


@pytest.mark.parametrize("name", ["generated_accuracy", "accuracy"])
def test_labels(workspace, tiny_splits, tiny_model, name):
    train(tiny_splits, tiny_model, "out", *chosen_by(name), trunk="one")
    found = curve("out", f"eval_{name}")
    step = max(found)
    assert len(set(found.values())) > 1 and facts("out")["best_step"] == max(found, key=found.get)
    if name == "generated_accuracy":
        texts = answers(tiny_splits, tiny_model, Path(f"results/.state/one/checkpoint-{step}"))
        right = [read_class(text, ["negative", "positive"]) == wanted for wanted, text in texts]
        assert found[step] == pytest.approx(sum(right) / len(right))


def test_it_moves_no_weight_and_resumes_exactly(workspace, tiny_splits, tiny_model):
    plain = [*BEST, *FAST]
    train(tiny_splits, tiny_model, "plain", *plain, trunk="plain")
    judged = train(tiny_splits, tiny_model, "judged", *chosen_by("exact_match"), trunk="one")
    last = facts("judged")["global_step"]
    weights = [
        load_file(f"results/.state/{name}/checkpoint-{last}/adapter_model.safetensors") for name in ("plain", "one")
    ]
    assert_equal(*weights)
    shutil.copytree("results/.state/one", "results/.state/two")
    shutil.rmtree(f"results/.state/two/checkpoint-{last}")
    assert_equal(judged, train(tiny_splits, tiny_model, "resumed", *chosen_by("exact_match"), trunk="two"))
    assert facts("resumed")["resumed_from_step"] > 0
    for name in ("eval_exact_match", "eval_loss", "loss"):
        assert curve("resumed", name) == curve("judged", name)
    assert facts("resumed")["best_step"] == facts("judged")["best_step"]


WAYS = {
    "virtual tokens": (["adapter=prompt_tuning", "~adapter.r", "~adapter.lora_dropout"], "adapter_model.safetensors"),
    "all parameters": (["adapter=full", "~adapter.r", "~adapter.lora_dropout"], "model.safetensors"),
    "less memory": (["train.gradient_checkpointing=true"], "adapter_model.safetensors"),
    "in 4 bits": (["quantization=4bit", "adapter.lora_dropout=0.1"], "adapter_model.safetensors"),
}


@pytest.mark.parametrize("name", rarely(WAYS, ("less memory", "in 4 bits")))
def test_any_training_can_be_judged(workspace, tiny_splits, tiny_model, name):
    options, file = WAYS[name]
    found = []
    for metric in ("loss", "exact_match"):
        by = [*chosen_by(metric), "train.num_train_epochs=1", *options]
        arguments = ["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", metric]
        config = load_stage_config("train_adapter", None, [*SMALL, *by]) | {"trunk": metric}
        train_adapter.main([*arguments, "--config", json.dumps(config)])
        found.append(load_file(f"results/.state/{metric}/checkpoint-{facts(metric)['global_step']}/{file}"))
    assert_equal(*found)
    assert curve("exact_match", "eval_exact_match") and not curve("loss", "eval_exact_match")


def test_preference_pairs(workspace, tiny_pairs, tiny_model):
    from steps import reference_logprobs

    fixed = ["experiment=dpo", "sweep=none", "model.load.dtype=float32"]
    inputs = ["--splits", str(tiny_pairs), "--model", str(tiny_model)]
    reference_logprobs.main([*inputs, "--output", "references", *fixed])
    options = [*fixed, *SMALL[1:], *chosen_by("accuracy"), "train.num_train_epochs=1"]
    train_adapter.main([*inputs, "--references", "references", "--output", "out", *options])
    assert set(curve("out", "eval_accuracy")) == set(curve("out", "eval_rewards/margins"))


# --- keys ----------------------------------------------------------------------------------------

FIXED = ["sweep=none", "train.num_train_epochs=1", "train.load_best_model_at_end=true"]


def trainings(*overrides):
    plan = planner.build("smoke", None, [*FIXED, *overrides])
    return {job.path: job for job in plan.jobs.values() if job.stage == "train_adapter"}


def test_the_key_has_what_judges_and_only_where_it_is_asked_for(workspace):
    Path("mine.py").write_text(OWN)
    own = ["eval.metrics=[mine:my_loss]"]
    by = {name: f"train.metric_for_best_model=eval_{name}" for name in ("accuracy", "exact_match", "my_loss")}
    plain = trainings(*own)
    assert plain.keys() == trainings("eval.max_new_tokens=3").keys()
    assert JUDGING not in keys.code_hashes("steps.train_adapter")
    assert not {"eval", "own_code", "judging_code"} & next(iter(plain.values())).config.keys()

    likeliest = trainings(by["accuracy"])
    assert likeliest.keys() == trainings(by["accuracy"], "eval.max_new_tokens=3", "eval.samples=1", *own).keys()
    assert next(iter(likeliest.values())).config["judging_code"] == keys.code_key(JUDGING)
    answered = trainings(by["exact_match"])
    assert answered.keys() != trainings(by["exact_match"], "eval.max_new_tokens=3").keys()
    assert answered.keys() == trainings(by["exact_match"], *own).keys()

    mine = trainings(by["my_loss"], *own)
    assert list(next(iter(mine.values())).config["own_code"]) == ["mine.py"]
    Path("mine.py").write_text(OWN.replace("1 +", "2 +"))
    assert mine.keys() != trainings(by["my_loss"], *own).keys()
    assert trainings(*own).keys() == plain.keys()


def test_by_hand_the_checkpoints_know_what_judges(workspace):
    Path("mine.py").write_text(OWN)
    names = []
    for text in (OWN, OWN, OWN.replace("1 +", "2 +")):
        Path("mine.py").write_text(text)
        config = load_stage_config(
            "train_adapter", None, [*SMALL, *chosen_by("my_loss", "eval.metrics=[mine:my_loss]")]
        )
        names.append(train_adapter._by_hand(train_adapter.TrainAdapter.model_validate(config), []))
    assert names[0] == names[1] != names[2]
