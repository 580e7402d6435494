"""MLflow: one run per sweep point, complete, repeatable, and never in the way of training."""

import json
import time
from pathlib import Path

import pytest

from steps.lib import plan as planning
from steps.lib import tracking
from steps.lib.errors import UserError

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
    return api, tracking._search(api, experiment.experiment_id, {tracking.SWEEP_TAG: plan.sweep})


def test_mirror_makes_complete_runs_once(plan):
    plan, board = plan
    tracking.prepare(plan.tracking, plan.sweep)
    assert "2 run(s)" in tracking.mirror(plan, board)
    assert "still version 1" in tracking.mirror(plan, board), "again changes nothing"
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


def test_a_dead_server_never_stops_training(workspace, caplog):
    dead = {**SETTINGS, "tracking_uri": "http://127.0.0.1:9"}
    with caplog.at_level("INFO", logger="temper"):
        started = time.monotonic()
        with tracking.follow({"tracking": dead, "sweep": "s", "run": "r", "title": "t"}) as listener:
            for line in LINES:
                listener(line)
            assert time.monotonic() - started < 2, "a line is taken at once"
    assert "training goes on" in caplog.text


def test_a_dead_server_is_named_before_the_first_job(workspace):
    with pytest.raises(UserError, match="tracking store http://127.0.0.1:9: .* or tracking=none"):
        tracking.prepare({**SETTINGS, "tracking_uri": "http://127.0.0.1:9"}, "s")


def test_no_tracking_makes_no_store(workspace):
    off = {**SETTINGS, "enabled": False}
    tracking.prepare(off, "s")
    with tracking.follow({"tracking": off, "sweep": "s", "run": "r", "title": "t"}) as listener:
        listener(LINES[0])
    assert not Path("results").exists()
