"""Sweeps of a tiny model on a real Slurm on this machine (tests/support/slurm.py): `make test-slurm`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.support import slurm, tiny
from tests.support.trainings import assert_equal, steps_done
from tests.support.workflow_tools import environment, leaderboard, own_sources, snakemake

pytestmark = pytest.mark.slurm
PATIENCE = 1500  # seconds that a command may take beside other work
STEPS = 800
STAGES = ("adapters", "models", "merged", "prompts", "rankings", "reports", "splits")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A cluster of one node with two cores."""
    if reason := slurm.why_not():
        pytest.fail(reason, pytrace=False)
    with slurm.cluster(tmp_path_factory.mktemp("lab")) as folder:
        yield folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_model) -> str:
    """Overrides that name rows and model; both of the sweeps below have one epoch, and two learning rates."""
    rows = [(f"{prompt} ({number})", label) for number in range(20) for prompt, label in tiny.tiny_rows(120)]
    limits = "data.limit.validation=16 data.limit.test=16 train.num_train_epochs=1 eval.suspects=0"
    named = own_sources(tmp_path_factory.mktemp("rows"), tiny_model, rows)
    return f"sweep=none train.learning_rate=1e-3,1e-2 tracking.experiment_name=test {limits} {named}"


@pytest.fixture(scope="module")
def short(sources) -> str:
    return f"overrides={sources} data.limit.train=64 train.per_device_train_batch_size=4"


@pytest.fixture(scope="module")
def long(sources) -> str:
    """So many steps, without a checkpoint before the end."""
    return f"overrides={sources} data.limit.train={STEPS} train.per_device_train_batch_size=1 train.logging_steps=5"


def start(folder: Path, overrides: str, *arguments: str) -> subprocess.Popen:
    """Snakemake with the profile, except for what waits for large clusters and slow disks."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "--directory", folder]
    command += ["--workflow-profile", ROOT / "profiles" / "slurm", "--set-threads", "tokenize_splits=1"]
    command += ["--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "5", "--slurm-keep-successful-logs"]
    command += ["--config", "experiment=smoke", overrides, *arguments]
    with (folder / "commands.out").open("a") as log:
        return subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=environment(), cwd=ROOT, start_new_session=True
        )


def output(folder: Path) -> str:
    return (folder / "commands.out").read_text()


def finish(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait(timeout=PATIENCE) == 0, output(folder)[-6000:]


def logs_of(folder: Path, rule: str) -> dict[int, str]:
    """Slurm's number of a job -> what it wrote."""
    files = (folder / ".snakemake" / "slurm_logs" / f"rule_{rule}").rglob("*.log")
    return {int(file.stem): file.read_text() for file in files}


def wait_for(condition, process: subprocess.Popen, folder: Path):
    """What the condition gives, once that is true; the command must run until then."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, output(folder)[-6000:]
        time.sleep(0.1)
    return found


def training_at(folder: Path, step: int):
    """A function that gives the state folders of the trainings, once both have done so many steps."""

    def states() -> list[Path]:
        there = [path for path in (folder / "results" / ".state").glob("*") if steps_done(path) >= step]
        return there if len(there) == 2 else []

    return states


def adapters(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (folder / "results" / "adapters").glob("tiny-*")}


def facts(adapter: Path) -> dict:
    return json.loads((adapter / "training.json").read_text())


@pytest.fixture(scope="module")
def swept(lab, short, tmp_path_factory) -> Path:
    """The folder of a sweep of two runs that went through Slurm."""
    folder = tmp_path_factory.mktemp("swept")
    finish(start(folder, short), folder)
    return folder


def test_a_sweep_gives_what_it_gives_on_one_machine(swept, short, tmp_path):
    local = snakemake(tmp_path, "--config", "experiment=smoke", short)
    assert len(leaderboard(swept, "single")) == len(leaderboard(tmp_path, "single")) == 2
    for stage in STAGES:
        here, there = ({path.name for path in (one / "results" / stage).glob("[!.]*")} for one in (tmp_path, swept))
        assert here == there and here, (stage, local.stderr[-3000:])
    for name, adapter in adapters(tmp_path).items():
        one, other = (load_file(path / "adapter_model.safetensors") for path in (adapter, adapters(swept)[name]))
        assert_equal(one, other)


def test_a_person_finds_the_jobs_in_the_queue(swept):
    trained = [job for job in slurm.jobs() if job["comment"].startswith("rule_train_adapter")]
    assert {job["name"].partition("_")[0] for job in trained} == {"temper"}
    names = {job["comment"].removeprefix("rule_train_adapter_wildcards_") for job in trained}
    assert names >= adapters(swept).keys()
    assert not re.search(r"rule_(fetch|format|rank|compare)", str(slurm.jobs())), "cheap rules run where Snakemake does"


@pytest.fixture(scope="module")
def killed(lab, long, tmp_path_factory) -> Path:
    """The folder of a command that was killed while two trainings ran and an evaluation waited, and of a second one."""
    folder = tmp_path_factory.mktemp("killed")
    first = start(folder, long, "--until", "train_adapter", "evaluate_base")
    wait_for(training_at(folder, 10), first, folder)  # on both cores
    assert [job["comment"][:18] for job in slurm.jobs("PENDING")] == ["rule_evaluate_base"]
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    finish(start(folder, long, "--until", "train_adapter", "evaluate_base"), folder)
    wait_until_idle()
    return folder


def wait_until_idle() -> None:
    deadline = time.monotonic() + PATIENCE
    while slurm.jobs("PENDING", "RUNNING", "COMPLETING", "CONFIGURING") and time.monotonic() < deadline:
        time.sleep(0.5)


def test_after_a_kill_of_snakemake_nothing_is_made_twice(killed):
    for rule, stage, count in (("train_adapter", "train_adapter", 2), ("evaluate_base", "evaluate_model", 1)):
        logs = logs_of(killed, rule)
        assert len(logs) == 2 * count, "the second command has asked for them again"
        assert "".join(logs.values()).count(f"{stage}: wrote ") == count, logs
    assert [facts(adapter)["resumed_from_step"] for adapter in adapters(killed).values()] == [0, 0]


def steps_saved(folder: Path) -> list[int]:
    """The steps that both trainings say they have saved, before they start again with new logs."""
    logs = "".join(file.read_text() for file in (folder / "results" / "logs" / "train_adapter").glob("*.log"))
    saved = sorted(map(int, re.findall(rf"asked to end: saved step (\d+) of {STEPS}", logs)))
    return saved if len(saved) == 2 else []


def test_a_preempted_training_goes_on_from_the_step_it_was_in(killed, long, tmp_path):
    command = start(tmp_path, long, "--until", "train_adapter")
    wait_for(training_at(tmp_path, 10), command, tmp_path)
    urgent = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, check=True)
    saved = wait_for(lambda: steps_saved(tmp_path), command, tmp_path)
    finish(command, tmp_path)
    assert "Trying to restart job" not in output(tmp_path), "Slurm itself starts them again"
    found = adapters(tmp_path)
    assert sorted(facts(adapter)["resumed_from_step"] for adapter in found.values()) == saved
    assert all(10 <= step < STEPS for step in saved)
    for name, adapter in adapters(killed).items():
        one, other = (load_file(path / "adapter_model.safetensors") for path in (adapter, found[name]))
        assert_equal(one, other)
