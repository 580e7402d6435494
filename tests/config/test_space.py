"""Points that are drawn at random from a space (sweep.strategy=random), and Hydra's own name for axes."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.config import compose
from temper.config.space import Interval, drawn
from temper.errors import UserError
from temper.planning import planner

RATE, RANK = "train.learning_rate=tag(log,interval(1e-5,1e-2))", "adapter.r=int(interval(4,64))"


def points_of(*overrides: str) -> list[dict]:
    parsed = compose.parse_overrides(["experiment=smoke", "sweep=none", "sweep.strategy=random", *overrides])
    return [point for point, _ in compose.expand(parsed)[1]]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_a_longer_sweep_begins_with_the_shorter_one(few, more, seed):
    axes = {"a": Interval(1e-5, 1e-2, True, False), "b": ["x", "y"], "c": Interval(1, 99, False, True)}
    first = drawn(axes, few, seed)
    assert drawn(axes, few + more, seed)[:few] == first
    assert len({*first}) == few
    for rate, choice, whole in first:
        assert 1e-5 <= float(rate) <= 1e-2 and choice in "xy" and 1 <= int(whole) <= 99


def test_an_interval_by_magnitude_has_as_many_points_in_each_magnitude():
    def middle(log: bool) -> float:
        return statistics.median(float(value) for (value,) in drawn({"a": Interval(1e-5, 1e-1, log, False)}, 500, 0))

    assert math.log10(middle(log=True)) == pytest.approx(-3, abs=0.3)
    assert middle(log=False) == pytest.approx(0.05, abs=0.01)


def test_another_sampler_seed_draws_others(workspace):
    few = points_of("sweep.n=4", RATE)
    others = points_of("sweep.n=4", "sweep.sampler_seed=1", RATE)
    assert not {str(point) for point in few} & {str(point) for point in others}


def test_points_are_repeated_with_each_seed(workspace):
    found = points_of("sweep.n=3", "sweep.seeds=2", "seed=7", RATE, RANK)
    assert [point["seed"] for point in found] == [7, 8] * 3
    assert len({(point["train.learning_rate"], point["adapter.r"]) for point in found}) == 3


def test_lists_and_ranges_are_drawn_from_as_well(workspace):
    found = points_of("sweep.n=6", "adapter.r=4,8", "train.num_train_epochs=range(1,4)", "adapter=lora,rslora")
    assert {point["adapter.r"] for point in found} == {4, 8}
    assert {point["train.num_train_epochs"] for point in found} <= {1, 2, 3}
    assert {point["adapter"] for point in found} <= {"lora", "rslora"}


def test_an_extended_sweep_repeats_no_run(workspace):
    def runs(number: int) -> list[str]:
        overrides = ["sweep.strategy=random", f"sweep.n={number}", RATE, RANK]
        return [run.name for run in planner.build("smoke", "none", overrides).runs]

    assert runs(8)[:4] == runs(4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((RATE,), "needs 'n', the number of points"),
        (("sweep.n=2",), "draws values of axes, and there are none"),
        (("sweep.n=9", "adapter.r=4,8"), r"no 9 different points \(2 were drawn\): lower sweep.n"),
        (("sweep.n=2", "adapter.r=interval(8,4)"), "begins at 8 and ends at 4: turn it round"),
        (("sweep.n=2", "adapter.r=tag(log,interval(0,4))"), "begins above 0"),
        (("sweep.n=2", "adapter.r=tag(lag,interval(1,4))"), "the tag 'lag' means nothing here"),
        (("sweep.n=0", RATE), "'sweep.n'.*greater than or equal to 1"),
        (("sweep.strategy=grid", RATE), r"is an interval, which has no list of values: .*sweep.n=16"),
        (("sweep.strategy=grid", "sweep.n=3", "adapter.r=4,8"), "'n' is for strategy 'random'"),
    ],
)
def test_faults(workspace, overrides, message):
    with pytest.raises(UserError, match=message):
        points_of(*overrides)


def test_hydras_name_for_axes_is_understood(workspace, monkeypatch):
    folder = workspace / "own" / "experiment"
    folder.mkdir(parents=True)
    params = "hydra: {sweeper: {params: {train.learning_rate: '1e-4,3e-4', adapter.r: 'choice(4,8)'}}}"
    (folder / "alias.yaml").write_text(f"# @package _global_\ndefaults:\n  - smoke\n  - _self_\n{params}\n")
    monkeypatch.setenv(compose.OWN_CONF, "own")
    axes, points = compose.expand(compose.parse_overrides(["experiment=alias"]))
    assert axes == {"train.learning_rate": ["0.0001", "0.0003"], "adapter.r": ["4", "8"]}
    assert len(points) == 4 and "hydra" not in points[0][1]
