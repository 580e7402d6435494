"""Compare the runs of a sweep: a leaderboard, and a page that shows what each swept value does.

By hand, with the config that the sweep's folder keeps (``temper plan --json`` shows it too)::

    python -m steps.compare_runs --config results/sweeps/demo/config.yaml --output results/sweeps/demo
    temper leaderboard demo

Reads   each run's report folder: metrics.json, curves.jsonl. Runs without a report (failed, not yet made) are left
        out, and named.
Writes  leaderboard.csv and leaderboard.json (one row per run, best first), report.html, config.yaml; provenance.json
        comes last. Each file is replaced by itself, so the folder is made again in place, whenever a report is new.
"""

import logging
import math
import shutil
import sys
import time
from pathlib import Path

from temper import tracking
from temper.errors import UserError
from temper.evaluation import metrics
from temper.files import read_json, read_yaml, write_whole
from temper.folders import locked, made_again, temporary_folder
from temper.keys import stage_key
from temper.planning import plan
from temper.provenance import provenance
from temper.reports.leaderboard import csv_text, json_text, leaderboard_row, print_leaderboard, shown_metrics
from temper.reports.sweep_page import write_page
from temper.step import config_and_settings, run_command

STAGE = "compare_runs"
OUTPUT_HELP = "folder of the sweep; its files are replaced"
log = logging.getLogger("temper")


def compare(config: dict, output: Path) -> dict:
    """Rank the runs and write the sweep's folder.

    Args:
        config: {"eval", "sweep": {"name", "axes"}, "runs": [{"name", "point", "report"}]}, and optionally
            "experiment" and "overrides" (those that are not axes), for the command that makes the best run again.

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
    names = shown_metrics(runs, config["eval"]["task"], metric)
    rows = [leaderboard_row(run, names, metric) for run in runs]
    rows += [_diverged_row(run, rows[0]) for run in diverged]
    board = {"sweep": config["sweep"]["name"], "metric": metric, "rows": rows, "missing": missing}
    output.mkdir(parents=True, exist_ok=True)
    _keep_other_experiment(output, config["sweep"]["name"], config.get("experiment"))
    write_whole(output / "config.yaml", safe_dump(config, sort_keys=False, allow_unicode=True))
    write_whole(output / "leaderboard.csv", csv_text(rows))
    write_page(output, config, metric, names, runs, rows, missing, diverged)
    linked = [{**row, "report": run["report"]} for row, run in zip(rows, [*runs, *diverged], strict=True)]
    base = runs[0]["facts"]["base"]
    write_whole(output / "leaderboard.json", json_text({**board, "base": base, "rows": linked}))
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
    figured: list[dict] = []
    diverged: list[dict] = []
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


# --- the command ---------------------------------------------------------------------------------


def _work(_step, arguments, _inputs) -> None:
    """As temper.step.execute, for a folder that is made again in place."""
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
        write_whole(output / "provenance.json", json_text(facts))
    if not arguments.plan:  # the workflow shows it at its very end
        print_leaderboard(output)


def main(argv=None) -> None:
    run_command(sys.modules[__name__], {}, argv, work=_work)


if __name__ == "__main__":
    main()
