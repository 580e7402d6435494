"""The tracking server of deploy/mlflow, for real: PostgreSQL, logins, artifacts through the server, several users."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from temper import tracking
from temper.errors import UserError
from temper.planning import planner
from tests.conftest import ROOT
from tests.support import stores, tiny
from tests.support.sweeps import board_of
from tests.support.workflow_tools import environment, executed, own_sources, snakemake, snakemake_command
from tests.test_tracking import BACK, DOWN, LINES, SETTINGS, _write, steps_of

DEPLOY = ROOT / "deploy" / "mlflow"
WRITERS = 16
SLACK = 2.0  # seconds that a busy machine may add to a bound
PASSWORDS = {"alice": "alice-password", "bob": "bobs-password"}


def test_the_server_has_the_versions_that_temper_is_tested_with():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["server"]
    for file in ("Dockerfile", "README.md"):
        text = (DEPLOY / file).read_text()
        assert all(re.search(rf"{re.escape(wanted)}(?![\w.])", text.replace('"', "")) for wanted in extra), file
    assert f"temper-mlflow:{extra[0].rpartition('==')[2]}" in (DEPLOY / "compose.yaml").read_text()
    assert (
        extra[0].replace("[auth]", "")
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    )


def test_each_secret_must_be_given():
    """None has a default, and each one that .env must have is written by the README's command."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    values = [str(value) for service in services.values() for value in service["environment"].values()]
    needed = {re.match(r"\$\{(\w+):\?is missing", value)[1] for value in values if ":?" in value}
    assert needed == {"POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert all(name in (DEPLOY / "README.md").read_text() for name in needed)
    assert not re.search(r"(?im)^\s*[^#\n]*password\s*[=:]\s*[^$\s]", (DEPLOY / "auth.ini").read_text())


# --- with the real ones --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database():
    if stores.postgres_programs() is None:
        pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
    for module in ("psycopg2", "flask_wtf"):
        pytest.importorskip(module, reason="needs the server's packages: pip install -e '.[server]'")
    database = stores.Database()
    yield database
    database.remove()


@pytest.fixture(scope="module")
def server(database, tmp_path_factory):
    server = stores.TeamServer(tmp_path_factory.mktemp("team"), database, DEPLOY)
    try:
        server.start()
        for name, password in PASSWORDS.items():
            added = server.add_user(name, password)
            assert added.returncode == 0, added.stderr
        yield server
    finally:
        server.kill()


def log_in(monkeypatch, name: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS[name])


def planned(server, finished_run, experiment: str, accuracy: float, rates: str) -> tuple:
    """(plan, board) of a sweep in the current folder, all of its stages done but the comparison."""
    settings = [f"tracking.experiment_name={experiment}", f"tracking.tracking_uri={server.uri}"]
    made = planner.build("smoke", None, [*settings, "tracking.flush_seconds=1", f"train.learning_rate={rates}"])
    for run in made.runs:
        _write(run, finished_run, accuracy=accuracy)
    board = board_of(made.sweep, [{"run": run.name, "validation_accuracy": accuracy} for run in made.runs])
    folder = Path(made.leaderboard).parent
    folder.mkdir(parents=True)
    for name in ("leaderboard.csv", "report.html"):
        (folder / name).write_text(name)
    return made, board


def target_of(plan, run) -> dict:
    return plan.jobs[run.segments[-1]].settings["follow"]


@pytest.mark.slow
def test_trainings_at_once_lose_nothing_when_server_and_database_are_restarted(
    workspace, server, database, finished_run, monkeypatch
):
    """Half of them end while the store is there, half while it is not, and none waits longer than the docs say."""
    log_in(monkeypatch, "alice")
    rates = ",".join(f"{number}e-5" for number in range(1, WRITERS + 1))
    plan, board = planned(server, finished_run, "sixteen", 0.8, rates)
    tracking.prepare(plan.tracking, plan.sweep)
    logs = [Path(f"log{number}").resolve() for number in range(WRITERS)]
    ended, going_on = logs[1::2], logs[::2]
    with followers_of(plan, logs) as end:
        wait_for_points_of_all(database)
        restart(server, logs, 1)
        restart(database, logs, 2)
        end(ended)
        wait_for_each(ended, "waited", 1)
        server.kill()
        wait_for_each(going_on, DOWN, 3)
        end(going_on)
    server.start()
    waited = {log: float(re.search(r"waited ([\d.]+) s", log.read_text())[1]) for log in logs}
    print(f"waited: {sorted(waited.values())}")
    assert max(waited[log] for log in ended) <= tracking.GOODBYE_SECONDS + SLACK
    assert max(waited[log] for log in going_on) <= tracking.GOODBYE_WHEN_DOWN + SLACK
    assert not any("MLFLOW_TRACKING_USERNAME" in log.read_text() for log in logs), "a dead database is no wrong login"
    done, said = tracking.mirror(plan, board)
    assert done and f"{WRITERS} run(s)" in said, said
    assert_whole(plan, database, "sixteen")
    assert "still version 1" in tracking.mirror(plan, board)[1], "again changes nothing"
    assert_whole(plan, database, "sixteen")


@contextlib.contextmanager
def followers_of(plan, logs):
    """Trainings of the plan's runs, each with its log; yields what ends those with the logs that it is given.

    At the end of the block all must have been asked to end, and then end well.
    """
    runs = {
        "targets": [target_of(plan, run) for run in plan.runs],
        "adapters": [str(Path(run.artefacts["train_adapter"]).resolve()) for run in plan.runs],
        "logs": list(map(str, logs)),
        "ends": [f"{log}.end" for log in logs],
    }
    Path("followers.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "tests.support.followers", "followers.json"]
    followers = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        yield lambda some: [Path(f"{log}.end").touch() for log in some]
        assert followers.wait(timeout=120) == 0
    finally:
        followers.kill()


def restart(part, logs, times):
    """Kill the server or the database, and start it again, for the n-th time; each training says both in its log."""
    part.kill()
    wait_for_each(logs, DOWN, times)
    part.start()
    wait_for_each(logs, BACK, times)


def of_experiment(name: str) -> str:
    return (
        "from runs join experiments using (experiment_id) join tags using (run_uuid) "
        f"where experiments.name = '{name}' and runs.lifecycle_stage = 'active' and tags.key = '{tracking.RUN_TAG}'"
    )


def wait_for_points_of_all(database, seconds=300):
    deadline = time.monotonic() + seconds
    have = "run_uuid in (select run_uuid from metrics)"
    counted = f"select count(distinct run_uuid) {of_experiment('sixteen')} and {have}"
    while database.query(counted) != [[str(WRITERS)]]:
        assert time.monotonic() < deadline, database.query(counted)
        time.sleep(1)


def wait_for_each(logs, text, times, seconds=300):
    deadline = time.monotonic() + seconds
    while not all(log.exists() and log.read_text().count(text) >= times for log in logs):
        assert time.monotonic() < deadline, "\n".join(log.read_text() for log in logs if log.exists())
        time.sleep(0.5)


def assert_whole(plan, database, experiment):
    """Each line of each metrics.jsonl is in the store once, and each run is there once, with its files."""
    rows = database.query(f"select run_uuid, tags.value, runs.status {of_experiment(experiment)}")
    assert sorted(name for _, name, _ in rows) == sorted(["-", *(run.name for run in plan.runs)])
    assert {status for _, _, status in rows} == {"FINISHED"}
    ids = {name: run for run, name, _ in rows}
    points: dict = {}
    for run, key, step, value in database.query("select run_uuid, key, step, value from metrics"):
        points.setdefault((run, key), []).append((int(step), float(value)))
    for run in plan.runs:
        lines = [json.loads(line) for line in (Path(run.artefacts["train_adapter"]) / "metrics.jsonl").open()]
        assert len(lines) > 20
        for name in ("loss", "tokens"):
            assert sorted(points[ids[run.name], name]) == [(line["step"], line[name]) for line in lines], run.name
        assert len(points[ids[run.name], "validation_accuracy"]) == 1
    api = tracking.client(plan.tracking)
    some = ids[plan.runs[-1].name]
    assert api.get_run(some).info.artifact_uri.startswith("mlflow-artifacts:/")
    assert (
        Path(api.download_artifacts(some, "config.yaml", ".")).read_bytes()
        == (Path(plan.runs[-1].artefacts["train_adapter"]) / "config.yaml").read_bytes()
    )


@pytest.mark.slow
def test_two_peoples_sweeps_of_one_name_do_not_mix(tmp_path, server, finished_run, monkeypatch):
    """The same sweep, the same runs by name and key, in one experiment."""
    plans = {}
    for name, accuracy in (("alice", 0.7), ("bob", 0.9)):
        (tmp_path / name / "reviews").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name / "reviews")
        plans[name] = planned(server, finished_run, "shared", accuracy, "3e-4,1e-3")
    (alices, of_alice), (bobs, of_bob) = plans["alice"], plans["bob"]
    assert [run.key for run in alices.runs] == [run.key for run in bobs.runs]

    def as_(name: str) -> None:
        log_in(monkeypatch, name)
        monkeypatch.chdir(tmp_path / name / "reviews")

    def seen(name: str) -> dict:
        api = tracking.client(alices.tracking)
        experiment = api.get_experiment_by_name("shared").experiment_id
        runs = api.search_runs([experiment], f"attributes.user_id = '{name}'")
        return {run.data.tags[tracking.RUN_TAG]: run for run in runs}

    as_("alice")
    tracking.prepare(alices.tracking, alices.sweep)
    with tracking.follow(target_of(alices, alices.runs[0])) as listener:
        listener(LINES[0])
    before = seen("alice")
    assert {run.info.status for run in before.values()} == {"RUNNING"}

    as_("bob")
    bobs.runs[0].config["data"]["source"]["path"] = "/home/bob"  # in no key
    tracking.prepare(bobs.tracking, bobs.sweep)
    tracking.mirror(bobs, of_bob)
    bobs.runs[0].config["data"]["source"]["path"] = "/home/bob/elsewhere"  # replaces his run, as he may
    first = seen("bob")[bobs.runs[0].name].info.run_id
    tracking.client(bobs.tracking).set_tag(first, tracking.MIRRORED_TAG, "no")
    done, said = tracking.mirror(bobs, of_bob)
    assert done and "champion" in said, said
    for name, run in seen("alice").items():
        assert run.info.status == "RUNNING" and run.info.run_id == before[name].info.run_id
        assert run.data.metrics == before[name].data.metrics and run.data.params == {}

    as_("alice")
    done, said = tracking.mirror(alices, of_alice)
    assert done, said
    for name, (plan, _), accuracy in (("alice", plans["alice"], 0.7), ("bob", plans["bob"], 0.9)):
        assert_ones_own(plan, seen(name), accuracy)


def assert_ones_own(plan, found, accuracy):
    """A person's MLflow runs, by name, are those of the plan, each with all of its figures."""
    assert set(found) == {"-", *(run.name for run in plan.runs)}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert len({run.data.tags[tracking.PROJECT_TAG] for run in found.values()}) == 1
    for run in plan.runs:
        mine = found[run.name]
        assert mine.data.tags["mlflow.parentRunId"] == found["-"].info.run_id
        assert mine.data.metrics["validation_accuracy"] == accuracy
        assert steps_of(tracking.client(plan.tracking), mine) == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_people_run_the_same_sweep_at_once(tmp_path, server, tiny_model, monkeypatch):
    """Two commands as users give them, in folders of one name, on equal data."""
    folders = [tmp_path / name / "reviews" for name in PASSWORDS]
    commands = []
    for name, folder in zip(PASSWORDS, folders, strict=True):
        folder.mkdir(parents=True)
        rows = [(f"{prompt} ({number})", label) for number in range(3) for prompt, label in tiny.tiny_rows(40)]
        settings = f"tracking.tracking_uri={server.uri} tracking.experiment_name=at-once train.optim=adamw_torch"
        overrides = f"overrides={own_sources(folder, tiny_model, rows)} {settings} ~data.limit"
        login = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": PASSWORDS[name]}
        with (folder / "out").open("w") as out:
            commands.append(
                subprocess.Popen(
                    [*snakemake_command(folder), "--config", "experiment=smoke", overrides],
                    stdout=out,
                    stderr=out,
                    env=environment() | login,
                    cwd=ROOT,
                )
            )
    assert [command.wait(timeout=900) for command in commands] == [0, 0], [(f / "out").read_text() for f in folders]
    said = [(folder / "out").read_text() for folder in folders]
    assert all("tracking: 2 run(s) in " in text and "not up to date" not in text for text in said), said
    log_in(monkeypatch, "alice")
    api = tracking.client({"tracking_uri": server.uri})
    runs = api.search_runs([api.get_experiment_by_name("at-once").experiment_id])
    assert len(runs) == 6 and {run.info.status for run in runs} == {"FINISHED"}
    of = {
        name: {run.data.tags[tracking.RUN_TAG]: run for run in runs if run.info.user_id == name} for name in PASSWORDS
    }
    assert of["alice"].keys() == of["bob"].keys(), "the same runs"
    for name, folder in zip(PASSWORDS, folders, strict=True):
        files = (folder / "results" / "adapters").glob("*/metrics.jsonl")
        lines = [json.loads(line) for file in files for line in file.open()]
        sent = [point for run in of[name].values() for point in api.get_metric_history(run.info.run_id, "loss")]
        assert sorted((point.step, point.value) for point in sent) == sorted(
            (line["step"], line["loss"]) for line in lines if line.get("loss") is not None
        )
        assert len(sent) > 2


@pytest.mark.slow
def test_a_lacking_right_is_said_as_such(workspace, server, monkeypatch):
    """Carol was not added by add_user.py, so she may delete no runs, as where one was made twice."""
    with monkeypatch.context() as as_admin:
        for name, value in server.admin.items():
            as_admin.setenv(name, value)
        from mlflow.server import get_app_client

        get_app_client("basic-auth", tracking_uri=server.uri).create_user("carol", "carol-password")
    log_in(monkeypatch, "alice")
    settings = {**SETTINGS, "tracking_uri": server.uri, "experiment_name": "rights"}
    tracking.prepare(settings, "s")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "carol")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "carol-password")
    place = tracking._connect(settings, "s")
    tracking._new_run(place, "r", "r")
    tracking._new_run(place, "r", "r")
    with pytest.raises(UserError, match="403.*; ask who runs the server for the right to do it, or choose an exp"):
        tracking.prepare(settings, "s")
    log_in(monkeypatch, "alice")
    tracking.prepare(settings, "s")
    assert set(tracking._runs(place)) == {"-", "r"}


@pytest.mark.slow
@pytest.mark.parametrize("password", ["not-hers-at-all", None])
def test_a_wrong_login_ends_the_command_before_any_job(tmp_path, server, monkeypatch, password):
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    if password:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    overrides = f"overrides=tracking.tracking_uri={server.uri}"
    done = snakemake(tmp_path, "--config", "experiment=smoke", overrides, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    [line] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert server.uri in line and "give the login by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in line
    assert executed(done) == {} and "Traceback" not in done.stderr
