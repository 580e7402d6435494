"""Rows that are no independent ones: those of one group (a document, a user) count as a cluster.

As many rows of fewer kinds say less. So the bootstrap draws whole clusters, a share's interval has as many rows as its
clusters are worth, and a test asks which model is better by cluster.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

MOST_STEPS = 50_000  # of the exact test: its work grows with their square, and the normal limit is as good by then


def clusters_of(groups: Sequence[Hashable] | None):
    """The row numbers of each cluster, (rows,) int arrays; None where each row is a cluster of its own."""
    import numpy as np

    if groups is None or len(set(groups)) == len(groups):
        return None
    at: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        at.setdefault(group, []).append(row)
    return [np.array(rows) for rows in at.values()]


def totals(values, clusters):
    """(sum of the values of each cluster, its rows), (clusters,) float arrays each."""
    import numpy as np

    return np.array([values[rows].sum() for rows in clusters]), np.array([float(len(rows)) for rows in clusters])


def worth(values, clusters) -> float:
    """How many independent rows a share's rows are worth: with as many, it would spread as much.

    Rows that are all right, or all wrong, do not say by how much those of a cluster go together; then each cluster is
    worth one. Few clusters tell their own spread badly, which Student's t accounts for.

    Args:
        values: (rows,) of 0 and 1.

    Source: Kish 1965 on the design effect; Korn and Graubard 1998; Dean and Pagano 2015, who find that Wilson's
    interval with this number of rows holds the truth as often as it says.
    """
    import numpy as np
    from scipy.stats import norm, t

    sums, sizes = totals(values, clusters)
    rows, number, share = sizes.sum(), len(clusters), values.mean()
    if number == 1 or share in (0.0, 1.0):
        return float(number)
    variance = number / (number - 1) * ((sums - share * sizes) ** 2).sum() / rows**2
    effective = share * (1 - share) / variance if variance else rows
    few = (norm.ppf(0.975) / t.ppf(0.975, number - 1)) ** 2
    return float(np.clip(effective * few, 1, rows))


def wilson(share: float, rows: float, reach: float) -> list[float]:
    """Wilson's interval of a share; `rows` need be no whole number. `reach`: standard errors to either side."""
    middle = (share + reach**2 / (2 * rows)) / (1 + reach**2 / rows)
    around = reach / (1 + reach**2 / rows) * (share * (1 - share) / rows + reach**2 / (4 * rows**2)) ** 0.5
    return [max(0.0, middle - around), min(1.0, middle + around)]


def sign_flip(differences) -> float:
    """P value of the test that one model is as good as the other: within a cluster, which is which does not matter.

    Each cluster's difference has either sign as often. The statistic is their sum (Obuchowski's), its distribution
    exact, or the normal one where that is as good. With clusters of one row this is McNemar's exact test.

    Args:
        differences: (clusters,), of how many more rows one model is right; whole numbers.

    Source: Fisher 1935, section 21, on the test by reversing signs; Obuchowski 1998 on McNemar's test with clusters.
    """
    import numpy as np
    from scipy.stats import binom, norm

    steps, counts = np.unique(np.abs(np.rint(differences).astype(int)), return_counts=True)
    steps, counts = steps[steps > 0], counts[steps > 0]
    seen, most = abs(int(np.rint(np.sum(differences)))), int((steps * counts).sum())
    if not most:
        return 1.0
    if most > MOST_STEPS:
        return float(2 * norm.sf(seen / np.sqrt((steps**2 * counts).sum())))
    chances = np.ones(1)  # of each sum from -most to most, by twos
    for step, count in zip(steps, counts, strict=True):
        spaced = np.zeros(step * count + 1)
        spaced[::step] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, spaced)
    sums = 2 * np.arange(len(chances)) - most
    return float(min(1.0, chances[np.abs(sums) >= seen].sum()))
