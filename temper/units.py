"""Numbers, seconds and bytes as texts for people. Rates and what is left of a count: `temper.progress`."""

import math


def figure(value) -> str:
    """A metric with three decimals; large ones shorter; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def signed(value) -> str:
    """A difference with its sign."""
    if value is None:
        return "–"
    return ("−" if value < 0 else "+") + figure(abs(value))


def seconds(value) -> str:
    """``47 s``, ``3 min 20 s``, ``2 h 05 min``.

    By hand: tqdm's ``03:20`` may be hours and has no tenths, humanfriendly's "2 hours and 5 minutes" is too long.
    """
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def size(value) -> str:
    """Bytes: ``512 MiB``, ``3.27 GiB``."""
    if value is None:
        return "–"
    from humanfriendly import format_size

    return format_size(value, binary=True)


def count(value) -> str:
    """A number with thousands marked."""
    return "–" if value is None else f"{value:,.0f}"
