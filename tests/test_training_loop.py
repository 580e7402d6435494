"""The loop itself: when it evaluates, what it keeps, where it ends, beside a plain transformers.Trainer."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from steps import merge_adapter
from steps.lib.adapters import add_adapter
from steps.lib.batches import EpochSampler, collate
from steps.lib.config import load_stage_config
from steps.lib.models import load_model, load_tokenizer
from steps.lib.training import read_metrics
from tests import tiny
from tests.test_train_adapter import SMALL, assert_equal, train

PLAIN = ["adapter.lora_dropout=0", "train.learning_rate=1e-2", "train.warmup_steps=0", "train.logging_steps=1"]
EVERY_4 = ["train.eval_strategy=steps", "train.eval_steps=4", "train.save_strategy=steps", "train.save_steps=4"]
BEST = ["train.load_best_model_at_end=true"]


def facts(folder: str) -> dict:
    return json.loads(Path(folder, "training.json").read_text())


def figure(folder: str, name: str) -> dict[int, float]:
    """Step -> a figure of metrics.jsonl."""
    return {line["step"]: line[name] for line in read_metrics(Path(folder, "metrics.jsonl")) if name in line}


class SameRows(Trainer, TrainerCallback):
    """transformers.Trainer, but for the order of rows, and a record of what it logs."""

    def __init__(self, batch: int, **arguments):
        super().__init__(**arguments)
        lengths = [len(row) for row in self.train_dataset["input_ids"]]
        self.sampler = EpochSampler(lengths, batch, self.args.seed)
        self.add_callback(self)

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def on_epoch_begin(self, args, state, control, **_):
        self.sampler.epoch = round(state.epoch or 0)

    def figure(self, name: str) -> dict[int, float]:
        return {line["step"]: line[name] for line in self.state.log_history if name in line}


def plain_trainer(splits, model, *overrides) -> SameRows:
    """A plain Trainer after training on the same rows, by the same options, from the same start."""
    config = load_stage_config("train_adapter", None, [*SMALL, *overrides])
    fixed = {"output_dir": "plain", "report_to": "none", "disable_tqdm": True, "seed": config["seed"]}
    args = TrainingArguments(**{**config["train"], **fixed, "dataloader_pin_memory": False})
    rows = load_from_disk(splits).select_columns(["input_ids", "labels"])
    network = add_adapter(load_model(Path(model), config["model"]["load"]), config["adapter"], config["seed"])
    trainer = SameRows(
        args.per_device_train_batch_size * args.gradient_accumulation_steps,
        model=network,
        args=args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=functools.partial(collate, pad_token_id=load_tokenizer(model).pad_token_id),
    )
    trainer.train()
    return trainer


ENDS = {
    "within the second epoch": ["train.max_steps=10", *BEST],
    "one and a half epochs": ["train.num_train_epochs=1.5", *BEST],
    "half an epoch": ["train.num_train_epochs=0.5", *BEST],
    "every few steps": ["train.max_steps=10", *EVERY_4, *BEST],
    "whole epochs": ["train.num_train_epochs=2", *BEST],
    "the last model": ["train.max_steps=10"],
    "the last model, every few steps": ["train.max_steps=10", *EVERY_4],
    "no evaluation": ["train.max_steps=4", "train.eval_strategy=no"],
}


@pytest.mark.parametrize("name", ENDS)
def test_evaluates_and_chooses_as_a_plain_trainer(workspace, tiny_splits, tiny_model, name):
    options = [*PLAIN, *ENDS[name]]
    train(tiny_splits, tiny_model, "out", *options)
    plain = plain_trainer(tiny_splits, tiny_model, *options)
    evaluated, expected = figure("out", "eval_loss"), plain.figure("eval_loss")
    assert list(evaluated) == list(expected)
    assert list(evaluated.values()) == pytest.approx(list(expected.values()), rel=1e-4)
    losses, expected_losses = figure("out", "loss"), plain.figure("loss")
    assert list(losses) == list(expected_losses) == list(range(1, plain.state.global_step + 1))
    assert list(losses.values()) == pytest.approx(list(expected_losses.values()), rel=1e-4)
    keeps_best = "load_best" in "".join(options)
    kept = plain.state.best_global_step if keeps_best else plain.state.global_step
    found = facts("out")
    assert found["best_step"] == (kept if keeps_best else None)
    assert found["eval_loss"] == evaluated.get(kept)
    assert found["final_loss"] == losses[plain.state.global_step]
    trained = dict(plain.model.named_parameters())
    for key, weight in load_file("out/adapter_model.safetensors").items():
        torch.testing.assert_close(weight, trained[key.replace(".weight", ".default.weight")], rtol=1e-3, atol=1e-4)


def test_a_training_that_has_ended_takes_no_step_more(workspace, tiny_splits, tiny_model):
    """As after a kill between its last checkpoint and its output, or when the output was deleted."""
    first = train(tiny_splits, tiny_model, "first", "train.max_steps=10", trunk="ended")
    again = train(tiny_splits, tiny_model, "again", "train.max_steps=10", trunk="ended")
    assert facts("again")["resumed_from_step"] == facts("again")["global_step"] == 10
    assert_equal(first, again)
    for name in ("final_loss", "eval_loss", "tokens"):
        assert facts("again")[name] == facts("first")[name]


def test_a_training_that_was_stopped_early_stays_so(workspace, tiny_splits, tiny_model):
    from tests.test_options import BEST as STOPPED

    first = train(tiny_splits, tiny_model, "first", *STOPPED, trunk="stopped")
    again = train(tiny_splits, tiny_model, "again", *STOPPED, trunk="stopped")
    assert facts("again")["global_step"] == facts("first")["global_step"] == 18
    assert facts("again")["best_step"] == facts("first")["best_step"]
    assert_equal(first, again)


@pytest.mark.parametrize("save", ["train.save_steps=6", "train.save_steps=2 train.save_total_limit=1"])
def test_what_is_in_no_key_does_not_choose_the_best_model(workspace, tiny_splits, tiny_model, save):
    options = [*PLAIN, *EVERY_4, "train.eval_steps=2", "train.save_steps=2", *BEST]
    options += ["train.metric_for_best_model=eval_loss", "train.greater_is_better=true"]  # the first one, then
    expected = train(tiny_splits, tiny_model, "expected", *options)
    best = max(figure("expected", "eval_loss").items(), key=lambda item: item[1])[0]
    assert best == facts("expected")["best_step"] == 2
    found = train(tiny_splits, tiny_model, "found", *options, *save.split())
    assert facts("found")["best_step"] == best
    assert_equal(expected, found)


def test_the_curve_of_a_shared_trunk_is_that_of_a_separate_run(workspace, tiny_splits, tiny_model):
    options = ["train.logging_steps=4"]  # of 6 in an epoch
    for epoch in (1, 2):
        train(tiny_splits, tiny_model, f"shared{epoch}", *options, f"train.num_train_epochs={epoch}", trunk="shared")
    train(tiny_splits, tiny_model, "alone", *options, "train.num_train_epochs=2", trunk="alone")
    shared, alone = ({name: figure(folder, name) for name in ("loss", "eval_loss")} for folder in ("shared2", "alone"))
    assert list(alone["loss"]) == [4, 6, 8, 12]
    assert shared == alone


SMOOTH = [*PLAIN, "train.label_smoothing_factor=0.1", "train.eval_strategy=no"]


def test_label_smoothing_is_trainers(workspace, tiny_splits, tiny_model):
    options = [*SMOOTH, "train.gradient_accumulation_steps=2"]
    train(tiny_splits, tiny_model, "out", *options)
    plain = plain_trainer(tiny_splits, tiny_model, *options)
    assert list(figure("out", "loss").values()) == pytest.approx(list(plain.figure("loss").values()), rel=1e-5)
    train(tiny_splits, tiny_model, "unsmoothed", *options, "train.label_smoothing_factor=0")
    assert figure("out", "loss")[1] != pytest.approx(figure("unsmoothed", "loss")[1], rel=1e-3)


def test_accumulated_steps_are_those_of_one_batch(workspace, tiny_splits, tiny_model):
    options = [*PLAIN, "train.num_train_epochs=2", "train.optim=sgd"]
    train(tiny_splits, tiny_model, "large", *options, "train.per_device_train_batch_size=8")
    for rows, steps in ((4, 2), (2, 4)):
        cut = [f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={steps}"]
        train(tiny_splits, tiny_model, f"cut{rows}", *options, *cut)
        found, expected = figure(f"cut{rows}", "loss"), figure("large", "loss")
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)


DIVERGING = {
    "at each step": ["train.learning_rate=1e30", "train.max_grad_norm=0", "train.logging_steps=1"],
    "between two steps that are logged": [
        "train.learning_rate=1e30",
        "train.max_grad_norm=0",
        "train.logging_steps=500",
    ],
    "in the last update, which no loss shows": [
        "train.learning_rate=1e300",
        "train.max_steps=2",
        "train.warmup_steps=1",
    ],
    "in the gradients, with a fine loss": [f"adapter.lora_alpha={10**38}"],
    "without validation and logs": ["train.learning_rate=1e30", "train.logging_strategy=no", "train.eval_strategy=no"],
}


@pytest.mark.parametrize("name", DIVERGING)
def test_what_diverged_is_a_result_and_no_model(workspace, tiny_splits, tiny_model, name):
    options = DIVERGING[name]
    train(tiny_splits, tiny_model, "out", *options, trunk="shared")
    found = facts("out")
    assert found["diverged_at_step"] == found["global_step"]
    assert found["eval_loss"] is None
    merge_adapter.main(["--model", str(tiny_model), "--adapter", "out", "--output", "merged"])
    assert json.loads(Path("merged/diverged.json").read_text()) == {"step": found["diverged_at_step"]}
    for weights in Path("results/.state/shared").glob("checkpoint-*/adapter_model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(weights).values()), "nobody continues from nan"


def test_a_trunk_that_diverged_does_so_for_all_its_runs_at_one_step(workspace, tiny_splits, tiny_model):
    options = DIVERGING["between two steps that are logged"]
    for epochs in (1, 2):
        train(tiny_splits, tiny_model, f"out{epochs}", *options, f"train.num_train_epochs={epochs}", trunk="shared")
    assert facts("out1")["diverged_at_step"] == facts("out2")["diverged_at_step"] is not None


def test_by_hand_what_was_made_anew_is_trained_anew(workspace, tiny_model):
    """The same command, the same paths, but other rows in them: no checkpoint of the old ones goes on."""
    splits = tiny.make_tiny_splits(workspace / "splits", tiny_model)
    train("splits", tiny_model, "first")
    shutil.rmtree(splits)
    shutil.rmtree("first")
    tiny.make_tiny_splits(splits, tiny_model, rows={"train": tiny.tiny_rows(24, 100)})
    found = train("splits", tiny_model, "again")
    assert facts("again")["resumed_from_step"] == 0
    shutil.rmtree("results")
    assert_equal(found, train("splits", tiny_model, "expected"))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """Wide enough that torch shares its products among threads, and rounds otherwise with two than with one."""
    return tiny.make_tiny_model(tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=512)


def test_the_bits_follow_from_num_threads_whatever_the_machine_offers(workspace, tiny_splits, wide_model):
    offered, found = torch.get_num_threads(), []
    try:
        for threads, machine in ((1, 1), (1, 2), (2, 1)):
            torch.set_num_threads(machine)
            options = [f"num_threads={threads}", "train.max_steps=2", "train.eval_strategy=no"]
            found.append(train(tiny_splits, wide_model, f"out{len(found)}", *options))
            assert torch.get_num_threads() == machine, "the caller's setting stays"
    finally:
        torch.set_num_threads(offered)
    assert_equal(found[0], found[1])
    assert any(not torch.equal(weight, found[2][name]) for name, weight in found[0].items()), "else this shows nothing"
