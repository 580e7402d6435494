"""Figures for the pages, as SVG text that takes its colours from the page.

Matplotlib draws with placeholder colours; these become CSS variables (``--ink``, ``--series-1``), so one figure fits a
light and a dark page. The same data gives the same bytes. Names and swept values are anybody's text: they are shown as
they are, whatever they would mean to Matplotlib (``$``, a leading ``_``) or to a page.
"""

import hashlib
import io
import math
import re
import warnings
from typing import Any

from temper.reports.html import distinct, short

# Placeholder colour -> CSS variable. Matplotlib writes colours in lower case.
THEME = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "accent": "#040404",
    "base": "#050505",
    **{f"series-{number}": f"#06060{number}" for number in range(1, 9)},
}
SERIES = 8
MOST_CURVES, MOST_TICKS = 50, 12  # in one figure; more cannot be told apart
TICK_LETTERS = 48  # in the labels of numbers below one; those left out can be guessed, unlike words
MANY = 50  # runs in a plot, from which on each is drawn fainter
LONGEST_LABEL, LONGEST_TICK = 60, 24  # characters; a longer text leaves no room for the figure
RC: Any = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": THEME["ink"],
    "axes.edgecolor": THEME["grid"],
    "axes.labelcolor": THEME["muted"],
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": THEME["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": THEME["grid"],
    "xtick.labelcolor": THEME["muted"],
    "ytick.color": "none",
    "ytick.labelcolor": THEME["muted"],
    "legend.frameon": False,
    "legend.labelcolor": THEME["ink"],
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def _draw(paint, width: float, height: float, columns: int = 1, rows: int = 1) -> str:
    """SVG text of what `paint(axes)` draws; `width` and `height` in inches. `paint` gets a list when `columns` > 1."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes:
            axis.set_facecolor("none")
        paint(axes if columns > 1 else axes[0])
        return _svg(figure)


def _svg(figure) -> str:
    import matplotlib

    def text(salt: str) -> str:
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the page's fonts draw the text, not Matplotlib's
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
        return buffer.getvalue()

    # Several figures share a page, so ids inside them must differ: the salt is the figure's own content.
    salt = hashlib.sha256(text("figure").encode()).hexdigest()
    figure.set_layout_engine("none")  # everything has its place by now
    svg = text(salt)
    return re.sub("<[^>]*>", lambda tag: _themed(tag[0]), svg[svg.index("<svg") :])  # a text may name a colour, too


def _themed(tag: str) -> str:
    for name, colour in THEME.items():
        tag = tag.replace(colour, f"var(--{name})")
    return tag


def _legend(owner, handles: list, texts: list[str], **where) -> None:
    """A legend. The texts are set last, for Matplotlib leaves out those that begin with an underscore."""
    legend = owner.legend(handles, [str(number) for number in range(len(texts))], **where)
    for shown, text in zip(legend.get_texts(), texts, strict=True):
        shown.set_text(text)


# --- loss ----------------------------------------------------------------------------------------


def curve(lines: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of one figure in the lines of a metrics.jsonl; values that are not numbers are left out."""
    points = [(line.get("epoch", line["step"]), line[name]) for line in lines if _is_number(line.get(name))]
    return [x for x, _ in points], [y for _, y in points]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


def loss_curves(lines: list[dict]) -> str | None:
    """Training and validation loss of one run; None when there is nothing to draw."""
    train, validation = curve(lines, "loss"), curve(lines, "eval_loss")
    if not train[0] and not validation[0]:
        return None

    def paint(axis):
        axis.plot(*train, color=THEME["base"], label="training", linewidth=1.4)
        if validation[0]:
            axis.plot(*validation, color=THEME["accent"], label="validation", marker="o", markersize=5)
        _loss_axis(axis, train[1] + validation[1], _unit(lines))
        axis.legend(loc="upper right")

    return _draw(paint, 7.6, 3.1)


def reward_curves(lines: list[dict]) -> str | None:
    """Rewards of one preference optimization, and in how many pairs they are right (of single answers their margin);
    None when there are none."""
    if not curve(lines, "rewards/margins")[0]:
        return None
    of_pairs = bool(curve(lines, "rewards/accuracies")[0])
    shown, title = ("accuracies", "share of pairs that are right") if of_pairs else ("margins", "margin of rewards")

    def paint(axes):
        for name, label, colour in (("chosen", "chosen", THEME["accent"]), ("rejected", "rejected", THEME["series-1"])):
            axes[0].plot(*curve(lines, f"rewards/{name}"), color=colour, label=label, linewidth=1.4)
            axes[0].plot(*curve(lines, f"eval_rewards/{name}"), color=colour, linestyle="", marker="o", markersize=5)
        axes[1].plot(*curve(lines, f"rewards/{shown}"), color=THEME["base"], label="training", linewidth=1.4)
        validation = curve(lines, f"eval_rewards/{shown}")
        if validation[0]:
            axes[1].plot(*validation, color=THEME["accent"], label="validation", marker="o", markersize=5)
        axes[0].set(title=f"rewards{' (points: validation)' if validation[0] else ''}", xlabel="epoch")
        axes[1].set(title=title, xlabel="epoch", **({"ylim": (0, 1.05)} if of_pairs else {}))
        for axis in axes:
            axis.legend(loc="best")

    return _draw(paint, 9.6, 3.1, columns=2)


def sweep_curves(runs: list[tuple[str, list[dict]]]) -> str | None:
    """Loss of the best runs, training on the left, validation on the right. `runs`: (name, lines), best first."""
    runs = [(name, lines) for name, lines in runs if curve(lines, "loss")[0] or curve(lines, "eval_loss")[0]]
    runs = runs[:MOST_CURVES]
    if not runs:
        return None
    labels = distinct([name for name, _ in runs], LONGEST_LABEL)

    titles = {"loss": "training loss", "eval_loss": "validation loss"}
    shown = [name for name in titles if any(curve(lines, name)[0] for _, lines in runs)]

    def paint(axes):
        axes = axes if isinstance(axes, list) else [axes]
        for axis, name in zip(axes, shown, strict=True):
            drawn = {}
            for rank, (_, lines) in reversed(list(enumerate(runs))):
                style = _run_style(rank, len(runs))
                [drawn[rank]] = axis.plot(*curve(lines, name), marker="o" if name == "eval_loss" else None, **style)
            _loss_axis(axis, [value for _, lines in runs for value in curve(lines, name)[1]])
            axis.set(title=titles[name], ylabel="")
        if len(runs) <= SERIES:
            handles = [drawn[rank] for rank in range(len(runs))]
            _legend(axes[0].figure, handles, labels, loc="outside lower left", ncols=2, fontsize=9)

    width = 9.6 if len(shown) > 1 else 7.6
    return _draw(paint, width, 3.4 + 0.2 * math.ceil(min(len(runs), SERIES) / 2), columns=len(shown))


def _run_style(rank: int, runs: int) -> dict:
    """The best run stands out; the others have colours of their own while those can be told apart."""
    if rank == 0:
        return {"color": THEME["accent"], "linewidth": 2.4, "markersize": 5, "zorder": 5}
    colour = THEME[f"series-{rank}"] if runs <= SERIES else THEME["base"]
    return {"color": colour, "linewidth": 1.1, "markersize": 3.5, "alpha": 0.9}


def _unit(lines: list[dict]) -> str:
    """What a training's loss is a mean over."""
    if curve(lines, "kl")[0]:
        return "per answer"
    return "per pair" if curve(lines, "rewards/margins")[0] else "nats per token"


def _loss_axis(axis, values: list[float], unit: str = "nats per token") -> None:
    axis.set(xlabel="epoch", ylabel=f"loss ({unit})")
    if values and min(values) > 0 and max(values) / min(values) > 10:
        _log_scale(axis.set_yscale, axis.yaxis)


def _log_scale(set_scale, axis) -> None:
    """A log scale whose ticks are read as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# --- figures of merit ----------------------------------------------------------------------------


def comparison(panels: list[dict]) -> str:
    """One panel per metric: its figures as dots with their intervals, one line each.

    `panels`: {"title", "entries": [{"name", "value", "interval" or None, "kind": tuned, base or other}]}
    """
    shown = [[entry for entry in panel["entries"] if _is_number(entry["value"])] for panel in panels]
    panels = [{**panel, "entries": entries} for panel, entries in zip(panels, shown, strict=True)]
    most = max(len(panel["entries"]) for panel in panels)

    columns = min(len(panels), 2)  # of more, the page would shrink the text
    rows = math.ceil(len(panels) / columns)

    def paint(axes):
        axes = axes if isinstance(axes, list) else [axes]
        for axis, panel in zip(axes, panels, strict=False):
            _dots(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()

    return _draw(paint, 4.6 * columns if columns > 1 else 7.6, (0.75 + 0.36 * most) * rows, columns, rows)


def _dots(axis, panel: dict) -> None:
    entries = panel["entries"][::-1]  # the first on top
    colours = {"tuned": THEME["accent"], "base": THEME["ink"], "other": THEME["base"]}
    for height, entry in enumerate(entries):
        colour = colours[entry["kind"]]
        if entry["interval"]:
            axis.plot(entry["interval"], [height, height], color=colour, linewidth=5, alpha=0.3)
        axis.plot(entry["value"], height, "o", color=colour, markersize=8, clip_on=False)
        right = max(entry["value"], *(entry["interval"] or [0]))
        axis.annotate(f"{entry['value']:.3f}", (right, height), (9, 0), textcoords="offset points", va="center")
    names = distinct([entry["name"] for entry in entries], LONGEST_LABEL)
    axis.set_yticks(range(len(entries)), names, color=THEME["ink"])
    values = [entry["value"] for entry in entries]
    axis.set_xlim(0, 1 if max(values, default=0) <= 1 else max(values) * 1.15)
    axis.set_ylim(-0.6, len(entries) - 0.4)
    axis.grid(axis="x")
    axis.grid(axis="y", visible=False)
    axis.set_title(panel["title"], color=THEME["muted"])
    axis.margins(x=0.1)


# --- sweeps --------------------------------------------------------------------------------------


def axis_effect(points: list[dict], key: str, metric_name: str, mean: bool) -> str:
    """The metric against one swept key: thin lines join runs that differ in this key only, the bold one is their mean.

    Args:
        points: {"x", "y", "interval" or None, "others": what the run has for the other keys, best: bool}
        mean: whether there is a bold line. A search gives up runs, so that its means are of different ones.
    """
    values = _ordered({point["x"] for point in points})
    numeric = all(_is_number(value) and not isinstance(value, bool) for value in values)
    place = (lambda value: value) if numeric else values.index

    def paint(axis):
        _families(axis, points, place)
        means = [_mean([point["y"] for point in points if point["x"] == value]) for value in values]
        if mean and len(values) < len(points):
            axis.plot([place(value) for value in values], means, color=THEME["ink"], linewidth=2.4, label="mean")
            axis.legend(loc="best")
        best = next((point for point in points if point["best"]), None)
        if best:
            axis.plot(place(best["x"]), best["y"], "o", color=THEME["accent"], markersize=9, zorder=6)
        if numeric and min(values) > 0 and max(values) / min(values) >= 10:
            axis.set_xscale("log")
        axis.minorticks_off()
        labels = distinct([_value_text(value) for value in values], LONGEST_TICK)
        fitting = TICK_LETTERS // max(map(len, labels)) if numeric else MOST_TICKS
        most = max(2, min(MOST_TICKS, fitting))
        shown = range(0, len(values), math.ceil(len(values) / most))
        axis.set_xticks([place(values[index]) for index in shown], [labels[index] for index in shown])
        axis.margins(x=0.12, y=0.15)
        axis.set(xlabel=short(key, LONGEST_LABEL), title=metric_name)
        axis.title.set_color(THEME["muted"])

    return _draw(paint, 4.6, 3.2)


def tradeoff(points: list[dict], names: tuple[str, str], bounds: tuple[float | None, float | None]) -> str:
    """One figure of each run against another, with their intervals.

    Args:
        points: {"x", "y", "x_interval", "y_interval", "chosen": bool}
        names: of the two figures.
        bounds: dashed lines at these values.
    """

    def paint(axis):
        axis.axhline(0, color=THEME["grid"], linewidth=1)
        axis.axvline(0, color=THEME["grid"], linewidth=1)
        for draw, bound in zip((axis.axvline, axis.axhline), bounds, strict=True):
            if bound is not None:
                draw(bound, color=THEME["muted"], linewidth=1.2, linestyle="--")
        style = {"linewidth": 3, "alpha": 0.22, "capstyle": "round"}
        for chosen, colour, size in ((False, THEME["base"], 5.5), (True, THEME["accent"], 9)):
            some = [point for point in points if point["chosen"] is chosen]
            xs, ys = [point["x"] for point in some], [point["y"] for point in some]
            if some:
                axis.hlines(ys, *zip(*(point["x_interval"] for point in some), strict=True), color=colour, **style)
                axis.vlines(xs, *zip(*(point["y_interval"] for point in some), strict=True), color=colour, **style)
            axis.plot(xs, ys, "o", color=colour, markersize=size, zorder=5 + chosen)
        axis.grid(axis="x")
        axis.margins(x=0.12, y=0.15)
        axis.set(xlabel=names[0], title=names[1])
        axis.title.set_color(THEME["muted"])

    return _draw(paint, 7.6, 3.6)


def _families(axis, points: list[dict], place) -> None:
    """All points with their intervals as two artists: one for each would take a minute for a thousand runs."""
    families: dict[str, list[tuple]] = {}
    for point in sorted(points, key=lambda point: place(point["x"])):
        families.setdefault(point["others"], []).append((place(point["x"]), point["y"]))
    gap = (math.nan, math.nan)  # where the line is lifted
    xs, ys = zip(*(point for others in sorted(families) for point in (*families[others], gap)), strict=True)
    faint = min(1.0, math.sqrt(MANY / len(points)))  # else a thousand runs are one grey field
    axis.plot(xs, ys, color=THEME["base"], linewidth=1, alpha=0.8 * faint, marker="o", markersize=4.5)
    sure = [(place(point["x"]), *point["interval"]) for point in points if point["interval"]]
    if sure:
        axis.vlines(*zip(*sure, strict=True), color=THEME["base"], linewidth=3, alpha=0.22 * faint, capstyle="round")


def _ordered(values: set) -> list:
    try:
        return sorted(values)
    except TypeError:  # numbers and words mixed
        return sorted(values, key=str)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _value_text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
