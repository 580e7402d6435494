"""A full disk, a read-only one, too little memory: one line, nothing half-written, and the next run completes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from steps import train_adapter
from temper.config.stages import load_stage_config
from temper.errors import UserError, lack, one_line_errors
from tests.conftest import ROOT
from tests.support.disks import small_disk


def arguments(splits, model, output, config) -> list[str]:
    return ["--splits", str(splits), "--model", str(model), "--output", str(output), "--config", json.dumps(config)]


@pytest.fixture
def config():
    overrides = ["experiment=smoke", "train.num_train_epochs=2", "model.load.dtype=float32"]
    return load_stage_config("train_adapter", None, overrides) | {"trunk": "trunk"}


@pytest.mark.parametrize("kilobytes", [8, 100, 300])  # full before, within and after the first checkpoint
def test_a_full_disk_is_one_line_and_the_next_run_completes(
    workspace, tiny_splits, tiny_model, config, kilobytes, capsys
):
    train_adapter.main(arguments(tiny_splits, tiny_model, "elsewhere", config | {"trunk": "undisturbed"}))
    with small_disk(workspace / "small", kilobytes) as remount:
        (workspace / "small" / "state").mkdir()
        Path("results/.state/trunk").symlink_to(workspace / "small" / "state")
        command = arguments(tiny_splits, tiny_model, "small/adapter", config)
        with pytest.raises(SystemExit) as ended:
            train_adapter.main(command)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("error: small/adapter: the disk is full; free some space")
        assert not Path("small/adapter").exists()
        remount("size=20m")
        train_adapter.main(command)
        expected = load_file("elsewhere/adapter_model.safetensors")
        found = load_file("small/adapter/adapter_model.safetensors")
        assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_a_read_only_disk_is_one_line(workspace, tiny_splits, tiny_model, config, capsys):
    with small_disk(workspace / "results", 1000) as remount:
        remount("ro")
        with pytest.raises(SystemExit) as ended:
            train_adapter.main(arguments(tiny_splits, tiny_model, "results/adapters/x", config))
        assert ended.value.code == 2
        assert "the disk is read-only" in capsys.readouterr().err.splitlines()[-1]


def test_too_little_memory_to_begin_is_one_line(workspace, tiny_splits, tiny_model, config):
    command = [sys.executable, "-m", "steps.train_adapter", *arguments(tiny_splits, tiny_model, "x", config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))  # noqa: E731
    failed = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limit)
    assert failed.returncode == 2, failed.stderr
    last = failed.stderr.splitlines()[-1]  # which of the two comes first is the machine's affair
    assert last.startswith(("error: x: no more threads can be started; ", "error: x: out of memory; lower train."))


@pytest.mark.parametrize("allocate", [torch.empty, numpy.empty, bytearray])
def test_too_much_memory_at_once_is_one_line(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as failed:
        allocate(2**58)
    assert "out of memory; lower train.per_device_train_batch_size" in str(lack(failed.value, "x"))


def test_commands_that_are_no_steps_say_it_too(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        torch.empty(2**58)
    assert ended.value.code == 2
    assert "out of memory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="shapes"), one_line_errors():
        raise ValueError("shapes do not match")


def test_other_errors_are_not_explained_away():
    assert lack(ValueError("shapes do not match"), "x") is None
    wrapped = RuntimeError("inline_container.cc:672 unexpected pos")
    assert "disk is full" in str(lack(wrapped, "x"))
    assert "no more threads" in str(lack(RuntimeError("can't start new thread"), "x"))
    with pytest.raises(UserError, match="read-only"):
        raise lack(OSError(30, os.strerror(30)), "x")
