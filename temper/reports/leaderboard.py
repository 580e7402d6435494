"""The leaderboard: its rows, as CSV, as JSON and in a terminal."""

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from temper import units
from temper.errors import UserError, visible
from temper.evaluation import metrics
from temper.evaluation.comparison import DivergedRun, RankedRun, Ranking, Recipe
from temper.evaluation.figures import Figures, Number, ProbeFigures, finite
from temper.evaluation.harness import Harness
from temper.files import read_json
from temper.reports import html, plots

FORMULAS = (*"=+-@", *"＝＋－＠", *"\t\r\n ")  # beginnings of what a spreadsheet does not take for a text
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
OF_PAIRS = (*metrics.OF_PREFERENCE, "rewards/accuracies", "rewards/margins")
MOST_LINES = 20  # of a leaderboard in a terminal
EXTRAS = ("tokens_per_second", "peak_memory_bytes", "trainable_parameters")
BOARD = "leaderboard.json"


# --- the leaderboard -----------------------------------------------------------------------------


class Board(BaseModel):
    """A leaderboard, as leaderboard.json has it: a row for each run, best first, those that diverged below.

    `split`: the one that ranks. `chosen`: the name of the run that the sweep chooses. `base`: metric -> figure of the
    untouched model; `base_test`: on the test split, where that was opened. `harness`: what lm-eval measured of the
    chosen run. `missing`: names of the runs without a report. `gate`: a reason for each bound of eval.gate that the
    chosen run does not keep.
    """

    model_config = ConfigDict(strict=True, extra="ignore")
    sweep: str
    metric: str
    split: str
    rows: list[dict[str, Any]]
    chosen: str
    missing: list[str]
    base: dict[str, Number] | None
    base_test: dict[str, Number] | None
    harness: Harness | None = None
    gate: list[str] = []

    @property
    def chosen_row(self) -> dict[str, Any]:
        return next(row for row in self.rows if row["run"] == self.chosen)


def shown_metrics(ranking: Ranking, task: str) -> list[str]:
    """The leaderboard's figures: the ranking one, the task's, own ones, the loss; of pairs what any run has."""
    pairs = [name for name in OF_PAIRS if any(name in run.figures.values for run in ranking.runs)]
    loss = metrics.BITS_PER_BYTE if metrics.sweeps_model(ranking.best.point) else "loss"
    own = [name for name in ranking.best.figures.values if name not in metrics.metrics_of(task)]
    return list(dict.fromkeys([ranking.metric, *(metric.name for metric in metrics.TASKS[task]), *own, loss, *pairs]))


def leaderboard_rows(ranking: Ranking, names: list[str]) -> list[dict]:
    """The lines of the leaderboard, the best recipe first, those that diverged last."""
    repeated = ranking.noise is not None
    rows = [
        _row(run, names, ranking) | _of_recipe(recipe, place, repeated)
        for place, recipe in enumerate(ranking.recipes, 1)
        for run in recipe.runs
    ]
    return [finite(row) for row in rows] + [_diverged_row(run, rows[0]) for run in ranking.diverged]


def _row(run: RankedRun, names: list[str], ranking: Ranking) -> dict:
    """The run, its swept values, its figures and the base model's on each split, what it cost."""
    judged: dict[str, Figures | None] = {ranking.split: run.figures}
    if any(one.test for one in ranking.runs):
        judged["test"] = run.test
    row = {"run": run.name, **run.point}
    for split, figures in judged.items():
        values, base = (figures.values, figures.base or {}) if figures else ({}, {})
        row |= {f"{split}_{name}": values.get(name) for name in names}
        row |= {f"base_{split}_{name}": base.get(name) for name in names}
    if any(one.figures.probe for one in ranking.runs):
        row |= _of_probe(run.figures.probe)
    row["train_seconds"] = run.train.get("train_seconds")
    row |= {name: run.train.get(name) for name in EXTRAS}
    for split, figures in judged.items():
        low, high = figures.interval if figures else (None, None)
        row |= {f"{split}_{ranking.metric}_low": low, f"{split}_{ranking.metric}_high": high}
    for split, figures in judged.items():
        row |= _of_sources(split, figures or run.figures, ranking.metric, known=figures is not None)
    return row


def _of_sources(split: str, figures: Figures, metric: str, known: bool) -> dict:
    """Rows, ranking metric and loss of each data set of a mixture; null where the run was not judged on this split."""
    row: dict[str, Any] = {}
    for source, part in figures.sources.items():
        values = {"rows": part.rows, **{name: part.values.get(name) for name in dict.fromkeys([metric, "loss"])}}
        row |= {f"{source}:{split}_{name}": value if known else None for name, value in values.items()}
    return row


def _of_probe(probe: ProbeFigures | None) -> dict:
    """How well the run still predicts general text; null where that was not measured."""
    change = probe.forgetting if probe else None
    low, high = change.interval if change else (None, None)
    row = {"probe_bits_per_byte": probe and probe.bits_per_byte, "base_probe_bits_per_byte": probe and probe.base}
    return {**row, "forgetting": change and change.value, "forgetting_low": low, "forgetting_high": high}


def _of_recipe(recipe: Recipe, place: int, repeated: bool) -> dict:
    """What the runs of a recipe have in common; `repeated`: whether any recipe of the sweep has several seeds."""
    row: dict[str, Any] = {"place": place}
    if repeated:
        row |= {"seeds": len(recipe.runs), f"mean_{recipe.metric}": recipe.mean, f"sd_{recipe.metric}": recipe.spread}
    low, high = recipe.behind.interval if recipe.behind else (None, None)
    row |= {"behind_best": recipe.behind and recipe.behind.value, "behind_best_low": low, "behind_best_high": high}
    return {**row, "p_holm": recipe.p_holm, "tied": recipe.is_tied}


def _diverged_row(run: DivergedRun, like: dict) -> dict:
    """A line of the leaderboard without figures; it stands below all others."""
    known = {"run": run.name, **run.point, "train_seconds": run.train.get("train_seconds")}
    return {name: known.get(name) for name in like} | {"diverged_at_step": run.at_step}


def tie_sentence(ranking: Ranking) -> str | None:
    """What cannot be told from the best, and what it would take; None where there is one run only."""
    recipes, tied, rows = ranking.recipes, ranking.tied, ranking.best.figures.rows
    what = "recipes" if ranking.noise else "runs"
    if len(recipes) == 1:
        return _noise_sentence(ranking)
    if not ranking.one_rows:
        return "The runs were judged on different rows, so they are not compared row by row: their order may be chance."
    if len(tied) == 1:
        text = f"The best is told apart from all other {what} on {rows:,} {ranking.split} rows"
    else:
        text = f"{len(tied)} of {len(recipes)} {what} cannot be told apart on {rows:,} {ranking.split} rows"
    text += " (paired test at 5%, Holm's correction)."
    if shown := ranking.shown():
        smallest, needed = shown
        text += f" A difference in {html.metric_name(ranking.metric)} below {smallest:.3f} would often go unseen"
        text += f"; to see one of 0.01 takes {needed:,} rows."
    return " ".join(filter(None, [text, _noise_sentence(ranking)]))


def _noise_sentence(ranking: Ranking) -> str | None:
    """What other seeds change, and how far two runs must be apart for it."""
    if ranking.noise is None:
        return None
    text = f"Trainings of one recipe with other seeds differ by {ranking.noise.spread:.3f} (standard deviation)"
    return f"{text}: two single runs mean something from {ranking.noise.told_apart:.3f} apart."


def csv_text(rows: list[dict]) -> str:
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)  # the last may be diverged_at_step
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value):
    """A value for the CSV file. A text that a spreadsheet would compute gets the apostrophe that makes it text."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        apostrophe = "'" if value.startswith(FORMULAS) and not NUMBER.fullmatch(value) else ""
        return apostrophe + value.replace("\r", "\\r")  # which Python's csv does not quote, and which ends a line
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def end_at_gate(board: Board) -> None:
    """End the process with 1 where the chosen run does not keep its bounds; the reasons are on the leaderboard."""
    if board.gate:
        bounds = "a bound" if len(board.gate) == 1 else f"{len(board.gate)} bounds"
        print(f"{board.chosen} does not keep {bounds} of eval.gate: exit code 1", file=sys.stderr)
        sys.exit(1)


def print_leaderboard(path: Path) -> None:
    """Print a sweep's leaderboard as a table, and where its page is.

    Args:
        path: the sweep's folder.
    """
    print(leaderboard_text(read_board(Path(path)), Path(path)))


def read_board(folder: Path) -> Board:
    """The leaderboard.json of a sweep's folder.

    Raises:
        UserError: it is not there, or damaged.
    """
    file, remedy = folder / BOARD, f"delete {folder} and run snakemake again, which compares anew"
    if not file.is_file():
        raise UserError(f"{file}: no such file; run the sweep first")
    board = read_json(file, Board, remedy)
    figures = [f"{board.split}_{board.metric}{end}" for end in ("", "_low", "_high")]
    needed = {"run", "report", "train_seconds", "place", "tied", *figures}
    if not board.rows or any(needed - row.keys() for row in board.rows):
        raise UserError(f"{file}: damaged (a row lacks one of {', '.join(sorted(needed))}); {remedy}")
    return board


def leaderboard_text(board: Board, folder: Path) -> str:
    """The leaderboard as text: a run a line, best first, and the base model below; of a large sweep the first lines."""
    metric, rows, prefix = board.metric, board.rows, f"{board.split}_"
    keys = swept_keys(rows)
    shown = [name for name in rows[0] if name.startswith(prefix) and not name.endswith(("_low", "_high"))]
    head = ["", *short_names(keys).values()]
    probed = ["forgetting"] if "forgetting" in rows[0] else []
    head += [name.removeprefix(prefix) for name in shown] + ["95% interval", *probed, "train", "key"]

    table = [head, *(_text_cells(row, keys, shown, f"{prefix}{metric}") for row in rows[:MOST_LINES])]
    if board.base:
        base = [units.figure(board.base.get(name.removeprefix(prefix))) for name in shown]
        table.append(["", *("" for _ in keys), *base, "", *("" for _ in probed), "", "(base model)"])

    lines = [f"sweep {board.sweep}, best {metric} on the {board.split} split first", "", *_aligned(table), ""]
    if len(rows) > MOST_LINES:
        lines.append(f"and {len(rows) - MOST_LINES:,} more runs: {folder / 'leaderboard.csv'}")
    lines += _tested_lines(board)
    if sum(bool(row["tied"]) for row in rows) > 1:
        lines.append("=: cannot be told from the best on these rows (paired test at 5%, Holm's correction)")
    if "forgetting" in rows[0]:
        lines.append("forgetting: bits per byte of general text, less those of the base model")
    lines += [f"gate: {reason}" for reason in board.gate]
    if "seeds" in rows[0]:
        lines.append(f"runs of one place differ in their seed; places are by the mean of {metric}")
    if board.chosen != rows[0]["run"]:
        lines.append(f"chosen (sweep.choose): {board.chosen}")
    if board.missing:
        more = len(board.missing) - MOST_LINES
        named = ", ".join(board.missing[:MOST_LINES]) + (f" and {more:,} more" if more > 0 else "")
        lines.append(f"partial: {len(board.missing)} run(s) without a report: {named}")
    lines += [f"page: {folder / 'report.html'}", f"table: {folder / 'leaderboard.csv'}"]
    return "\n".join(map(visible, [*lines, "each run: results/reports/*-<key>/report.html"]))


def _tested_lines(board: Board) -> list[str]:
    """What the test split says of the runs that were judged on it."""
    name = f"test_{board.metric}"
    if board.split == "test":
        flattered = ", so the figure of the best is flattered by the choice" if len(board.rows) > 1 else ""
        return [f"ranked by the test split itself{flattered}"]
    tested = [row for row in board.rows if row.get(name) is not None]
    if not tested:
        return ["the test split was not opened"]
    base = f", base model {units.figure(board.base_test[board.metric])}" if board.base_test else ""
    return [
        f"test split: {key_of(row)} {board.metric} {units.figure(row[name])} ({_ends(row, name)}){base}"
        for row in tested
    ]


def _ends(row: dict, name: str) -> str:
    return "{:.3f} to {:.3f}".format(row[f"{name}_low"], row[f"{name}_high"])


def _text_cells(row: dict, keys: list[str], shown: list[str], name: str) -> list[str]:
    """`name`: the column that ranks."""
    swept = [cell_text(row[key]) for key in keys]
    probed = [units.signed(row["forgetting"])] if "forgetting" in row else []
    if row[name] is None:
        step = row.get("diverged_at_step")
        what = "no finite figures" if step is None else f"diverged, step {step}"
        return ["", *swept, *("" for _ in shown), what, *("" for _ in probed), "", key_of(row)]
    figures = [units.figure(row[column]) for column in shown]
    place = f"{row['place']}=" if row["place"] > 1 and row["tied"] else str(row["place"])
    return [place, *swept, *figures, _ends(row, name), *probed, units.seconds(row["train_seconds"]), key_of(row)]


def key_of(row: dict) -> str:
    """The end of a run's name: enough to find its folders, and short enough for a terminal."""
    return row["run"].rpartition("-")[2]


def swept_keys(rows: list[dict]) -> list[str]:
    """The swept keys of a leaderboard: its columns between the run's name and the first figure."""
    names = list(rows[0])
    first = next(index for index, name in enumerate(names) if name.startswith(("validation_", "test_")))
    return names[1:first]


def short_names(keys: list[str]) -> dict[str, str]:
    """Key -> its last part, ``learning_rate``; the whole key where two would look the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: key if last.count(name) > 1 else name for key, name in zip(keys, last, strict=True)}


def cell_text(value) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return html.short(value if isinstance(value, str) else str(_cell(value)), plots.LONGEST_LABEL)


def _aligned(table: list[list[str]]) -> list[str]:
    """Columns of figures to the right, the last one, names, to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines
