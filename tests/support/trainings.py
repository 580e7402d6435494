"""Trainings by hand, in this process or as a command, and whether two of them are equal."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from steps import train_adapter
from temper.config.stages import load_stage_config
from tests.conftest import ROOT

SAVE_STEPS = 3
OPTIONS = [
    "experiment=smoke",
    "adapter.r=4",
    "adapter.lora_dropout=0.1",
    "train.per_device_train_batch_size=4",
    "train.num_train_epochs=8",
    "train.save_strategy=steps",
    f"train.save_steps={SAVE_STEPS}",
    "train.logging_steps=1",
    "model.load.dtype=float32",
]


def start(splits, model, output, config) -> subprocess.Popen:
    command = [sys.executable, "-m", "steps.train_adapter", "--splits", splits, "--model", model]
    command += ["--output", output, "--config", json.dumps(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True, env=environment)


def steps_done(state: Path) -> int:
    lines = (state / "metrics.jsonl").read_text().splitlines() if (state / "metrics.jsonl").is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for_a_step(process: subprocess.Popen, state: Path, step: int) -> None:
    """Return when a training has taken so many steps, and still runs."""
    deadline = time.monotonic() + 120
    while process.poll() is None and steps_done(state) < step and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read()


def curve(folder: str | Path) -> list[dict]:
    """The lines of a training's metrics, less the time."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def forget_after(step: int, state: Path) -> None:
    """Leave of a training's checkpoints those up to a step, as if it had been killed soon after."""
    for checkpoint in state.glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)


BEST = [
    "train.load_best_model_at_end=true",
    "train.metric_for_best_model=eval_loss",
    "train.early_stopping_patience=2",
    "train.learning_rate=10",  # which is reached late: the validation loss falls, then rises
    "train.warmup_steps=60",
    "train.early_stopping_threshold=100",  # no evaluation is better by that much, so the third one ends it
    "train.num_train_epochs=8",
    "adapter.lora_dropout=0",
]
SMALL = [
    "experiment=smoke",
    "adapter.r=4",
    "adapter.lora_dropout=0.1",
    "train.per_device_train_batch_size=4",
    "model.load.dtype=float32",
    "train.warmup_steps=2",
]


def train(tiny_splits, tiny_model, output, *overrides, trunk=None) -> dict[str, torch.Tensor]:
    """One training by hand; returns the trained weights."""
    arguments = ["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", str(output)]
    if trunk is None:
        train_adapter.main([*arguments, *SMALL, *overrides])
    else:
        config = load_stage_config("train_adapter", None, [*SMALL, *overrides]) | {"trunk": trunk}
        train_adapter.main([*arguments, "--config", json.dumps(config)])
    return weights(output)


def weights(folder) -> dict[str, torch.Tensor]:
    """What a training has saved: an adapter, or all weights."""
    adapter = Path(folder, "adapter_model.safetensors")
    return load_file(adapter if adapter.exists() else Path(folder, "model.safetensors"))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert one, "no weights to compare"
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
