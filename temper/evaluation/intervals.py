"""How sure a figure is: 95% intervals over the rows of a split.

They say how much a figure could move with other rows of the same kind. Training again with another seed moves it too;
that is not in here.
"""

import warnings

from temper.evaluation.metrics import Mean, Statistic

CONFIDENCE = 0.95
RESAMPLES = 1000
SEED = 0  # of the bootstrap: the same answers give the same interval
MOST_ROWS = 2000  # for BCa, whose correction fades as 1 / rows, while its jackknife takes rows x rows


def interval(statistic: Statistic, rows: int) -> list[float]:
    """95% interval of a metric on `rows` rows.

    Of a share (each row is right or wrong) Wilson's, which holds near 0 and 1, where the bootstrap is far too narrow:
    of 32 rows, 31 of them right, it covers the truth in 61% of the cases. Of other metrics a bootstrap interval.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001 on why this one.
    """
    from scipy.stats import binomtest

    if isinstance(statistic, Mean) and statistic.is_share:
        share = binomtest(int(statistic.values.sum()), rows).proportion_ci(CONFIDENCE, method="wilson")
        return [float(share.low), float(share.high)]
    return _bootstrap(statistic, rows)


def delta_interval(ours: Statistic, theirs: Statistic, rows: int) -> list[float]:
    """95% interval of `ours` - `theirs` on the same rows: narrower than two intervals side by side suggest."""
    if isinstance(ours, Mean) and isinstance(theirs, Mean):
        return _bootstrap(Mean(ours.values - theirs.values), rows)
    return _bootstrap(lambda picked: ours(picked) - theirs(picked), rows)


def _bootstrap(statistic: Statistic, rows: int) -> list[float]:
    """Bias-corrected and accelerated (BCa) bootstrap interval, over 1,000 splits drawn from this one.

    Source: Efron 1987. Its plain quantiles are too narrow, and off the middle, where a metric is near its end.
    """
    import numpy as np
    from scipy.stats import DegenerateDataWarning, bootstrap

    if rows == 1:  # nothing to draw from
        return [statistic([0])] * 2
    values = statistic.values if isinstance(statistic, Mean) else None  # many resamples at a time: 3 times as fast
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            (np.arange(rows) if values is None else values,),
            statistic if values is None else np.mean,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="BCa" if rows <= MOST_ROWS else "percentile",
            vectorized=values is not None,
            batch=100,  # resamples laid at once: memory
            rng=np.random.default_rng(SEED),
        )
    ends = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    if np.isfinite(ends).all():
        return ends
    # No correction where (almost) all resamples give one figure.
    return [float(end) for end in np.quantile(found.bootstrap_distribution, [0.025, 0.975])]
