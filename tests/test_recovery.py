"""Two commands at once, a killed one, a failing run: the whole workflow on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steps.lib import tracking
from tests import stores, tiny
from tests.conftest import ROOT
from tests.test_tracking import SETTINGS
from tests.test_workflow import jobs_in, leaderboard

pytestmark = pytest.mark.slow
SWEEP = "sweep=none train.learning_rate=1e-3,1e-2 train.num_train_epochs=1,2"


@pytest.fixture
def project(tmp_path, tiny_model):
    """(folder, the command that sweeps four runs of a tiny model there)."""
    rows = [
        {"text": f"{prompt} ({number})", "rating": 1 if label == "positive" else -1}
        for number in range(3)
        for prompt, label in tiny.tiny_rows(120)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.name=tiny data.source.kind=files data.source.path={tmp_path}/rows.jsonl data.format=jsonl"
    model = f"model.name=tiny model.source.kind=files model.source.path={tiny_model} model.load.dtype=float32"
    limits = "data.limit.train=200 data.limit.validation=20 data.limit.test=20 train.per_device_train_batch_size=4"
    tracked = "tracking.experiment_name=test"
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    command += [
        "--cores",
        "2",
        "--workflow-profile",
        str(ROOT / "profiles" / "default"),
        "--config",
        "experiment=smoke",
    ]
    return tmp_path, [*command, f"overrides={SWEEP} {source} {model} {limits} {tracked}"]


def start(command, folder: Path, name: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "TEMPER_PLAN")}
    log = (folder / f"{name}.out").open("w")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)


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


def test_after_a_kill_of_snakemake_the_same_command_goes_on(project, monkeypatch):
    folder, command = project
    killed = start(command, folder, "killed")
    deadline = time.monotonic() + 200
    while not list((folder / "results" / ".state").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)  # the main process alone: its jobs live on as orphans
    killed.wait()
    again = start(command, folder, "again")
    assert again.wait(timeout=500) == 0, output(folder, "again")
    assert_finished(folder, monkeypatch)


def test_after_everything_was_killed_the_same_command_goes_on(project, monkeypatch):
    folder, command = project
    killed = start(command, folder, "killed")
    deadline = time.monotonic() + 200
    while not list((folder / "results" / ".state").glob("*/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = start(command, folder, "again")
    assert again.wait(timeout=500) == 0, output(folder, "again")
    assert_finished(folder, monkeypatch)


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
