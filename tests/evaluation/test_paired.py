"""Comparing two models on the same rows: against figures worked out by hand, and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.evaluation.comparison import RankedRun, Ranking, ordered_recipes
from temper.evaluation.figures import Figures
from temper.evaluation.metrics import Mean
from temper.evaluation.paired import (
    difference,
    holm,
    mean_statistic,
    rows_needed,
    smallest_difference,
    spread_of,
    with_more_spread,
)


def two_models(rng, rows: int, accuracy: float, gain: float, correlation: float):
    """Right and wrong answers of two models whose errors go together, the second better by `gain`."""
    common, own, other = (rng.standard_normal(rows) for _ in range(3))
    from scipy.stats import norm

    def answers(noise, share):
        return (correlation**0.5 * common + (1 - correlation) ** 0.5 * noise < norm.ppf(share)).astype(float)

    return answers(own, accuracy), answers(other, accuracy + gain)


def judged(name: str, split: str, right) -> Figures:
    """A run's figures, by its right and wrong answers; equal ones differ in their loss, as runs do."""
    values = {"accuracy": float(right.mean()), "loss": float(name)}
    return Figures.model_construct(metric="accuracy", split=split, rows=len(right), values=values)


def chosen_of_equals(rng) -> tuple[float, float]:
    """(validation, test) accuracy of the run that a sweep of 8 chooses, all of which are right in 86% of all rows."""
    common, own = rng.standard_normal(1000), rng.standard_normal((8, 1000))
    answers = 0.6**0.5 * common + 0.4**0.5 * own < 1.0803  # the 86% quantile
    runs = [
        RankedRun(
            name=str(number),
            point={"adapter.r": number},
            report="",
            test_report=None,
            train={},
            figures=judged(str(number), "validation", right[:500]),
            test=judged(str(number), "test", right[500:]),
        )
        for number, right in enumerate(answers)
    ]
    ranking = Ranking("accuracy", "validation", ordered_recipes(runs, "accuracy"), [], [])
    assert ranking.tested("chosen") == [ranking.chosen]
    return ranking.chosen.figures.values["accuracy"], ranking.chosen.test.values["accuracy"]


def test_the_choice_flatters_the_validation_figure_and_not_that_of_the_test_split():
    rng = np.random.default_rng(3)
    validation, test = np.array([chosen_of_equals(rng) for _ in range(500)]).T
    assert validation.mean() - 0.86 > 0.01, "the best of eight is lucky on its rows"
    error = test.std() / len(test) ** 0.5
    assert abs(test.mean() - 0.86) < 3 * error, "and not on others"


def test_mcnemar_by_hand():
    ours, theirs = Mean([1] * 12 + [0] * 3 + [1] * 10), Mean([1] * 4 + [0] * 8 + [1] * 3 + [1] * 10)
    found = difference(ours, theirs, 25)
    assert found.value == pytest.approx(5 / 25)
    # 8 rows for us, 3 for them: 2 * P(at most 3 of 11) = 2 * (1 + 11 + 55 + 165) / 2048
    assert found.p_value == pytest.approx(2 * 232 / 2048)


def test_a_model_is_not_better_than_itself():
    rows = Mean([1, 0, 1, 1])
    assert difference(rows, rows, 4).p_value == 1.0
    graded = Mean([0.2, 0.7, 0.9, 0.1])
    assert difference(graded, graded, 4) == difference(graded, graded, 4)
    assert (difference(graded, graded, 4).value, difference(graded, graded, 4).p_value) == (0.0, 1.0)


def test_equally_good_models_are_told_apart_in_5_of_100_cases_at_most():
    rng = np.random.default_rng(0)
    pairs = [two_models(rng, 300, 0.86, 0.0, 0.6) for _ in range(400)]
    found = [difference(Mean(ours), Mean(theirs), 300).p_value < 0.05 for ours, theirs in pairs]
    assert np.mean(found) <= 0.07
    graded = [difference(Mean(ours + rng.random(300)), Mean(theirs + rng.random(300)), 300) for ours, theirs in pairs]
    assert 0.02 <= np.mean([one.p_value < 0.05 for one in graded]) <= 0.09


def test_a_difference_of_the_stated_size_is_found_in_80_of_100_cases():
    rng = np.random.default_rng(1)
    first = difference(*map(Mean, two_models(rng, 500, 0.86, 0.05, 0.6)), 500)
    gain = smallest_difference(spread_of(first.interval, 500), 500)
    assert 0.03 < gain < 0.06, "of 500 rows with 86% right"
    found = [
        difference(Mean(theirs), Mean(ours), 500).p_value < 0.05
        for ours, theirs in (two_models(rng, 500, 0.86, gain, 0.6) for _ in range(200))
    ]
    assert 0.65 <= np.mean(found) <= 0.95


@given(st.floats(0.01, 1), st.integers(10, 10_000))
def test_rows_needed_is_the_other_side_of_the_smallest_difference(spread, rows):
    assert rows_needed(spread, smallest_difference(spread, rows)) in (rows, rows + 1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_is_never_smaller(p_values):
    adjusted = holm(p_values)
    assert all(after >= before for before, after in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[index] for index in order] == sorted(adjusted)
    assert max(adjusted) <= 1


def test_recipes_of_equal_worth_whose_seeds_differ_are_told_apart_in_5_of_100_cases():
    """Of three seeds each; by the rows alone it would be 25 of 100 and more."""
    rng, found, by_rows = np.random.default_rng(2), [], []
    for _ in range(300):
        ours, theirs = (
            [Mean(two_models(rng, 300, 0.86 + shift, 0.0, 0.0)[0]) for shift in rng.normal(0, 0.04, 3)] for _ in "ab"
        )
        apart = difference(mean_statistic(ours), mean_statistic(theirs), 300)
        means = np.array([[one.values.mean() for one in side] for side in (ours, theirs)])
        spread = np.sqrt((means.var(axis=1, ddof=1)).mean())
        found.append(with_more_spread(apart, spread * np.sqrt(2 / 3), 4).p_value < 0.05)
        by_rows.append(apart.p_value < 0.05)
    assert np.mean(found) <= 0.07
    assert np.mean(by_rows) > 0.15
