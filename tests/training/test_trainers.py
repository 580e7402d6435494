"""The loop itself: when it evaluates, what it keeps, where it ends, beside a plain transformers.Trainer."""

import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from steps import evaluate_model, merge_adapter, train_adapter
from temper import workflow
from temper.config.stages import load_stage_config, typed
from temper.data.batches import EpochSampler, collate
from temper.files import read_json_lines
from temper.model.adapters import add_adapter
from temper.model.loading import load_model, load_tokenizer
from temper.planning import planner
from tests.conftest import ROOT, rarely
from tests.support import tiny
from tests.support.trainings import SMALL, assert_equal, train

PLAIN = ["adapter.lora_dropout=0", "train.learning_rate=1e-2", "train.warmup_steps=0", "train.logging_steps=1"]
EVERY_4 = ["train.eval_strategy=steps", "train.eval_steps=4", "train.save_strategy=steps", "train.save_steps=4"]
BEST = ["train.load_best_model_at_end=true"]


def facts(folder: str) -> dict:
    return json.loads(Path(folder, "training.json").read_text())


def figure(folder: str, name: str) -> dict[int, float]:
    """Step -> a figure of metrics.jsonl."""
    return {line["step"]: line[name] for line in read_json_lines(Path(folder, "metrics.jsonl")) if name in line}


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


@pytest.mark.parametrize("name", rarely(ENDS, ("half an epoch", "whole epochs", "the last model")))
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
    from tests.support.trainings import BEST as STOPPED

    first = train(tiny_splits, tiny_model, "first", *STOPPED, trunk="stopped")
    again = train(tiny_splits, tiny_model, "again", *STOPPED, trunk="stopped")
    assert facts("again")["global_step"] == facts("first")["global_step"] == 18
    assert facts("again")["best_step"] == facts("first")["best_step"]
    assert_equal(first, again)


def test_a_best_model_that_is_damaged_is_not_passed_off(workspace, tiny_splits, tiny_model, capsys):
    options = [*PLAIN, *EVERY_4, *BEST, "train.metric_for_best_model=eval_loss", "train.greater_is_better=true"]
    train(tiny_splits, tiny_model, "first", *options, trunk="best")
    assert facts("first")["best_step"] == 4
    weights = Path("results/.state/best/checkpoint-4/adapter_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-8] ^= 1  # one bit of one weight: the file still loads
    weights.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        train(tiny_splits, tiny_model, "again", *options, trunk="best")
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-4: the best model, adapter_model.safetensors is damaged; delete results/.state/best" in said
    shutil.rmtree("results/.state/best")
    assert_equal(
        train(tiny_splits, tiny_model, "again", *options, trunk="best"), load_file("first/adapter_model.safetensors")
    )


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


def test_the_batch_that_is_proposed_trains(workspace, tiny_splits, tiny_model):
    options = ["train.dataloader_drop_last=true", "train.warmup_steps=0"]
    with pytest.raises(SystemExit):
        train(tiny_splits, tiny_model, "none", *options, "train.per_device_train_batch_size=25")
    train(tiny_splits, tiny_model, "all", *options, "train.per_device_train_batch_size=24")
    assert facts("all")["global_step"] == 1


def test_evaluations_at_shares_of_the_total_are_shared_by_no_runs(workspace):
    every = ["train.eval_strategy=steps", "train.num_train_epochs=1,2"]
    shared = planner.build("smoke", "none", [*every, "train.eval_steps=4"]).runs
    apart = planner.build("smoke", "none", [*every, "train.eval_steps=0.5"]).runs
    assert [len(run.segments) for run in shared] == [1, 2]
    assert [len(run.segments) for run in apart] == [1, 1]


def test_a_training_takes_the_threads_that_its_key_says(workspace):
    one, three = (planner.build("smoke", "none", [f"num_threads={threads}"]) for threads in (1, 3))
    for made, threads in ((one, 1), (three, 3)):
        for stage in ("train_adapter", "evaluate_model"):
            path = made.runs[0].artefacts[stage]
            wildcards = SimpleNamespace(name=Path(path).name)
            assert workflow.threads_of(made, stage)(wildcards) == made.jobs[path].config["num_threads"] == threads
    assert one.runs[0].artefacts["tokenize_splits"] == three.runs[0].artefacts["tokenize_splits"]
    assert one.runs[0].artefacts["train_adapter"] != three.runs[0].artefacts["train_adapter"]
    assert "num_threads=8 is faster" in workflow.idle_cores(one, 8)
    assert workflow.idle_cores(three, 3) is None


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


def test_mixed_precision_is_trainers(workspace, tiny_splits, tiny_model):
    options = [*PLAIN, "train.use_cpu=true", "train.optim=sgd", "train.num_train_epochs=1"]
    train(tiny_splits, tiny_model, "full", *options)
    train(tiny_splits, tiny_model, "mixed", *options, "train.bf16=true")
    plain = plain_trainer(tiny_splits, tiny_model, *options, "train.bf16=true")
    for name in ("loss", "eval_loss"):
        exact, mixed, expected = figure("full", name), figure("mixed", name), plain.figure(name)
        assert list(mixed.values()) == pytest.approx(list(expected.values()), rel=1e-2)
        assert all(abs(mixed[step] - exact[step]) > 1e-4 for step in exact), "it is computed in another precision"


def test_workers_that_read_ahead_change_no_bit(workspace, tiny_splits, tiny_model):
    options = [*SMALL, "train.max_steps=3", "train.save_strategy=no", "train.eval_strategy=no"]
    alone = train(tiny_splits, tiny_model, "alone", *options)
    assert_equal(alone, train(tiny_splits, tiny_model, "ahead", *options, "train.dataloader_num_workers=2"))


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
    evaluate_model.main(
        [
            "--model",
            "merged",
            "--splits",
            str(tiny_splits),
            "--adapter",
            "out",
            "--output",
            "report",
            "experiment=smoke",
        ]
    )
    page = Path("report/report.html").read_text()
    assert f"diverged: at step {found['diverged_at_step']} " in page
    assert "None" not in page
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


def trained_with(threads: int, machine: int, splits, model) -> dict[str, torch.Tensor]:
    """The weights after two steps with `num_threads`, where torch would by itself take as many as `machine`."""
    offered = torch.get_num_threads()
    torch.set_num_threads(machine)
    try:
        options = [f"num_threads={threads}", "train.max_steps=2", "train.eval_strategy=no"]
        return train(splits, model, f"out-{threads}-{machine}", *options)
    finally:
        assert torch.get_num_threads() == machine, "the caller's setting stays"
        torch.set_num_threads(offered)


def test_the_bits_are_those_of_num_threads_whatever_the_machine_offers(workspace, tiny_splits, wide_model):
    assert_equal(trained_with(1, 1, tiny_splits, wide_model), trained_with(1, 2, tiny_splits, wide_model))


@pytest.mark.slow  # two threads wait for each other for seconds when the cores have other work
def test_another_num_threads_gives_other_bits(workspace, tiny_splits, wide_model):
    one, two = (trained_with(threads, 1, tiny_splits, wide_model) for threads in (1, 2))
    assert any(not torch.equal(weight, two[name]) for name, weight in one.items()), "else the key would not need it"


ESTIMATED = {
    "common beginnings are computed once": [],
    "with dropout nothing is shared": ["adapter.lora_dropout=0.1"],
    "two batches a step": ["train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=5"],
    "all parameters": ["adapter=full"],
    "padded rows": ["train.gradient_checkpointing=true"],
    "pairs": ["experiment=dpo", "model.load.dtype=float32"],
}


@pytest.mark.parametrize("name", ESTIMATED)
def test_flops_and_activations_are_those_of_real_batches(workspace, tiny_splits, tiny_pairs, tiny_model, name):
    from torch.utils.flop_counter import FlopCounterMode

    from temper.training import arguments, estimates

    overrides = [*SMALL, "adapter.lora_dropout=0", "train.per_device_train_batch_size=8", *ESTIMATED[name]]
    if "adapter=full" in overrides:
        overrides = [option for option in overrides if not option.startswith("adapter.")]
    config = typed("train_adapter", load_stage_config("train_adapter", None, overrides))
    args = arguments.training_arguments(config.train, 1, workspace / "state")
    rows = load_from_disk(tiny_pairs if name == "pairs" else tiny_splits)
    if name == "pairs":
        zeros = [0.0] * len(rows["train"])
        rows["train"] = rows["train"].add_column("ref_chosen_logps", zeros).add_column("ref_rejected_logps", zeros)
    trainer = train_adapter._trainer(config, rows, tiny_model, args, 3, judge=None)
    found = estimates.estimate(trainer, trainer.sampler.lengths, program=0)
    order, size = list(trainer.sampler), args.train_batch_size
    counted, kept = [], []
    for at in range(0, len(order), size):
        batch = trainer.data_collator([rows["train"][row] for row in order[at : at + size]])
        kept.append(estimates._probe(trainer, batch)[1])
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, batch).backward()
        counted.append(counter.get_total_flops())
    steps = math.ceil(len(counted) / args.gradient_accumulation_steps)
    assert found.flops_per_step == pytest.approx(sum(counted) / steps, rel=0.1)
    assert found.activations == pytest.approx(estimates.HEAP * max(kept), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_peak_of_memory_is_what_was_said(workspace, adapter):
    """In a process of its own, of a model whose activations are most of what it takes."""
    model = tiny.make_tiny_model(
        workspace / "model", hidden_size=512, intermediate_size=1024, num_hidden_layers=6, initializer_range=0.02
    )
    rows = [
        (" ".join([prompt] * (2 + number % 5)), answer) for number, (prompt, answer) in enumerate(tiny.tiny_rows(180))
    ]
    splits = tiny.make_tiny_splits(workspace / "splits", model, rows={"train": rows})
    options = ["experiment=smoke", f"adapter={adapter}", "model.load.dtype=float32", "train.num_train_epochs=2"]
    inputs = ["--splits", str(splits), "--model", str(model), "--output", "out"]
    command = [sys.executable, "-m", "steps.train_adapter", *inputs, *options, "train.per_device_train_batch_size=32"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found = facts("out")
    assert 0.85 < found["estimated_peak_memory_bytes"] / found["peak_memory_bytes"] < 1.15


HOARD = """
import sys, torch
from temper.model.threads import bound_shape_caches
from temper.provenance import peak_memory
if sys.argv[1] == "bound": bound_shape_caches()
weight, inputs = torch.randn(256, 256).to_mkldnn(), torch.randn(900, 256)
before = peak_memory()
for rows in range(100, 900, 2): torch._C._nn.mkldnn_linear(inputs[:rows].to_mkldnn(), weight, None)
print(peak_memory() - before)
"""


def test_code_for_shapes_that_are_never_met_again_is_not_hoarded(workspace):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    grown = {}
    for how in ("bound", "as it comes"):
        command, environment = [sys.executable, "-c", HOARD, how], {**os.environ, "PYTHONPATH": str(ROOT)}
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            environment.pop(name, None)  # as a step in this process may have set them
        grown[how] = int(subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout)
    assert grown["bound"] < grown["as it comes"] / 2


OTHERS = {
    "an optimizer that keeps no moments": ["train.optim=adafactor"],
    "states in 8 bits": ["adapter=full", "train.optim=adamw_bnb_8bit", "train.learning_rate=1e-4"],
    "no checkpoints asked for": ["train.save_strategy=no"],
    "checkpoints within an epoch": ["train.save_strategy=steps", "train.save_steps=4", "train.save_total_limit=1"],
    "a falling rate": ["train.lr_scheduler_type=inverse_sqrt"],
    "accumulation that does not divide": ["train.gradient_accumulation_steps=4", "train.label_smoothing_factor=0.1"],
    "whole batches only": ["train.dataloader_drop_last=true", "train.per_device_train_batch_size=7"],
    "autocast": ["train.bf16=true", "train.use_cpu=true"],
}


RARER = ("states in 8 bits", "a falling rate", "whole batches only", "autocast")


@pytest.mark.parametrize("name", rarely(OTHERS, RARER))
def test_options_leave_a_shared_trunk_equal_to_separate_runs(workspace, tiny_splits, tiny_model, name):
    options = [*SMALL, *OTHERS[name]]
    if "adapter=full" in options:
        options = [option for option in options if not option.startswith("adapter.")]
    inputs = ["--splits", str(tiny_splits), "--model", str(tiny_model)]
    for output, epochs, trunk in (("first", 1, "shared"), ("shared", 2, "shared"), ("alone", 2, "alone")):
        config = load_stage_config("train_adapter", None, [*options, f"train.num_train_epochs={epochs}"])
        train_adapter.main([*inputs, "--output", output, "--config", json.dumps(config | {"trunk": trunk})])
    assert facts("shared")["resumed_from_step"] == facts("first")["global_step"] > 0
    weights = "model.safetensors" if "adapter=full" in options else "adapter_model.safetensors"
    assert_equal(load_file(f"shared/{weights}"), load_file(f"alone/{weights}"))


@pytest.mark.slow
def test_the_number_of_cores_changes_no_bit_of_a_workflow(workspace, wide_model):
    """Neither of the training nor of the evaluation: on one core, and where it could have had four."""
    from tests.support.workflow_tools import leaderboard, own_sources, snakemake

    few = "sweep=none tracking=none data.limit={train:24,validation:8,test:8} train.per_device_train_batch_size=4"
    found = []
    for cores in ("1", "4"):
        folder = workspace / cores
        folder.mkdir()
        sources = own_sources(folder, wide_model, tiny.tiny_rows(180))
        config = ["--config", "experiment=smoke", f"overrides={sources} {few}"]
        done = snakemake(folder, "--cores", cores, *config)
        assert ("1 training(s) of 1 thread(s) on 4 cores: num_threads=4 is faster" in done.stderr) is (cores == "4")
        [row] = leaderboard(folder, "single")
        [adapter] = (folder / "results" / "adapters").glob("*/adapter_model.safetensors")
        figures = {
            name: row[name] for name in ("run", "validation_loss", "base_validation_loss", "validation_accuracy")
        }
        found.append((figures, load_file(adapter)))
    (figures, weights), (other_figures, other_weights) = found
    assert figures == other_figures
    assert_equal(weights, other_weights)
