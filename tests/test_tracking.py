"""MLflow: one run per sweep point, complete, repeatable, and never in the way of training."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from steps import merge_adapter, train_adapter
from temper import mlflow_pages, tracking, workflow
from temper.errors import UserError
from temper.planning import planner
from temper.reports.leaderboard import Board
from tests.support import finished, stores
from tests.support.sweeps import board_of, report_figures
from tests.test_champion import asked, predicted

SETTINGS = {
    "enabled": True,
    "tracking_uri": None,
    "experiment_name": "test",
    "registered_model_name": None,
    "flush_seconds": 0.2,
}
NAME = "tracking.registered_model_name=movie_reviews"
LINES = [
    {"step": step, "epoch": step / 4, "loss": 1 / step, "seconds": 1.0, "tokens": 10 * step} for step in (1, 2, 3, 4)
]


@pytest.fixture
def plan(workspace, empty_store, finished_run):
    """A plan of two runs with everything in place that the stages would have written."""
    Path("results").mkdir()
    shutil.copy(empty_store, "results/mlflow.db")
    made = planner.build("smoke", None, ["tracking.experiment_name=test", "tracking.flush_seconds=0.2", NAME])
    for index, run in enumerate(made.runs):
        _write(run, finished_run, accuracy=0.8 + index / 10)
    rows = [{"run": run.name, "validation_accuracy": 0.9 - index / 10} for index, run in enumerate(reversed(made.runs))]
    board = board_of(made.sweep, rows)
    folder = Path(made.leaderboard).parent
    folder.mkdir(parents=True)
    for name in ("leaderboard.csv", "report.html"):
        (folder / name).write_text(name)
    return made, board


def _write(run, finished_run, accuracy):
    finished.put(finished_run, run.artefacts)
    figures = report_figures(accuracy, 0.5) | {
        "split": "validation",
        "values": {"accuracy": accuracy, "loss": 0.5},
        "base": {"accuracy": 0.6},
        "train": {"train_seconds": 12.5},
    }
    Path(run.artefacts["evaluate_model"], "metrics.json").write_text(json.dumps(figures))
    lines = "".join(json.dumps(line) + "\n" for line in LINES)
    Path(run.artefacts["train_adapter"], "metrics.jsonl").write_text(lines)


def of_rows(board: Board, rows: list[dict]) -> Board:
    return board.model_copy(update={"rows": rows, "chosen": rows[0]["run"]})


def runs_of(plan):
    api = tracking.client(plan.tracking)
    experiment = api.get_experiment_by_name("test")
    return api, api.search_runs([experiment.experiment_id], f"tags.`{tracking.SWEEP_TAG}` = '{plan.sweep}'")


def place_of(settings, sweep):
    return tracking._connect(settings, sweep)


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
        assert run.data.metrics["validation_accuracy"] in (0.8, 0.9)
        assert run.data.metrics["base_validation_accuracy"] == 0.6
        assert run.data.metrics["train_seconds"] == 12.5
        assert run.data.params["train.learning_rate"] in ("0.0003", "0.001")
        assert set(run.data.params) == {"data", "model", "method", "train.learning_rate"}, (
            "what is swept, and about what"
        )
        assert run.inputs.dataset_inputs[0].dataset.name == "movie_reviews"
        names = {file.path for file in api.list_artifacts(run.info.run_id)}
        assert {"adapter", "report.html", "config.yaml"} <= names
    champion = api.get_model_version_by_alias("movie_reviews", "champion")
    assert api.get_run(champion.run_id).data.metrics["validation_accuracy"] == 0.9
    assert parent.info.status == "FINISHED"


def test_a_run_has_its_whole_config_as_a_file(plan, tmp_path):
    plan, board = plan
    tracking.mirror(plan, board)
    api, runs = runs_of(plan)
    run = next(run for run in runs if run.data.tags[tracking.RUN_TAG] == plan.runs[0].name)
    shown = yaml.safe_load(Path(api.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))).read_text())
    assert shown["train"] == plan.runs[0].config["train"] and shown["data"] == plan.runs[0].config["data"]
    assert set(plan.runs[0].config) - set(shown) == {"tracking", "notify", "keep", "sweep"}


def test_the_view_of_a_sweep_is_saved_once(plan, monkeypatch):
    import mlflow

    plan, board = plan
    link = tracking.prepare(plan.tracking, plan.sweep, mlflow_pages.shown_of(plan))
    assert link == tracking.link(plan.tracking, plan.sweep) and link.startswith("http://127.0.0.1:5000/#/experiments/")
    [name] = parse_qs(urlsplit(link).fragment.partition("?")[2])["viewStateShareKey"]
    tags = tracking.client(plan.tracking).get_experiment_by_name("test").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    state = json.loads(json.loads(tags[f"mlflow.sharedViewState.{name}"])["state"])
    assert state["orderByKey"] == "metrics.`validation_accuracy`" and state["orderByAsc"] is False
    assert state["selectedColumns"][:2] == ["params.`train.learning_rate`", "metrics.`validation_accuracy`"]
    monkeypatch.setattr(mlflow.MlflowClient, "set_experiment_tag", lambda *_: pytest.fail("nothing is new"))
    assert tracking.mirror(plan, board)[0]
    assert tracking.newest_sweeps(3) == {plan.sweep: link.partition("5000/")[2]}


def test_a_view_of_many_columns_is_cut_to_what_a_tag_holds():
    swept = [f"adapter.some_long_name_of_a_field_{number}" for number in range(200)]
    shown = mlflow_pages.Shown(swept, "validation_loss", ["train_seconds"], lower=True)
    value = mlflow_pages.view("sweep s", "tags.`a` = 'b'", shown, 0)
    state = json.loads(json.loads(value)["state"])
    assert len(value) <= 5000 and state["orderByAsc"] is True
    assert state["selectedColumns"] == [f"params.`{name}`" for name in swept[: len(state["selectedColumns"])]]


def test_a_note_that_a_person_has_edited_stays(plan):
    plan, board = plan
    tracking.mirror(plan, None)
    api, runs = runs_of(plan)
    parent = next(run for run in runs if run.data.tags[tracking.RUN_TAG] == "-").info.run_id
    before = api.get_run(parent).data.tags["mlflow.note.content"]
    tracking.mirror(plan, board)
    after = api.get_run(parent).data.tags["mlflow.note.content"]
    assert "accuracy 0.900" in after and after != before, "ours follows the results"
    api.set_tag(parent, "mlflow.note.content", "look at the second one")
    tracking.mirror(plan, board)
    assert api.get_run(parent).data.tags["mlflow.note.content"] == "look at the second one"


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


def test_how_busy_the_machine_is_goes_on_over_a_kill(workspace):
    """Its steps are seconds since the run began, so that those of a training that goes on do not begin at 0 again."""
    tracking.prepare(SETTINGS, "s")
    target = target_at(None) | {"tracking": {**SETTINGS, "system_metrics": True}}
    counts = []
    for line in LINES[:2]:
        with tracking.follow(target) as listener:
            listener(line)
            wait_until_sent(None, line["step"])
        api, runs = all_runs(None)
        counts.append(len(steps_of(api, runs["r"], "system/cpu_utilization_percentage")))
        time.sleep(1)
    assert 0 < counts[0] < counts[1]
    assert steps_of(api, runs["r"]) == [1, 2]


def test_what_a_killed_command_left_running_is_ended(plan):
    plan, _ = plan
    tracking.prepare(plan.tracking, plan.sweep)
    api, _ = runs_of(plan)
    left = tracking._child_run(place_of(plan.tracking, plan.sweep), "killed", "killed").info.run_id
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
    """The log; stores are given up after a second and asked again soon, so that a test is short."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking, "LONGEST_PAUSE", 2.0)
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


def test_runs_that_are_complete_in_the_store_are_asked_for_together(plan, monkeypatch):
    import mlflow

    made, board = plan
    assert tracking.mirror(made, board)[0]
    asked = []
    monkeypatch.setattr(tracking, "_mirror_run", lambda *_: asked.append("one by one"))
    search = mlflow.MlflowClient.search_runs
    monkeypatch.setattr(
        mlflow.MlflowClient, "search_runs", lambda *all_, **named: asked.append("all") or search(*all_, **named)
    )
    ids, refused = tracking._mirror_runs(place_of(made.tracking, made.sweep), made)
    assert (len(ids), refused, asked) == (2, [], ["all"])


def test_a_batch_that_arrives_twice_is_one(workspace):
    tracking.prepare(SETTINGS, "s")
    with tracking.follow(target_at(None)) as listener:
        listener(LINES[0])
    api, runs = all_runs(None)
    curves = tracking._Curves(api, runs["r"])
    curves.known.clear()  # as when the answer of the store came too late to be heard
    curves.send(LINES)
    assert steps_of(api, runs["r"]) == [1, 2, 3, 4]


def test_a_run_that_was_made_twice_is_one_again(workspace):
    tracking.prepare(SETTINGS, "s")
    api, _ = all_runs(None)
    experiment = api.get_experiment_by_name("test").experiment_id
    first = tracking._child_run(place_of(SETTINGS, "s"), "r", "r").info.run_id
    tags = api.get_run(first).data.tags
    api.create_run(experiment, tags={name: tags[name] for name in (tracking.SWEEP_TAG, tracking.RUN_TAG)})
    assert len(api.search_runs([experiment])) == 3
    assert tracking._child_run(place_of(SETTINGS, "s"), "r", "r").info.run_id == first
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
    assert all(steps_of(api, run, "validation_loss") == [0] for run in runs if run.data.tags[tracking.RUN_TAG] != "-")


def test_what_has_no_report_is_ended_as_failed(plan):
    plan, board = plan
    tracking.prepare(plan.tracking, plan.sweep)
    lost = plan.runs[1]
    with tracking.follow(plan.jobs[lost.segments[-1]].settings["follow"]):
        (Path(lost.artefacts["evaluate_model"]) / "metrics.json").unlink()
    tracking.mirror(plan, of_rows(board, [row for row in board.rows if row["run"] != lost.name]))
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


# --- names, values, addresses --------------------------------------------------------------------


@given(st.text(max_size=300))
def test_every_name_becomes_one_that_mlflow_takes(name):
    from mlflow.utils.validation import _validate_param_name

    clean = tracking.valid_name(name)
    _validate_param_name(clean)
    assert len(clean) <= 250


@given(st.text(max_size=300) | st.from_regex(r"[/\w.\- :]{1,300}", fullmatch=True), st.text(max_size=20))
def test_two_names_never_become_one(name, other):
    assert (tracking.valid_name(name) == tracking.valid_name(other)) == (name == other)


@given(st.text(max_size=12) | st.sampled_from([".", "..", "../a", "a/b", "a:b", " ", "..a", "a.", "\n"]))
def test_a_models_name_is_refused_before_mlflow_refuses_it(name):
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_model_name
    from pydantic import ValidationError

    from temper.config.schema import Tracking

    def taken(check, *errors) -> bool:
        try:
            check()
        except errors:
            return False
        return True

    ours = taken(lambda: Tracking(registered_model_name=name), ValidationError)
    assert ours == taken(lambda: _validate_model_name(name), MlflowException)


def test_names_and_values_that_mlflow_does_not_take_as_they_are(plan):
    """Regular expressions as keys, texts of 7,000 characters that differ at their end only."""
    plan, board = plan
    pattern = {"^a$": 4, "(a)": 8, "^a(": 2}
    long = "Say positive or negative. " * 270
    for index, run in enumerate(plan.runs):
        run.point["adapter.rank_pattern"] = pattern
        run.point["prompt.system"] = f"{long}{index}"
        run.config["data"]["source"]["path"] = ["x" * 1000] * 100
    plan.axes["prompt.system"] = [long, long]
    tracking.prepare(plan.tracking, plan.sweep)
    done, said = tracking.mirror(plan, board)
    assert done, said
    runs = [run for run in runs_of(plan)[1] if run.data.tags[tracking.RUN_TAG] != "-"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        ranks = {name: value for name, value in run.data.params.items() if name.startswith("adapter.rank_pattern")}
        assert sorted(ranks.values()) == ["2", "4", "8"]
    systems = [run.data.params["prompt.system"] for run in runs]
    assert len(set(systems)) == 2 and all(f"... ({len(long) + 1} characters, " in text for text in systems)
    assert len({run.info.run_name for run in runs}) == 2


def test_a_parameter_that_changed_makes_the_run_anew(plan):
    """Such as the path of the same rows, which no key has: MLflow would refuse it for ever."""
    plan, board = plan
    run = plan.runs[0]
    tracking.prepare(plan.tracking, plan.sweep)
    api, _ = runs_of(plan)
    left = tracking._child_run(place_of(plan.tracking, plan.sweep), run.name, run.title).info.run_id
    api.log_param(left, "data.source.path", "/where/it/was")
    run.point["data.source.path"] = "/where/it/is"
    done, said = tracking.mirror(plan, board)
    assert done, said
    runs = [made for made in runs_of(plan)[1] if made.data.tags[tracking.RUN_TAG] == run.name]
    assert [made.data.params["data.source.path"] for made in runs] == ["/where/it/is"]
    assert steps_of(api, runs[0]) == [1, 2, 3, 4]


def test_what_a_store_refuses_for_one_run_does_not_keep_the_others_out(plan):
    plan, board = plan
    tracking.prepare(plan.tracking, plan.sweep)
    plan.runs[0].config["data"] = {**plan.runs[0].config["data"], "name": "x" * 600}  # longer than MLflow takes
    done, said = tracking.mirror(plan, board)
    assert done is False
    assert "1 run(s) refused" in said and "run the same command again" in said and "will try again" not in said
    statuses = {run.data.tags[tracking.RUN_TAG]: run.info.status for run in runs_of(plan)[1]}
    assert statuses == {"-": "FAILED", plan.runs[0].name: "FAILED", plan.runs[1].name: "FINISHED"}


# --- a project that is copied or moved -----------------------------------------------------------


def files_below(folder) -> dict[str, tuple]:
    """Each file, and what changes when it is written anew, also by a copy with its time."""
    stats = {str(path): path.stat() for path in Path(folder).rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}


def another_run(plan, finished_run):
    """The plan as it is after one more run."""
    extra = copy.deepcopy(plan.runs[0])
    extra.name, extra.key = "one-more-0123456789", "0123456789"
    extra.artefacts = {
        **extra.artefacts,
        "evaluate_model": "results/reports/one-more",
        "train_adapter": "results/adapters/more",
    }
    _write(extra, finished_run, accuracy=0.99)
    plan.runs.append(extra)
    rows = [{"run": extra.name, "validation_accuracy": 0.99}]
    return board_of(plan.sweep, rows)


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_a_copied_or_moved_project_writes_into_itself_only(plan, finished_run, tmp_path_factory, monkeypatch, how):
    plan, board = plan
    tracking.mirror(plan, board)
    original, copied = Path.cwd(), tmp_path_factory.mktemp("other") / "here"
    how(original, copied)
    before = files_below(original)
    monkeypatch.chdir(copied)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._artifact_repos_cache", OrderedDict())  # a new process
    board = another_run(plan, finished_run)
    done, said = tracking.mirror(plan, board)
    assert done, said
    assert files_below(original) == before, "nothing is written where the project was"
    api, runs = runs_of(plan)
    assert len(runs) == 4
    for run in runs:
        assert run.info.artifact_uri.startswith(Path("results").resolve().as_uri())
        assert Path(local_path(run.info.artifact_uri), "report.html").is_file(), "old and new artifacts are found"
    for version in api.search_model_versions("name = 'movie_reviews'"):
        assert Path(local_path(version.source), "MLmodel").is_file()
        download = api.get_model_version_download_uri("movie_reviews", version.version)
        assert Path(local_path(download)).is_dir()


def test_the_ui_shows_the_artifacts_of_a_copy_that_no_command_has_run_in(plan, tmp_path_factory, monkeypatch):
    plan, board = plan
    tracking.mirror(plan, board)
    copied = tmp_path_factory.mktemp("other") / "here"
    shutil.copytree(Path.cwd(), copied)
    monkeypatch.chdir(copied)
    assert tracking.open_own_store() == "sqlite:///results/mlflow.db"
    assert all(run.info.artifact_uri.startswith(copied.resolve().as_uri()) for run in runs_of(plan)[1])


def local_path(uri: str) -> str:
    return unquote(urlsplit(uri).path)


@pytest.mark.parametrize("name", ["we ird#a%41", 'it\'s "quoted" & é;$HOME'])
def test_a_project_whose_path_has_signs_of_addresses(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    tracking.prepare(SETTINGS, "s")
    with tracking.follow(target_at(None)) as listener:
        listener(LINES[0])
    api, runs = all_runs(None)
    (folder / "a.txt").write_text("a")
    api.log_artifact(runs["r"].info.run_id, "a.txt")
    assert [file.path for file in api.list_artifacts(runs["r"].info.run_id)] == ["a.txt"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "results"]


def test_a_diverged_run_is_mirrored_and_never_the_champion(plan):
    plan, board = plan
    diverged, sound = plan.runs[1], plan.runs[0]
    report = Path(diverged.artefacts["evaluate_model"], "metrics.json")
    report.write_text(
        json.dumps({"task": "labels", "metric": "accuracy", "diverged_at_step": 2, "train": {"train_seconds": 1.0}})
    )
    Path(diverged.artefacts["train_adapter"], "metrics.jsonl").write_text('{"step": 1, "seconds": 1, "loss": NaN}\n')
    rows = [{"run": diverged.name, "validation_accuracy": None, "diverged_at_step": 2}]
    done, said = tracking.mirror(plan, of_rows(board, rows))
    assert done and said.endswith("no run has figures, so there is no new champion")
    assert "is version 1" in tracking.mirror(plan, of_rows(board, [board.rows[1], *rows]))[1]
    api, runs = runs_of(plan)
    champion = api.get_model_version_by_alias("movie_reviews", "champion")
    assert api.get_run(champion.run_id).data.tags[tracking.RUN_TAG] == sound.name
    [told] = [run for run in runs if run.data.tags[tracking.RUN_TAG] == diverged.name]
    assert (told.info.status, told.data.tags["temper.diverged_at_step"]) == ("FINISHED", "2")


def test_a_moved_project_keeps_its_name_in_a_shared_store_and_a_copy_gets_its_own(tmp_path, monkeypatch):
    original, moved, copied = (tmp_path / name for name in ("it's mine", "moved", "copied"))
    original.mkdir()
    monkeypatch.chdir(original)
    name = tracking.project()
    assert re.fullmatch(r"it_s_mine-[0-9a-f]{8}", name) and tracking.project() == name
    original.rename(moved)
    monkeypatch.chdir(moved)
    assert tracking.project() == name
    shutil.copytree(moved, copied)
    monkeypatch.chdir(copied)
    other = tracking.project()
    assert re.fullmatch(r"copied-[0-9a-f]{8}", other) and tracking.project() == other
    (tmp_path / "link").symlink_to(moved)
    monkeypatch.chdir(tmp_path / "link")
    assert tracking.project() == name
    shutil.rmtree(copied)
    shutil.copytree(moved, copied)
    shutil.rmtree(moved)
    monkeypatch.chdir(copied)
    assert tracking.project() == name, "the original is gone: that was a move to another disk"
    tracking.PROJECT.write_text("no json")
    with pytest.raises(UserError, match="project.json: .*delete it, and the project gets another name"):
        tracking.project()


def test_the_projects_own_store_goes_on_by_whatever_address(workspace):
    """Its runs are the project's, those without the tag of one too; in another file they are not."""
    tracking.prepare(SETTINGS, "s")
    for uri, own in ((None, True), ("sqlite:///results/mlflow.db", True), (f"sqlite:///{workspace}/other.db", False)):
        place = place_of({**SETTINGS, "tracking_uri": uri}, "s")
        assert (place.project is None, tracking.PROJECT.exists()) == (own, not own)
        assert set(tracking._runs(place)) == ({"-"} if own else set())


# --- what is said --------------------------------------------------------------------------------


def test_try_again_is_said_only_where_it_can_succeed(plan):
    plan, board = plan
    tracking.mirror(plan, board)
    api, _ = runs_of(plan)
    experiment = api.get_experiment_by_name("test").experiment_id
    api.delete_experiment(experiment)
    with pytest.raises(UserError, match=r"the experiment 'test' was deleted in MLflow: restore it \(MLFLOW_TRACKING_"):
        tracking.prepare(plan.tracking, plan.sweep)
    done, said = tracking.mirror(plan, board)
    assert done is False and "will try again" not in said and said.endswith("then run the same command again")
    [command] = re.findall(r"restore it \((.*?)\)", said)
    variable, _, command = command.partition(" ")
    environment = {**os.environ, **dict([variable.split("=", 1)])}
    subprocess.run([sys.executable, "-m", *command.split()], check=True, env=environment, capture_output=True)
    assert tracking.mirror(plan, board)[0], "what was said to do helps"


def test_a_damaged_store_is_made_anew_once_it_is_moved_away(plan):
    plan, board = plan
    Path("results/mlflow.db").write_text("no database, " * 100)
    done, said = tracking.mirror(plan, board)
    assert done is False and "move the damaged file away" in said and "will try again" not in said
    with pytest.raises(UserError, match="sqlite:///results/mlflow.db: .*move the damaged file away"):
        tracking.prepare(plan.tracking, plan.sweep)
    Path("results/mlflow.db").rename("results/damaged")
    assert tracking.mirror(plan, board)[0]


def test_an_address_of_the_environment_is_read_when_it_is_needed_and_never_shown(plan, monkeypatch):
    plan, board = plan
    Path("results/mlflow.db").unlink()
    settings = {**plan.tracking, "tracking_uri": "env"}
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="the environment variable MLFLOW_TRACKING_URI is not set"):
        tracking.check(settings)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:s3cret@127.0.0.1:9")
    with pytest.raises(UserError) as refused:
        tracking.prepare(settings, "s")
    assert "http://***@127.0.0.1:9" in str(refused.value) and "s3cret" not in str(refused.value)
    plan.tracking.update(settings)
    assert "s3cret" not in tracking.mirror(plan, board)[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path('mine.db').resolve()}")
    assert tracking.mirror(plan, board)[0]
    assert Path("mine.db").is_file() and not Path("results/mlflow.db").exists()


def test_the_address_for_a_browser_is_that_of_the_server_without_its_login():
    assert (
        mlflow_pages.server_of("https://alice:s3cret@mlflow.example.org/team/?a=b") == "https://mlflow.example.org/team"
    )
    assert mlflow_pages.server_of("sqlite:////somewhere/else.db") is None, "which nobody serves, as far as is known"


def test_a_variable_that_is_not_used_is_said(workspace, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://alice:s3cret@127.0.0.1:9")
    tracking.prepare(SETTINGS, "s")
    said = capsys.readouterr().err
    assert "MLFLOW_TRACKING_URI is set, but not used" in said and "s3cret" not in said


# --- what is registered --------------------------------------------------------------------------


def test_a_fully_trained_champion_is_sent_to_a_server_and_answers_from_there(plan, server, tmp_path, monkeypatch):
    import mlflow

    plan, board = plan
    if server.process is None or server.process.poll() is not None:
        server.start()
    plan.tracking["tracking_uri"] = server.uri
    best = next(run for run in plan.runs if run.name == board.chosen).artefacts
    shutil.rmtree(best["train_adapter"])
    shutil.rmtree(best["merge_adapter"])
    config = [*(override for override in finished.CONFIG if override != "adapter.r=4"), "adapter=full"]
    given = ["--model", best["fetch_model"], *config]
    train_adapter.main(["--splits", best["tokenize_splits"], "--output", best["train_adapter"], *given])
    merge_adapter.main(["--adapter", best["train_adapter"], "--output", best["merge_adapter"], *given])
    done, said = tracking.mirror(plan, board)
    assert done and "champion of 'movie_reviews' is version 1" in said, said
    expected = predicted(best["evaluate_model"], tmp_path)
    shutil.move("results", "gone")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    model = mlflow.pyfunc.load_model("models:/movie_reviews@champion")
    assert asked(model) == expected
    folder = Path(
        mlflow.artifacts.download_artifacts("models:/movie_reviews@champion", dst_path=str(tmp_path / "copy"))
    )
    weights = list(folder.rglob("*.safetensors"))
    assert [path.parent.parent.name for path in weights] == ["merged"], "once, and without the adapter's copy"
