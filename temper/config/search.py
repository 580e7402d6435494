"""The strategies of a sweep: which points to run next, by what those before have given.

Each is a generator of rounds. A round is a list of points, each a tuple of Hydra texts, one of every axis. The workflow
runs them, ranks them, and sends back point -> loss: the ranking metric, negative where higher is better, and infinite
for a run that diverged. Rounds depend on nothing else, so that a sweep that is stopped, started again or extended asks
for the same points in the same order, and finds their artefacts by their keys.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Generator
from pathlib import Path

from temper.config.schema import Sweep
from temper.config.space import TRIES, Interval, as_text, distributions, drawn, optuna_study
from temper.errors import UserError
from temper.files import whole_file

RANDOM, HALVING, TPE = "random", "halving", "tpe"
SEARCHES = (HALVING, TPE)  # strategies that go on by what came out
EPOCHS, STEPS = "train.num_train_epochs", "train.max_steps"  # what rungs are counted in
MOST_POINTS = 10_000  # of one sweep: planning them takes a minute
AHEAD = 1e9  # a loss that is lower by so much is the best
MOST_DERIVED = 3  # rungs below the whole training, where the config names none

Point = tuple[str, ...]
Axes = dict[str, list[str] | Interval]
Rounds = Generator[list[Point], dict[Point, float], None]


@dataclasses.dataclass(frozen=True)
class Rungs:
    """How far a run is trained before it is ranked with the others, as texts, shortest first; the last is the whole.

    `key`: the config key that they are values of. Without a search by rungs there are none, and no key.
    """

    key: str | None = None
    values: tuple[str, ...] = ()


def rungs_of(sweep: Sweep, axes: Axes, train_config: Callable[[], dict]) -> tuple[Rungs, Axes]:
    """(the rungs of a sweep, its other axes).

    They are `sweep.rungs`, else the values of an axis of num_train_epochs (or max_steps), else what the config has
    there, divided by `sweep.eta` as often as the points suffice for, and three times at most.

    Args:
        train_config: gives the config section `train`.

    Raises:
        UserError: rungs are given twice, or are no list of numbers.
    """
    if sweep.strategy != HALVING and sweep.rungs is None:
        return Rungs(), axes
    train = train_config()
    key = STEPS if train.get("max_steps", -1) > 0 or STEPS in axes else EPOCHS
    others = {name: values for name, values in axes.items() if name != key}
    if sweep.rungs is not None:
        if key in axes:
            raise UserError(
                f"sweep: sweep.rungs and an axis {key} are two ways to say one thing: leave one out (a fixed value, "
                f"{key}={sweep.rungs[-1]:g}, takes the axis out)"
            )
        return Rungs(key, _texts(sweep.rungs, key)), others
    if key in axes:
        values = axes[key]
        if isinstance(values, Interval):
            raise UserError(f"sweep: {key} is what the rungs are, which are a list: {key}=1,2,4")
        return Rungs(key, _texts([_number(key, value) for value in values], key)), others
    whole = train.get(key.partition(".")[2], 3)
    most = int(math.log(max(1, _how_many(sweep, others)), sweep.eta) + 1e-9)
    values = [whole / sweep.eta**times for times in range(min(most, MOST_DERIVED), -1, -1)]
    return Rungs(key, _texts([float(f"{value:.3g}") for value in values[:-1]] + [whole], key)), others


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"sweep: {key}={text}: not a number") from None


def _texts(values: list[float], key: str) -> tuple[str, ...]:
    """Rungs as Hydra texts. In steps they are whole."""
    if key == STEPS:
        values = [math.ceil(value) for value in values]
    return tuple(dict.fromkeys(str(int(value)) if value == int(value) else repr(value) for value in sorted(values)))


def _how_many(sweep: Sweep, axes: Axes) -> int:
    """The points that a search begins with."""
    return sweep.n or math.prod(len(values) for values in axes.values() if not isinstance(values, Interval))


def rounds(sweep: Sweep, axes: Axes, rungs: Rungs) -> Rounds:
    """The rounds of a sweep. With rungs, a point has the text of its rung behind the values of the axes.

    Raises:
        UserError: while it runs: the axes have no such points.
    """
    if sweep.strategy == TPE:
        return _tpe(sweep, axes, rungs.values)
    if sweep.strategy == HALVING:
        points = _drawn(sweep, axes) if sweep.n else _grid(axes)
        return _halving(points, rungs.values, sweep.eta)
    return _once(_drawn(sweep, axes) if sweep.strategy == RANDOM else _grid(axes))


def _once(points: list[Point]) -> Rounds:
    yield points


def _grid(axes: Axes) -> list[Point]:
    """All combinations, the last axis fastest."""
    lists = {key: _listed(key, values) for key, values in axes.items()}
    number = math.prod(map(len, lists.values()))
    refuse_more(number, list(axes))
    return list(itertools.product(*lists.values()))


def refuse_more(number: int, axes: list[str]) -> None:
    """Refuse more points than a plan takes."""
    if number > MOST_POINTS:
        raise UserError(f"sweep: {', '.join(axes)} make {number:,} runs; a plan takes {MOST_POINTS:,}: narrow the axes")


def _listed(key: str, values: list[str] | Interval) -> list[str]:
    if isinstance(values, Interval):
        raise UserError(
            f"sweep: {key} is an interval, which has no list of values: name them ({key}=1,2), or draw some "
            f"(sweep.strategy={RANDOM} sweep.n=16; {HALVING} and {TPE} draw, too)"
        )
    return values


def _drawn(sweep: Sweep, axes: Axes) -> list[Point]:
    _refuse_no_axes(sweep, axes)
    assert sweep.n, "the schema asks for it"
    return drawn(axes, min(sweep.n, MOST_POINTS + 1), sweep.sampler_seed)


def _refuse_no_axes(sweep: Sweep, axes: Axes) -> None:
    if not axes:
        raise UserError(f"sweep: strategy={sweep.strategy} draws values of axes, and there are none: give sweep.axes")


def guessed(points: list[Point], told: dict[Point, float]) -> dict[Point, float]:
    """Losses for a look ahead: what is known, and for other points as if they came out best, the first one before all.

    Args:
        told: the losses that are known.
    """
    return {point: told.get(point, place - AHEAD) for place, point in enumerate(points)}


def _halving(points: list[Point], rungs: tuple[str, ...], eta: int) -> Rounds:
    """Successive halving: train all to the first rung, the best 1/eta of them on to the next, and so on.

    The whole rung is waited for: promotion by who comes first (ASHA) would make the result depend on the machine.
    Source: Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization".
    """
    for rung in rungs:
        if not points:  # all diverged
            return
        losses = yield [(*point, rung) for point in points]
        points = _best(points, rung, losses)[: max(1, len(points) // eta)]


def _best(points: list[Point], rung: str, losses: dict[Point, float]) -> list[Point]:
    """Those that did not diverge, best first; of equal ones the one that was asked for first."""
    finite = [point for point in points if math.isfinite(losses[*point, rung])]
    return sorted(finite, key=lambda point: losses[*point, rung])


def _tpe(sweep: Sweep, axes: Axes, rungs: tuple[str, ...]) -> Rounds:
    """Optuna's tree-structured Parzen estimator, asked for some points at a time, which are run side by side.

    With rungs each round is trained to the first, and those are trained on that belong to the best 1/eta of all that
    came so far; Optuna is told of the others as pruned at their rung.
    Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization".
    """
    _refuse_no_axes(sweep, axes)
    assert sweep.n, "the schema asks for it"
    refuse_more(sweep.n, list(axes))
    told: dict[Point, list[float]] = {}  # point -> its losses, one of each rung that it reached
    ends: list[Point] = [(rung,) for rung in rungs] or [()]
    at_rung: list[list[float]] = [[] for _ in ends]
    while len(told) < sweep.n:
        startup = 2 * sweep.points_per_round if not told else sweep.points_per_round
        asked = _asked(sweep, axes, told, min(startup, sweep.n - len(told)), len(at_rung))
        if not asked:
            return
        told |= {point: [] for point in asked}
        for end, before in zip(ends, at_rung, strict=True):
            losses = yield [point + end for point in asked]
            found = {point: losses[point + end] for point in asked}
            before += found.values()
            for point, loss in found.items():
                told[point].append(loss)
            kept = sorted(before)[: max(1, len(before) // sweep.eta)]
            asked = [point for point in asked if math.isfinite(found[point]) and found[point] <= kept[-1]]
            if not asked:
                break


def _asked(sweep: Sweep, axes: Axes, told: dict[Point, list[float]], number: int, length: int) -> list[Point]:
    """The next points, new ones; fewer where the axes have no more.

    The study is made anew each time, from what is known: nothing of a sweep is anywhere but in its artefacts.
    """
    import warnings

    import optuna

    seed = int.from_bytes(hashlib.sha256(f"{sweep.sampler_seed} {len(told)}".encode()).digest()[:4], "little")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=2 * sweep.points_per_round, multivariate=True, constant_liar=True
        )
    study, ranges = optuna_study(sampler=sampler), distributions(axes)
    study.add_trials([_trial(point, losses, axes, length) for point, losses in told.items()])
    found: dict[Point, None] = {}
    for _ in range(number * TRIES):
        values = study.ask(ranges).params  # it counts as running, so that the next lies elsewhere
        point = tuple(as_text(values[key], axes[key]) for key in axes)
        if point not in told:
            found.setdefault(point)
        if len(found) == number:
            break
    return list(found)


def _trial(point: Point, losses: list[float], axes: Axes, length: int):
    """A point that was run, as Optuna keeps it: complete, pruned at a rung, or, where it diverged, as bad as any.

    Args:
        length: how many rungs there are.
    """
    from optuna.trial import TrialState, create_trial

    values = {key: _value(text, axes[key]) for key, text in zip(axes, point, strict=True)}
    steps = {rung: loss for rung, loss in enumerate(losses) if math.isfinite(loss)}
    whole = len(steps) == length
    return create_trial(
        state=TrialState.COMPLETE if whole else TrialState.PRUNED,
        value=losses[-1] if whole else None,
        params=values,
        distributions=distributions(axes),
        intermediate_values=steps,
    )


def _value(text: str, values: list[str] | Interval) -> str | int | float:
    if not isinstance(values, Interval):
        return text
    return int(text) if values.whole else float(text)


def write_study(path: Path, sweep: Sweep, axes: Axes, rungs: Rungs, told: dict[Point, float], maximize: bool) -> None:
    """Write what is known as a study of Optuna in a SQLite file, for its plots and its dashboard.

    Args:
        path: it is replaced, once the new one is whole.
        told: point (with its rung, if there are rungs) -> loss.
        maximize: whether the losses are figures of which more is better, negated.
    """
    from optuna.storages import RDBStorage

    losses: dict[Point, list[float]] = {}
    for point, loss in told.items():
        losses.setdefault(point[: len(axes)], []).append(-loss if maximize else loss)
    with whole_file(path) as temporary:
        storage = RDBStorage(f"sqlite:///{temporary}")
        study = optuna_study(storage=storage, study_name=sweep.name, direction="maximize" if maximize else "minimize")
        study.add_trials([_trial(point, one, axes, max(1, len(rungs.values))) for point, one in losses.items()])
        storage.remove_session()
