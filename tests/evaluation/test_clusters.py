"""Rows that go together: intervals and tests that count them by cluster, by simulation and against known figures."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from temper.evaluation import clusters, intervals
from temper.evaluation.metrics import Mean
from temper.evaluation.paired import difference

COPIES = 5


def copies(values):
    """Each row five times over, and the group of each."""
    return np.repeat(values, COPIES, axis=-1), [
        f"user {number}" for number in np.repeat(range(values.shape[-1]), COPIES)
    ]


def rights(rng):
    """Right and wrong answers of two models, 60 rows each."""
    return (rng.random((2, 60)) < 0.7).astype(float)


def scores(rng):
    return rng.beta(2, 1, size=(2, 60))


def flipped(ours, theirs, group) -> float:
    """The p value that `difference` gives, without the bootstrap of its interval."""
    return clusters.sign_flip(clusters.totals(ours - theirs, clusters.clusters_of(group))[0])


def test_clusters_of_five_equal_rows_are_told_apart_by_chance_in_5_percent_of_the_cases():
    rng, by_cluster, by_row = np.random.default_rng(0), [], []
    for _ in range(1500):
        (ours, theirs), group = copies(rights(rng))
        by_cluster.append(flipped(ours, theirs, group) < 0.05)
        better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
        by_row.append(binomtest(better, better + worse).pvalue < 0.05)
    assert 0.02 < np.mean(by_cluster) < 0.05 + 2 * (0.05 * 0.95 / 1500) ** 0.5  # exact tests stay below their level
    assert np.mean(by_row) > 0.25, "as rows on their own, equal models seem to differ"
    (ours, theirs), group = copies(rights(rng))
    assert difference(Mean(ours), Mean(theirs), 300, group).p_value == flipped(ours, theirs, group)


def test_graded_rows_of_clusters_are_told_apart_no_oftener():
    rng, found = np.random.default_rng(0), []
    for _ in range(150):
        (ours, theirs), group = copies(scores(rng))
        found.append(difference(Mean(ours), Mean(theirs), 300, group).p_value < 0.05)
    assert np.mean(found) < 0.05 + 2 * (0.05 * 0.95 / 150) ** 0.5


def test_equal_rows_of_a_cluster_say_what_one_of_them_does():
    ours, theirs = rights(np.random.default_rng(1))
    (many, others), group = copies(np.array([ours, theirs]))
    one, five = difference(Mean(ours), Mean(theirs), 60), difference(Mean(many), Mean(others), 300, group)
    assert five.p_value == pytest.approx(one.p_value, rel=1e-9)
    assert five.value == pytest.approx(one.value)
    assert five.interval == pytest.approx(one.interval, abs=0.01)
    graded = scores(np.random.default_rng(1))[0]
    assert intervals.interval(Mean(np.repeat(graded, 5)), 300, group) == pytest.approx(
        intervals.interval(Mean(graded), 60), abs=1e-12
    )


def test_a_metric_that_is_no_mean_draws_clusters_too():
    values, group = copies(scores(np.random.default_rng(2))[0])
    mean = Mean(values)
    assert intervals.interval(lambda rows: mean(rows), 300, group) == pytest.approx(
        intervals.interval(mean, 300, group), abs=1e-9
    )


@pytest.mark.parametrize("truth", [0.5, 0.87, 0.97])
def test_the_interval_of_a_share_holds_the_truth_whatever_goes_together(truth):
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        values, group = copies((rng.random(40) < truth).astype(float))
        low, high = intervals.interval(Mean(values), len(values), group)
        held.append(low <= truth <= high)
    assert 0.92 <= np.mean(held) <= 0.99


def test_groups_of_one_row_change_nothing():
    ours, theirs = map(Mean, rights(np.random.default_rng(3)))
    group = list(range(60))
    assert difference(ours, theirs, 60, group) == difference(ours, theirs, 60)
    assert intervals.interval(ours, 60, group) == intervals.interval(ours, 60)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_sign_flip_is_that_of_all_signs(differences):
    sums = [sum(map(int.__mul__, differences, signs)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    expected = np.mean([abs(value) >= abs(sum(differences)) for value in sums])
    assert clusters.sign_flip(np.array(differences)) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 40), st.integers(0, 40))
def test_with_clusters_of_one_row_it_is_mcnemars_exact_test(better, worse):
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    found = clusters.sign_flip(np.array([1] * better + [-1] * worse + [0] * 5))
    assert found == pytest.approx(expected, abs=1e-12)


def test_many_rows_take_the_normal_limit(monkeypatch):
    differences = np.random.default_rng(0).integers(-5, 6, size=2000)
    exact = clusters.sign_flip(differences)
    monkeypatch.setattr(clusters, "MOST_STEPS", 100)
    assert clusters.sign_flip(differences) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(("right", "rows"), [(0, 20), (13, 20), (20, 20)])
def test_wilson_is_scipys(right, rows):
    known = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    found = clusters.wilson(right / rows, rows, 1.959963984540054)
    assert found == pytest.approx([known.low, known.high], abs=1e-12)
