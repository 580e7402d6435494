"""Rank the runs of a sweep by their reports, and say which of them are to be judged on the test split.

By hand, with the config that the folder keeps::

    python -m steps.rank_runs --config results/rankings/X/config.yaml --output results/rankings/new

Reads   each run's report: metrics.json and predictions.jsonl.
Writes  ranking.json: the recipes best first, those tied with the best one, the chosen run, the runs to be tested.

The test split is opened for the chosen run only: whoever looks at it for every run and takes the best figure gets one
that is too good, for it was chosen by the same rows (`eval.test`).
"""

import logging
import sys
from pathlib import Path

from temper.config.stages import RankRuns
from temper.errors import UserError
from temper.evaluation.comparison import RankedRun, Ranking, comparable_losses, rank
from temper.evaluation.figures import finite
from temper.evaluation.metrics import lower_is_better
from temper.files import json_text, write_whole
from temper.planning.plan import RANKING
from temper.step import run_command

STAGE = "rank_runs"
log = logging.getLogger("temper")


def run(config: RankRuns, output: Path) -> dict:
    """Rank the runs and write ranking.json.

    Raises:
        UserError: a run has no report, or all diverged.
    """
    ranking = rank(config.runs, config.eval.model_dump(), config.sweep.choose)
    if ranking.missing:
        raise UserError(
            f"{ranking.missing[0]}: has no report yet, and the test split is opened once, after all have one"
        )
    tested = [run.name for run in ranking.tested(config.eval.test)]
    content = {
        "metric": ranking.metric,
        "split": ranking.split,
        "values": {run.name: run.figures.values[ranking.metric] for run in ranking.runs}
        | {run.name: None for run in ranking.diverged},
        "losses": finite(comparable_losses(ranking.runs)) | {run.name: None for run in ranking.diverged},
        "gained": [run.name for run in ranking.runs if has_gained(run, ranking.metric)],
        "order": [[run.name for run in recipe.runs] for recipe in ranking.recipes],
        "tied": [run.name for recipe in ranking.tied for run in recipe.runs],
        "chosen": ranking.chosen.name,
        "tested": tested,
    }
    write_whole(output / RANKING, json_text(content))
    log.info("chosen by %s on %s: %s", ranking.metric, ranking.split, ranking.chosen.name)
    if note := unlearned(ranking):
        log.info("note: %s", note)
    return {"inputs": {run["name"]: run["report"] for run in config.runs}}


def has_gained(run: RankedRun, metric: str) -> bool:
    """Whether a run is better than the untouched model, by more than its rows explain; as far as that is known."""
    if run.figures.delta is None:
        return True
    low, high = run.figures.delta.interval
    return high < 0 if lower_is_better(metric) else low > 0


def unlearned(ranking: Ranking) -> str | None:
    """What is to be said where no run is better than the untouched model: a search that goes by that goes by chance."""
    base, best = (ranking.best.figures.base or {}).get(ranking.metric), ranking.recipes[0].mean
    if base is None or (best < base if lower_is_better(ranking.metric) else best > base):
        return None
    return (
        f"no run is better than the untouched model ({ranking.metric} {base:.3f}), so this order says little of longer "
        "trainings; halving goes by their loss, and says more if it begins with a longer rung (sweep.rungs)"
    )


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
