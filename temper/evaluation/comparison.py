"""The runs of a sweep beside each other: which is best, and which cannot be told from it."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from temper.errors import UserError
from temper.evaluation.figures import FILE, Diverged, Figures, read_figures
from temper.evaluation.judge import evidence_of, groups_of
from temper.evaluation.metrics import (
    BITS_PER_BYTE,
    DOCUMENTS,
    TASKS,
    Mean,
    Statistic,
    check_metric,
    lower_is_better,
    sweeps_model,
    with_own,
)
from temper.evaluation.paired import (
    Difference,
    difference,
    holm,
    mean_statistic,
    reach,
    rows_needed,
    smallest_difference,
    spread_of,
    with_more_spread,
)
from temper.files import read_json_lines
from temper.folders import made_again

ALPHA = 0.05  # what a p value is held against


@dataclasses.dataclass
class ComparedRun:
    """A run of a sweep that has a report.

    `point`: swept key -> its value. `report`: the folder of its evaluation; `test_report`: of the one on the test
    split, which most runs never get. `train`: the figures of its training. Which only the chosen run gets: `suspects`,
    the folder of its suspicious rows, and `harness`, of what lm-eval measured.
    """

    name: str
    point: dict[str, Any]
    report: str
    test_report: str | None
    train: dict[str, Any]
    suspects: str | None = dataclasses.field(default=None, kw_only=True)
    harness: str | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass
class RankedRun(ComparedRun):
    """One with figures. `test`: those on the test split, where it was judged on that too."""

    figures: Figures
    test: Figures | None = None

    @property
    def cost(self) -> float:
        """Floating point operations of its training: the same on every machine, as seconds are not."""
        flops, steps = self.train.get("flops_per_step"), self.train.get("global_step")
        return math.inf if flops is None or steps is None else flops * steps


@dataclasses.dataclass
class Recipe:
    """A point of the sweep with all its trainings, which differ in nothing but their seed.

    `runs`: by seed. `behind`: its mean less that of the best recipe, on the same rows; None for that one, and where the
    rows differ. `p_holm`: the p value of this difference, for as many tests as the sweep makes.
    """

    runs: list[RankedRun]
    metric: str
    behind: Difference | None = None
    p_holm: float | None = None

    @property
    def values(self) -> list[float]:
        """The ranking metric of each run."""
        return [run.figures.values[self.metric] for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation between its seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.runs) > 1 else None

    @property
    def is_tied(self) -> bool:
        """Whether it cannot be told from the best recipe."""
        return self.p_holm is None or self.p_holm >= ALPHA

    @property
    def cost(self) -> float:
        return min(run.cost for run in self.runs)


@dataclasses.dataclass
class DivergedRun(ComparedRun):
    """One without; `at_step` is None where the training ended, and its figures are not finite."""

    at_step: int | None


@dataclasses.dataclass
class Ranking:
    """The recipes that have figures, best first; runs that diverged; the names of runs without a report.

    `split`: the one that they are ranked by. `choose`: the config's `sweep.choose`. `one_rows`: whether all runs were
    judged on the same rows.
    """

    metric: str
    split: str
    recipes: list[Recipe]
    diverged: list[DivergedRun]
    missing: list[str]
    choose: str = "best"
    one_rows: bool = True

    @property
    def runs(self) -> list[RankedRun]:
        return [run for recipe in self.recipes for run in recipe.runs]

    @property
    def best(self) -> RankedRun:
        """Of the best recipe the first seed: taking its luckiest one would flatter it."""
        return self.recipes[0].runs[0]

    @property
    def tied(self) -> list[Recipe]:
        """The best recipe, and those that cannot be told from it."""
        return [recipe for recipe in self.recipes if recipe.is_tied]

    @property
    def cheapest(self) -> RankedRun:
        """Of the tied recipes the one whose training took the fewest operations; of equally cheap ones the better."""
        return min(self.tied, key=lambda recipe: recipe.cost).runs[0]

    @property
    def chosen(self) -> RankedRun:
        return self.cheapest if self.choose == "cheapest_of_tied" else self.best

    def tested(self, test: str) -> list[RankedRun]:
        """The runs that are to be judged on the test split as well. `test`: the config's `eval.test`."""
        if self.split == "test" or test == "none":
            return []
        if test == "all":
            return self.runs
        tied = [run for recipe in self.tied for run in recipe.runs] if test == "tied" else []
        return [self.chosen, *(run for run in tied if run is not self.chosen)]

    @property
    def noise(self) -> Noise | None:
        """What the seed alone changes, by all recipes with several of them."""
        return _noise(self.recipes)

    def shown(self) -> tuple[float, int] | None:
        """(the smallest difference that these rows would show in 80% of the cases, rows that 1 point would take).

        None for a single recipe, and where seeds differ, which more rows do not mend. By how much the
        rows of the tied ones differ from those of the best one, in the middle; of all others where none is tied.
        """
        if self.noise:
            return None
        rows = self.best.figures.rows
        others = [one for one in self.tied if one.behind] or [one for one in self.recipes if one.behind]
        spreads = sorted(spread_of(one.behind.interval, rows) for one in others if one.behind)
        usual = spreads[len(spreads) // 2] if spreads else 0.0
        return (smallest_difference(usual, rows), rows_needed(usual, 0.01)) if usual else None


@dataclasses.dataclass(frozen=True)
class Noise:
    """What other seeds change.

    `spread`: standard deviation of a figure between the seeds of a recipe, pooled over recipes. `freedom`: its degrees
    of freedom, runs less recipes.
    """

    spread: float
    freedom: int

    @property
    def told_apart(self) -> float:
        """How far two runs of one seed each must be apart at least, to differ by more than their seeds (95%)."""
        return reach(self.freedom) * self.spread * math.sqrt(2)


def _noise(recipes: list[Recipe]) -> Noise | None:
    freedom = sum(len(recipe.runs) - 1 for recipe in recipes)
    if not freedom:
        return None
    squares = sum((value - recipe.mean) ** 2 for recipe in recipes for value in recipe.values)
    return Noise(math.sqrt(squares / freedom), freedom)


def rank(planned: list[dict], settings: dict, choose: str = "best") -> Ranking:
    """Read the runs' reports, order them by a metric (alike in it, by their loss), and compare each with the best one.

    Args:
        planned: name, point, report and test_report of each run.
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
        known = {"test_report": None, **run, "train": figures.train or {}}
        if isinstance(figures, Diverged):
            diverged.append(DivergedRun(**known, at_step=figures.diverged_at_step))
        elif not figures.are_finite:
            diverged.append(DivergedRun(**known, at_step=None))
        else:
            ranked.append(RankedRun(**known, figures=figures))
    if not ranked:
        steps = ", ".join(str(run.at_step or "its end") for run in diverged)
        raise UserError(f"every run with a report diverged (at steps {steps}): lower train.learning_rate")

    missing = [run["name"] for run in planned if run not in there]
    recipes = ordered_recipes(ranked, metric)
    one_rows = _compare_with_best(recipes, settings)
    return Ranking(metric, _one_split(ranked), recipes, diverged, missing, choose, one_rows)


def _one_split(runs: list[RankedRun]) -> str:
    first = runs[0].figures.split
    for run in runs:
        if run.figures.split != first:
            raise UserError(
                f"{run.report}: is of the {run.figures.split} split, and {runs[0].report} of the {first} split: runs "
                "are ranked by one split"
            )
    return first


def add_tested(ranking: Ranking, test: str) -> list[str]:
    """Read the test figures of the runs that the ranking chose for it; the names of those that have none yet.

    Args:
        test: the config's `eval.test`.
    """
    if ranking.split == "test":
        for run in ranking.runs:
            run.test = run.figures
    for run in ranking.tested(test):
        if run.test_report and (Path(run.test_report) / FILE).is_file():
            found = read_report(Path(run.test_report), ranking.metric)
            run.test = found if isinstance(found, Figures) else None
    return [run.name for run in ranking.tested(test) if run.test is None]


def _recipes(runs: list[RankedRun], metric: str) -> list[Recipe]:
    """Runs that differ in nothing but their seed, together."""
    found: dict[str, list[RankedRun]] = {}
    for run in runs:
        rest = {key: value for key, value in run.point.items() if key != "seed"}
        key = run.name if rest == run.point else json.dumps(rest, sort_keys=True, default=str)
        found.setdefault(key, []).append(run)
    return [Recipe(sorted(of_one, key=lambda run: run.point.get("seed", 0)), metric) for of_one in found.values()]


def ordered_recipes(runs: list[RankedRun], metric: str) -> list[Recipe]:
    """Best first; of equal figures the lower loss, then the name, so that nothing is left to chance."""
    losses = comparable_losses(runs)

    def place(recipe: Recipe) -> tuple:
        mean = recipe.mean if lower_is_better(recipe.metric) else -recipe.mean
        return mean, statistics.fmean(losses[run.name] for run in recipe.runs), recipe.runs[0].name

    return sorted(_recipes(runs, metric), key=place)


def comparable_losses(runs: list[RankedRun]) -> dict[str, float]:
    """Run's name -> its loss; infinite if its report has none."""
    # Models may cut text into different tokens: then figures per token do not compare.
    loss = BITS_PER_BYTE if any(sweeps_model(run.point) for run in runs) else "loss"
    return {run.name: run.figures.values.get(loss, math.inf) for run in runs}


def _compare_with_best(recipes: list[Recipe], settings: dict) -> bool:
    """Find out how far each recipe is behind the first; whether all have the same rows."""
    best, *others = recipes
    theirs, rows, groups = _statistic(best, settings)
    noise, comparable = _noise(recipes), []
    for recipe in others:
        ours, found, _ = _statistic(recipe, settings)
        if found == rows:
            apart = difference(ours, theirs, len(rows), groups)
            recipe.behind = apart if noise is None else _with_noise(apart, noise, len(recipe.runs), len(best.runs))
            comparable.append(recipe)
    adjusted = holm([recipe.behind.p_value for recipe in comparable if recipe.behind])
    for recipe, p_value in zip(comparable, adjusted, strict=True):
        recipe.p_holm = p_value
    return len(comparable) == len(others)


def _with_noise(found: Difference, noise: Noise, ours: int, theirs: int) -> Difference:
    """A difference of means over seeds, of which others would have come out otherwise.

    Args:
        ours, theirs: numbers of seeds.
    """
    return with_more_spread(found, noise.spread * math.sqrt(1 / ours + 1 / theirs), noise.freedom)


def _statistic(recipe: Recipe, settings: dict) -> tuple[Statistic, list[tuple], list[str] | None]:
    """(the ranking metric of a recipe's answers, mean over its seeds; what tells their rows; the groups of these)."""
    rows = [_rows(run, settings["task"]) for run in recipe.runs]
    found = [_statistic_of(of_run, settings, recipe.metric) for of_run in rows]
    return mean_statistic(found), [(row["id"], row["reference"]) for row in rows[0]], groups_of(rows[0])


def _rows(run: RankedRun, task: str) -> list[dict]:
    answers = {} if task == DOCUMENTS else {"prediction": str}
    return read_json_lines(Path(run.report) / "predictions.jsonl", {"id": int, "reference": str, **answers})


def _statistic_of(rows: list[dict], settings: dict, metric: str) -> Statistic:
    if settings["task"] != DOCUMENTS and metric == TASKS[settings["task"]][0].name:  # of which each row has its score
        return Mean([row["score"] for row in rows])
    found = with_own(settings["task"], [metric])[metric].statistic(evidence_of(settings, rows))
    assert found is not None, "a run is ranked by a metric that it has"
    return found


def read_report(folder: Path, metric: str) -> Figures | Diverged:
    """A run's figures, ranked by `metric`.

    Raises:
        UserError: they are damaged, or lack one that the comparison needs.
    """
    found = read_figures(folder)
    if isinstance(found, Figures):
        lacking = [name for name in (metric, "loss") if name not in found.values]
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
