"""kill -9 at random moments: training goes on and ends with the bits of an undisturbed run."""

import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from temper.config.stages import load_stage_config
from tests.support.trainings import OPTIONS, SAVE_STEPS, assert_equal, curve, start, steps_done, wait_for_a_step


def kill_at_random(process: subprocess.Popen, state: Path, rng: random.Random) -> bool:
    """Kill a training some random time after its first new step. False when it ended before."""
    before, deadline = steps_done(state), time.monotonic() + 60
    while process.poll() is None and steps_done(state) == before and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3))
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_trainings_end_as_undisturbed_ones(workspace, tiny_splits, tiny_model, kills):
    config = load_stage_config("train_adapter", None, OPTIONS)
    undisturbed = start(tiny_splits, tiny_model, "undisturbed", {**config, "trunk": "undisturbed"})
    assert undisturbed.wait() == 0
    rng, done, repeated = random.Random(kills), 0, []
    for attempt in range(kills * 3):
        if done == kills:
            break
        trunk = f"killed{attempt // 4}"  # a new trunk now and then: one has only so many steps to be killed in
        state, output = Path("results/.state") / trunk, Path(trunk)
        reached = steps_done(state)
        process = start(tiny_splits, tiny_model, output, {**config, "trunk": trunk})
        done += kill_at_random(process, state, rng)
        assert not output.exists() or (output / "provenance.json").is_file(), "whole or absent"
        log = process.stderr.read()
        if "continuing from" in log:
            repeated.append(reached - int(log.split("checkpoint-")[-1].split()[0]))
    assert done == kills
    assert all(steps <= SAVE_STEPS + 1 for steps in repeated), repeated
    expected = load_file("undisturbed/adapter_model.safetensors")
    for state in sorted(Path("results/.state").glob("killed*")):
        final = start(tiny_splits, tiny_model, state.name, {**config, "trunk": state.name})
        assert final.wait() == 0, final.stderr.read()
        found = load_file(f"{state.name}/adapter_model.safetensors")
        for name, weight in expected.items():
            assert torch.equal(weight, found[name]), (state.name, name)
        lines = [json.loads(line) for line in Path(state.name, "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 49)), "each step once"


@pytest.mark.parametrize(
    ("method", "processes"),
    [("sft", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sft", 2), ("orpo", 1), ("orpo", 2)))],
)
def test_a_signal_saves_the_step_it_comes_in(workspace, tiny_splits, tiny_pairs, tiny_model, method, processes):
    options = [option for option in OPTIONS if not option.startswith(("train.save", "train.logging"))]
    options += [f"method={method}", "train.logging_steps=7", f"num_processes={processes}"]
    options += [f"train.per_device_train_batch_size={4 // processes}"]
    options += [] if method == "sft" else ["data.rejected_from=[positive,negative]"]
    config = load_stage_config("train_adapter", None, options)
    splits = tiny_splits if method == "sft" else tiny_pairs
    undisturbed = start(splits, tiny_model, "undisturbed", {**config, "trunk": "undisturbed"})
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    state = Path("results/.state/asked")
    first = start(splits, tiny_model, "asked", {**config, "trunk": "asked"})
    wait_for_a_step(first, state, 10)
    first.send_signal(signal.SIGTERM)
    log = first.communicate()[1]
    assert first.returncode == 128 + signal.SIGTERM, log
    saved = int(re.search(r"asked to end: saved step (\d+) of", log)[1])
    assert saved >= 10 and log.rstrip().splitlines()[-1].startswith("interrupted (SIGTERM)")
    second = start(splits, tiny_model, "asked", {**config, "trunk": "asked"})
    log = second.communicate()[1]
    assert second.returncode == 0 and f"checkpoint-{saved}" in log, log
    assert_equal(load_file("undisturbed/adapter_model.safetensors"), load_file("asked/adapter_model.safetensors"))
    assert curve("asked") == curve("undisturbed"), "also the figures that are means over steps before and after"
