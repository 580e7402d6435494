"""How a sweep stands: which run is in which stage and how far, what failed and why, and the first results.

All of it is read from results/, so it is the same from another terminal, on another node, and after the command ended:
a folder that is there is done, one whose lock is held is at work, and the last line of a log says how far or why not.
"""

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path

from temper import running, units
from temper.errors import UserError, visible
from temper.evaluation.figures import Figures, read_figures
from temper.evaluation.metrics import check_metric, lower_is_better
from temper.folders import PROVENANCE, is_locked
from temper.logs import Log
from temper.planning import plan as planning
from temper.planning.forecast import Archive, Forecast
from temper.reports.leaderboard import cell_text, short_names

AT_WORK, FAILED, WAITING, DONE = "at work", "failed", "waiting", "done"  # the order in which runs are shown
STARTING = 120.0  # seconds that a job may take to load its libraries and to wait for a GPU, without a lock of its own
WAITS = "waiting"  # the end of a line about GPUs, after which a log may be silent for hours
MOST_LINES = 20  # of runs
REMAINING = re.compile(r"((?:\d+:)?\d+:\d\d) left")  # of a step's progress line
CLOCK = re.compile(r"^\d\d:\d\d:\d\d ")
EVALUATED = re.compile(r"step \d+: ")


@dataclasses.dataclass
class JobNow:
    """A job that is not done. `said`: how far it is, or why it failed; empty if it waits."""

    stage: str
    path: str
    state: str
    said: str
    log: str

    @property
    def name(self) -> str:
        """Of its folder; of raw data, of its pin."""
        return Path(self.path).name

    @property
    def seconds_left(self) -> float | None:
        """What its progress line says."""
        found = REMAINING.search(self.said)
        if not found:
            return None
        parts = [int(part) for part in found[1].split(":")]
        return float(sum(part * 60**power for power, part in enumerate(reversed(parts))))


@dataclasses.dataclass
class RunNow:
    """A run. `job`, `stage`: what it is in, or waits for. `value`, `interval`: its figure by which runs are ranked."""

    name: str
    point: dict
    state: str
    job: str
    stage: str
    said: str
    value: float | None = None
    interval: list[float] | None = None


@dataclasses.dataclass
class Standing:
    """A sweep at one moment. `jobs`: those that are not done. `begun`: when a command that is at work on it began."""

    sweep: str
    experiment: str
    begun: float | None
    complete: bool
    metric: str
    base: float | None
    runs: list[RunNow]
    jobs: list[JobNow]
    seconds_left: float | None
    unknown: int
    later: str
    folder: str

    def of(self, state: str) -> list[JobNow]:
        """The jobs in a state."""
        return [job for job in self.jobs if job.state == state]

    @property
    def best(self) -> RunNow | None:
        """The best of the runs that have figures."""
        return next((run for run in self.runs if run.value is not None), None)


# --- looking -------------------------------------------------------------------------------------


def plans(sweep: str | None) -> list[planning.Plan]:
    """The plans of the sweeps that commands are at work on, else of the last one; or that of the named sweep.

    Raises:
        UserError: nothing was planned here, or no such sweep.
    """
    newest = dict(_frozen())
    if not newest:
        raise UserError(f"{planning.PLANS}: no sweep was started here; go to the folder in which snakemake runs")
    if sweep:
        named = Path(sweep).name  # its folder will do
        if named not in newest:
            raise UserError(f"{sweep}: no such sweep was started here; there are {', '.join(sorted(newest))}")
        return [_load(newest[named])]
    at_work = [name for name in newest if running.begun(name) is not None]
    return [_load(newest[name]) for name in at_work or list(newest)[-1:]]


def _frozen() -> Iterator[tuple[str, Path]]:
    """(sweep, frozen plan), the oldest first. The first line of a plan says which sweep it is of."""
    found = [(path.stat().st_mtime, path) for path in planning.PLANS.glob("*.json")]
    for _, path in sorted(found):
        with contextlib.suppress(UserError):  # of an older version
            yield planning.sweep_of(path), path


@functools.lru_cache(maxsize=8)
def _loaded(path: Path, written: float) -> planning.Plan:  # noqa: ARG001 - another time is another plan
    return planning.load(path)


def _load(path: Path) -> planning.Plan:
    return _loaded(path, path.stat().st_mtime)


def standing(plan: planning.Plan, archive: Archive | None = None) -> Standing:
    """How the sweep of a plan stands at this moment.

    Args:
        archive: what earlier jobs took, for the time that is left; None: that is left out.
    """
    begun, complete = running.begun(plan.sweep), Path(plan.complete).is_file()
    missing = {job.path: job for job in plan.missing(whole=False)}
    if begun and not complete:  # or it was compared before, and waits for nothing
        missing[plan.comparison.path] = plan.comparison
    jobs = {path: _job_now(job, begun) for path, job in missing.items()}
    runs = [_run_now(plan, run, jobs) for run in plan.runs]
    sign = 1 if lower_is_better(_metric(plan)) else -1
    order = [AT_WORK, FAILED, WAITING, DONE]
    runs.sort(key=lambda run: (order.index(run.state), run.value is None, sign * (run.value or 0.0)))
    left, unknown = _time_left(plan, jobs, archive) if archive else (None, 0)
    return Standing(
        sweep=plan.sweep,
        experiment=plan.experiment,
        begun=begun,
        complete=complete and not missing,
        metric=_metric(plan),
        base=_base(plan),
        runs=runs,
        jobs=list(jobs.values()),
        seconds_left=left,
        unknown=unknown,
        later=plan.later,
        folder=str(Path(plan.leaderboard).parent),
    )


def _metric(plan: planning.Plan) -> str:
    return check_metric(plan.comparison.config["eval"])


def _base(plan: planning.Plan) -> float | None:
    """The figure of the untouched model, where all runs have the same one."""
    reports = {run.artefacts.get("base_report") for run in plan.runs}
    path = reports.pop()
    return _figure(path)[0] if path and not reports and _is_there(path) else None


def _is_there(path: str) -> bool:
    return Path(path, PROVENANCE).is_file()


@functools.lru_cache(maxsize=20_000)
def _figure(report: str) -> tuple[float | None, list[float] | None]:
    """(the ranking figure, its interval) of a report, which never changes; None where a training diverged."""
    found = read_figures(Path(report))
    if isinstance(found, Figures) and found.are_finite:
        return found.values[found.metric], found.interval
    return None, None


def _job_now(job: planning.Job, begun: float | None) -> JobNow:
    """What becomes of a job whose output is not there."""
    output = Path(job.path)
    now = JobNow(job.stage, job.path, WAITING, "", str(job.log))
    if is_locked(output.parent if job.stage == "fetch_data" else output):
        now.state, now.said = AT_WORK, _progress(Log(job.log)) or "starts"
    elif job.log.is_file() and job.log.stat().st_mtime >= (begun or 0.0):
        log, age = Log(job.log), time.time() - job.log.stat().st_mtime
        if begun and not log.tells_end and (age < STARTING or log.last.endswith(WAITS)):
            now.state, now.said = AT_WORK, _progress(log) or "starts"
        else:
            now.state, now.said = FAILED, log.end
    return now


def _progress(log: Log) -> str:
    """The last line without its time, but not what an evaluation in a training found: the line before says more.

    Empty where an earlier attempt wrote the log.
    """
    lines = [CLOCK.sub("", line) for line in log.lines]
    return "" if log.tells_end else next((line for line in reversed(lines) if not EVALUATED.match(line)), "")


def _run_now(plan: planning.Plan, run: planning.PlannedRun, jobs: dict[str, JobNow]) -> RunNow:
    report = run.artefacts["evaluate_model"]
    now = RunNow(run.name, run.point, DONE, report, "", "")
    if report in jobs:
        ahead = [jobs[path] for path in _needs(plan, report, jobs)]
        found = min(ahead, key=lambda job: ([FAILED, AT_WORK, WAITING].index(job.state), job.path == report))
        now.state, now.job, now.stage, now.said = found.state, found.path, found.stage, found.said
    else:
        now.value, now.interval = _figure(report)
        now.said = "" if now.interval else "diverged"
    return now


def _needs(plan: planning.Plan, report: str, jobs: dict[str, JobNow]) -> list[str]:
    """A report and all jobs to do before it, the earliest first."""
    found: dict[str, None] = {}
    todo = [report]
    while todo:
        path = todo.pop()
        if path in jobs and path not in found:
            found[path] = None
            todo += plan.jobs[path].inputs.values()
    return list(reversed(found))


def _time_left(plan: planning.Plan, jobs: dict[str, JobNow], archive: Archive) -> tuple[float | None, int]:
    """(seconds until the jobs that did not fail are done, of how many of them nothing is known)."""
    ahead = {path: job for path, job in jobs.items() if job.state != FAILED and job.stage != "compare_runs"}
    at_once = sum(plan.jobs[path].threads for path, job in ahead.items() if job.state == AT_WORK)
    forecast = Forecast(plan, max(1, at_once))
    for path, job in ahead.items():
        if job.state == AT_WORK and job.seconds_left is not None:
            forecast.jobs[path] = job.seconds_left
        else:
            forecast.add(plan.jobs[path], archive.most_similar(plan.jobs[path]))
    return (None if forecast.unknown == len(forecast.jobs) else forecast.wall_clock()), forecast.unknown


# --- saying --------------------------------------------------------------------------------------


def headline(now: Standing) -> str:
    """The sweep in a line: how many runs are where, since when, and how long it may take."""
    counts = {state: sum(run.state == state for run in now.runs) for state in (DONE, AT_WORK, FAILED, WAITING)}
    parts = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    text = f"sweep {now.sweep}: {len(now.runs)} run{'s' if len(now.runs) > 1 else ''}: {parts}"
    if now.complete:
        return f"{text}; complete"
    if now.begun is None:
        return f"{text}; no command is at work on it"
    text += f"; at work for {units.seconds(time.time() - now.begun)}"
    if now.seconds_left is not None:
        unknown = f" without {now.unknown} job(s) that nothing is known of" if now.unknown else ""
        text += f", about {units.seconds(now.seconds_left)} left{unknown}"
    return text


def first_result(now: Standing) -> str | None:
    """The best run so far in a line; None before there is one."""
    best = now.best
    if best is None or best.value is None or best.interval is None:
        return None
    done = sum(run.value is not None for run in now.runs)
    base = f"; base model {units.figure(now.base)}" if now.base is not None else ""
    which = "best" if now.complete else f"best of {done} so far"
    return f"{which}: {_title(best)}, {_figure_text(now.metric, best.value, best.interval)}{base}"


def _figure_text(metric: str, value: float, interval: list[float]) -> str:
    return f"{metric} {units.figure(value)} ({units.figure(interval[0])} to {units.figure(interval[1])})"


def lines(now: Standing) -> list[tuple[str, str]]:
    """The standing as lines for a terminal, each with the state that it is about; empty for none."""
    shown = [("", headline(now)), *([(DONE, found)] if (found := first_result(now)) else []), ("", "")]
    table = [("", ["key", *short_names(list(now.runs[0].point)).values(), "", ""])]
    table += [(run.state, _cells(run, now.metric)) for run in now.runs[:MOST_LINES]]
    widths = [max(len(cells[column]) for _, cells in table) for column in range(len(table[0][1]))]
    for state, cells in table:
        shown.append((state, "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()))
    if len(now.runs) > MOST_LINES:
        shown.append(("", f"and {len(now.runs) - MOST_LINES:,} more"))
    others = [job for job in now.of(AT_WORK) if job.path not in {run.job for run in now.runs}]
    shown += [(AT_WORK, f"at work: {job.stage} {job.name}: {job.said}") for job in others]
    failed = [f"failed: {job.stage} {job.name}: {job.said}  (log: {job.log})" for job in now.of(FAILED)]
    shown += [(FAILED, line) for line in failed[:MOST_LINES]]
    if len(failed) > MOST_LINES:
        shown.append((FAILED, f"and {len(failed) - MOST_LINES:,} more failed"))
    if waiting := _waiting(now):
        shown.append((WAITING, f"waiting: {waiting}"))
    if Path(now.folder, "report.html").is_file():
        shown.append(("", f"page: {now.folder}/report.html"))
    return [(state, visible(line)) for state, line in shown]


def _cells(run: RunNow, metric: str) -> list[str]:
    """The columns of a run: key, swept values, stage, how far or how good."""
    swept = [cell_text(value) for value in run.point.values()]
    said = run.said
    if run.value is not None and run.interval:
        said = _figure_text(metric, run.value, run.interval)
    elif run.state == FAILED:
        said = "failed"
    stage = f"waits for {run.stage}" if run.state == WAITING else run.stage or run.state
    return [run.name.rpartition("-")[2], *swept, stage, said.removeprefix("train: ")]


def _title(run: RunNow) -> str:
    names = short_names(list(run.point))
    return ", ".join(f"{names[key]}={cell_text(value)}" for key, value in run.point.items()) or run.name


def _waiting(now: Standing) -> str:
    counts: dict[str, int] = {}
    for job in now.of(WAITING):
        counts[job.stage] = counts.get(job.stage, 0) + 1
    later = [f"then the search goes on: {now.later}"] if now.later else []
    return ", ".join([f"{stage} {count}" for stage, count in counts.items()] + later)
