"""The leaderboard: its rows, as CSV, as JSON and in a terminal."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from temper import units
from temper.errors import UserError, visible
from temper.evaluation import metrics
from temper.evaluation.comparison import DivergedRun, RankedRun, Ranking, sweeps_model
from temper.evaluation.figures import Number, finite
from temper.files import read_json
from temper.reports import html, plots

FORMULAS = (*"=+-@", *"＝＋－＠", *"\t\r\n ")  # beginnings of what a spreadsheet does not take for a text
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
OF_PAIRS = (metrics.PREFERENCE, "rewards/accuracies", "rewards/margins")
EXTRAS = ("tokens_per_second", "peak_memory_bytes", "trainable_parameters")


# --- the leaderboard -----------------------------------------------------------------------------


class Board(BaseModel):
    """A leaderboard, as leaderboard.json has it: a row for each run, best first, those that diverged below.

    `chosen`: the name of the run that the sweep chooses. `base`: metric -> figure of the untouched model. `missing`:
    names of the runs without a report.
    """

    model_config = ConfigDict(strict=True, extra="ignore")
    sweep: str
    metric: str
    rows: list[dict[str, Any]]
    chosen: str
    missing: list[str]
    base: dict[str, Number] | None


def shown_metrics(ranking: Ranking, task: str) -> list[str]:
    """The leaderboard's figures: the ranking one, the task's, the loss; of preference pairs what any run has."""
    pairs = [name for name in OF_PAIRS if any(name in run.figures.test for run in ranking.runs)]
    loss = metrics.BITS_PER_BYTE if sweeps_model(ranking.best.point) else "loss"
    return list(dict.fromkeys([ranking.metric, *(metric.name for metric in metrics.TASKS[task]), loss, *pairs]))


def leaderboard_row(run: RankedRun, names: list[str], metric: str) -> dict:
    """One line of the leaderboard: the run, its swept values, its figures, the base model's, what it cost."""
    figures = run.figures
    row = {"run": run.name, **run.point}
    row |= {f"test_{name}": figures.test.get(name) for name in names}
    row |= {f"base_test_{name}": (figures.base or {}).get(name) for name in names}
    row["train_seconds"] = run.train.get("train_seconds")
    row |= {name: run.train.get(name) for name in EXTRAS}
    row |= {f"test_{metric}_low": figures.interval[0], f"test_{metric}_high": figures.interval[1]}
    row |= {"behind_best": None, "behind_best_low": None, "behind_best_high": None, "p_holm": run.p_holm}
    if run.behind:
        row |= {"behind_best": run.behind.value}
        row["behind_best_low"], row["behind_best_high"] = run.behind.interval
    return finite({**row, "tied": run.is_tied})


def tie_sentence(ranking: Ranking) -> str | None:
    """Which runs cannot be told from the best one, and what it would take; None for a single run."""
    runs, tied, rows = ranking.runs, ranking.tied, ranking.best.figures.rows
    if len(runs) == 1:
        return None
    if not ranking.one_rows:
        return "The runs were judged on different rows, so they are not compared row by row: their order may be chance."
    if len(tied) == 1:
        first = f"The best run is told apart from all others on {rows:,} rows"
    else:
        first = f"{len(tied)} of {len(runs)} runs cannot be told apart on {rows:,} rows"
    text = f"{first} (paired test at 5%, Holm's correction)."
    if shown := ranking.shown():
        smallest, needed = shown
        name = html.metric_name(ranking.metric)
        text += f" A difference in {name} below {smallest:.3f} would often go unseen"
        text += f"; to see one of 0.01 takes {needed:,} rows."
    return text


def diverged_row(run: DivergedRun, like: dict) -> dict:
    """A line of the leaderboard without figures; it stands below all others."""
    known = {"run": run.name, **run.point, "train_seconds": run.train.get("train_seconds")}
    return {name: known.get(name) for name in like} | {"diverged_at_step": run.at_step}


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


def json_text(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


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
    file, remedy = folder / "leaderboard.json", f"delete {folder} and run snakemake again, which compares anew"
    if not file.is_file():
        raise UserError(f"{file}: no such file; run the sweep first")
    board = read_json(file, Board, remedy)
    figures = [f"test_{board.metric}", f"test_{board.metric}_low", f"test_{board.metric}_high"]
    needed = {"run", "report", "train_seconds", "tied", *figures}
    if not board.rows or any(needed - row.keys() for row in board.rows):
        raise UserError(f"{file}: damaged (a row lacks one of {', '.join(sorted(needed))}); {remedy}")
    return board


def leaderboard_text(board: Board, folder: Path) -> str:
    """The leaderboard as text: a run a line, best first, and the base model below."""
    metric, rows = board.metric, board.rows
    keys = swept_keys(rows)
    shown = [name for name in rows[0] if name.startswith("test_") and not name.endswith(("_low", "_high"))]
    head = ["", *short_names(keys).values()]
    head += [name.removeprefix("test_") for name in shown] + ["95% interval", "train", "key"]

    table = [head, *(_text_cells(rank, row, keys, shown, metric) for rank, row in enumerate(rows, 1))]
    if board.base:
        base = [units.figure(board.base.get(name.removeprefix("test_"))) for name in shown]
        table.append(["", *("" for _ in keys), *base, "", "", "(base model)"])

    lines = [f"sweep {board.sweep}, best {metric} first", "", *_aligned(table), ""]
    if sum(bool(row["tied"]) for row in rows) > 1:
        lines.append("=: cannot be told from the best run on these rows (paired test at 5%, Holm's correction)")
    if board.chosen != rows[0]["run"]:
        lines.append(f"chosen (sweep.choose): {board.chosen}")
    if board.missing:
        lines.append(f"partial: {len(board.missing)} run(s) without a report: {', '.join(board.missing)}")
    lines += [f"page: {folder / 'report.html'}", f"table: {folder / 'leaderboard.csv'}"]
    return "\n".join(map(visible, [*lines, "each run: results/reports/*-<key>/report.html"]))


def _text_cells(rank: int, row: dict, keys: list[str], shown: list[str], metric: str) -> list[str]:
    swept = [cell_text(row[key]) for key in keys]
    if row[f"test_{metric}"] is None:
        step = row.get("diverged_at_step")
        what = "no finite figures" if step is None else f"diverged, step {step}"
        return ["", *swept, *("" for _ in shown), what, "", key_of(row)]
    ends = "{:.3f} to {:.3f}".format(row[f"test_{metric}_low"], row[f"test_{metric}_high"])
    figures = [units.figure(row[name]) for name in shown]
    place = f"{rank}=" if rank > 1 and row["tied"] else str(rank)
    return [place, *swept, *figures, ends, units.seconds(row["train_seconds"]), key_of(row)]


def key_of(row: dict) -> str:
    """The end of a run's name: enough to find its folders, and short enough for a terminal."""
    return row["run"].rpartition("-")[2]


def swept_keys(rows: list[dict]) -> list[str]:
    """The swept keys of a leaderboard: its columns between the run's name and the first figure."""
    names = list(rows[0])
    first = next(index for index, name in enumerate(names) if name.startswith("test_"))
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
