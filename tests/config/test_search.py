"""Which points a sweep asks for, round by round (sweep.strategy=halving and tpe)."""

import math
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.config.schema import Sweep
from temper.config.search import EPOCHS, STEPS, Rungs, rounds, rungs_of, write_study
from temper.config.space import Interval
from temper.errors import UserError

RATE = {"rate": Interval(1e-5, 1e-1, True, False)}


def sweep(**fields) -> Sweep:
    return Sweep(**{"name": "one", "strategy": "halving", **fields})


def rungs(fields: dict, axes: dict, train: dict) -> Rungs:
    return rungs_of(sweep(**fields), axes, lambda: train)[0]


def played(search: Sweep, axes: dict, steps: Rungs, loss) -> list[list[tuple]]:
    """All rounds of a search in which a point has the loss that a function gives it."""
    asked = rounds(search, axes, steps)
    found = [next(asked)]
    while True:
        try:
            found.append(asked.send({point: loss(point) for point in found[-1]}))
        except StopIteration:
            return found


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_rung_keeps_the_best_of_the_one_before(number, eta, length, random):
    axes, steps = {"a": [str(value) for value in range(number)]}, Rungs(EPOCHS, tuple(map(str, range(length))))
    losses = {str(value): random.random() for value in range(number)}
    found = played(sweep(eta=eta), axes, steps, lambda point: losses[point[0]])
    assert len(found) == length and len(found[0]) == number
    for before, after in zip(found, found[1:], strict=False):
        best = sorted(losses[value] for value, _ in before)[: max(1, len(before) // eta)]
        assert [losses[value] for value, _ in after] == best
        assert {rung for _, rung in after} == {str(int(before[0][1]) + 1)}


def test_runs_that_diverged_are_not_trained_on():
    steps, losses = Rungs(EPOCHS, ("1", "2", "4")), {"x": math.inf, "y": 2.0, "z": math.inf}
    found = played(sweep(), {"a": ["x", "y", "z"]}, steps, lambda point: losses[point[0]])
    assert [len(one) for one in found] == [3, 1, 1] and found[1] == [("y", "2")]
    assert len(played(sweep(), {"a": ["x"]}, steps, lambda _: math.inf)) == 1, "and where all did nothing follows"


@pytest.mark.parametrize(
    ("fields", "axes", "train", "expected"),
    [
        ({}, {"a": ["1", "2", "3", "4"]}, {"num_train_epochs": 2}, ("0.5", "1", "2")),
        ({}, {"a": list("abcdefghijklmnop")}, {"num_train_epochs": 2}, ("0.25", "0.5", "1", "2")),
        ({"eta": 3}, {"a": list("abcdefghi")}, {"num_train_epochs": 1}, ("0.111", "0.333", "1")),
        ({"n": 4}, RATE, {}, ("0.75", "1.5", "3")),
        ({}, {"a": ["1", "2"], EPOCHS: ["4", "1"]}, {"num_train_epochs": 2}, ("1", "4")),
        ({"rungs": [0.5, 1]}, {"a": ["1"]}, {"num_train_epochs": 8}, ("0.5", "1")),
        ({}, {"a": ["1", "2", "3", "4"]}, {"max_steps": 30}, ("8", "15", "30")),
    ],
)
def test_rungs(fields, axes, train, expected):
    assert rungs(fields, axes, train).values == expected


def test_rungs_are_told_once():
    with pytest.raises(UserError, match="sweep.rungs and an axis train.num_train_epochs are two ways"):
        rungs({"rungs": [1, 2]}, {EPOCHS: ["1", "2"]}, {})
    with pytest.raises(UserError, match="is what the rungs are, which are a list"):
        rungs({}, {EPOCHS: Interval(1, 4, False, True)}, {})
    assert rungs({"rungs": [8, 16]}, {"a": ["1"]}, {"max_steps": 99}).key == STEPS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strategy": "tpe"}, "strategy 'tpe' needs 'n'"),
        ({"strategy": "grid", "eta": 3}, "'eta' is for strategy 'halving' and 'tpe', and this is 'grid'"),
        ({"strategy": "random", "n": 2, "rungs": [1]}, "'rungs' is for strategy 'halving' and 'tpe'"),
        ({"points_per_round": 2}, "'points_per_round' is for strategy 'tpe'"),
        ({"strategy": "tpe", "n": 4, "eta": 3}, "'eta' does nothing without 'rungs'"),
        ({"rungs": [2, 1]}, "'rungs' must rise"),
        ({"rungs": []}, "at least 1 item"),
    ],
)
def test_a_key_that_does_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sweep(**fields)


def valley(point: tuple) -> float:
    """A loss that is least at a rate of 1e-3."""
    return abs(math.log10(float(point[0])) + 3)


def test_tpe_looks_where_it_was_good():
    found = played(sweep(strategy="tpe", n=32), RATE, Rungs(), valley)
    assert [len(one) for one in found] == [8, 4, 4, 4, 4, 4, 4]
    points = [point for one in found for point in one]
    assert len({*points}) == 32
    first, last = (sorted(map(valley, some)) for some in (points[:8], points[-12:]))
    assert last[6] < 0.7 * first[4], "by their medians"


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 14), st.integers(1, 10), st.integers(0, 99))
def test_a_longer_search_begins_with_the_shorter_one(few, more, seed):
    def points(number: int) -> list[tuple]:
        search = sweep(strategy="tpe", n=number, sampler_seed=seed)
        return [point for one in played(search, RATE, Rungs(), valley) for point in one]

    first = points(few)
    assert points(few + more)[:few] == first and len(first) == few


def test_tpe_gives_up_runs_at_rungs():
    """Of each round those go on that are among the best half of all so far."""
    search, steps = sweep(strategy="tpe", n=16, rungs=[1, 2]), Rungs(EPOCHS, ("1", "2"))
    found = played(search, RATE, steps, lambda point: valley(point) / float(point[-1]))
    first = [point for one in found for point in one if point[-1] == "1"]
    second = [point for one in found for point in one if point[-1] == "2"]
    assert len(first) == 16 and {point[0] for point in second} < {point[0] for point in first}
    assert [len(found[0]), len(found[1])] == [8, 4]
    assert min(map(valley, first)) == min(map(valley, second)), "the best one was trained on"


def test_tpe_ends_where_the_axes_end():
    search = sweep(strategy="tpe", n=9)
    found = [
        point for one in played(search, {"a": ["1", "2"], "b": ["3", "4"]}, Rungs(), lambda _: 0.0) for point in one
    ]
    assert sorted(found) == [("1", "3"), ("1", "4"), ("2", "3"), ("2", "4")]


def test_a_study_is_read_by_optuna(tmp_path):
    search, steps = sweep(strategy="tpe", n=3, rungs=[1, 2]), Rungs(EPOCHS, ("1", "2"))
    told = {("0.001", "1"): -0.7, ("0.001", "2"): -0.8, ("0.1", "1"): -0.5, ("0.01", "1"): math.inf}
    for _ in range(2):  # a second time it is replaced
        write_study(tmp_path / "study.db", search, RATE, steps, told, maximize=True)
    study = optuna.load_study(study_name="one", storage=f"sqlite:///{tmp_path}/study.db")
    assert study.best_params == {"rate": 0.001} and study.best_value == 0.8
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [trial.intermediate_values for trial in study.trials] == [{0: 0.7, 1: 0.8}, {0: 0.5}, {}]
    assert [path.name for path in Path(tmp_path).iterdir()] == ["study.db"]
