"""The gate: bounds that the chosen run of a sweep must keep."""

from temper.evaluation.comparison import RankedRun
from temper.evaluation.metrics import lower_is_better

ROUNDING = 1e-9  # a gain of 0.05 is a difference of two figures, and may come out as 0.0499999999999


def unmet(chosen: RankedRun, gate: dict | None) -> list[str]:
    """A reason for each bound that the chosen run does not keep.

    Args:
        gate: the config section `eval.gate`.
    """
    found = [_forgetting(chosen, gate["forgetting"]), _gain(chosen, gate["gain"])] if gate else []
    return [reason for reason in found if reason]


def _forgetting(chosen: RankedRun, most: float | None) -> str | None:
    probe = chosen.figures.probe
    change = probe.forgetting if probe else None
    if most is None:
        return None
    if change is None:
        return f"forgetting was not measured, and may be {most:g} at most: the reports need a probe (--probe)"
    if change.value <= most + ROUNDING:
        return None
    low, high = change.interval
    return f"forgetting {change.value:+.4g} bits per byte [{low:+.4g}, {high:+.4g}] is above {most:g}"


def _gain(chosen: RankedRun, least: float | None) -> str | None:
    judged = chosen.test or chosen.figures
    if least is None:
        return None
    if judged.delta is None:
        return f"the gain was not measured, and must be {least:g} at least: the reports need a base report"
    sign = -1 if lower_is_better(judged.metric) else 1
    if sign * judged.delta.value >= least - ROUNDING:
        return None
    low, high = sorted(sign * end for end in judged.delta.interval)
    gain = f"gain in {judged.metric} on the {judged.split} split {sign * judged.delta.value:+.4g}"
    return f"{gain} [{low:+.4g}, {high:+.4g}] is below {least:g}"
