"""MLflow: one run per sweep point, complete, repeatable, and never in the way of training."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from steps.lib import plan as planning
from steps.lib import tracking, workflow
from steps.lib.errors import UserError
from tests import stores

SETTINGS = {
    "enabled": True,
    "tracking_uri": None,
    "experiment_name": "test",
    "registered_model_name": None,
    "flush_seconds": 0.2,
}
LINES = [
    {"step": step, "epoch": step / 4, "loss": 1 / step, "seconds": 1.0, "tokens": 10 * step} for step in (1, 2, 3, 4)
]


@pytest.fixture
def plan(workspace):
    """A plan of two runs with everything in place that the stages would have written."""
    made = planning.build("smoke", None, ["tracking.experiment_name=test", "tracking.flush_seconds=0.2"])
    for index, run in enumerate(made.runs):
        _write(run, accuracy=0.8 + index / 10)
    rows = [{"run": run.name, "test_accuracy": 0.9 - index / 10} for index, run in enumerate(reversed(made.runs))]
    board = {"metric": "accuracy", "rows": rows}
    folder = Path(made.leaderboard).parent
    folder.mkdir(parents=True)
    for name in ("leaderboard.csv", "report.html"):
        (folder / name).write_text(name)
    return made, board


def _write(run, accuracy):
    files = {
        "train_adapter": {
            "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in LINES),
            "adapter_config.json": "{}",
            "config.yaml": "",
            "provenance.json": "{}",
        },
        "evaluate_model": {
            "metrics.json": json.dumps(
                {
                    "test": {"accuracy": accuracy, "loss": 0.5},
                    "base": {"accuracy": 0.6},
                    "train": {"train_seconds": 12.5},
                }
            ),
            "report.html": "<p>",
            "predictions.jsonl": "",
        },
        "tokenize_splits": {"audit.json": json.dumps({"splits": {"train": {"rows": 3}}})},
    }
    for stage, contents in files.items():
        folder = Path(run.artefacts[stage])
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            (folder / name).write_text(text)


def runs_of(plan):
    api = tracking.client(plan.tracking)
    experiment = api.get_experiment_by_name("test")
    return api, api.search_runs([experiment.experiment_id], f"tags.`{tracking.SWEEP_TAG}` = '{plan.sweep}'")


def test_mirror_makes_complete_runs_once(plan):
    plan, board = plan
    tracking.prepare(plan.tracking, plan.sweep)
    assert "2 run(s)" in tracking.mirror(plan, board)[1]
    assert "still version 1" in tracking.mirror(plan, board)[1], "again changes nothing"
    api, runs = runs_of(plan)
    parent = next(run for run in runs if run.data.tags[tracking.RUN_TAG] == "-")
    children = [run for run in runs if run is not parent]
    assert len(children) == 2
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert [metric.step for metric in api.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
        assert run.data.metrics["test_accuracy"] in (0.8, 0.9)
        assert run.data.metrics["base_test_accuracy"] == 0.6
        assert run.data.metrics["train_seconds"] == 12.5
        assert run.data.params["train.learning_rate"] in ("0.0003", "0.001")
        assert run.inputs.dataset_inputs[0].dataset.name == "movie_reviews"
        names = {file.path for file in api.list_artifacts(run.info.run_id)}
        assert {"adapter", "report.html", "config.yaml"} <= names
    champion = api.get_model_version_by_alias("movie_reviews", "champion")
    assert api.get_run(champion.run_id).data.metrics["test_accuracy"] == 0.9
    assert parent.info.status == "FINISHED"


def test_curves_grow_while_training_and_are_not_sent_twice(plan):
    plan, board = plan
    tracking.prepare(plan.tracking, plan.sweep)
    target = plan.jobs[plan.runs[0].segments[-1]].settings["follow"]
    with tracking.follow(target) as listener:
        for line in LINES[:3]:
            listener(line)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            _, runs = runs_of(plan)
            live = [run for run in runs if run.data.tags[tracking.RUN_TAG] == plan.runs[0].name]
            if live and "loss" in live[0].data.metrics:
                break
            time.sleep(0.2)
        assert live[0].info.status == "RUNNING"
        assert "loss" in live[0].data.metrics
    tracking.mirror(plan, board)
    api, runs = runs_of(plan)
    run = next(run for run in runs if run.data.tags[tracking.RUN_TAG] == plan.runs[0].name)
    assert [metric.step for metric in api.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert run.info.status == "FINISHED"


def test_what_a_killed_command_left_running_is_ended(plan):
    plan, _ = plan
    tracking.prepare(plan.tracking, plan.sweep)
    api, _ = runs_of(plan)
    experiment = api.get_experiment_by_name("test").experiment_id
    left = tracking._child_run(api, experiment, plan.sweep, "killed", "killed")
    tracking.prepare(plan.tracking, plan.sweep)
    assert api.get_run(left).info.status == "KILLED"


def target_at(uri, name="r"):
    return {"tracking": {**SETTINGS, "tracking_uri": uri}, "sweep": "s", "run": name, "title": name}


def all_runs(uri):
    api = tracking.client({**SETTINGS, "tracking_uri": uri})
    experiment = api.get_experiment_by_name("test")
    return api, {run.data.tags[tracking.RUN_TAG]: run for run in api.search_runs([experiment.experiment_id])}


def steps_of(api, run, name="loss"):
    return [metric.step for metric in api.get_metric_history(run.info.run_id, name)]


def wait_for(text, caplog, seconds=60):
    deadline = time.monotonic() + seconds
    while text not in caplog.text:
        assert time.monotonic() < deadline, f"{text!r} was never said:\n{caplog.text}"
        time.sleep(0.05)


DOWN, BACK = "training goes on", "is back and has the curves"


@pytest.fixture
def said(caplog, monkeypatch):
    """The log; stores are given up after a second, so that a test is short."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking, "LOCK_SECONDS", 0.2)
    with caplog.at_level("INFO", logger="temper"):
        yield caplog


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = stores.Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def test_a_locked_store_gets_the_rest_when_it_is_free(workspace, said):
    tracking.prepare(SETTINGS, "s")
    with tracking.follow(target_at(None)) as listener:
        listener(LINES[0])
        wait_until_sent(None, 1)
        with stores.locked(Path("results/mlflow.db")):
            started = time.monotonic()
            for line in LINES[1:]:
                listener(line)
            assert time.monotonic() - started < 0.1, "a line is taken at once"
            wait_for(DOWN, said)
        wait_for(BACK, said)
    assert said.text.count(DOWN) == said.text.count(BACK) == 1, "each is said once"
    api, runs = all_runs(None)
    assert steps_of(api, runs["r"]) == [1, 2, 3, 4]


def wait_until_sent(uri, step, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        api, runs = all_runs(uri)
        if "r" in runs and step in steps_of(api, runs["r"]):
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was never sent")


def test_a_store_locked_until_the_end_does_not_hold_the_training_up(workspace, said):
    tracking.prepare(SETTINGS, "s")
    with stores.locked(Path("results/mlflow.db")):
        with tracking.follow(target_at(None)) as listener:
            listener(LINES[0])
            wait_for(DOWN, said)
        done, line = tracking.mirror(SimpleNamespace(tracking=SETTINGS, sweep="s", runs=[]), None)
        assert done is False
        assert "database is locked" in line


def test_a_server_that_comes_late_or_freezes_gets_each_step_once(workspace, said, server):
    with tracking.follow(target_at(server.uri)) as listener:
        listener(LINES[0])
        wait_for(DOWN, said)
        server.start()
        wait_for(BACK, said)
        wait_until_sent(server.uri, 1)
        said.clear()
        server.freeze()
        listener(LINES[1])  # its batch times out, and is read by the server all the same, when it goes on
        wait_for(DOWN, said)
        listener(LINES[2])
        server.thaw()
        wait_for(BACK, said)
        listener(LINES[3])
    api, runs = all_runs(server.uri)
    assert set(runs) == {"-", "r"}
    for name in ("loss", "tokens"):
        assert steps_of(api, runs["r"], name) == [1, 2, 3, 4]
    times = [
        metric.timestamp - runs["r"].info.start_time for metric in api.get_metric_history(runs["r"].info.run_id, "loss")
    ]
    assert times == [1000, 1000, 1000, 1000], "when it was measured, not when it was sent"


def test_a_batch_that_arrives_twice_is_one(workspace):
    tracking.prepare(SETTINGS, "s")
    with tracking.follow(target_at(None)) as listener:
        listener(LINES[0])
    api, runs = all_runs(None)
    curves = tracking._Curves(api, runs["r"].info.run_id)
    curves.known.clear()  # as when the answer of the store came too late to be heard
    curves.send(LINES)
    assert steps_of(api, runs["r"]) == [1, 2, 3, 4]


def test_a_run_that_was_made_twice_is_one_again(workspace):
    tracking.prepare(SETTINGS, "s")
    api, _ = all_runs(None)
    experiment = api.get_experiment_by_name("test").experiment_id
    first = tracking._child_run(api, experiment, "s", "r", "r")
    tags = api.get_run(first).data.tags
    api.create_run(experiment, tags={name: tags[name] for name in (tracking.SWEEP_TAG, tracking.RUN_TAG)})
    assert len(api.search_runs([experiment])) == 3
    assert tracking._child_run(api, experiment, "s", "r", "r") == first
    assert len(api.search_runs([experiment])) == 2


def test_training_a_complete_run_again_does_not_leave_it_running(plan):
    plan, board = plan
    tracking.prepare(plan.tracking, plan.sweep)
    tracking.mirror(plan, board)
    with tracking.follow(plan.jobs[plan.runs[0].segments[-1]].settings["follow"]) as listener:
        for line in LINES:
            listener(line)
    assert {run.info.status for run in runs_of(plan)[1]} == {"FINISHED", "RUNNING"}
    assert tracking.mirror(plan, board)[0]
    api, runs = runs_of(plan)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(steps_of(api, run) == [1, 2, 3, 4] for run in runs if run.data.tags[tracking.RUN_TAG] != "-")
    assert all(steps_of(api, run, "test_loss") == [0] for run in runs if run.data.tags[tracking.RUN_TAG] != "-")


def test_what_has_no_report_is_ended_as_failed(plan):
    plan, board = plan
    tracking.prepare(plan.tracking, plan.sweep)
    lost = plan.runs[1]
    with tracking.follow(plan.jobs[lost.segments[-1]].settings["follow"]):
        (Path(lost.artefacts["evaluate_model"]) / "metrics.json").unlink()
    tracking.mirror(plan, {**board, "rows": [row for row in board["rows"] if row["run"] != lost.name]})
    statuses = {run.data.tags[tracking.RUN_TAG]: run.info.status for run in runs_of(plan)[1]}
    assert statuses == {"-": "FAILED", lost.name: "FAILED", plan.runs[0].name: "FINISHED"}


def test_a_comparison_that_was_not_mirrored_is_made_again(plan):
    plan, _ = plan
    file = Path(plan.complete)
    real, dry = SimpleNamespace(dryrun=False), SimpleNamespace(dryrun=True)
    off = SimpleNamespace(complete=plan.complete, tracking={"enabled": False})
    for mirrored, run, how, stays in (
        (False, plan, dry, True),
        (False, off, real, True),
        (True, plan, real, True),
        (False, plan, real, False),
    ):
        file.write_text(json.dumps({"mirrored": mirrored}))
        assert workflow.complete(run, how)(None) == plan.complete
        assert file.exists() is stays


def test_a_dead_server_is_named_before_the_first_job(workspace):
    with pytest.raises(UserError, match="tracking store http://127.0.0.1:9: .* or tracking=none"):
        tracking.prepare({**SETTINGS, "tracking_uri": "http://127.0.0.1:9"}, "s")


def test_no_tracking_makes_no_store(workspace):
    off = {**SETTINGS, "enabled": False}
    tracking.prepare(off, "s")
    with tracking.follow({"tracking": off, "sweep": "s", "run": "r", "title": "t"}) as listener:
        listener(LINES[0])
    assert not Path("results").exists()
