"""Compare the runs of a sweep: a leaderboard, and a page that shows what each swept value does.

By hand, with the config that the sweep's folder keeps (``python -m steps.plan --json`` shows it too)::

    python -m steps.compare_runs --config results/sweeps/demo/config.yaml --output results/sweeps/demo
    python -m steps.compare_runs --show results/sweeps/demo

Reads   each run's report folder: metrics.json, curves.jsonl. Runs without a report (failed, not yet made) are left
        out, and named.
Writes  leaderboard.csv and leaderboard.json (one row per run, best first), report.html, config.yaml; provenance.json
        comes last. Each file is replaced by itself, so the folder is made again in place, whenever a report is new.
"""

import csv
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import quote

from steps.lib import figures, metrics, pages, plan, tracking
from steps.lib.config import groups, hydra_text
from steps.lib.errors import UserError, one_line_errors, visible
from steps.lib.files import read_json, read_json_lines, read_yaml
from steps.lib.folders import locked, made_again, temporary_folder
from steps.lib.keys import stage_key
from steps.lib.step import config_and_settings, provenance, run_command

STAGE = "compare_runs"
OUTPUT_HELP = "folder of the sweep; its files are replaced"
FORMULAS = (*"=+-@", *"＝＋－＠", *"\t\r\n ")  # beginnings of what a spreadsheet does not take for a text
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
EXTRAS = ("tokens_per_second", "peak_memory_bytes", "trainable_parameters")

log = logging.getLogger("temper")


def compare(config: dict, output: Path) -> dict:
    """Rank the runs and write the sweep's folder.

    Args:
        config: {"eval", "sweep": {"name", "axes"}, "runs": [{"name", "point", "report"}]}, and optionally
            "experiment" and "overrides" (those that are no axis), for the command that makes the best run again.

    Returns:
        {"metric", "rows": the leaderboard's rows, best first, "missing": names of runs without a report}

    Raises:
        UserError: no run has a report.
    """
    from yaml import safe_dump

    metric = metrics.check_metric(config["eval"])
    reports, missing = _reports(config["runs"], metric)
    runs, diverged = _without_diverged(reports, metric)
    runs.sort(key=lambda run: _rank(run, metric))
    names = _shown_metrics(runs, config["eval"]["task"], metric)
    rows = [_row(run, names, metric) for run in runs]
    rows += [_diverged_row(run, rows[0]) for run in diverged]
    board = {"sweep": config["sweep"]["name"], "metric": metric, "rows": rows, "missing": missing}
    output.mkdir(parents=True, exist_ok=True)
    _keep_other_experiment(output, config["sweep"]["name"], config.get("experiment"))
    pages.write_whole(output / "config.yaml", safe_dump(config, sort_keys=False, allow_unicode=True))
    pages.write_whole(output / "leaderboard.csv", _csv(rows))
    _write_page(output, config, metric, names, runs, rows, missing, diverged)
    linked = [{**row, "report": run["report"]} for row, run in zip(rows, [*runs, *diverged], strict=True)]
    base = runs[0]["facts"]["base"]
    pages.write_whole(output / "leaderboard.json", _json_text({**board, "base": base, "rows": linked}))
    return board


def _keep_other_experiment(output: Path, sweep: str, experiment: str | None) -> None:
    """Two experiments over the same sweep share its folder: the page of the other one is kept beside it.

    It is called ``<sweep>@<experiment>``: no sweep's own name has an @, so nothing else is ever in its place.

    Raises:
        UserError: the folder is that of another sweep.
    """
    config, board = output / "config.yaml", output / "leaderboard.csv"
    if not config.is_file():
        return
    before = read_yaml(config, remedy=f"delete {output} and run snakemake again, which compares anew")
    if before.get("sweep", {}).get("name", sweep) != sweep:
        raise UserError(f"{output}: has the sweep '{before['sweep']['name']}', not '{sweep}': name another folder")
    other = before.get("experiment")
    if board.is_file() and other and other != experiment:
        kept = output.with_name(f"{output.name}@{other}")
        with temporary_folder(kept) as copy:
            shutil.copytree(output, copy, dirs_exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)  # an older page of the same two
        log.info("%s was of experiment=%s: kept as %s", output, other, kept)


# --- reading the reports -------------------------------------------------------------------------


def _reports(planned: list[dict], metric: str) -> tuple[list[dict], list[str]]:
    """(runs with the figures of their report, names of runs that have none)."""
    runs, missing = [], []
    for run in planned:
        folder = Path(run["report"])
        if (folder / "metrics.json").is_file():
            runs.append({**run, "facts": read_report(folder, metric)})
        else:
            missing.append(run["name"])
            log.info("left out: %s has no report (%s)", run["name"], folder)
    if not runs:
        raise UserError(
            f"none of the sweep's {len(planned)} run(s) has a report: see their logs, and run snakemake again"
        )
    if missing:
        log.info("the leaderboard is partial: %d of %d runs", len(runs), len(planned))
    return runs, missing


def read_report(folder: Path, metric: str) -> dict:
    """A run's metrics.json, with what the comparison reads of it; a figure that is not finite is None.

    Raises:
        UserError: it is damaged, or lacks a figure.
    """
    facts = read_json(folder / "metrics.json", {"train": dict | None})
    if facts.get("diverged_at_step") is None:
        figures = {"test": dict[str, float | None], "base": dict[str, float | None] | None}
        read_json(folder / "metrics.json", {**figures, "interval": list[float]})
        lacking = [name for name in (metric, "loss") if not isinstance(facts["test"].get(name), int | float)]
        if lacking or len(facts["interval"]) != 2:
            what = f"figure '{lacking[0]}'" if lacking else "interval of two ends"
            raise UserError(f"{folder / 'metrics.json'}: damaged (it has no {what}); {made_again(folder)}")
    return _finite(facts)


def _finite(value):
    """The same with None for nan and inf: JSON and MLflow have no such numbers, and none is better than another."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_diverged(runs: list[dict], metric: str) -> tuple[list[dict], list[dict]]:
    """(runs with figures, runs whose training, or whose figures, diverged)."""
    figured, diverged = [], []
    for run in runs:
        (figured if _has_figures(run["facts"], metric) else diverged).append(run)
    if not figured:
        steps = ", ".join(str(run["facts"].get("diverged_at_step") or "its end") for run in diverged)
        raise UserError(f"every run with a report diverged (at steps {steps}): lower train.learning_rate")
    return figured, diverged


def _has_figures(facts: dict, metric: str) -> bool:
    if facts.get("diverged_at_step") is not None:
        return False
    return None not in (facts["test"][metric], facts["test"]["loss"], *facts["interval"])


def _diverged_row(run: dict, like: dict) -> dict:
    """A line of the leaderboard without figures; it stands below all others."""
    known = {"run": run["name"], **run["point"], "train_seconds": (run["facts"]["train"] or {}).get("train_seconds")}
    return {name: known.get(name) for name in like} | {"diverged_at_step": run["facts"].get("diverged_at_step")}


def _rank(run: dict, metric: str) -> tuple:
    value = run["facts"]["test"][metric]
    return (value if metric in metrics.LOWER_IS_BETTER else -value, run["facts"]["test"]["loss"], run["name"])


# --- the leaderboard -----------------------------------------------------------------------------


def _shown_metrics(runs: list[dict], task: str, metric: str) -> list[str]:
    """The leaderboard's figures: the ranking one, the task's, the loss; of preference pairs what any run has."""
    pairs = [
        name for name in (metrics.PREFERENCE, *metrics.REWARDS[:2]) if any(name in run["facts"]["test"] for run in runs)
    ]
    return list(dict.fromkeys([metric, *metrics.METRICS[task], "loss", *pairs]))


def _row(run: dict, names: list[str], metric: str) -> dict:
    """One line of the leaderboard: the run, its swept values, its figures, the base model's, what it cost."""
    facts, train = run["facts"], run["facts"]["train"] or {}
    row = {"run": run["name"], **run["point"]}
    row |= {f"test_{name}": facts["test"].get(name) for name in names}
    row |= {f"base_test_{name}": (facts["base"] or {}).get(name) for name in names}
    row["train_seconds"] = train.get("train_seconds")
    row |= {name: train.get(name) for name in EXTRAS}
    row |= {f"test_{metric}_low": facts["interval"][0], f"test_{metric}_high": facts["interval"][1]}
    return row


def _csv(rows: list[dict]) -> str:
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


def _json_text(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def print_leaderboard(path: Path) -> None:
    """Print a sweep's leaderboard as a table, and where its page is.

    Args:
        path: the sweep's folder.
    """
    print(leaderboard_text(read_board(Path(path)), Path(path)))


def read_board(folder: Path) -> dict:
    """The leaderboard.json of a sweep's folder.

    Raises:
        UserError: it is not there, or damaged.
    """
    file, remedy = folder / "leaderboard.json", f"delete {folder} and run snakemake again, which compares anew"
    if not file.is_file():
        raise UserError(f"{file}: no such file; run the sweep first")
    shape = {"metric": str, "sweep": str, "base": dict | None, "missing": list[str], "rows": list[dict]}
    board = read_json(file, shape, remedy)
    figures = [f"test_{board['metric']}", f"test_{board['metric']}_low", f"test_{board['metric']}_high"]
    needed = {"run", "report", "train_seconds", *figures}
    if not board["rows"] or any(needed - row.keys() for row in board["rows"]):
        raise UserError(f"{file}: damaged (a row lacks one of {', '.join(sorted(needed))}); {remedy}")
    return board


def leaderboard_text(board: dict, folder: Path) -> str:
    """The leaderboard as text: a run a line, best first, and the base model below."""
    metric, rows = board["metric"], board["rows"]
    keys = swept_keys(rows)
    shown = [name for name in rows[0] if name.startswith("test_") and not name.endswith(("_low", "_high"))]
    head = ["", *short_names(keys).values()]
    head += [name.removeprefix("test_") for name in shown] + ["95% interval", "train", "key"]
    table = [head]
    for rank, row in enumerate(rows, 1):
        if row[f"test_{metric}"] is None:
            step = row.get("diverged_at_step")
            what = "no finite figures" if step is None else f"diverged, step {step}"
            table.append(["", *(_cell_text(row[key]) for key in keys), *("" for _ in shown), what, "", key_of(row)])
            continue
        ends = (row[f"test_{metric}_low"], row[f"test_{metric}_high"])
        line = [str(rank), *(_cell_text(row[key]) for key in keys), *(pages.figure(row[name]) for name in shown)]
        table.append([*line, "{:.3f} to {:.3f}".format(*ends), pages.seconds(row["train_seconds"]), key_of(row)])
    if board["base"]:
        base = [pages.figure(board["base"].get(name.removeprefix("test_"))) for name in shown]
        table.append(["", *("" for _ in keys), *base, "", "", "(base model)"])
    lines = [f"sweep {board['sweep']}, best {metric} first", "", *_aligned(table), ""]
    if board["missing"]:
        lines.append(f"partial: {len(board['missing'])} run(s) without a report: {', '.join(board['missing'])}")
    lines += [f"page: {folder / 'report.html'}", f"table: {folder / 'leaderboard.csv'}"]
    return "\n".join(map(visible, [*lines, "each run: results/reports/*-<key>/report.html"]))


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


def _cell_text(value) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return pages.short(value if isinstance(value, str) else str(_cell(value)), figures.LONGEST_LABEL)


def _aligned(table: list[list[str]]) -> list[str]:
    """Columns of figures to the right, the last one, names, to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


# --- the page ------------------------------------------------------------------------------------


def _write_page(
    output: Path,
    config: dict,
    metric: str,
    names: list[str],
    runs: list,
    rows: list,
    missing: list,
    diverged: list,
) -> None:
    keys = swept_keys(rows)
    best = runs[0]
    pages.render(
        "sweep.html",
        output / "report.html",
        sweep=config["sweep"]["name"],
        metric=metric,
        keys=short_names(keys),
        runs=[_shown(run, output) for run in runs],
        best=best,
        names=names,
        missing=missing,
        diverged=[_shown(run, output) for run in diverged],
        planned=len(config["runs"]),
        rivals=_rivals(runs),
        published=config["eval"]["published"],
        effects=_effects(runs, keys, metric),
        curves=figures.sweep_curves([(_label(run), _curves(run)) for run in runs[: figures.MOST_CURVES]]),
        most_curves=figures.MOST_CURVES,
        command=_command_for(best, config),
    )


def _shown(run: dict, output: Path) -> dict:
    """What the table shows of a run; `page` is relative, so that results/ can be moved or sent as a whole."""
    page = os.path.relpath(Path(run["report"]) / "report.html", output)
    return {**run, "page": quote(Path(page).as_posix()), "train": run["facts"]["train"] or {}, "label": _label(run)}


def _curves(run: dict) -> list[dict]:
    path = Path(run["report"]) / "curves.jsonl"
    return read_json_lines(path) if path.is_file() else []


def _label(run: dict) -> str:
    """A run's swept values, or its name when nothing is swept."""
    names = short_names(list(run["point"]))
    return ", ".join(f"{names[key]}={_cell_text(value)}" for key, value in run["point"].items()) or run["name"]


def _rivals(runs: list[dict]) -> int:
    """How many other runs' intervals overlap with the best one's: their order may be chance."""
    low, high = runs[0]["facts"]["interval"]
    others = (run["facts"]["interval"] for run in runs[1:])
    return sum(other_low <= high and low <= other_high for other_low, other_high in others)


def _effects(runs: list[dict], keys: list[str], metric: str) -> list[str]:
    """One plot per swept key that takes more than one value."""
    plots = []
    for key in keys:
        points = [
            {
                "x": _plain(run["point"][key]),
                "y": run["facts"]["test"][metric],
                "interval": run["facts"]["interval"],
                "others": json.dumps({other: run["point"][other] for other in keys if other != key}, default=str),
                "best": run is runs[0],
            }
            for run in runs
        ]
        if len({point["x"] for point in points}) > 1:
            plots.append(figures.axis_effect(points, key, pages.metric_name(metric)))
    return plots


def _plain(value):
    """A swept value that a plot can place: lists, nulls and booleans go by their text."""
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else json.dumps(value)


def _command_for(run: dict, config: dict) -> str:
    """The command that makes this run alone, for a shell: fixed values collapse the sweep's axes."""
    # sweep=none: alone, the run gets a page of its own, and this one stays.
    given = {"experiment": config.get("experiment"), "sweep": "none", "overrides": _overrides(run["point"], config)}
    given = [f"{name}={_shell_text(text)}" for name, text in given.items() if text]
    return " ".join(["snakemake --cores all --config", *given])


def _overrides(point: dict, config: dict) -> str:
    """What was given beside the sweep, then the swept values; of a config group the point has the choice's name."""
    given = [text for text in config.get("overrides", []) if not re.match(r"[+~]*sweep\b", text)]
    swept = [f"{key}={value if key in groups() else hydra_text(value, literal=True)}" for key, value in point.items()]
    return " ".join([*given, *swept])


def _shell_text(text: str) -> str:
    """A text quoted for a shell; control characters, which a terminal would act upon, as escapes."""
    if visible(text) == text:
        plain = shlex.quote(text) != text and not set(text) & set('$`"\\!')
        return f'"{text}"' if plain else shlex.quote(text)
    written = (_shell_escape(char) if visible(char) != char or char in "\\'" else char for char in text)
    return "$'" + "".join(written) + "'"


def _shell_escape(char: str) -> str:
    if visible(char) != char:
        return f"\\x{ord(char):02x}" if ord(char) < 128 else f"\\U{ord(char):08x}"
    return f"\\{char}"


# --- the command ---------------------------------------------------------------------------------


def _work(_step, arguments, _inputs) -> None:
    """As steps.lib.step.execute, for a folder that is made again in place."""
    if not (arguments.config or arguments.plan):
        raise UserError("--config is missing: the runs to compare; results/sweeps/<sweep>/config.yaml has them")
    config = config_and_settings(STAGE, arguments)[0]
    output = Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file, and the sweep's folder should be there: move it away")
    with locked(output):
        started = time.time()
        board = compare(config, output)
        # Whoever finds the folder can tell which comparison it is.
        facts = {"missing": board["missing"], "mirrored": None, "key": stage_key(STAGE, config, {})}
        if arguments.plan:
            planned = plan.load(arguments.plan)
            facts["key"] = planned.comparison.key
            facts["mirrored"], said = tracking.mirror(planned, board)
            log.info("%s", said)
        reports = {run["name"]: run["report"] for run in config["runs"]}
        facts = provenance(STAGE, reports, time.time() - started, facts)
        pages.write_whole(output / "provenance.json", _json_text(facts))
    if not arguments.plan:  # the workflow shows it at its very end
        print_leaderboard(output)


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) == 2 and argv[0] == "--show":
        with one_line_errors():
            print_leaderboard(Path(argv[1]))
    else:
        run_command(sys.modules[__name__], {}, argv, work=_work)


if __name__ == "__main__":
    main()
