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
import dataclasses
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper import energy, mlflow_pages, other_trackers, shared_disk
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
NOTED_TAG = "temper.noted"  # a hash of the note that we wrote: another note is a person's
SWEEP = "-"  # RUN_TAG of the sweep's own run
NAMED = ("data", "model", "method")  # sections of a config whose names are parameters of each run
PARAMS_IN_BATCH, METRICS_IN_BATCH = 100, 850  # the store takes 1,000 of all kinds, and so leaves room for tags
LOCK_SECONDS = 5.0  # how long to wait for other writers of an SQLite file
LONGEST_PAUSE = 60.0  # seconds between two attempts to reach an unreachable store
GOODBYE_SECONDS = 10.0  # how long the end of a training waits for the last curves to be sent
GOODBYE_WHEN_DOWN = 1.0  # the same if the last attempt failed; the comparison will send them
STORE, ARTIFACTS = Path("results/mlflow.db"), Path("results/mlflow-artifacts")
PROJECT = Path("results/.state/project.json")
SHOWN_STORE = f"sqlite:///{STORE}"  # as `mlflow server` takes it in the project's folder
OWN: dict = {"tracking_uri": None, "enabled": True, "report_to": []}  # the section `tracking` of that store
FROM_ENVIRONMENT, VARIABLE = "env", "MLFLOW_TRACKING_URI"
# Most characters of names and values in MLflow's stores.
LONGEST_NAME, LONGEST_PARAM, LONGEST_TAG, LONGEST_TITLE, LONGEST_SOURCE = 250, 6000, 5000, 250, 65_000


# --- the store -----------------------------------------------------------------------------------


def check(tracking: dict) -> None:
    """Refuse, before any job, what cannot be a store's address.

    Raises:
        UserError: the variable that should hold the address is empty, or the project's path cannot be part of one.
    """
    other_trackers.check(tracking)
    energy.check(tracking)
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


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a sweep's runs are."""

    api: Any
    experiment: str  # its id
    sweep: str
    project: str | None  # whose runs these are; None: in the project's own store all are
    server: str | None  # where a browser finds its pages; None: it is a database that others serve, if anyone

    @property
    def tags(self) -> dict[str, str]:
        """Those of the sweep's run and of all runs below it."""
        return {SWEEP_TAG: self.sweep} | ({PROJECT_TAG: self.project} if self.project else {})

    @property
    def title(self) -> str:
        return f"sweep {self.sweep}" + (f" of {self.project}" if self.project else "")

    @property
    def points(self) -> str:
        """The filter, in MLflow's language, that finds the runs of the sweep's points."""
        return f"{_filter(self.tags)} and tags.`{RUN_TAG}` != '{SWEEP}'"

    @property
    def view_tag(self) -> str:
        """The experiment's tag that holds the view of the sweep's runs."""
        return valid_name(f"{mlflow_pages.VIEW_TAG}{'.'.join(self.tags.values())}")

    @property
    def runs_page(self) -> str:
        """The page of that view, from any page of the server."""
        return mlflow_pages.runs_page(self.experiment, self.view_tag.removeprefix(mlflow_pages.VIEW_TAG))

    @property
    def link(self) -> str | None:
        """The address of that page."""
        return self.server and f"{self.server}/{self.runs_page}"


def _filter(tags: dict[str, str]) -> str:
    return " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())


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
        kind = {mlflow_pages.KIND_TAG: mlflow_pages.KIND}
        experiment = api.create_experiment(name, artifact_location=location, tags=kind)
    uri = store_uri(tracking)
    own = uri in (f"sqlite:///{STORE.resolve()}", SHOWN_STORE)
    if own:
        return _Place(api, experiment, sweep, None, mlflow_pages.OWN_SERVER)
    return _Place(api, experiment, sweep, project(), mlflow_pages.server_of(uri))


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
    check(OWN)
    try:
        with locked(STORE):
            _make_store()
            _follow_the_folder()
    except Exception as error:
        raise lack(error, SHOWN_STORE) or _unusable(OWN, error) from None
    return SHOWN_STORE


def newest_sweeps(most: int) -> dict[str, str]:
    """Sweep -> the page of its runs, from any page of the server; of the project's own store, the newest first."""
    api, found = client(OWN), dict[str, str]()
    experiments = {one.experiment_id: one.tags for one in api.search_experiments()}
    order = ["attributes.start_time DESC"]
    for run in api.search_runs(list(experiments), _filter({RUN_TAG: SWEEP}), max_results=most, order_by=order):
        place = _Place(api, run.info.experiment_id, run.data.tags[SWEEP_TAG], None, mlflow_pages.OWN_SERVER)
        if place.view_tag in experiments[place.experiment]:
            found.setdefault(place.sweep, place.runs_page)
    return found


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
    text = _filter(wanted)
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
    return _new_run(place, SWEEP, place.title).info.run_id


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


def prepare(tracking: dict, sweep: str, shown: "mlflow_pages.Shown | None" = None) -> str | None:
    """Create store, experiment and the sweep's run, and end what a killed command left RUNNING.

    Args:
        shown: what the table of the sweep's runs shows; None: what MLflow shows by itself.

    Returns:
        the address of the page with the sweep's runs; None if tracking is off, or if no server is known.

    Raises:
        UserError: the tracking store cannot be reached.
    """
    if not tracking["enabled"]:
        return None
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
        _save_view(place, shown)
        return place.link
    except Exception as error:
        raise lack(error, shown_uri(tracking)) or _unusable(tracking, error) from None


def _save_view(place: _Place, shown: "mlflow_pages.Shown | None") -> None:
    """Save the view of the sweep's runs, which a link opens; and say what the experiment holds, unless it says so."""
    tags = place.api.get_experiment(place.experiment).tags
    if mlflow_pages.KIND_TAG not in tags:  # made by an older Temper, or by hand
        place.api.set_experiment_tag(place.experiment, mlflow_pages.KIND_TAG, mlflow_pages.KIND)
    if shown:
        shown = dataclasses.replace(shown, swept=[valid_name(name) for name in shown.swept])
        value = mlflow_pages.view(place.title, place.points, shown, int(1000 * time.time()))
        if not mlflow_pages.same_view(tags.get(place.view_tag), value):
            place.api.set_experiment_tag(place.experiment, place.view_tag, value)


def link(tracking: dict, sweep: str) -> str | None:
    """The address of the page with a sweep's runs, best first; None: there is none, or the store does not answer."""
    if not tracking["enabled"]:
        return None
    try:
        return _connect(tracking, sweep).link
    except Exception:  # what is wrong with the store is said where runs are sent
        return None


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
    if target is None:
        yield lambda _line: None
        return
    with other_trackers.follow(target) as other, _sent(target) as send:

        def listener(line: dict) -> None:
            other(line)
            send(line)

        yield listener


@contextlib.contextmanager
def _sent(target: dict):
    """The same for MLflow alone."""
    if not target["tracking"]["enabled"]:
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
        self.machine = _Machine() if target["tracking"].get("system_metrics") else None
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
        elif lines or self.machine:
            _check_lock(tracking)
        self.curves.send([*lines, self.machine.now(self.curves.start)] if self.machine else lines)

    def _say(self, down: bool, what: str) -> None:
        if down != self.down:
            log.info("tracking store %s%s", shown_uri(self.target["tracking"]), what)
        self.down = down


class _Machine:
    """How busy this machine is, by MLflow's own monitors: all of it, with whatever else runs here."""

    def __init__(self):
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self.monitors.append(GPUMonitor())

    def now(self, start: int) -> dict:
        """A line for `_Curves.send`. Its steps are seconds since the run's `start`, so that they go on after a kill."""
        seconds = time.time() - start / 1000
        line: dict = {"step": int(seconds), "seconds": seconds}
        for monitor in self.monitors:
            monitor.collect_metrics()
            line |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return line


# --- after training, from the files --------------------------------------------------------------


def mirror(plan, board: "Board | None", unfinished: str = "FAILED") -> tuple[bool | None, str]:
    """Send what the files of a sweep have: to MLflow (`_mirror`), and to what else `tracking.report_to` names.

    Arguments and what is returned are those of `_mirror`.
    """
    done, said = _mirror(plan, board, unfinished)
    return done, "; ".join([said, *other_trackers.mirror(plan, _figures_of, _shown_config)])


def _figures_of(run) -> dict | None:
    """The figures of a planned run as a line for `_Curves.send`; None: it has no report."""
    report = Path(run.artefacts["evaluate_model"])
    return _results(read_figures(report)) if (report / FILE).is_file() else None


def _mirror(plan, board: "Board | None", unfinished: str) -> tuple[bool | None, str]:
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
        _save_view(place, mlflow_pages.shown_of(plan) if plan.runs else None)
        ids, refused = _mirror_runs(place, plan)
        _finish_sweep(place, plan, board, ids, "FINISHED" if len(ids) == len(plan.runs) else unfinished)
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
            ids[run.name] = _mirror_run(place, plan, run, found)
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


def _mirror_run(place: _Place, plan, run, found) -> str:
    """Send what a run's files have. `found`: its MLflow run; None: it has none yet, as far as is known."""
    from mlflow.entities import Param, RunTag

    api, found = place.api, found or _child_run(place, run.name, run.title)
    params = _params(run)
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
    note = _note_tags(found, _point_note(place, found, plan, run, figures))
    tags = [RunTag(name, value) for name, value in (note | _tags(run, figures)).items()]
    _log(api, run_id, metrics, [Param(name, value) for name, value in params.items()], tags)
    api.set_terminated(run_id, status="FINISHED")
    return run_id


def _log_files(api, run_id: str, run) -> None:
    report, adapter = Path(run.artefacts["evaluate_model"]), Path(run.artefacts["train_adapter"])
    for file in (report / "report.html", report / "predictions.jsonl", adapter / "provenance.json"):
        api.log_artifact(run_id, str(file))
    api.log_dict(run_id, _shown_config(run.config), "config.yaml")
    if (adapter / "adapter_config.json").is_file():  # a full model is gigabytes, so a tag names its folder instead
        api.log_artifacts(run_id, str(adapter), "adapter")


def _shown_config(config: dict) -> dict:
    """All that a run was made with: its config, less what changes no run."""
    sections = {name: value for name, value in config.items() if name not in ("tracking", "notify", "keep", "sweep")}
    if "eval" in sections:  # lm-eval is asked of one run only
        sections["eval"] = {name: value for name, value in sections["eval"].items() if name != "harness"}
    return sections


def _point_note(place: _Place, made, plan, run, figures: Figures | Diverged) -> str:
    """The note of a sweep point's MLflow run, `made`; the pages about its data are artifacts of the sweep's run."""
    run_id = made.info.run_id
    values = figures.values if isinstance(figures, Figures) else {}
    base = (figures.base or {}).get(figures.metric) if isinstance(figures, Figures) else None
    links = {
        "report": mlflow_pages.run_page(place.experiment, run_id, "report.html"),
        "whole config": mlflow_pages.run_page(place.experiment, run_id, "config.yaml"),
        **_links_to_data(place, made.data.tags["mlflow.parentRunId"], _pages_of_data(plan, [run])),
        "all runs of the sweep, best first": place.runs_page,
        "folder of the report": run.artefacts["evaluate_model"],
        "folder of the adapter": run.artefacts["train_adapter"],
    }
    if isinstance(figures, Diverged):
        return mlflow_pages.run_note("", "", None, None, links)
    return mlflow_pages.run_note(figures.metric, figures.split, values[figures.metric], base, links)


def _note_tags(run, note: str) -> dict[str, str]:
    """The tags of a note, unless a person has edited it since."""
    before, noted = run.data.tags.get(mlflow_pages.NOTE_TAG), run.data.tags.get(NOTED_TAG)
    if before is not None and noted != digest(before):
        return {}
    note = _cut(note, LONGEST_TAG)
    return {mlflow_pages.NOTE_TAG: note, NOTED_TAG: digest(note)}


def _tags(run, figures: Figures | Diverged) -> dict[str, str]:
    """Those of a run that is complete, of which the last one says so."""
    tags = {}
    if isinstance(figures, Diverged):
        tags["temper.diverged_at_step"] = str(figures.diverged_at_step)
    if Path(run.artefacts["merge_adapter"]).is_dir():  # of the others there is the adapter
        tags["temper.merged"] = run.artefacts["merge_adapter"]
    return tags | {MIRRORED_TAG: run.key}


def _params(run) -> dict[str, str]:
    """MLflow's parameters of a run: what is swept and what it is about; `config.yaml` among its artifacts has all."""
    values = flat({name: run.config[name]["name"] for name in NAMED if "name" in run.config[name]}) | flat(run.point)
    return {valid_name(name): _cut(value, LONGEST_PARAM) for name, value in values.items()}


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


def _finish_sweep(place: _Place, plan, board: "Board | None", ids: dict[str, str], status: str) -> None:
    api, run_id = place.api, _sweep_run(place)
    for axis, values in plan.axes.items():
        api.set_tag(run_id, valid_name(f"axis.{axis}"), _cut(", ".join(str(value) for value in values), LONGEST_TAG))
    files = [Path(plan.leaderboard).with_name(name) for name in ("leaderboard.csv", "report.html")] if board else []
    for file in files:
        api.log_artifact(run_id, str(file))
    pages = _pages_of_data(plan, plan.runs)
    for folder, file in pages.items():
        api.log_artifact(run_id, str(file), folder)
    for name, value in _note_tags(api.get_run(run_id), _sweep_note(place, plan, board, ids, run_id, pages)).items():
        api.set_tag(run_id, name, value)
    api.set_terminated(run_id, status=status)


def _pages_of_data(plan, runs: Sequence) -> dict[str, Path]:
    """Folder among the sweep's artifacts -> page about the rows of some runs, or about what a model learns of them."""
    pages = {}
    for splits in dict.fromkeys(run.artefacts["tokenize_splits"] for run in runs):
        prompts = plan.jobs[splits].inputs["prompts"] if splits in plan.jobs else None
        for file in [Path(prompts, "report.html")] if prompts else []:
            pages[f"data/{file.parent.name}"] = file
        pages[f"data/{Path(splits).name}"] = Path(splits, "audit.html")
    return {folder: file for folder, file in pages.items() if file.is_file()}


def _links_to_data(place: _Place, sweep_run: str, pages: dict[str, Path]) -> dict[str, str]:
    """Text -> address of each of these pages, which are artifacts of the sweep's run."""
    links: dict[str, str] = {}
    for folder, file in pages.items():
        what = "what is learned of the rows" if file.name == "audit.html" else "the rows"
        text = f"{what} ({file.parent.name})" if what in links else what
        links[text] = mlflow_pages.run_page(place.experiment, sweep_run, f"{folder}/{file.name}")
    return links


def _sweep_note(place: _Place, plan, board: "Board | None", ids: dict[str, str], run_id: str, pages: dict) -> str:
    from temper.runs import champion

    links = {"all runs, best first": place.runs_page}
    if board:
        links["page of the sweep"] = mlflow_pages.run_page(place.experiment, run_id, "report.html")
    if board and board.chosen in ids:
        links["best run"] = mlflow_pages.run_page(place.experiment, ids[board.chosen])
        best = next(run for run in plan.runs if run.name == board.chosen)
        links["registered model"] = mlflow_pages.model_page(champion.name_of(plan, best))
    links |= _links_to_data(place, run_id, pages)
    return mlflow_pages.sweep_note(plan, board, links | {"folder": str(Path(plan.leaderboard).parent)})


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
