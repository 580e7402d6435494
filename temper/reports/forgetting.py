"""What a sweep's page says of forgetting."""

from __future__ import annotations

from collections.abc import Callable

from temper.evaluation.comparison import RankedRun, Ranking
from temper.evaluation.figures import Delta
from temper.evaluation.metrics import lower_is_better
from temper.reports import html, plots
from temper.units import count, figure, signed


def _forgetting(run: RankedRun) -> Delta | None:
    return run.figures.probe.forgetting if run.figures.probe else None


def forgetting_sentence(ranking: Ranking, label: Callable[[RankedRun], str]) -> str | None:
    """What the chosen run forgot, and which of the runs that are as good forgot least; None where it was not measured.

    Args:
        label: what the page calls a run.
    """
    probe, change = ranking.chosen.figures.probe, _forgetting(ranking.chosen)
    if probe is None or change is None:
        return None
    low, high = change.interval
    text = f"Of general text ({count(probe.passages)} passages) the chosen run has {figure(probe.bits_per_byte)} bits "
    text += f"per byte, the base model {figure(probe.base)}: {signed(change.value)} ({signed(low)} to {signed(high)}), "
    text += "so it forgot some." if low > 0 else "so none was forgotten." if high <= 0 else "which may be chance."
    least = _least(ranking)
    if least and least is not ranking.chosen:
        text += f" Of the runs that cannot be told from the best, {label(least)} forgot least ({_change(least)})."
    return text


def _least(ranking: Ranking) -> RankedRun | None:
    """Of the tied runs the one that forgot least."""
    tied = {run.name: change.value for recipe in ranking.tied for run in recipe.runs if (change := _forgetting(run))}
    return next((run for run in ranking.runs if run.name == min(tied, key=tied.__getitem__)), None) if tied else None


def _change(run: RankedRun) -> str:
    change = _forgetting(run)
    return signed(change and change.value)


def gains_and_forgetting(ranking: Ranking, gate: dict | None) -> str | None:
    """The plot: gain in the ranking metric against forgetting, a point for each run that has both.

    Args:
        gate: the config section `eval.gate`, whose bounds it shows.
    """
    sign = -1 if lower_is_better(ranking.metric) else 1
    points = [
        {
            "x": change.value,
            "y": sign * gain.value,
            "x_interval": change.interval,
            "y_interval": sorted(sign * end for end in gain.interval),
            "chosen": run is ranking.chosen,
        }
        for run in ranking.runs
        if (change := _forgetting(run)) and (gain := run.figures.delta)
    ]
    if not points:
        return None
    gain_name = f"gain in {html.metric_name(ranking.metric)} ({ranking.split} split)"
    bounds = (gate["forgetting"], gate["gain"]) if gate else (None, None)
    return plots.tradeoff(points, ("forgetting (bits per byte)", gain_name), bounds)
