"""Everything about MLflow. It mirrors the files in results/, which are authoritative (see docs/tracking.md).

* `prepare` makes the store, the experiment and the sweep's run before the first job, because several jobs that meet a
  new SQLite file at once crash.
* `follow` sends training curves as they grow, from its own thread, so that a slow, locked or dead store never slows or
  stops training. It keeps what it cannot send and tries again.
* `mirror` completes every run of a sweep from its files.

All of it can be interrupted anywhere and repeated. A sweep point is one MLflow run, identified by its tags and a child
of its sweep's run. Before a metric is sent again, the store is asked whether it has it.

A store that others use too may have their sweeps of the same name, and even the same runs, so there a run belongs to
the project that made it (`project`).
"""

import contextlib
import getpass
import itertools
import json
import logging
import os
import posixpath
import queue
import re
import secrets
import sqlite3
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper import shared_disk
from temper.data.chunks import chunks
from temper.errors import UserError, lack
from temper.evaluation.figures import FILE, Diverged, Figures, finite, read_figures
from temper.files import json_text, known_json, read_json, read_json_lines, whole_file, write_whole
from temper.folders import locked
from temper.hashing import digest
from temper.keys import flat
from temper.provenance import git_commit
from temper.secrets import redacted

if TYPE_CHECKING:
    from temper.reports.leaderboard import Board

log = logging.getLogger("temper")
SWEEP_TAG, RUN_TAG, MIRRORED_TAG = "temper.sweep", "temper.run", "temper.mirrored"
PROJECT_TAG = "temper.project"
SWEEP = "-"  # RUN_TAG of the sweep's own run
PARAMS_IN_BATCH, METRICS_IN_BATCH = 100, 850  # the store takes 1,000 of all kinds, and so leaves room for tags
LOCK_SECONDS = 5.0  # how long to wait for other writers of an SQLite file
LONGEST_PAUSE = 60.0  # seconds between two attempts to reach an unreachable store
GOODBYE_SECONDS = 10.0  # how long the end of a training waits for the last curves to be sent
GOODBYE_WHEN_DOWN = 1.0  # the same if the last attempt failed; the comparison will send them
STORE, ARTIFACTS = Path("results/mlflow.db"), Path("results/mlflow-artifacts")
PROJECT = Path("results/.state/project.json")
SHOWN_STORE = f"sqlite:///{STORE}"  # as `mlflow server` takes it in the project's folder
FROM_ENVIRONMENT, VARIABLE = "env", "MLFLOW_TRACKING_URI"
# Most characters of names and values in MLflow's stores.
LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG, LONGEST_TITLE, LONGEST_SOURCE = 250, 6000, 5000, 250, 65_000


# --- the store -----------------------------------------------------------------------------------


def check(tracking: dict) -> None:
    """Refuse, before any job, what cannot be a store's address.

    Raises:
        UserError: the variable that should hold the address is empty, or the project's path cannot be part of one.
    """
    if not tracking["enabled"]:
        return
    if tracking["tracking_uri"] is None and "?" in str(STORE.resolve()):
        raise UserError(
            f"tracking: {STORE.resolve()} cannot be a database's address, for a '?' ends it: rename the folder, "
            "or set tracking.tracking_uri=http://... (a server), or tracking=none"
        )
    store_uri(tracking)


def store_uri(tracking: dict) -> str:
    """The tracking URI: the configured one, that of the environment, or SQLite at an absolute path in results/.

    From the environment it may hold a login, so messages use `shown_uri`.
    """
    if tracking["tracking_uri"] == FROM_ENVIRONMENT:
        if not os.environ.get(VARIABLE):
            raise UserError(f"tracking.tracking_uri={FROM_ENVIRONMENT}: the environment variable {VARIABLE} is not set")
        return os.environ[VARIABLE]
    return tracking["tracking_uri"] or f"sqlite:///{STORE.resolve()}"


def shown_uri(tracking: dict) -> str:
    """The tracking URI for messages: without a login, and short for the project's own store."""
    return SHOWN_STORE if tracking["tracking_uri"] is None else redacted(store_uri(tracking))


def client(tracking: dict):
    """An MLflow client that waits seconds, not minutes, for a dead server."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for each run that ends
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # tracebacks of errors that we report in one line
    return mlflow.MlflowClient(store_uri(tracking))


@dataclass(frozen=True)
class _Place:
    """Where a sweep's runs are."""

    api: Any
    experiment: str  # its id
    sweep: str
    project: str | None  # whose runs these are; None: in the project's own store all are

    @property
    def tags(self) -> dict[str, str]:
        """Those of the sweep's run and of all runs below it."""
        return {SWEEP_TAG: self.sweep} | ({PROJECT_TAG: self.project} if self.project else {})


def _connect(tracking: dict, sweep: str) -> _Place:
    """The place of a sweep in a store that answers."""
    _check_lock(tracking)
    api = client(tracking)
    name = tracking["experiment_name"]
    found = api.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"the experiment '{name}' was deleted in MLflow: restore it ({VARIABLE}={shown_uri(tracking)} mlflow "
                f"experiments restore --experiment-id {found.experiment_id}), or choose another with "
                "tracking.experiment_name=..."
            )
        experiment = found.experiment_id
    else:
        location = ARTIFACTS.resolve().as_uri() if tracking["tracking_uri"] is None else None
        experiment = api.create_experiment(name, artifact_location=location)
    own = store_uri(tracking) in (f"sqlite:///{STORE.resolve()}", SHOWN_STORE)
    return _Place(api, experiment, sweep, None if own else project())


def _check_lock(tracking: dict) -> None:
    """Refuse a locked SQLite file after seconds; MLflow itself would wait for minutes."""
    uri = store_uri(tracking)
    if not uri.startswith("sqlite"):
        return
    from sqlalchemy import make_url

    file = make_url(uri).database
    if not file or not Path(file).exists():
        return
    with contextlib.closing(sqlite3.connect(file, timeout=LOCK_SECONDS)) as database:
        if tracking["tracking_uri"] is None:  # readers (the UI) and writers (jobs) must not block each other
            database.execute("PRAGMA journal_mode=WAL")
        database.execute("BEGIN IMMEDIATE")


def _open(tracking: dict, sweep: str) -> _Place:
    """Like `_connect`, if there may be no store yet. Locked, because two commands would both create its tables."""
    with locked(STORE):
        if tracking["tracking_uri"] is not None:
            return _connect(tracking, sweep)
        _make_store()
        connected = _connect(tracking, sweep)  # which refuses the file of another version of MLflow
        _follow_the_folder()
        return connected


def _make_store() -> None:
    """Make the SQLite file completely or not at all: MLflow cannot use one with half of its tables."""
    if STORE.exists():
        return
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # The second argument is the artifact location of MLflow's default experiment, which we do not use. By default it
    # would be a path, which MLflow pastes into SQL.
    with whole_file(STORE) as temporary:
        SqlAlchemyStore(f"sqlite:///{temporary.resolve()}", "mlflow-artifacts:/").engine.dispose()


# Where MLflow stores absolute addresses below results/: table, column.
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)


def _follow_the_folder() -> None:
    """Correct the addresses of artifacts after the project was copied or moved.

    MLflow stores absolute ones, and would keep writing to the old place.
    """
    here, ending = STORE.parent.resolve().as_uri(), f"/{ARTIFACTS.name}"
    with contextlib.closing(sqlite3.connect(STORE, timeout=LOCK_SECONDS)) as database, database:
        locations = database.execute("SELECT artifact_location FROM experiments").fetchall()
        before = {location.removesuffix(ending) for (location,) in locations if location.endswith(ending)}
        for there in before - {here}:
            for table, column in ADDRESSES:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (here, len(there) + 1, len(there) + 1, f"{there}/"),
                )


def open_own_store() -> str:
    """Make the project's store or correct its addresses; returns its address for MLflow's UI.

    Raises:
        UserError: the store is not readable, or locked.
    """
    tracking = {"tracking_uri": None, "enabled": True}
    check(tracking)
    try:
        with locked(STORE):
            _make_store()
            _follow_the_folder()
    except Exception as error:
        raise lack(error, SHOWN_STORE) or _unusable(tracking, error) from None
    return SHOWN_STORE


def project() -> str:
    """This project's name in a store that others use too: its folder's and random digits, made on first use.

    A moved project keeps it. A copy gets another while its original is there, because both may go on.
    """
    results = PROJECT.parents[1].resolve()
    if (known := _named(PROJECT)) and known["results"] == str(results):
        return known["project"]
    with locked(PROJECT):
        known = _named(PROJECT)
        if known is None or (known["results"] != str(results) and _is_copy(known)):
            folder = re.sub(r"[^\w.-]", "_", results.parent.name)[:100]
            known = {"project": f"{folder}-{secrets.token_hex(4)}"}
        write_whole(PROJECT, json_text(known | {"results": str(results)}))
    return known["project"]


def _named(file: Path) -> dict[str, str] | None:
    """The project's name and the folder of results/ for which it was made; None: it has none yet."""
    if not file.exists():
        return None
    return read_json(file, {"project": str, "results": str}, "delete it, and the project gets another name")


def _is_copy(known: dict[str, str]) -> bool:
    """Whether the folder that the project's name was made for is still there, and another one than this."""
    original = Path(known["results"], *PROJECT.parts[1:])
    return original.exists() and not original.samefile(PROJECT) and known_json(original) == known


# --- runs ----------------------------------------------------------------------------------------


def _runs(place: _Place, name: str | None = None) -> dict:
    """name -> MLflow run, for all runs of this project's sweep or for one name.

    Of two runs with the same name the second is deleted: it comes from a store that answered too late and was asked
    again.
    """
    wanted = place.tags | ({RUN_TAG: name} if name else {})
    text = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in wanted.items())
    found: list = []
    token = None
    while token != "":
        page = place.api.search_runs([place.experiment], text, max_results=1000, page_token=token)
        found, token = found + page, page.token or ""
    runs: dict = {}
    for run in sorted(found, key=lambda run: (run.info.start_time, run.info.run_id)):
        if runs.setdefault(run.data.tags[RUN_TAG], run) is not run:
            place.api.delete_run(run.info.run_id)
    return runs


def _sweep_run(place: _Place) -> str:
    found = _runs(place, SWEEP)
    if found:
        return found[SWEEP].info.run_id
    title = f"sweep {place.sweep}" + (f" of {place.project}" if place.project else "")
    return _new_run(place, SWEEP, title).info.run_id


def _child_run(place: _Place, name: str, title: str):
    """The MLflow run of a sweep point, made on first use."""
    found = _runs(place, name)
    if found:
        return found[name]
    return _new_run(place, name, title, {"mlflow.parentRunId": _sweep_run(place)})


def _new_run(place: _Place, name: str, title: str, tags: dict[str, str] | None = None):
    tags = place.tags | {RUN_TAG: name, **(tags or {}), **_origin(place)}
    return place.api.create_run(place.experiment, tags=tags, run_name=_cut(title, LONGEST_TITLE))


def _end_running(place: _Place, status: str) -> None:
    """End whatever of a sweep is RUNNING."""
    for run in _runs(place).values():
        if run.info.status == "RUNNING":
            place.api.set_terminated(run.info.run_id, status=status)


def _origin(place: _Place) -> dict[str, str]:
    """User and code version of a run, in the UI's columns for them."""
    tags = {"mlflow.source.name": "temper", "mlflow.source.type": "PROJECT"}
    if place.project and (login := os.environ.get("MLFLOW_TRACKING_USERNAME")):  # in a container the user is root
        tags["mlflow.user"] = login
    else:
        with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
    commit = git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


class _Curves:
    """The metrics of one MLflow run, as the store has it now. Finds what the store does not have."""

    def __init__(self, api, run):
        self.api, self.run_id, self.start = api, run.info.run_id, run.info.start_time
        self.known = {
            (name, metric.step) for name in run.data.metrics for metric in api.get_metric_history(self.run_id, name)
        }

    def send(self, lines: list[dict]) -> None:
        """Send what is new in lines as `new` takes them."""
        new = self.new(lines)
        _log(self.api, self.run_id, new)
        self.known |= {(metric.key, metric.step) for metric in new}

    def new(self, lines: list[dict]) -> list:
        """The metrics of lines of metrics.jsonl: {"step", "seconds": training time so far, metric: value or None}.

        A metric's time is the run's start plus `seconds`. So replayed curves look like live ones, and a store that gets
        a batch twice, because its first answer came too late, recognizes it.
        """
        from mlflow.entities import Metric

        new = {}
        for line in lines:
            step, time = line["step"], self.start + int(1000 * line["seconds"])
            for name, value in line.items():
                if name in ("step", "epoch", "seconds") or value is None or (name, step) in self.known:
                    continue
                new[name, step] = Metric(name, value, time, step)
        return list(new.values())


def _log(api, run_id: str, metrics: Sequence, params: Sequence = (), tags: Sequence = ()) -> None:
    """Send all in as few batches as the store's limits allow; the tags come with the last one."""
    of_metrics = chunks(metrics, lambda _metric: 1, METRICS_IN_BATCH)
    of_params = chunks(params, lambda _param: 1, PARAMS_IN_BATCH)
    batches = list(itertools.zip_longest(of_metrics, of_params, fillvalue=()))
    for number, (some_metrics, some_params) in enumerate(batches, start=1):
        last = tags if number == len(batches) else ()
        api.log_batch(run_id, metrics=some_metrics, params=some_params, tags=last)


# --- before the first job ------------------------------------------------------------------------


def prepare(tracking: dict, sweep: str) -> None:
    """Create store, experiment and the sweep's run, and end what a killed command left RUNNING.

    Raises:
        UserError: the tracking store cannot be reached.
    """
    if not tracking["enabled"]:
        return
    if tracking["tracking_uri"] is None and os.environ.get(VARIABLE):
        print(
            f"note: {VARIABLE} is set, but not used: MLflow is {SHOWN_STORE}; "
            f"tracking.tracking_uri={FROM_ENVIRONMENT} uses it",
            file=sys.stderr,
        )
    try:
        place = _open(tracking, sweep)
        _end_running(place, "KILLED")
        place.api.update_run(_sweep_run(place), status="RUNNING")
    except Exception as error:
        raise lack(error, shown_uri(tracking)) or _unusable(tracking, error) from None


def _unusable(tracking: dict, error: Exception) -> UserError:
    """The error for a store that cannot be used now, with what to do."""
    if isinstance(error, UserError):
        return error
    advice = what_to_do(error)
    if advice is None and tracking["tracking_uri"] is None:
        advice = "end the program that has it open, or set tracking=none"
    elif advice is None:
        advice = "start the server, or set tracking.tracking_uri, or tracking=none"
    return UserError(f"tracking store {shown_uri(tracking)}: {_one_line(error)}; {advice}")


# --- while training ------------------------------------------------------------------------------


@contextlib.contextmanager
def follow(target: dict | None):
    """Follow one training.

    Args:
        target: ``{"tracking": config section, "sweep": name, "run": name, "title": text}`` of the sweep
            point of this training; None (a step by hand, or tracking off) sends nothing.

    Yields:
        a function that takes a line of metrics.jsonl and returns at once.
    """
    if target is None or not target["tracking"]["enabled"]:
        yield lambda _line: None
        return
    if shared_disk.is_far() and store_uri(target["tracking"]).startswith("sqlite"):
        log.info("note: MLflow gets these curves when the workflow ends, for one machine alone can write to SQLite")
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
    """Sends its queue every few seconds. Keeps what it cannot send and tries again, less and less often."""

    def __init__(self, target: dict):
        super().__init__(daemon=True)
        self.target, self.over = target, threading.Event()
        self.lines: queue.SimpleQueue = queue.SimpleQueue()
        self.curves: _Curves | None = None
        self.down = False  # whether the last attempt failed

    def run(self) -> None:
        flush = self.target["tracking"]["flush_seconds"]
        unsent, pause, ended = [], 0.0, False
        while not ended:
            ended = self.over.wait(pause)
            while not self.lines.empty():
                unsent.append(self.lines.get())
            try:
                self._send(unsent)
            except Exception as error:  # whatever it is, training continues, and the files have everything
                later = what_to_do(error) or "what is missed is sent later"
                self._say(True, f": {_one_line(error)}; training goes on; {later}")
                self.curves = None  # the batch may have arrived anyway, so ask the store what it has
                pause = min(LONGEST_PAUSE, max(flush, 2 * pause))
            else:
                self._say(False, " is back and has the curves")
                unsent, pause = [], flush

    def _send(self, lines: list[dict]) -> None:
        tracking = self.target["tracking"]
        if self.curves is None:
            place = _connect(tracking, self.target["sweep"])
            run = _child_run(place, self.target["run"], self.target["title"])
            place.api.update_run(run.info.run_id, status="RUNNING")
            self.curves = _Curves(place.api, run)
        elif lines:
            _check_lock(tracking)
        self.curves.send(lines)

    def _say(self, down: bool, what: str) -> None:
        if down != self.down:
            log.info("tracking store %s%s", shown_uri(self.target["tracking"]), what)
        self.down = down


# --- after training, from the files --------------------------------------------------------------


def mirror(plan, board: "Board | None", unfinished: str = "FAILED") -> tuple[bool | None, str]:
    """Complete the MLflow run of every sweep point that has a report, end all others, and name the champion.

    Args:
        plan: a `temper.planning.plan.Plan`.
        board: the leaderboard; None: there is none.
        unfinished: status of the runs without a report.

    Returns:
        (whether the store has everything, or None if tracking is off; a line that says so)
    """
    tracking = plan.tracking
    if not tracking["enabled"]:
        return None, "tracking is off"
    try:
        place = _open(tracking, plan.sweep)
        ids, refused = _mirror_runs(place, plan)
        _finish_sweep(place, plan, board, "FINISHED" if len(ids) == len(plan.runs) else unfinished)
        _end_running(place, unfinished)
        _mirror_tests(place.api, plan, board, ids)
        _mirror_harness(place.api, board, ids)
        champion = f"; {_champion(place.api, plan, board, ids)}" if board and not refused else ""
    except Exception as error:  # the results are in files
        return False, f"tracking: not up to date: {_one_line(error)}; {_again(error)}"
    if refused:
        return False, f"tracking: not up to date: {len(refused)} run(s) refused, the first is {refused[0]}"
    return True, f"tracking: {len(ids)} run(s) in {shown_uri(tracking)}{champion}"


def _mirror_runs(place: _Place, plan) -> tuple[dict[str, str], list[str]]:
    """(run name -> MLflow run, for all with a report; why the store refused the others).

    If the store is unreachable, the exception is passed on.
    """
    ids, refused = {}, []
    known = _runs(place)  # asked once: one by one, a thousand that are complete take long
    for run in plan.runs:
        if not (Path(run.artefacts["evaluate_model"]) / FILE).is_file():
            continue
        found = known.get(run.name)
        if found and _is_mirrored(found, run):
            ids[run.name] = found.info.run_id
            continue
        try:
            ids[run.name] = _mirror_run(place, run, found)
        except Exception as error:
            if what_to_do(error) is None:
                raise
            refused.append(f"{run.name}: {_one_line(error)}; {_again(error)}")
    return ids, refused


def _mirror_tests(api, plan, board: "Board | None", ids: dict[str, str]) -> None:
    """Add the figures on the test split to the runs that were chosen for it."""
    tested = [row["run"] for row in board.rows if row.get(f"test_{board.metric}") is not None] if board else []
    for run in plan.runs:
        if run.name not in tested or run.name not in ids:
            continue
        report = Path(run.artefacts["test_report"])
        if (report / FILE).is_file():
            _Curves(api, api.get_run(ids[run.name])).send([_results(read_figures(report))])
            api.log_artifact(ids[run.name], str(report / "report.html"), "test")


def _mirror_harness(api, board: "Board | None", ids: dict[str, str]) -> None:
    """Add what lm-eval measured to the chosen run. Its key does not have the tasks, so figures may change."""
    from mlflow.entities import Metric

    if not board or board.harness is None or board.chosen not in ids:
        return
    run_id, now = ids[board.chosen], int(1000 * time.time())
    known = api.get_run(run_id).data.metrics
    figures = {valid_name(name): value for name, value in finite(board.harness.figures()).items()}
    new = [Metric(name, value, now, 0) for name, value in figures.items() if value not in (None, known.get(name))]
    _log(api, run_id, new)


def _is_mirrored(found, run) -> bool:
    """Whether an MLflow run has all of a planned one. A complete run that was trained again is RUNNING."""
    return found.data.tags.get(MIRRORED_TAG) == run.key and found.info.status == "FINISHED"


def _mirror_run(place: _Place, run, found) -> str:
    """Send what a run's files have. `found`: its MLflow run; None: it has none yet, as far as is known."""
    from mlflow.entities import Param, RunTag

    api, found = place.api, found or _child_run(place, run.name, run.title)
    params = _params(run.config)
    # MLflow cannot change a parameter, and one in no key may differ, as the path of the same rows: replace the run.
    if any(params.get(name, value) != value for name, value in found.data.params.items()):
        api.delete_run(found.info.run_id)
        found = _child_run(place, run.name, run.title)
    run_id = found.info.run_id
    _log_files(api, run_id, run)
    _log_dataset(api, run_id, run)
    figures = read_figures(Path(run.artefacts["evaluate_model"]))
    lines = read_json_lines(Path(run.artefacts["train_adapter"]) / "metrics.jsonl")
    metrics = _Curves(api, found).new([*lines, _results(figures)])
    tags = [RunTag(name, value) for name, value in _tags(run, figures).items()]
    _log(api, run_id, metrics, [Param(name, value) for name, value in params.items()], tags)
    api.set_terminated(run_id, status="FINISHED")
    return run_id


def _log_files(api, run_id: str, run) -> None:
    report, adapter = Path(run.artefacts["evaluate_model"]), Path(run.artefacts["train_adapter"])
    for file in (
        report / "report.html",
        report / "predictions.jsonl",
        adapter / "config.yaml",
        adapter / "provenance.json",
    ):
        api.log_artifact(run_id, str(file))
    if (adapter / "adapter_config.json").is_file():  # a full model is gigabytes, so a tag names its folder instead
        api.log_artifacts(run_id, str(adapter), "adapter")


def _tags(run, figures: Figures | Diverged) -> dict[str, str]:
    """Those of a run that is complete, of which the last one says so."""
    tags = {}
    if isinstance(figures, Diverged):
        tags["temper.diverged_at_step"] = str(figures.diverged_at_step)
    if Path(run.artefacts["merge_adapter"]).is_dir():  # of the others there is the adapter
        tags["temper.merged"] = run.artefacts["merge_adapter"]
    return tags | {MIRRORED_TAG: run.key}


def _params(config: dict) -> dict[str, str]:
    """A run's config as MLflow's parameters."""
    sections = {name: value for name, value in config.items() if name not in ("tracking", "sweep")}
    if "eval" in sections:  # lm-eval is asked of one run only
        sections["eval"] = {name: value for name, value in sections["eval"].items() if name != "harness"}
    return {valid_name(name): _cut(value, LONGEST_PARAM) for name, value in flat(sections).items()}


def valid_name(name: str) -> str:
    """A name that MLflow accepts. A changed name ends in a hash of the original, so that names stay distinct."""
    clean = re.sub(r"[^/\w.\- :]", "_", name)
    norm = posixpath.normpath(clean)
    plain = norm == clean and norm != "." and not norm.startswith(("..", "/"))  # MLflow may use names as paths
    if clean == name and plain and len(name) <= LONGEST_NAME:
        return name
    clean = clean if plain else clean.replace("/", "_").lstrip(".")
    return f"{clean[: LONGEST_NAME - 11]}-{digest(name)}"


def _cut(text: str, longest: int) -> str:
    """The text; if too long, its beginning, its length and a hash, so that different texts stay different."""
    if len(text) <= longest:
        return text
    rest = f"... ({len(text)} characters, {digest(text)})"
    return text[: longest - len(rest)] + rest


def _log_dataset(api, run_id: str, run) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = run.config["data"]
    splits = Path(run.artefacts["tokenize_splits"])
    dataset = Dataset(
        name=data["name"],
        digest=splits.name.rpartition("-")[2],
        source_type="mixture" if "mix" in data else data["source"].get("kind", "splits"),
        source=_cut(json.dumps(data["mix"] if "mix" in data else data["source"]), LONGEST_SOURCE),
        profile=json.dumps(read_json(splits / "audit.json", {"splits": dict})["splits"]),
    )
    api.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _results(figures: Figures | Diverged) -> dict:
    """The figures of a report as one line for `_Curves.send`."""
    training = figures.train or {}
    values = {
        name: training.get(name)
        for name in ("train_seconds", "tokens_per_second", "peak_memory_bytes", "trainable_parameters")
    }
    if isinstance(figures, Figures):
        values |= {f"{figures.split}_{name}": value for name, value in figures.values.items()}
        values |= {f"base_{figures.split}_{name}": value for name, value in (figures.base or {}).items()}
    if isinstance(figures, Figures) and (probe := figures.probe):
        values |= {"probe_bits_per_byte": probe.bits_per_byte, "base_probe_bits_per_byte": probe.base}
        values["forgetting"] = probe.forgetting and probe.forgetting.value
    numbers = {name: value for name, value in finite(values).items() if isinstance(value, (int, float))}
    return {"step": 0, "seconds": training.get("train_seconds") or 0.0, **numbers}


def _champion(api, plan, board: "Board", ids: dict[str, str]) -> str:
    from temper.runs import champion  # with all that a model needs; only a comparison does

    return champion.register(api, plan, board, ids)


def _finish_sweep(place: _Place, plan, board: "Board | None", status: str) -> None:
    api, run_id = place.api, _sweep_run(place)
    for axis, values in plan.axes.items():
        api.set_tag(run_id, valid_name(f"axis.{axis}"), _cut(", ".join(str(value) for value in values), LONGEST_TAG))
    if board:
        for name in ("leaderboard.csv", "report.html"):
            api.log_artifact(run_id, str(Path(plan.leaderboard).with_name(name)))
    api.set_terminated(run_id, status=status)


# --- what can be wrong with a store --------------------------------------------------------------

# Errors of a store that trying again does not change, and what to do about them.
LASTING = (
    (
        r"error code 403|PERMISSION_DENIED",
        "ask who runs the server for the right to do it, or choose an experiment of your own "
        "(tracking.experiment_name=...) and a name of your own for the model (tracking.registered_model_name=...)",
    ),
    (
        r"error code 401|UNAUTHENTICATED|password authentication failed",
        "give the login by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    (
        r"readonly database|unable to open database file|PermissionError|Read-only file system",
        "make the store and its artifacts (results/mlflow.db, results/mlflow-artifacts/) writable for you",
    ),
    (r"file is not a database|image is malformed", "move the damaged file away, and the runs are sent to a new one"),
    (
        r"out-of-date database schema|Can't locate revision",
        "bring it up to date with 'mlflow db upgrade' and its address, or use the version of MLflow that made it",
    ),
    (r"No module named", "install what its address needs"),
)
AWAY = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED", "ABORTED")


def what_to_do(error: BaseException) -> str | None:
    """What the user must do about an error of the store; None: it is unreachable or busy for now."""
    chain = _chain(error)
    said = "\n".join(f"{type(inner).__name__}: {getattr(inner, 'error_code', '')} {inner}" for inner in chain)
    for pattern, advice in LASTING:
        if re.search(pattern, said):
            return advice
    if any(isinstance(inner, UserError) for inner in chain):
        return "do that"
    busy = any(isinstance(inner, OSError | sqlite3.OperationalError) for inner in chain)
    if busy or any(getattr(inner, "error_code", None) in AWAY for inner in chain):
        return None
    return "MLflow does not take this, now or later: change what it names, or set tracking=none"


def _again(error: BaseException) -> str:
    advice = what_to_do(error)
    return f"{advice}, then run the same command again" if advice else "the next command will try again"


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    return chain


def _one_line(error: Exception) -> str:
    """What is wrong; for an unreachable server the underlying error, which MLflow's text leaves out."""
    error = next((inner for inner in reversed(_chain(error)) if isinstance(inner, OSError)), error)
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{name}{redacted(' '.join(str(error).split()))[:200]}"
