"""The runs of a sweep beside each other: which is better."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from temper.errors import UserError
from temper.evaluation.figures import FILE, Diverged, Figures, read_figures
from temper.evaluation.metrics import lower_is_better
from temper.folders import made_again


@dataclasses.dataclass
class ComparedRun:
    """A run of a sweep that has a report.

    `point`: swept key -> its value. `report`: the folder of its evaluation. `train`: the figures of its training.
    """

    name: str
    point: dict[str, Any]
    report: str
    train: dict[str, Any]


@dataclasses.dataclass
class RankedRun(ComparedRun):
    """One with figures."""

    figures: Figures


@dataclasses.dataclass
class DivergedRun(ComparedRun):
    """One without; `at_step` is None where the training ended, and its figures are not finite."""

    at_step: int | None


@dataclasses.dataclass
class Ranking:
    """The runs that have figures, best first; those that diverged; the names of those without a report."""

    metric: str
    runs: list[RankedRun]
    diverged: list[DivergedRun]
    missing: list[str]

    @property
    def best(self) -> RankedRun:
        return self.runs[0]


def rank(planned: list[dict], metric: str) -> Ranking:
    """Read the runs' reports, and order them by a metric; runs that are alike in it by their loss.

    Args:
        planned: name, point and report of each run.

    Raises:
        UserError: none has a report, all diverged, or a report is damaged.
    """
    there = [run for run in planned if (Path(run["report"]) / FILE).is_file()]
    if not there:
        raise UserError(
            f"none of the sweep's {len(planned)} run(s) has a report: see their logs, and run snakemake again"
        )

    ranked: list[RankedRun] = []
    diverged: list[DivergedRun] = []
    for run in there:
        figures = read_report(Path(run["report"]), metric)
        if isinstance(figures, Diverged):
            diverged.append(DivergedRun(**run, train=figures.train or {}, at_step=figures.diverged_at_step))
        elif not figures.are_finite:
            diverged.append(DivergedRun(**run, train=figures.train or {}, at_step=None))
        else:
            ranked.append(RankedRun(**run, train=figures.train or {}, figures=figures))
    if not ranked:
        steps = ", ".join(str(run.at_step or "its end") for run in diverged)
        raise UserError(f"every run with a report diverged (at steps {steps}): lower train.learning_rate")

    ranked.sort(key=lambda run: _order(run, metric))
    return Ranking(metric, ranked, diverged, [run["name"] for run in planned if run not in there])


def read_report(folder: Path, metric: str) -> Figures | Diverged:
    """A run's figures, ranked by `metric`.

    Raises:
        UserError: they are damaged, or lack one that the comparison needs.
    """
    found = read_figures(folder)
    if isinstance(found, Figures):
        lacking = [name for name in (metric, "loss") if name not in found.test]
        if lacking or len(found.interval) != 2:
            what = f"figure '{lacking[0]}'" if lacking else "interval of two ends"
            raise UserError(f"{folder / FILE}: damaged (it has no {what}); {made_again(folder)}")
        if found.metric != metric:
            found = _ranked_by(found, metric, folder)
    return found


def _ranked_by(found: Figures, metric: str, folder: Path) -> Figures:
    if metric not in found.intervals:
        raise UserError(
            f"{folder / FILE}: ranks by {found.metric}, and has no interval of {metric}; evaluate with "
            f"eval.metric={metric}, or compare by {found.metric}"
        )
    return found.model_copy(update={"metric": metric, "interval": found.intervals[metric]})


def _order(run: RankedRun, metric: str) -> tuple:
    value = run.figures.test[metric]
    return (value if lower_is_better(metric) else -value, run.figures.test["loss"], run.name)
