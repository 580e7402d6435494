"""What the rows that also stand in train do to the figure that ranks runs: the figure without them."""

from temper.data import overlap
from temper.data.in_train import KINDS, InTrain
from temper.evaluation import intervals, metrics
from temper.evaluation.figures import Figures, WithoutTrain


def figures_without(metric: str, split: str, rows: list[dict], evidence: metrics.Evidence, found: InTrain | None):
    """The ranking metric on the rows that do not stand in train; None where all are so, or nothing is known.

    Args:
        rows: those judged on.
        found: which rows stand in train.
    """
    ids = {kind: {*found.rows.get(split, {}).get(kind, ())} for kind in KINDS} if found else {}
    counts = {kind: sum(row["id"] in some for row in rows) for kind, some in ids.items()}
    if not any(counts.values()):
        return None
    kept = [place for place, row in enumerate(rows) if not any(row["id"] in some for some in ids.values())]
    if not kept:
        return WithoutTrain(in_train=counts, rows=0, value=None, interval=None)
    part = evidence.part(kept)
    statistic = metrics.score(part).statistics[metric]
    interval = intervals.interval(statistic, len(kept), part.groups)
    return WithoutTrain(in_train=counts, rows=len(kept), value=statistic(range(len(kept))), interval=interval)


def sentence(found: Figures, title: str) -> str:
    """Says it, of a model that was trained. `title`: of the metric."""
    without = found.without_train
    if without is None:
        return ""
    how = ", ".join(f"{count} {overlap.KINDS[kind]}" for kind, count in without.in_train.items() if count)
    number = found.rows - without.rows
    stand = "stands" if number == 1 else "stand"
    said = f"{number} of {found.rows} {found.split} rows also {stand} in train ({how})"
    if without.value is None or without.interval is None:
        return f"{said}: there is no figure without them"
    low, high = without.interval
    now = found.values[found.metric]
    return f"{said}; without them {title} is {without.value:.3f} [{low:.3f}, {high:.3f}] instead of {now:.3f}"
