"""Curves and figures for TensorBoard and Weights & Biases, beside MLflow (`tracking.report_to`).

Both are copies of the files in results/, which `mirror` writes for each run that has its report: event files in
results/tensorboard/, and runs of W&B's offline mode in results/wandb/, from where `wandb sync` sends them. TensorBoard
shows curves also while they grow: `follow` writes them from a thread of its own. Neither slows or stops a training.
"""

import contextlib
import importlib.util
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from temper.errors import UserError
from temper.files import read_json_lines, write_whole
from temper.hashing import digest

log = logging.getLogger("temper")
TENSORBOARD, WANDB = "tensorboard", "wandb"
FOLDERS = {TENSORBOARD: Path("results/tensorboard"), WANDB: Path("results/wandb")}
COMPLETE = "complete"  # file in a run's folder: the key of the run that was copied
GOODBYE_SECONDS = 5.0  # how long the end of a training waits for the last points
NOT_METRICS = ("step", "epoch", "seconds")  # of a line of metrics.jsonl

Figures = Callable[[object], dict | None]


def check(tracking: dict) -> None:
    """Refuse, before any job, a tracker that is not installed.

    Raises:
        UserError: it is not installed.
    """
    for name in tracking.get("report_to") or []:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"tracking.report_to: {name} is not installed: pip install {name}, or leave it out")


def folder_of(tracker: str, sweep: str, run: str) -> Path:
    """The folder of a run of a sweep."""
    return FOLDERS[tracker] / sweep / run


# --- while training ------------------------------------------------------------------------------


@contextlib.contextmanager
def follow(target: dict) -> Iterator[Callable[[dict], None]]:
    """Follow one training as `temper.tracking.follow` does; yields a function that takes a line of metrics.jsonl."""
    if TENSORBOARD not in (target["tracking"].get("report_to") or []):
        yield lambda _line: None
        return
    writer = _Writer(folder_of(TENSORBOARD, target["sweep"], target["run"]))
    writer.start()
    try:
        yield writer.lines.put
    finally:
        writer.lines.put(None)
        writer.join(GOODBYE_SECONDS)


class _Writer(threading.Thread):
    """Writes its queue to an event file until it gets None. What goes wrong is said once, and the training goes on."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder = folder
        self.lines: queue.SimpleQueue = queue.SimpleQueue()

    def run(self) -> None:
        try:
            if (first := self.lines.get()) is None:
                return
            with _events(self.folder, first["step"]) as writer:
                _add(writer, first, time.time())
                while (line := self.lines.get()) is not None:
                    _add(writer, line, time.time())
        except Exception as error:  # whatever it is: the files have all
            log.info("tensorboard: %s; training goes on, and the comparison writes the whole curve", error)


@contextlib.contextmanager
def _events(folder: Path, first_step: int):
    """A writer of an event file. Points from `first_step` on of older files, as of a killed training, are void."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=5)
    try:
        yield writer
    finally:
        writer.close()


def _add(writer, line: dict, when: float) -> None:
    for name, value in line.items():
        if name not in NOT_METRICS and value is not None:
            writer.add_scalar(name, value, line["step"], walltime=when)


# --- after training, from the files --------------------------------------------------------------


def mirror(plan, figures: Figures, config: Callable[[dict], dict]) -> list[str]:
    """Copy every run that has a report and is not copied yet; returns a line for each tracker.

    Args:
        plan: a `temper.planning.plan.Plan`.
        figures: a run of the plan -> its figures, as a line of metrics.jsonl; None: it has no report yet.
        config: a run's config -> what of it is to be shown.
    """
    said = []
    for tracker in plan.tracking.get("report_to") or []:
        try:
            count = sum(_copy(tracker, plan, run, figures, config) for run in plan.runs)
            said.append(f"{tracker}: {count} new run(s) in {FOLDERS[tracker]}")
        except Exception as error:  # the results are in files
            said.append(
                f"{tracker}: not up to date: {' '.join(str(error).split())[:200]}; the next command tries again"
            )
    return said


def has_all(plan) -> bool:
    """Whether every run of a plan is copied to each tracker that it names."""
    named = plan.tracking.get("report_to") or []
    return all(_is_copied(folder_of(tracker, plan.sweep, run.name), run) for tracker in named for run in plan.runs)


def _is_copied(folder: Path, run) -> bool:
    marker = folder / COMPLETE
    return marker.is_file() and marker.read_text(encoding="utf-8") == run.key


def _copy(tracker: str, plan, run, figures: Figures, config: Callable[[dict], dict]) -> bool:
    """Copy one run; whether there was anything to do."""
    folder = folder_of(tracker, plan.sweep, run.name)
    if _is_copied(folder, run) or (found := figures(run)) is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)  # what a training wrote while it ran, perhaps not to its end
    lines = read_json_lines(Path(run.artefacts["train_adapter"]) / "metrics.jsonl")
    if tracker == TENSORBOARD:
        _write_events(folder, lines, found)
    else:
        _write_wandb(folder, plan, run, lines, found, config(run.config))
    write_whole(folder / COMPLETE, run.key)
    return True


def _write_events(folder: Path, lines: list[dict], figures: dict) -> None:
    began = time.time() - figures["seconds"]
    with _events(folder, 0) as writer:
        for line in lines:
            _add(writer, line, began + line["seconds"])
        _add(writer, figures, began + figures["seconds"])


def _write_wandb(folder: Path, plan, run, lines: list[dict], figures: dict, config: dict) -> None:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    names = {"project": plan.tracking["experiment_name"], "group": plan.sweep, "name": run.title[:128]}
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    identity = digest([plan.sweep, run.name, run.key])
    with wandb.init(mode="offline", dir=str(folder), id=identity, config=config, settings=settings, **names) as made:
        for line in lines:
            values = {name: value for name, value in line.items() if name not in ("step", "seconds")}
            made.log(values, step=line["step"])
        made.summary.update({name: value for name, value in figures.items() if name not in NOT_METRICS})
