"""The runs of a sweep beside each other: which is best, and which cannot be told from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from temper.errors import UserError
from temper.evaluation.figures import FILE, Diverged, Figures, read_figures
from temper.evaluation.judge import evidence_of
from temper.evaluation.metrics import BITS_PER_BYTE, TASKS, Mean, Statistic, check_metric, lower_is_better, metrics_of
from temper.evaluation.paired import Difference, difference, holm, rows_needed, smallest_difference, spread_of
from temper.files import read_json_lines
from temper.folders import made_again

ALPHA = 0.05  # what a p value is held against


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
    """One with figures.

    `behind`: its figure less that of the best run, on the same rows; None for that one, and where the rows differ.
    `p_holm`: the p value of this difference, for as many tests as the sweep makes.
    """

    figures: Figures
    behind: Difference | None = None
    p_holm: float | None = None

    @property
    def is_tied(self) -> bool:
        """Whether these rows do not tell it from the best run."""
        return self.p_holm is None or self.p_holm >= ALPHA

    @property
    def cost(self) -> float:
        """Floating point operations of its training: the same on every machine, as seconds are not."""
        flops, steps = self.train.get("flops_per_step"), self.train.get("global_step")
        return math.inf if flops is None or steps is None else flops * steps


@dataclasses.dataclass
class DivergedRun(ComparedRun):
    """One without; `at_step` is None where the training ended, and its figures are not finite."""

    at_step: int | None


@dataclasses.dataclass
class Ranking:
    """The runs that have figures, best first; those that diverged; the names of those without a report.

    `choose`: the config's `sweep.choose`. `one_rows`: whether all runs were judged on the same rows.
    """

    metric: str
    runs: list[RankedRun]
    diverged: list[DivergedRun]
    missing: list[str]
    choose: str = "best"
    one_rows: bool = True

    @property
    def best(self) -> RankedRun:
        return self.runs[0]

    @property
    def tied(self) -> list[RankedRun]:
        """The best run, and those that cannot be told from it."""
        return [run for run in self.runs if run.is_tied]

    @property
    def cheapest(self) -> RankedRun:
        """Of these the one whose training took the fewest operations; of equally cheap ones the better."""
        return min(self.tied, key=lambda run: run.cost)

    @property
    def chosen(self) -> RankedRun:
        return self.cheapest if self.choose == "cheapest_of_tied" else self.best

    def shown(self) -> tuple[float, int] | None:
        """(the smallest difference that these rows would show in 80% of the cases, rows that 1 point would take).

        None for less than two runs. By the run whose rows differ from the best one's as much as is usual in this sweep.
        """
        rows = self.best.figures.rows
        spreads = sorted(spread_of(run.behind.interval, rows) for run in self.runs if run.behind)
        usual = spreads[len(spreads) // 2] if spreads else 0.0
        return (smallest_difference(usual, rows), rows_needed(usual, 0.01)) if usual else None


def rank(planned: list[dict], settings: dict, choose: str = "best") -> Ranking:
    """Read the runs' reports, order them by a metric (alike in it, by their loss), and compare each with the best one.

    Args:
        planned: name, point and report of each run.
        settings: the config section `eval`.
        choose: see `Ranking`.

    Raises:
        UserError: none has a report, all diverged, or a report is damaged.
    """
    metric = check_metric(settings)
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

    # Models may cut text into different tokens: then figures per token do not compare.
    across_models = any(sweeps_model(run.point) for run in ranked)
    ranked.sort(key=lambda run: _order(run, metric, across_models))
    missing = [run["name"] for run in planned if run not in there]
    return Ranking(metric, ranked, diverged, missing, choose, _compare_with_best(ranked, settings, metric))


def _compare_with_best(runs: list[RankedRun], settings: dict, metric: str) -> bool:
    """Find out how far each run is behind the first; whether all have the same rows."""
    best, *others = runs
    rows = _rows(best)
    theirs, comparable = _statistic(rows, settings, metric), []
    for run in others:
        found = _rows(run)
        if [row["id"] for row in found] == [row["id"] for row in rows]:
            run.behind = difference(_statistic(found, settings, metric), theirs, len(rows))
            comparable.append(run)
    for run, p_value in zip(comparable, holm([run.behind.p_value for run in comparable if run.behind]), strict=True):
        run.p_holm = p_value
    return len(comparable) == len(others)


def _rows(run: RankedRun) -> list[dict]:
    return read_json_lines(Path(run.report) / "predictions.jsonl", {"id": int, "reference": str, "prediction": str})


def _statistic(rows: list[dict], settings: dict, metric: str) -> Statistic:
    """The ranking metric of a report's answers."""
    if metric == TASKS[settings["task"]][0].name:  # the score of each row is this metric already
        return Mean([row["score"] for row in rows])
    found = metrics_of(settings["task"])[metric].statistic(evidence_of(settings, rows))
    assert found is not None, "a run is ranked by a metric that it has"
    return found


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


def _order(run: RankedRun, metric: str, across_models: bool) -> tuple:
    figures = run.figures.test
    loss = figures.get(BITS_PER_BYTE, math.inf) if across_models else figures["loss"]
    return (figures[metric] if lower_is_better(metric) else -figures[metric], loss, run.name)


def sweeps_model(point: Iterable[str]) -> bool:
    """Whether a model is among swept keys."""
    return any(key == "model" or key.startswith("model.") for key in point)
