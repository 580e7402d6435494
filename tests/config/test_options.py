"""Options of TrainingArguments that people know, and the estimates, on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steps import train_adapter
from temper.config.stages import validated_stage
from temper.errors import UserError
from temper.planning import planner
from temper.training.arguments import training_arguments
from tests.support.trainings import BEST, assert_equal, train


def facts(folder: str) -> dict:
    return json.loads(Path(folder, "training.json").read_text())


def lines(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_max_steps_overrides_epochs(workspace, tiny_splits, tiny_model):
    train(tiny_splits, tiny_model, "out", "train.max_steps=4", "train.num_train_epochs=9")
    assert facts("out")["global_step"] == 4


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch_fused", "sgd", "adamw_bnb_8bit", "paged_lion_8bit"])
def test_optimizers_by_their_names(workspace, tiny_splits, tiny_model, optim):
    rate = 1 if optim == "sgd" else 1e-2  # the others scale gradients to steps of about the rate
    train(
        tiny_splits, tiny_model, "out", f"train.optim={optim}", f"train.learning_rate={rate}", "train.logging_steps=1"
    )
    losses = [line["loss"] for line in lines("out") if "loss" in line]
    assert len(losses) == 6
    assert min(losses[1:]) < losses[0], "it learns"


def test_gradient_checkpointing_changes_no_loss(workspace, tiny_splits, tiny_model):
    """Up to rounding: layers that run again get their rows padded, so dropout would draw otherwise."""
    options = ["train.logging_steps=1", "train.optim=sgd", "adapter.lora_dropout=0"]
    train(tiny_splits, tiny_model, "plain", *options)
    train(tiny_splits, tiny_model, "checkpointed", *options, "train.gradient_checkpointing=true")
    losses = [[line["loss"] for line in lines(name) if "loss" in line] for name in ("plain", "checkpointed")]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][-1]


def test_evaluations_and_checkpoints_every_few_steps(workspace, tiny_splits, tiny_model):
    every = ["train.eval_strategy=steps", "train.eval_steps=2", "train.save_strategy=steps", "train.save_steps=4"]
    train(tiny_splits, tiny_model, "out", *every, "train.num_train_epochs=2", "train.save_total_limit=9")
    assert [line["step"] for line in lines("out") if "eval_loss" in line] == [2, 4, 6, 8, 10, 12]
    saved = {int(path.name.split("-")[1]) for path in Path("results/.state").glob("*/checkpoint-*")}
    assert saved == {4, 6, 8, 12}, "every fourth step, and the ends of the epochs"


def test_a_key_that_becomes_another_can_be_an_axis():
    runs = planner.build("smoke", "none", ["train.warmup_ratio=0.1,0.2"]).runs
    assert [run.point for run in runs] == [{"train.warmup_ratio": "0.1"}, {"train.warmup_ratio": "0.2"}]
    assert [run.config["train"]["warmup_steps"] for run in runs] == [0.1, 0.2]


def test_a_share_of_the_steps_as_warmup(workspace, tiny_splits, tiny_model):
    config = planner.build("smoke", "none", ["train.warmup_ratio=0.5"]).runs[0].config["train"]
    assert config["warmup_steps"] == 0.5
    train(tiny_splits, tiny_model, "out", "train.warmup_ratio=0.5", "train.logging_steps=1")
    rates = [line["learning_rate"] for line in lines("out") if "learning_rate" in line]
    assert rates == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3], rel=1e-5)


def test_early_stopping_keeps_the_best(workspace, tiny_splits, tiny_model):
    found = train(tiny_splits, tiny_model, "out", *BEST, trunk="best")
    evaluations = {line["step"]: line["eval_loss"] for line in lines("out") if "eval_loss" in line}
    best = min(evaluations, key=evaluations.get)
    assert facts("out")["best_step"] == best
    assert max(evaluations) == 18 < 48, "two evaluations of 6 steps each without a gain end it"
    assert_equal(found, load_file(f"results/.state/best/checkpoint-{best}/adapter_model.safetensors"))


def test_early_stopping_goes_on_counting_after_a_kill(workspace, tiny_splits, tiny_model):
    undisturbed = train(tiny_splits, tiny_model, "undisturbed", *BEST, trunk="one")
    last = facts("undisturbed")["global_step"]
    shutil.copytree("results/.state/one", "results/.state/two")
    shutil.rmtree(f"results/.state/two/checkpoint-{last}")  # as if it had been killed in its last epoch
    resumed = train(tiny_splits, tiny_model, "resumed", *BEST, trunk="two")
    assert facts("resumed")["resumed_from_step"] > 0
    assert facts("resumed")["global_step"] == last
    assert_equal(undisturbed, resumed)


@pytest.mark.parametrize("when", [["train.eval_strategy=steps", "train.eval_steps=7"], []])
def test_a_planned_training_that_keeps_its_best_is_accepted_by_its_step(workspace, when):
    """When to save is in no key: the step gets it apart from its config, and `temper verify` does not get it at all."""
    plan = planner.build("smoke", "none", [*BEST[:3], *when, *(text.replace("eval", "save") for text in when)])
    (job,) = [job for job in plan.jobs.values() if job.stage == "train_adapter"]
    assert "save_strategy" not in job.config["train"]
    config = validated_stage("train_adapter", job.config)["train"]
    args = training_arguments(config, 1, Path("state"))
    assert args.save_strategy == args.eval_strategy
    assert args.save_steps == args.eval_steps or not when


def test_early_stopping_without_a_best_model_is_refused():
    with pytest.raises(UserError, match="early stopping needs"):
        planner.build("smoke", "none", ["train.early_stopping_patience=2"])


def test_a_run_that_may_stop_early_shares_no_trunk():
    runs = planner.build("smoke", "none", [*BEST[:3], "train.num_train_epochs=1,2"]).runs
    assert [len(run.segments) for run in runs] == [1, 1]


def full(tiny_splits, tiny_model, output: str, batch: int) -> None:
    """Train all parameters."""
    arguments = ["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", output]
    overrides = ["experiment=smoke", "adapter=full", f"train.per_device_train_batch_size={batch}"]
    train_adapter.main([*arguments, *overrides])


def test_estimates_stand_beside_what_was_measured(workspace, tiny_splits, tiny_model):
    full(tiny_splits, tiny_model, "four", 4)
    found = facts("four")
    assert found["parameter_memory_bytes"] == 4 * found["total_parameters"]
    rate = found["flops_per_step"] * found["steps_per_second"]
    assert found["gflop_per_second"] == pytest.approx(rate / 1e9, abs=1e-3)


def test_the_estimate_leaves_no_trace(workspace, tiny_splits, tiny_model, monkeypatch):
    from temper.training import estimates

    with_it = train(tiny_splits, tiny_model, "with")
    nothing = estimates.Estimate(0, 0, 0, 0, 0, 0.0)
    monkeypatch.setattr(estimates, "estimate", lambda *_: nothing)
    assert_equal(with_it, train(tiny_splits, tiny_model, "without"))
    assert torch.is_grad_enabled()
