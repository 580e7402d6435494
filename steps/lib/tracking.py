"""MLflow, all of it. Files in results/ are the truth; this mirrors them (see docs/tracking.md).

* `prepare` makes the store, the experiment and the sweep's run before the first job: eight jobs that
  each meet a fresh SQLite file crash.
* `follow` sends training curves while they grow, from a thread of its own, so that a slow, locked or
  dead store never slows or stops training. What it cannot send it keeps, and tries again.
* `mirror` completes every run of a sweep from its files.

All of it can be cut off anywhere and repeated. A sweep point is one MLflow run, found by its tags, a
child of its sweep's run; before a metric is sent again, the store is asked whether it has it.
"""

import contextlib
import getpass
import json
import logging
import os
import queue
import sqlite3
import threading
from pathlib import Path

from steps.lib.errors import UserError, lack
from steps.lib.folders import locked
from steps.lib.keys import flat
from steps.lib.metrics import LOWER_IS_BETTER
from steps.lib.step import git_commit

log = logging.getLogger("temper")

SWEEP_TAG, RUN_TAG, MIRRORED_TAG = "temper.sweep", "temper.run", "temper.mirrored"
SWEEP = "-"  # RUN_TAG of the sweep's own run
BATCH = 1000  # metrics in one log_batch, the store's limit
LOCK_SECONDS = 5.0  # how long to wait for other writers of an SQLite file
LONGEST_PAUSE = 60.0  # seconds between two tries to reach a store that is away
GOODBYE_SECONDS = 10.0  # how long the end of a training waits for the last curves to be sent
GOODBYE_WHEN_DOWN = 1.0  # the same, if the last try failed: the comparison will send them


def store_uri(tracking: dict) -> str:
    """The tracking URI: the configured server, or SQLite at an absolute path in results/."""
    return tracking["tracking_uri"] or f"sqlite:///{Path('results/mlflow.db').resolve()}"


def client(tracking: dict):
    """An MLflow client that gives up on a dead server after seconds, not minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # tracebacks of what we say in one line
    return mlflow.MlflowClient(store_uri(tracking))


def _connect(tracking: dict) -> tuple:
    """(client, experiment id) of a store that answers."""
    _check_lock(tracking)
    api = client(tracking)
    found = api.get_experiment_by_name(tracking["experiment_name"])
    if found is not None:
        return api, found.experiment_id
    local = tracking["tracking_uri"] is None
    location = Path("results/mlflow-artifacts").resolve().as_uri() if local else None
    return api, api.create_experiment(tracking["experiment_name"], artifact_location=location)


def _check_lock(tracking: dict) -> None:
    """Refuse a locked SQLite file after seconds: MLflow itself would wait for it for minutes."""
    uri = store_uri(tracking)
    if not uri.startswith("sqlite"):
        return
    from sqlalchemy import make_url

    file = make_url(uri).database
    if not Path(file).exists():
        return
    with contextlib.closing(sqlite3.connect(file, timeout=LOCK_SECONDS)) as database:
        if tracking["tracking_uri"] is None:  # ours: readers (the UI) and writers (jobs) shall not block each other
            database.execute("PRAGMA journal_mode=WAL")
        database.execute("BEGIN IMMEDIATE")


def _open(tracking: dict) -> tuple:
    """As `_connect`, where there may be no store yet: two commands that both meet none would both fill the file."""
    with locked(Path("results/mlflow.db")):
        if tracking["tracking_uri"] is None:
            _make_store(tracking)
        return _connect(tracking)


def _make_store(tracking: dict) -> None:
    """Make the SQLite file whole or not at all: MLflow cannot go on with half of its tables."""
    store, temporary = Path("results/mlflow.db"), Path("results/.tmp-mlflow.db")
    if not store.exists():
        temporary.unlink(missing_ok=True)
        client({**tracking, "tracking_uri": f"sqlite:///{temporary.resolve()}"}).search_experiments(max_results=1)
        temporary.rename(store)


# --- runs ----------------------------------------------------------------------------------------


def _runs(api, experiment: str, sweep: str, name: str | None = None) -> dict:
    """name -> MLflow run, of all of a sweep or of one name.

    Of two runs of one name the second is deleted: a store that answers too late is asked again, and makes it twice.
    """
    wanted = {SWEEP_TAG: sweep} | ({RUN_TAG: name} if name else {})
    text = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in wanted.items())
    found, token = [], None
    while token != "":
        page = api.search_runs([experiment], text, max_results=1000, page_token=token)
        found, token = found + page, page.token or ""
    runs = {}
    for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id)):
        if runs.setdefault(run.data.tags[RUN_TAG], run) is not run:
            api.delete_run(run.info.run_id)
    return runs


def _sweep_run(api, experiment: str, sweep: str) -> str:
    found = _runs(api, experiment, sweep, SWEEP)
    if found:
        return found[SWEEP].info.run_id
    tags = {SWEEP_TAG: sweep, RUN_TAG: SWEEP, **_origin()}
    return api.create_run(experiment, tags=tags, run_name=f"sweep {sweep}").info.run_id


def _child_run(api, experiment: str, sweep: str, name: str, title: str) -> str:
    """The MLflow run of a sweep point, made when it is first needed."""
    found = _runs(api, experiment, sweep, name)
    if found:
        return found[name].info.run_id
    parent = _sweep_run(api, experiment, sweep)
    tags = {SWEEP_TAG: sweep, RUN_TAG: name, "mlflow.parentRunId": parent, **_origin()}
    return api.create_run(experiment, tags=tags, run_name=title).info.run_id


def _end_running(api, experiment: str, sweep: str, status: str) -> None:
    """End whatever of a sweep is RUNNING."""
    for run in _runs(api, experiment, sweep).values():
        if run.info.status == "RUNNING":
            api.set_terminated(run.info.run_id, status=status)


def _origin() -> dict[str, str]:
    """Who made a run with which code, in the columns that the UI has for it."""
    tags = {"mlflow.source.name": "temper", "mlflow.source.type": "PROJECT"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    commit = git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


class _Curves:
    """The metrics of one MLflow run. Sends what the store does not have."""

    def __init__(self, api, run_id: str):
        run = api.get_run(run_id)
        self.api, self.run_id, self.start = api, run_id, run.info.start_time
        self.known = {
            (name, metric.step) for name in run.data.metrics for metric in api.get_metric_history(run_id, name)
        }

    def send(self, lines: list[dict]) -> None:
        """Send lines of metrics.jsonl: {"step", "seconds": training time so far, metric: value or None}.

        A metric's time is that of the run's start plus `seconds`: replayed curves look as live ones do, and a store
        that gets a batch twice, because the first answer came too late, sees that it is the same.
        """
        from mlflow.entities import Metric

        new = {}
        for line in lines:
            step, time = line["step"], self.start + int(1000 * line["seconds"])
            for name, value in line.items():
                if name in ("step", "epoch", "seconds") or value is None or (name, step) in self.known:
                    continue
                new[name, step] = Metric(name, value, time, step)
        metrics = list(new.values())
        for start in range(0, len(metrics), BATCH):
            self.api.log_batch(self.run_id, metrics=metrics[start : start + BATCH])
        self.known |= new.keys()


# --- before the first job ------------------------------------------------------------------------


def prepare(tracking: dict, sweep: str) -> None:
    """Create store, experiment and the sweep's run, and end what a killed command left RUNNING.

    Raises:
        UserError: the tracking store cannot be reached.
    """
    if not tracking["enabled"]:
        return
    try:
        api, experiment = _open(tracking)
        _end_running(api, experiment, sweep, "KILLED")
        api.update_run(_sweep_run(api, experiment, sweep), status="RUNNING")
    except Exception as error:
        raise lack(error, store_uri(tracking)) or UserError(
            f"tracking store {store_uri(tracking)}: {_one_line(error)}; "
            "start the server, or set tracking.tracking_uri, or tracking=none"
        ) from None


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
    sender = _Sender(target)
    sender.start()
    try:
        yield sender.lines.put
    finally:
        sender.over.set()
        sender.join(GOODBYE_WHEN_DOWN if sender.down else GOODBYE_SECONDS)


class _Sender(threading.Thread):
    """Sends what is in its queue every few seconds; keeps what it cannot send, and tries again, ever less often."""

    def __init__(self, target: dict):
        super().__init__(daemon=True)
        self.target, self.lines, self.over = target, queue.SimpleQueue(), threading.Event()
        self.curves = None
        self.down = False  # whether the last try failed

    def run(self) -> None:
        flush = self.target["tracking"]["flush_seconds"]
        unsent, pause, ended = [], 0.0, False
        while not ended:
            ended = self.over.wait(pause)
            while not self.lines.empty():
                unsent.append(self.lines.get())
            try:
                self._send(unsent)
            except Exception as error:  # whatever it is, training goes on, and the files have everything
                self._say(True, f": {_one_line(error)}; training goes on, and what is missed is sent later")
                self.curves = None  # the batch may have arrived all the same: ask the store anew what it has
                pause = min(LONGEST_PAUSE, max(flush, 2 * pause))
            else:
                self._say(False, " is back and has the curves")
                unsent, pause = [], flush

    def _send(self, lines: list[dict]) -> None:
        tracking = self.target["tracking"]
        if self.curves is None:
            api, experiment = _connect(tracking)
            run = _child_run(api, experiment, self.target["sweep"], self.target["run"], self.target["title"])
            api.update_run(run, status="RUNNING")
            self.curves = _Curves(api, run)
        elif lines:
            _check_lock(tracking)
        self.curves.send(lines)

    def _say(self, down: bool, what: str) -> None:
        if down != self.down:
            log.info("tracking store %s%s", store_uri(self.target["tracking"]), what)
        self.down = down


# --- after training, from the files --------------------------------------------------------------


def mirror(plan, board: dict | None, unfinished: str = "FAILED") -> tuple[bool | None, str]:
    """Complete the MLflow run of every sweep point that has a report, end all others, and name the champion.

    Args:
        plan: a `steps.lib.plan.Plan`.
        board: {"metric", "rows": the leaderboard's rows, best first; `run` is the run's name}; None: there is none.
        unfinished: status of the runs that have no report.

    Returns:
        (whether the store has it all, or None when tracking is off; a line that says so)
    """
    tracking = plan.tracking
    if not tracking["enabled"]:
        return None, "tracking is off"
    try:
        api, experiment = _open(tracking)
        ids = {}
        for run in plan.runs:
            if (Path(run.artefacts["evaluate_model"]) / "metrics.json").is_file():
                ids[run.name] = _mirror_run(api, experiment, plan.sweep, run)
        champion = f"; {_register_champion(api, plan, board, ids)}" if board else ""
        _finish_sweep(api, experiment, plan, board, "FINISHED" if len(ids) == len(plan.runs) else unfinished)
        _end_running(api, experiment, plan.sweep, unfinished)
    except Exception as error:  # the results are in files
        return False, f"tracking: not up to date: {_one_line(error)}; the next command will try again"
    return True, f"tracking: {len(ids)} run(s) in {store_uri(tracking)}{champion}"


def _mirror_run(api, experiment: str, sweep: str, run) -> str:
    run_id = _child_run(api, experiment, sweep, run.name, run.title)
    found = api.get_run(run_id)
    # One that is complete but was trained again is RUNNING.
    if found.data.tags.get(MIRRORED_TAG) == run.key and found.info.status == "FINISHED":
        return run_id
    report, adapter = Path(run.artefacts["evaluate_model"]), Path(run.artefacts["train_adapter"])
    metrics = json.loads((report / "metrics.json").read_text())
    _log_params(api, run_id, run.config)
    _log_dataset(api, run_id, run)
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    _Curves(api, run_id).send([*lines, _results(metrics)])
    if metrics.get("diverged_at_step") is not None:
        api.set_tag(run_id, "temper.diverged_at_step", str(metrics["diverged_at_step"]))
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


def _results(metrics: dict) -> dict:
    """The figures of a report's metrics.json as one line for `_Curves.send`."""
    training = metrics["train"] or {}
    values = {
        name: training.get(name)
        for name in ("train_seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters")
    }
    for prefix, scores in (("test_", metrics.get("test")), ("base_test_", metrics.get("base"))):
        values |= {prefix + name: value for name, value in (scores or {}).items()}
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {"step": 0, "seconds": training.get("train_seconds") or 0.0, **numbers}


def _finish_sweep(api, experiment: str, plan, board: dict | None, status: str) -> None:
    run_id = _sweep_run(api, experiment, plan.sweep)
    for axis, values in plan.axes.items():
        api.set_tag(run_id, f"axis.{axis}", ", ".join(str(value) for value in values))
    if board:
        for name in ("leaderboard.csv", "report.html"):
            api.log_artifact(run_id, str(Path(plan.leaderboard).with_name(name)))
    api.set_terminated(run_id, status=status)


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
    tags = {"temper.measured": measured, "temper.score": str(best[score])}
    version = api.create_model_version(name, source, run_id=ids[best["run"]], tags=tags).version
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
    """What is wrong; for a server that cannot be reached, the refusal itself, which MLflow's text leaves out."""
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    error = next((inner for inner in reversed(chain) if isinstance(inner, OSError)), error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
