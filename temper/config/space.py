"""Points of a space that is not a grid, drawn by Optuna."""

import dataclasses
from typing import Any

from temper.errors import UserError

DIGITS = 3  # of a number that is drawn: more would say nothing, and make names and tables unreadable
TRIES = 100  # for each point, until one is drawn that was not there before


@dataclasses.dataclass(frozen=True)
class Interval:
    """Hydra's ``interval(low, high)``: all numbers between, evenly, or with `log` evenly by their magnitude.

    `whole`: only whole numbers, which is ``int(interval(low, high))``.
    """

    low: float
    high: float
    log: bool
    whole: bool


def interval(sweep, text: str) -> Interval:
    """From Hydra's own.

    Raises:
        UserError: it has no numbers in it, or tags that mean nothing here.
    """
    if unknown := sorted(sweep.tags - {"log"}):
        raise UserError(
            f"sweep '{text}': the tag '{unknown[0]}' means nothing here; tag(log, interval(1e-5,1e-2)) does"
        )
    if not sweep.start < sweep.end:
        raise UserError(
            f"sweep '{text}': the interval begins at {sweep.start:g} and ends at {sweep.end:g}: turn it round"
        )
    log = "log" in sweep.tags
    if log and sweep.start <= 0:
        raise UserError(
            f"sweep '{text}': an interval by magnitude (log) begins above 0, and this one at {sweep.start:g}"
        )
    whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
    return Interval(sweep.start, sweep.end, log, whole)


def drawn(axes: dict[str, list[str] | Interval], number: int, seed: int) -> list[tuple[str, ...]]:
    """Different points, each with a value of every axis as Hydra text.

    The first of 32 points are the 16 that are drawn for 16, so that a sweep can be extended.

    Raises:
        UserError: there are not so many.
    """
    import optuna

    study = optuna_study(sampler=optuna.samplers.RandomSampler(seed))
    ranges = distributions(axes)
    found: dict[tuple[str, ...], None] = {}
    for _ in range(number * TRIES):
        values = study.ask(ranges).params
        found.setdefault(tuple(as_text(values[key], axes[key]) for key in axes))
        if len(found) == number:
            return list(found)
    raise UserError(
        f"sweep: the axes have no {number} different points ({len(found)} were drawn): lower sweep.n, or run them all "
        "(sweep.strategy=grid)"
    )


def optuna_study(**options):
    """A study of Optuna, which says nothing. `options`: those of `optuna.create_study`."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(**options)


def distributions(axes: dict[str, list[str] | Interval]) -> dict:
    """Each axis as Optuna knows it."""
    return {key: _distribution(values) for key, values in axes.items()}


def _distribution(values: list[str] | Interval):
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Interval):
        return CategoricalDistribution(values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def as_text(value: Any, values: list[str] | Interval) -> str:
    """A drawn value as Hydra text: of a number so many digits as say something, and still within its interval."""
    if not isinstance(values, Interval) or not isinstance(value, float):
        return str(value)
    rounded = min(max(float(f"{value:.{DIGITS}g}"), values.low), values.high)
    return f"{rounded:.{DIGITS + 3}g}"
