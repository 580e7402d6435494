"""Figures for the pages, as SVG text that takes its colours from the page.

Matplotlib draws with placeholder colours; these become CSS variables (``--ink``, ``--series-1``), so one figure fits a
light and a dark page. The same data gives the same bytes.
"""

import hashlib
import io
import math
import re

from steps.lib.errors import visible

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
MOST_CURVES = 50  # runs in one plot: more are a thicket, and a page of many megabytes
MOST_POINTS = 300  # of one curve: about as many as it is pixels wide
MOST_TICKS = 12  # labels of an axis
RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a text with $ in it is a text
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


def _draw(paint, width: float, height: float, columns: int = 1) -> str:
    """SVG text of what `paint(axes)` draws; `width` and `height` in inches. `paint` gets a list when `columns` > 1."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.set_facecolor("none")
        paint(list(axes) if columns > 1 else axes[0])
        return _svg(figure)


def _svg(figure) -> str:
    import warnings

    import matplotlib

    def text(salt: str) -> str:
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
            # The reader's browser has its own fonts; Matplotlib's only measure the text.
            warnings.filterwarnings("ignore", message=r"(Glyph .* missing|Matplotlib currently does not support)")
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
        return buffer.getvalue()

    # Several figures share a page, so ids inside them must differ: the salt is the figure's own content.
    svg = text(hashlib.sha256(text("figure").encode()).hexdigest())
    svg = svg[svg.index("<svg") :]
    names = {colour: f"var(--{name})" for name, colour in THEME.items()}
    colours = re.compile("|".join(names))
    # In tags only: a label may be called #010101.
    return re.sub(r"<[^>]*>", lambda tag: colours.sub(lambda colour: names[colour[0]], tag[0]), svg)


def label(text: str, most: int = 60) -> str:
    """A user's text as a plot can show it: on one line, and cut in the middle: what is swept often differs at its end.

    Matplotlib leaves a text that begins with ``_`` out of legends, so that one gets a blank, which SVG does not show.
    """
    text = visible(text) or '""'
    if len(text) > most:
        text = f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"
    return f" {text}" if text.startswith("_") else text


# --- loss ----------------------------------------------------------------------------------------


def curve(lines: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(epochs, values) of one figure in the lines of a metrics.jsonl; values that are no number are left out."""
    points = [(line.get("epoch", line["step"]), line[name]) for line in lines if _is_number(line.get(name))]
    return [x for x, _ in points], [y for _, y in points]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thinned(lines: list[dict], name: str) -> tuple[list[float], list[float]]:
    """As `curve`, with so many points as can be seen, the last one among them."""
    every = math.ceil(len(curve(lines, name)[0]) / MOST_POINTS) or 1
    xs, ys = (values[::-1][::every][::-1] for values in curve(lines, name))
    return xs, ys


def loss_curves(lines: list[dict]) -> str | None:
    """Training and validation loss of one run; None when there is nothing to draw."""
    train, validation = curve(lines, "loss"), curve(lines, "eval_loss")
    if not train[0] and not validation[0]:
        return None

    def paint(axis):
        axis.plot(*train, color=THEME["base"], label="training", linewidth=1.4)
        axis.plot(*validation, color=THEME["accent"], label="validation", marker="o", markersize=5)
        _loss_axis(axis, train[1] + validation[1], _unit(lines))
        axis.legend(loc="upper right")

    return _draw(paint, 7.6, 3.1)


def reward_curves(lines: list[dict]) -> str | None:
    """Rewards of one preference optimization, and in how many pairs they are right; None when there are none."""
    if not curve(lines, "rewards/margins")[0]:
        return None

    def paint(axes):
        for name, colour in (("chosen", THEME["accent"]), ("rejected", THEME["series-1"])):
            axes[0].plot(*curve(lines, f"rewards/{name}"), color=colour, label=name, linewidth=1.4)
            axes[0].plot(*curve(lines, f"eval_rewards/{name}"), color=colour, linestyle="", marker="o", markersize=5)
        axes[1].plot(*curve(lines, "rewards/accuracies"), color=THEME["base"], label="training", linewidth=1.4)
        validation = curve(lines, "eval_rewards/accuracies")
        axes[1].plot(*validation, color=THEME["accent"], label="validation", marker="o", markersize=5)
        axes[0].set(title="rewards (points: validation)", xlabel="epoch")
        axes[1].set(title="share of pairs that are right", xlabel="epoch", ylim=(0, 1.05))
        for axis in axes:
            axis.legend(loc="best")

    return _draw(paint, 9.6, 3.1, columns=2)


def sweep_curves(runs: list[tuple[str, list[dict]]]) -> str | None:
    """Loss of the best runs, training on the left, validation on the right. `runs`: (name, lines), best first."""
    runs = [(name, lines) for name, lines in runs if curve(lines, "loss")[0] or curve(lines, "eval_loss")[0]]
    runs = runs[:MOST_CURVES]
    if not runs:
        return None

    def paint(axes):
        for axis, name, title in zip(axes, ("loss", "eval_loss"), ("training loss", "validation loss"), strict=True):
            for rank, (run, lines) in reversed(list(enumerate(runs))):
                style = _run_style(rank, len(runs))
                axis.plot(
                    *_thinned(lines, name), label=label(run), marker="o" if name == "eval_loss" else None, **style
                )
            _loss_axis(axis, [value for _, lines in runs for value in curve(lines, name)[1]])
            axis.set(title=title, ylabel="")
        if len(runs) <= SERIES:
            handles, labels = axes[0].get_legend_handles_labels()
            axes[0].figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=2, fontsize=9)

    return _draw(paint, 9.6, 3.4 + 0.2 * math.ceil(min(len(runs), SERIES) / 2), columns=2)


def _run_style(rank: int, runs: int) -> dict:
    """The best run stands out; the others have colours of their own while those can be told apart."""
    if rank == 0:
        return {"color": THEME["accent"], "linewidth": 2.4, "markersize": 5, "zorder": 5}
    colour = THEME[f"series-{rank}"] if runs <= SERIES else THEME["base"]
    return {"color": colour, "linewidth": 1.1, "markersize": 3.5, "alpha": 0.9}


def _unit(lines: list[dict]) -> str:
    """What a training's loss is a mean over."""
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
    most = max(len(panel["entries"]) for panel in panels)

    def paint(axes):
        for axis, panel in zip(axes if isinstance(axes, list) else [axes], panels, strict=True):
            _dots(axis, panel)

    return _draw(paint, 4.6 * len(panels) if len(panels) > 1 else 7.6, 0.75 + 0.36 * most, columns=len(panels))


def _dots(axis, panel: dict) -> None:
    entries = panel["entries"][::-1]  # the first on top
    colours = {"tuned": THEME["accent"], "base": THEME["ink"], "other": THEME["base"]}
    for height, entry in enumerate(entries):
        colour = colours[entry["kind"]]
        interval = [end for end in entry["interval"] or [] if _is_number(end)]
        if len(interval) == 2:
            axis.plot(interval, [height, height], color=colour, linewidth=5, alpha=0.3)
        axis.plot(entry["value"], height, "o", color=colour, markersize=8, clip_on=False)
        right = max([0, *filter(_is_number, [entry["value"], *interval])])
        axis.annotate(f"{entry['value']:.3f}", (right, height), (9, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(entries)), [label(entry["name"]) for entry in entries], color=THEME["ink"])
    values = [entry["value"] for entry in entries if _is_number(entry["value"])] or [0]
    axis.set_xlim(0, 1 if max(values) <= 1 else max(values) * 1.15)
    axis.set_ylim(-0.6, len(entries) - 0.4)
    axis.grid(axis="x")
    axis.grid(axis="y", visible=False)
    axis.set_title(label(panel["title"]), color=THEME["muted"])
    axis.margins(x=0.1)


# --- sweeps --------------------------------------------------------------------------------------


def axis_effect(points: list[dict], key: str, metric_name: str) -> str:
    """The metric against one swept key: thin lines join runs that differ in this key only, the bold one is their mean.

    `points`: {"x", "y", "interval" or None, "others": what the run has for the other keys, best: bool}
    """
    values = _ordered({point["x"] for point in points})
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = (lambda value: value) if numeric else values.index

    def paint(axis):
        families: dict[str, list[dict]] = {}
        for point in sorted(points, key=lambda point: point["others"]):
            families.setdefault(point["others"], []).append(point)
        _families(axis, list(families.values()), place)
        means = [_mean([point["y"] for point in points if point["x"] == value]) for value in values]
        if len(values) < len(points):
            axis.plot([place(value) for value in values], means, color=THEME["ink"], linewidth=2.4, label="mean")
            axis.legend(loc="best")
        best = next((point for point in points if point["best"]), None)
        if best:
            axis.plot(place(best["x"]), best["y"], "o", color=THEME["accent"], markersize=9, zorder=6)
        if numeric and min(values) > 0 and max(values) / min(values) >= 10:
            axis.set_xscale("log")
        axis.minorticks_off()
        ticks = values[:: math.ceil(len(values) / MOST_TICKS)]
        most = max(8, 48 // len(ticks))  # characters, so that neighbours do not touch
        axis.set_xticks([place(value) for value in ticks], [label(_value_text(value), most) for value in ticks])
        axis.margins(x=0.12, y=0.15)
        axis.set(xlabel=label(key), title=label(metric_name))
        axis.title.set_color(THEME["muted"])

    return _draw(paint, 4.6, 3.2)


def _families(axis, families: list[list[dict]], place) -> None:
    """The thin lines and the bars, each kind in one go: a sweep may have a thousand."""
    xs, ys, bars = [], [], []
    for family in families:
        for point in sorted(family, key=lambda point: place(point["x"])):
            xs.append(place(point["x"]))
            ys.append(point["y"])
            if point["interval"] and all(map(_is_number, point["interval"])):
                bars.append((xs[-1], *point["interval"]))
        xs.append(math.nan)  # ends a line
        ys.append(math.nan)
    axis.plot(xs, ys, color=THEME["base"], linewidth=1, alpha=0.8, marker="o", markersize=4.5)
    if bars:
        axis.vlines(*zip(*bars, strict=True), color=THEME["base"], linewidth=3, alpha=0.22)


def _ordered(values: set) -> list:
    try:
        return sorted(values)
    except TypeError:  # numbers and words mixed
        return sorted(values, key=str)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _value_text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
