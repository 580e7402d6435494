"""MLflow, all of it. Files in results/ are the truth; this mirrors them.

* `prepare` makes the store, the experiment and the sweep's run before the first job: eight jobs that
  each meet a fresh SQLite file crash.
* `follow` sends training curves while they grow, from a thread of its own, so that a slow, locked or
  dead store never slows or stops training.
* `mirror` completes every run of a sweep from its files. It can be repeated: what is there already is
  not sent again.

A sweep point is one MLflow run, found by its tags, a child of its sweep's run.
"""

import contextlib
import getpass
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from pathlib import Path

from steps.lib.errors import UserError, lack
from steps.lib.keys import flat
from steps.lib.metrics import LOWER_IS_BETTER
from steps.lib.step import git_commit, locked

log = logging.getLogger("temper")

SWEEP_TAG, RUN_TAG, MIRRORED_TAG = "temper.sweep", "temper.run", "temper.mirrored"
BATCH = 1000  # metrics in one log_batch, the store's limit
GOODBYE_SECONDS = 10.0  # how long the end of a training waits for the last curves to be sent


def store_uri(tracking: dict) -> str:
    """The tracking URI: the configured server, or SQLite at an absolute path in results/."""
    return tracking["tracking_uri"] or f"sqlite:///{Path('results/mlflow.db').resolve()}"


def client(tracking: dict):
    """An MLflow client that gives up on a dead server after seconds, not minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow.MlflowClient(store_uri(tracking))


# --- before the first job ------------------------------------------------------------------------


def prepare(tracking: dict, sweep: str) -> None:
    """Create store, experiment and the sweep's run, and end what a killed command left RUNNING.

    Raises:
        UserError: the tracking store cannot be reached.
    """
    if tracking["enabled"]:
        with locked(Path("results/mlflow.db")):  # two commands that both meet a fresh store would both fill it
            _prepare(tracking, sweep)


def _prepare(tracking: dict, sweep: str) -> None:
    try:
        if tracking["tracking_uri"] is None:
            _make_store(tracking)
        api = client(tracking)
        experiment = _experiment(api, tracking)
        if tracking["tracking_uri"] is None:
            with contextlib.closing(sqlite3.connect("results/mlflow.db")) as database:
                # Readers (the UI) and writers (jobs) then do not block each other.
                database.execute("PRAGMA journal_mode=WAL")
        parent = _sweep_run(api, experiment, sweep)
        api.update_run(parent, status="RUNNING")
        for run in _search(api, experiment, {SWEEP_TAG: sweep}):
            if run.info.status == "RUNNING" and run.info.run_id != parent:
                api.set_terminated(run.info.run_id, status="KILLED")
    except Exception as error:
        raise lack(error, store_uri(tracking)) or UserError(
            f"tracking store {store_uri(tracking)}: {_one_line(error)}; "
            "start the server, or set tracking.tracking_uri, or tracking=none"
        ) from None


def _make_store(tracking: dict) -> None:
    """Make the SQLite file whole or not at all: MLflow cannot go on with half of its tables."""
    store, temporary = Path("results/mlflow.db"), Path("results/.tmp-mlflow.db")
    if not store.exists():
        temporary.unlink(missing_ok=True)
        client({**tracking, "tracking_uri": f"sqlite:///{temporary.resolve()}"}).search_experiments(max_results=1)
        temporary.rename(store)


def _experiment(api, tracking: dict) -> str:
    found = api.get_experiment_by_name(tracking["experiment_name"])
    if found is not None:
        return found.experiment_id
    local = tracking["tracking_uri"] is None
    location = Path("results/mlflow-artifacts").resolve().as_uri() if local else None
    return api.create_experiment(tracking["experiment_name"], artifact_location=location)


def _search(api, experiment: str, tags: dict[str, str]) -> list:
    text = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found, token = [], None
    while True:
        page = api.search_runs([experiment], text, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _sweep_run(api, experiment: str, sweep: str) -> str:
    found = _search(api, experiment, {SWEEP_TAG: sweep, RUN_TAG: "-"})
    if found:
        return found[0].info.run_id
    tags = {SWEEP_TAG: sweep, RUN_TAG: "-", **_origin()}
    return api.create_run(experiment, tags=tags, run_name=f"sweep {sweep}").info.run_id


def _child_run(api, experiment: str, sweep: str, name: str, title: str) -> str:
    """The MLflow run of a sweep point, made when it is first needed."""
    found = _search(api, experiment, {SWEEP_TAG: sweep, RUN_TAG: name})
    if found:
        return found[0].info.run_id
    parent = _sweep_run(api, experiment, sweep)
    tags = {SWEEP_TAG: sweep, RUN_TAG: name, "mlflow.parentRunId": parent, **_origin()}
    return api.create_run(experiment, tags=tags, run_name=title).info.run_id


def _origin() -> dict[str, str]:
    """Who made a run with which code, in the columns that the UI has for it."""
    tags = {"mlflow.source.name": "temper", "mlflow.source.type": "PROJECT"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    commit = git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


# --- while training ------------------------------------------------------------------------------


@contextlib.contextmanager
def follow(target: dict | None):
    """Follow one training.

    Args:
        target: ``{"tracking": config section, "sweep": name, "run": name, "title": text}`` of the sweep
            point this training belongs to; None (a step by hand, or tracking off) follows nothing.

    Yields:
        a function that takes a line of metrics.jsonl and returns at once.
    """
    if target is None or not target["tracking"]["enabled"]:
        yield lambda _line: None
        return
    lines: queue.Queue = queue.Queue()
    over = threading.Event()
    thread = threading.Thread(target=_send_until, args=(target, lines, over), daemon=True)
    thread.start()
    try:
        yield lines.put
    finally:
        over.set()
        thread.join(GOODBYE_SECONDS)


def _send_until(target: dict, lines: queue.Queue, over: threading.Event) -> None:
    """Send what is in the queue every few seconds. The first failure ends it: `mirror` replays from the files."""
    try:
        api = client(target["tracking"])
        experiment = _experiment(api, target["tracking"])
        run = _child_run(api, experiment, target["sweep"], target["run"], target["title"])
        api.update_run(run, status="RUNNING")
        sent = _sent_steps(api, run)
        while True:
            ended = over.wait(target["tracking"]["flush_seconds"])
            waiting = []
            while not lines.empty():
                waiting.append(lines.get())
            _send_lines(api, run, waiting, sent)
            if ended:
                return
    except Exception as error:  # whatever it is, training goes on, and the files have everything
        log.info("tracking: %s; training goes on, and the curves will be sent from the files later", _one_line(error))


def _send_lines(api, run: str, lines: list[dict], sent: dict[str, set[int]]) -> None:
    """Send metric lines, except steps that the store has."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = []
    for line in lines:
        for name, value in line.items():
            if name in ("step", "epoch", "seconds") or value is None or line["step"] in sent.setdefault(name, set()):
                continue
            sent[name].add(line["step"])
            metrics.append(Metric(name, value, now, line["step"]))
    for start in range(0, len(metrics), BATCH):
        api.log_batch(run, metrics=metrics[start : start + BATCH])


def _sent_steps(api, run: str) -> dict[str, set[int]]:
    """metric name -> steps that the store has."""
    names = api.get_run(run).data.metrics
    return {name: {metric.step for metric in api.get_metric_history(run, name)} for name in names}


# --- after training, from the files --------------------------------------------------------------


def mirror(plan, board: dict) -> str | None:
    """Complete the MLflow run of every sweep point that has a report, and name the champion.

    Args:
        plan: a `steps.lib.plan.Plan`.
        board: {"metric", "rows": the leaderboard's rows, best first; `run` is the run's name}.

    Returns:
        one line for the log; None when tracking is off.
    """
    tracking = plan.tracking
    if not tracking["enabled"]:
        return None
    try:
        api = client(tracking)
        experiment = _experiment(api, tracking)
        ids = {}
        for run in plan.runs:
            if (Path(run.artefacts["evaluate_model"]) / "metrics.json").is_file():
                ids[run.name] = _mirror_run(api, experiment, plan.sweep, run)
        _finish_sweep(api, experiment, plan, board)
        champion = _register_champion(api, plan, board, ids)
    except Exception as error:  # the results are in files; the next comparison mirrors again
        return (
            f"tracking: not up to date: {_one_line(error)}; the next comparison with a reachable store mirrors it all"
        )
    return f"tracking: {len(ids)} run(s) in {store_uri(tracking)}; {champion}"


def _mirror_run(api, experiment: str, sweep: str, run) -> str:
    run_id = _child_run(api, experiment, sweep, run.name, run.title)
    if api.get_run(run_id).data.tags.get(MIRRORED_TAG) == run.key:
        return run_id
    report, adapter = Path(run.artefacts["evaluate_model"]), Path(run.artefacts["train_adapter"])
    _log_params(api, run_id, run.config)
    _log_dataset(api, run_id, run)
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    _send_lines(api, run_id, lines, _sent_steps(api, run_id))
    _log_results(api, run_id, json.loads((report / "metrics.json").read_text()))
    for file in (
        report / "report.html",
        report / "predictions.jsonl",
        adapter / "config.yaml",
        adapter / "provenance.json",
    ):
        api.log_artifact(run_id, str(file))
    if (adapter / "adapter_config.json").is_file():  # a full model is gigabytes: its folder is named in a tag instead
        api.log_artifacts(run_id, str(adapter), "adapter")
    api.set_tag(run_id, "temper.merged", run.artefacts["merge_adapter"])
    api.set_tag(run_id, MIRRORED_TAG, run.key)
    api.set_terminated(run_id, status="FINISHED")
    return run_id


def _log_params(api, run_id: str, config: dict) -> None:
    from mlflow.entities import Param

    sections = {name: value for name, value in config.items() if name not in ("tracking", "sweep")}
    params = [Param(name, value[:6000]) for name, value in flat(sections).items()]
    for start in range(0, len(params), 100):
        api.log_batch(run_id, params=params[start : start + 100])


def _log_dataset(api, run_id: str, run) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = run.config["data"]
    splits = Path(run.artefacts["tokenize_splits"])
    dataset = Dataset(
        name=data["name"],
        digest=splits.name.rpartition("-")[2],
        source_type=data["source"]["kind"],
        source=json.dumps(data["source"]),
        profile=json.dumps(json.loads((splits / "audit.json").read_text())["splits"]),
    )
    api.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _log_results(api, run_id: str, metrics: dict) -> None:
    from mlflow.entities import Metric

    values = {}
    for prefix, scores in (("test_", metrics.get("test")), ("base_test_", metrics.get("base"))):
        values |= {prefix + name: value for name, value in (scores or {}).items()}
    if metrics.get("diverged_at_step") is not None:
        api.set_tag(run_id, "temper.diverged_at_step", str(metrics["diverged_at_step"]))
    training = metrics["train"] or {}
    values |= {
        name: training.get(name)
        for name in ("train_seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters")
    }
    now = int(time.time() * 1000)
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    api.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in numbers.items()])


def _finish_sweep(api, experiment: str, plan, board: dict) -> None:
    run_id = _sweep_run(api, experiment, plan.sweep)
    for axis, values in plan.axes.items():
        api.set_tag(run_id, f"axis.{axis}", ", ".join(str(value) for value in values))
    page = Path("results/sweeps") / plan.sweep
    for name in ("leaderboard.csv", "report.html"):
        api.log_artifact(run_id, str(page / name))
    complete = len(board["rows"]) == len(plan.runs)
    api.set_terminated(run_id, status="FINISHED" if complete else "FAILED")


def _register_champion(api, plan, board: dict, ids: dict[str, str]) -> str:
    """Register the best run under the data set's name, with the alias ``champion``.

    A champion that an earlier sweep found on the same splits and by the same metric stays if it is better.
    """
    from mlflow.exceptions import MlflowException

    best, score = board["rows"][0], f"test_{board['metric']}"
    run = next(run for run in plan.runs if run.name == best["run"])
    name = plan.tracking["registered_model_name"] or run.config["data"]["name"]
    measured = f"{score} on {run.artefacts['tokenize_splits']}"
    with contextlib.suppress(MlflowException):  # it exists
        api.create_registered_model(name)
    holder = _champion(api, name)
    if holder is not None and _holds(holder.tags, measured, best[score], board["metric"]):
        return f"champion of '{name}' is still version {holder.version}"
    source = f"{api.get_run(ids[best['run']]).info.artifact_uri}/adapter"
    version = api.create_model_version(name, source, run_id=ids[best["run"]]).version
    api.set_model_version_tag(name, version, "temper.measured", measured)
    api.set_model_version_tag(name, version, "temper.score", str(best[score]))
    api.set_registered_model_alias(name, "champion", version)
    return f"champion of '{name}' is version {version}"


def _holds(tags: dict, measured: str, score: float, metric: str) -> bool:
    """Whether the champion with these tags was measured in the same way and is at least as good as `score`."""
    if tags.get("temper.measured") != measured:
        return False
    held = float(tags["temper.score"])
    return held <= score if metric in LOWER_IS_BETTER else held >= score


def _champion(api, name: str):
    from mlflow.exceptions import MlflowException

    try:
        return api.get_model_version_by_alias(name, "champion")
    except MlflowException:
        return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
