"""Two commands at once, a killed one, a failing run: the whole workflow on a tiny model."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from temper import tracking
from tests.conftest import ROOT
from tests.support import stores, tiny
from tests.support.disks import small_disk
from tests.support.workflow_tools import environment, jobs_in, leaderboard, own_sources, snakemake_command
from tests.test_tracking import SETTINGS

pytestmark = pytest.mark.slow
SWEEP = "sweep=none train.learning_rate=1e-3,1e-2 train.num_train_epochs=1,2"


@pytest.fixture
def project(tmp_path, tiny_model):
    """(folder, the command that sweeps four runs of a tiny model there)."""
    rows = [(f"{prompt} ({number})", label) for number in range(3) for prompt, label in tiny.tiny_rows(120)]
    sources = own_sources(tmp_path, tiny_model, rows)
    limits = "data.limit.train=200 data.limit.validation=20 data.limit.test=20 train.per_device_train_batch_size=4"
    tracked = "tracking.experiment_name=test"
    overrides = f"overrides={SWEEP} {sources} {limits} {tracked}"
    return tmp_path, [*snakemake_command(tmp_path), "--config", "experiment=smoke", overrides]


def start(command, folder: Path, name: str) -> subprocess.Popen:
    """Start a command in a session of its own; PROJECT marks its processes, orphans too."""
    marked = environment() | {"PROJECT": str(folder)}
    log = (folder / f"{name}.out").open("w")
    return subprocess.Popen(command, stdout=log, stderr=log, env=marked, cwd=ROOT, start_new_session=True)


def output(folder: Path, name: str) -> str:
    return (folder / f"{name}.out").read_text()


def mlflow_runs(folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    api = tracking.client(SETTINGS)
    experiment = api.get_experiment_by_name("test").experiment_id
    return api, api.search_runs([experiment], f"tags.`{tracking.SWEEP_TAG}` = 'single'")


def assert_finished(folder: Path, monkeypatch):
    assert len(leaderboard(folder, "single")) == 4
    assert_complete(*mlflow_runs(folder, monkeypatch))
    assert not list((folder / "results").glob("*/.tmp-*"))


def assert_complete(api, runs):
    assert len(runs) == 5, "the sweep's run and one for each point"
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        for name in ("loss", "eval_loss"):
            steps = [metric.step for metric in api.get_metric_history(run.info.run_id, name)]
            assert len(steps) == len(set(steps)), "no step twice"
        assert steps or run.data.tags[tracking.RUN_TAG] == "-", "every run has its curves"


def test_two_commands_at_once_share_the_work(project, monkeypatch):
    folder, command = project
    both = [start(command, folder, name) for name in ("one", "two")]
    assert [process.wait(timeout=500) for process in both] == [0, 0], output(folder, "one") + output(folder, "two")
    assert_finished(folder, monkeypatch)
    made = (output(folder, "one") + output(folder, "two")).count("train_adapter: wrote ")
    assert made == 4, "two trunks of two epochs, each trained once"


def wait_for_training(folder: Path, made: str) -> None:
    """Until a training has left that in its folder of checkpoints."""
    deadline = time.monotonic() + 200
    while not list((folder / "results" / ".state").glob(made)) and time.monotonic() < deadline:
        time.sleep(0.1)


def test_after_a_kill_of_snakemake_the_same_command_goes_on(project, monkeypatch):
    folder, command = project
    killed = start(command, folder, "killed")
    wait_for_training(folder, "*/metrics.jsonl")
    killed.send_signal(signal.SIGKILL)  # the main process alone: its jobs live on as orphans
    killed.wait()
    again = start(command, folder, "again")
    assert again.wait(timeout=500) == 0, output(folder, "again")
    assert_finished(folder, monkeypatch)


def test_after_everything_was_killed_the_same_command_goes_on(project, monkeypatch):
    folder, command = project
    killed = start(command, folder, "killed")
    wait_for_training(folder, "*/checkpoint-*")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = start(command, folder, "again")
    assert again.wait(timeout=500) == 0, output(folder, "again")
    assert_finished(folder, monkeypatch)


def test_a_search_by_two_commands_of_which_one_is_killed(project):
    folder, command = project
    grid = "train.learning_rate=1e-3,1e-2 train.num_train_epochs=1,2"
    halving = "train.learning_rate=1e-3,1e-2,3e-2,1e-1 sweep.strategy=halving sweep.rungs=[0.5,1,2]"
    command = [*command[:-1], command[-1].replace(grid, halving)]
    killed, other = (start(command, folder, name) for name in ("killed", "other"))
    wait_for_training(folder, "*/checkpoint-*")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert other.wait(timeout=900) == 0, output(folder, "other")
    assert len(leaderboard(folder, "single")) == 4 + 2 + 1
    again = start(command, folder, "again")
    assert again.wait(timeout=500) == 0 and "wrote " not in output(folder, "again"), "nothing is left to do"


def test_a_failed_run_does_not_stop_the_others(project):
    folder, command = project
    bad = command[-1].replace("train.learning_rate=1e-3,1e-2", "adapter.target_modules=[q_proj],[nonsense]")
    failed = start([*command[:-1], bad], folder, "failed")
    assert failed.wait(timeout=500) == 1
    rows = leaderboard(folder, "single")
    assert len(rows) == 2, "a partial leaderboard"
    assert "its linear layers are called" in output(folder, "failed")
    again = start([*command[:-1], bad], folder, "again")
    assert again.wait(timeout=500) == 1
    assert "train_adapter: wrote" not in output(folder, "again"), "only the failed run is tried again"


def test_two_sweeps_that_share_runs_at_once(project, monkeypatch):
    folder, command = project
    other = command[-1].replace("sweep=none", "sweep=learning_rate").replace("1e-3,1e-2", "1e-3,5e-3")
    both = [start(command, folder, "one"), start([*command[:-1], other], folder, "two")]
    assert [process.wait(timeout=900) for process in both] == [0, 0], output(folder, "one") + output(folder, "two")
    assert_finished(folder, monkeypatch)
    assert len(leaderboard(folder, "learning_rate")) == 4
    for stage, trunks in (("train_adapter", 3 * 2), ("merge_adapter", 2), ("evaluate_model", 3 * 2 + 1)):
        made = (output(folder, "one") + output(folder, "two")).count(f"{stage}: wrote ")
        assert made == trunks, f"{stage}: each of three rates and two epochs once"


def test_a_full_disk_in_the_middle_of_a_sweep(project, monkeypatch):
    folder, command = project
    with small_disk(folder / "results", 2_000) as remount:  # room for the tracking store and half of the sweep
        failed = start(command, folder, "failed")
        assert failed.wait(timeout=900) in (1, 2)
        assert "the disk is full; free some space" in output(folder, "failed")
        remount("size=100m")
        again = start(command, folder, "again")
        assert again.wait(timeout=900) == 0, output(folder, "again")
        assert_finished(folder, monkeypatch)


def test_a_training_killed_for_its_memory_is_named(project):
    folder, command = project
    killed = start(command, folder, "killed")
    kill_one_training(folder, killed)
    assert killed.wait(timeout=900) == 1
    failed = [line for line in output(folder, "killed").splitlines() if line.startswith("failed: train_adapter")]
    assert failed
    assert all("by the system because memory ran out" in line for line in failed)
    again = start(command, folder, "again")
    assert again.wait(timeout=900) == 0, output(folder, "again")


def processes(folder: Path) -> list[int]:
    """All processes that were started for the project in `folder`, orphans included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PROJECT={folder}\0".encode() in path.read_bytes() + b"\0":
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def kill_one_training(folder: Path, main: subprocess.Popen) -> bool:
    """Kill a training as the system does when memory is short. False when the command ended before there was one."""
    while main.poll() is None:
        for pid in processes(folder):
            try:
                if b"steps.train_adapter" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
                    return True
            except (OSError, ProcessLookupError):
                continue
        time.sleep(0.1)
    return False


def kill(kind: str, folder: Path, main: subprocess.Popen) -> bool:
    """Kill a training, the main process alone (its jobs live on as orphans), or everything at once."""
    if kind == "training":
        return kill_one_training(folder, main)
    if main.poll() is not None:
        return False
    for pid in [main.pid] if kind == "main" else processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


@pytest.mark.parametrize(
    ("whom", "number"), [("all", signal.SIGINT), ("main", signal.SIGTERM), ("main", signal.SIGHUP), ("main", None)]
)
def test_a_sweep_that_is_asked_to_end_leaves_nothing_and_goes_on(project, whom, number):
    """`number` None: Ctrl-C twice."""
    folder, command = project
    asked = start(command, folder, "asked")
    wait_for_training(folder, "*/checkpoint-*")
    for wait in (0,) if number else (0, 1):
        time.sleep(wait)
        (os.killpg if whom == "all" else os.kill)(asked.pid, number or signal.SIGINT)
    assert asked.wait(timeout=60) == 128 + (number or signal.SIGINT)
    said = output(folder, "asked")
    assert "Traceback" not in said
    assert "killed from outside" not in said
    assert said.splitlines()[-1].startswith(f"interrupted ({number.name})" if number else "interrupted again")
    time.sleep(0.5)
    assert not processes(folder)
    if number:
        assert not list((folder / "results").glob("*/.tmp-*"))
    again = start(command, folder, "again")
    assert again.wait(timeout=500) == 0, output(folder, "again")
    assert "continuing from" in output(folder, "again")
    assert len(leaderboard(folder, "single")) == 4
    assert not list((folder / "results").glob("*/.tmp-*"))


@pytest.mark.parametrize("kills", [12])
def test_whatever_is_killed_and_when_the_sweep_ends_as_undisturbed(project, monkeypatch, tmp_path_factory, kills):
    folder, command = project
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    there = [str(undisturbed) if part == str(folder) else part for part in command]
    assert start(there, undisturbed, "undisturbed").wait(timeout=900) == 0
    rng, counts = random.Random(kills), {"training": 0, "main": 0, "all": 0}
    for attempt in range(kills):
        main = start(command, folder, f"killed{attempt}")
        time.sleep(rng.uniform(3, 30))
        kind = rng.choice(sorted(counts))
        counts[kind] += kill(kind, folder, main)
        if kind == "training":
            main.wait(timeout=900)
    last = start(command, folder, "last")
    assert last.wait(timeout=900) == 0, output(folder, "last")
    assert_finished(folder, monkeypatch)
    print(f"kills: {counts}")
    adapters = sorted((undisturbed / "results" / "adapters").glob("*/adapter_model.safetensors"))
    assert len(adapters) == 4
    for path in adapters:
        expected, found = load_file(path), load_file(folder / path.relative_to(undisturbed))
        assert all(torch.equal(weight, found[name]) for name, weight in expected.items()), path


def test_what_a_dead_server_missed_is_sent_by_the_next_command(project):
    folder, command = project
    server = stores.Server(folder / "server").start()
    command[-1] += f" tracking.tracking_uri={server.uri}"
    try:
        training = start(command, folder, "training")
        deadline = time.monotonic() + 200
        while not list((folder / "results" / ".state").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        server.kill()
        assert training.wait(timeout=500) == 0, output(folder, "training")
        assert "tracking: not up to date" in output(folder, "training")
        for name, jobs in (("dead", 1), ("dead-again", 1), ("alive", 1), ("done", 0)):
            if name == "alive":
                server.start()
            again = start(command, folder, name)
            assert again.wait(timeout=100) == 0, output(folder, name)
            assert jobs_in(output(folder, name)) == ({"compare_runs": 1} if jobs else {})
            assert ("tracking: not up to date" in output(folder, name)) is name.startswith("dead")
        api = tracking.client({"tracking_uri": server.uri})
        experiment = api.get_experiment_by_name("test").experiment_id
        assert_complete(api, api.search_runs([experiment]))
    finally:
        server.kill()
