"""Whether one model is better than another, judged on the same rows.

Two figures with overlapping intervals can differ for sure: most rows are as easy, or as hard, for both. What tells them
apart is the rows on which they differ, so all here is paired by row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from temper.evaluation.clusters import clusters_of, sign_flip, totals
from temper.evaluation.intervals import CONFIDENCE, Groups, delta_interval
from temper.evaluation.metrics import Mean, Statistic

POWER = 0.8  # how often a difference of the stated size would be found


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one model's figure and another's, on the same rows.

    `p_value`: how often a difference as large would come about by chance, were the two equally good. `interval`: 95%.
    """

    value: float
    interval: list[float]
    p_value: float


def difference(ours: Statistic, theirs: Statistic, rows: int, groups: Groups = None) -> Difference:
    """`ours` - `theirs`.

    Of right and wrong answers by McNemar's exact test: among the rows that one model has right and the other wrong,
    either is as likely. Of any other metric from the spread of the paired bootstrap. Where rows go together in groups,
    by the same test on clusters (see `temper.evaluation.clusters.sign_flip`), and from the bootstrap of clusters.

    Source: McNemar 1947; Dietterich 1998 on its false positives; Efron and Tibshirani 1993, chapter 15.
    """
    everything = range(rows)
    value = ours(everything) - theirs(everything)
    interval, clusters = delta_interval(ours, theirs, rows, groups), clusters_of(groups)
    if isinstance(ours, Mean) and isinstance(theirs, Mean) and ours.is_share and theirs.is_share:
        if clusters is not None:
            return Difference(value, interval, sign_flip(totals(ours.values - theirs.values, clusters)[0]))
        return Difference(value, interval, _mcnemar(ours, theirs))
    freedom = math.inf if clusters is None else max(1, len(clusters) - 1)
    return Difference(value, interval, _from_spread(value, interval, freedom))


def _mcnemar(ours: Mean, theirs: Mean) -> float:
    from scipy.stats import binomtest

    better, worse = int((ours.values > theirs.values).sum()), int((ours.values < theirs.values).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _from_spread(value: float, interval: list[float], freedom: float) -> float:
    """Two-sided, from a 95% interval. `freedom`: degrees of freedom of its spread."""
    from scipy.stats import t

    spread = _spread(interval)
    if spread == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * t.sf(abs(value) / spread, freedom))


def with_more_spread(found: Difference, spread: float, freedom: int) -> Difference:
    """The same difference where its rows are not all that chance decides.

    Args:
        spread: standard deviation of what else does, and of how many degrees of freedom that is an estimate.
    """
    from scipy.stats import t

    both = math.hypot(_spread(found.interval), spread)
    around = reach(freedom) * both
    p_value = float(2 * t.sf(abs(found.value) / both, freedom)) if both else found.p_value
    return Difference(found.value, [found.value - around, found.value + around], p_value)


def mean_statistic(found: Sequence[Statistic]) -> Statistic:
    """The mean of a metric over several models, on the same rows."""
    if len(found) == 1:
        return found[0]
    means = [one for one in found if isinstance(one, Mean)]
    if len(means) == len(found):
        return Mean(sum(one.values for one in means) / len(means))
    return lambda rows: sum(one(rows) for one in found) / len(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values that account for how many tests were made: each may be held against 5% as if it were alone.

    Source: Holm 1979.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


# --- what these rows can show --------------------------------------------------------------------


def smallest_difference(spread: float, rows: int) -> float:
    """The difference that a paired test at 5% finds in 80% of the cases.

    Args:
        spread: standard deviation of the rows' differences (`spread_of`).
    """
    return _needed() * spread / math.sqrt(rows)


def rows_needed(spread: float, wanted: float) -> int:
    """How many rows it takes to find a difference of this size as often."""
    return math.ceil((_needed() * spread / wanted) ** 2)


def spread_of(interval: list[float], rows: int) -> float:
    """Standard deviation of the rows' differences that an interval of a difference stands for."""
    return _spread(interval) * math.sqrt(rows)


def _spread(interval: list[float]) -> float:
    """Standard error that a 95% interval stands for."""
    return (interval[1] - interval[0]) / (2 * reach())


def reach(freedom: float = math.inf) -> float:
    """How many standard errors a 95% interval goes to either side.

    Args:
        freedom: degrees of freedom of the standard error; by itself it is taken as known.
    """
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def _needed() -> float:
    """Standard errors between no difference and one that is found with `POWER`."""
    from scipy.stats import norm

    return reach() + float(norm.ppf(POWER))
