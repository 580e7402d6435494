"""Compare the runs of a sweep: a leaderboard, and a page that shows what each swept value does.

By hand, with the config that the sweep's folder keeps (``temper plan --json`` shows it too)::

    python -m steps.compare_runs --config results/sweeps/demo/config.yaml --output results/sweeps/demo
    temper leaderboard demo

Reads   each run's report folder: metrics.json, predictions.jsonl, curves.jsonl. Runs without a report (failed, not yet
        made) are left out, and named. Of the runs chosen for the test split their report on that, too; of the chosen
        run what lm-eval measured (eval.harness).
Writes  leaderboard.csv and leaderboard.json (one row per run, best first), report.html, config.yaml; receipt.json
        (hashes of all that the chosen run consists of); provenance.json comes last. Each file is replaced by itself, so
        the folder is made again in place, whenever a report is new.

Exits with 1, after all is written, where the chosen run does not keep a bound of eval.gate.
"""

import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from temper import tracking
from temper.errors import UserError
from temper.evaluation.comparison import RankedRun, Ranking, add_tested, rank
from temper.evaluation.figures import finite
from temper.evaluation.gate import unmet
from temper.evaluation.harness import FILE as HARNESS
from temper.evaluation.harness import Harness, read_harness
from temper.files import json_text, read_yaml, write_whole
from temper.folders import PROVENANCE, locked, temporary_folder
from temper.keys import stage_key
from temper.planning import plan
from temper.provenance import provenance
from temper.reports.leaderboard import (
    BOARD,
    Board,
    csv_text,
    end_at_gate,
    leaderboard_rows,
    print_leaderboard,
    shown_metrics,
)
from temper.reports.sweep_page import write_page
from temper.runs.find import find
from temper.runs.receipt import FILE as RECEIPT
from temper.runs.receipt import receipt_of
from temper.step import config_and_settings, run_command

STAGE = "compare_runs"
OUTPUT_HELP = "folder of the sweep; its files are replaced"
log = logging.getLogger("temper")


def compare(config: dict, output: Path, growing: bool = False) -> Board:
    """Rank the runs and write the sweep's folder.

    Args:
        config: {"eval", "sweep": {"name", "axes"}, "runs": [{"name", "point", "report", "test_report"}]}, and
            optionally "harness" in a run, and "experiment" and "overrides" (those that are not axes), for the
            command that makes the chosen run again.
        growing: whether the sweep still runs, so that the page is to look for a newer one by itself.

    Raises:
        UserError: no run has a report.
    """
    from yaml import safe_dump

    ranking = rank(config["runs"], config["eval"], config["sweep"].get("choose", "best"))
    _say_missing(config["runs"], ranking)
    for name in add_tested(ranking, config["eval"]["test"]):
        log.info("%s: chosen for the test split, and has no report on it yet", name)
    names = shown_metrics(ranking, config["eval"]["task"])
    rows = leaderboard_rows(ranking, names)

    output.mkdir(parents=True, exist_ok=True)
    _keep_other_experiment(output, config["sweep"]["name"], config.get("experiment"))
    (output / RECEIPT).unlink(missing_ok=True)  # of the comparison before
    write_whole(output / "config.yaml", safe_dump(config, sort_keys=False, allow_unicode=True))
    write_whole(output / "leaderboard.csv", csv_text(rows))
    board = _board(config, ranking, rows)
    write_page(output, config, names, ranking, board, growing)
    write_whole(output / BOARD, json_text(finite(board.model_dump())))
    return board


def _board(config: dict, ranking: Ranking, rows: list[dict]) -> Board:
    runs = [*ranking.runs, *ranking.diverged]
    tested = next((run.test for run in ranking.runs if run.test), None)
    return Board(
        sweep=config["sweep"]["name"],
        metric=ranking.metric,
        split=ranking.split,
        rows=[{**row, "report": run.report} for row, run in zip(rows, runs, strict=True)],
        chosen=ranking.chosen.name,
        missing=ranking.missing,
        base=ranking.best.figures.base,
        base_test=tested.base if tested else None,
        harness=_harness(ranking.chosen),
        gate=unmet(ranking.chosen, config["eval"].get("gate")),
    )


def _harness(chosen: RankedRun) -> Harness | None:
    """What lm-eval measured of the chosen run; None: nothing was asked, or it is not made yet."""
    if chosen.harness and not (Path(chosen.harness) / HARNESS).is_file():
        log.info("%s: chosen for lm-eval, and has no figures of it yet", chosen.name)
        return None
    return read_harness(Path(chosen.harness)) if chosen.harness else None


def _say_missing(planned: list[dict], ranking: Ranking) -> None:
    for run in planned:
        if run["name"] in ranking.missing:
            log.info("left out: %s has no report (%s)", run["name"], Path(run["report"]))
    if ranking.missing:
        log.info("the leaderboard is partial: %d of %d runs", len(planned) - len(ranking.missing), len(planned))


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
        facts: dict[str, Any] = {"missing": board.missing, "mirrored": None, "key": stage_key(STAGE, config, {})}
        facts["gate"] = board.gate
        if arguments.plan:
            planned = plan.load(arguments.plan)
            facts["key"] = planned.comparison.key
            facts["mirrored"], said = tracking.mirror(planned, board)
            facts["mlflow"] = tracking.link(planned.tracking, planned.sweep) if facts["mirrored"] else None
            log.info("%s", said)
        _write_receipt(output, board)
        reports = {run["name"]: run["report"] for run in config["runs"]}
        facts = provenance(STAGE, reports, time.time() - started, facts)
        write_whole(output / "provenance.json", json_text(facts))
    if not arguments.plan:  # the workflow shows it at its very end, and ends so
        print_leaderboard(output)
        end_at_gate(board)


def _write_receipt(output: Path, board: Board) -> None:
    """Hashes of all that the chosen run consists of; none where its report was not written by a step."""
    report = Path(board.chosen_row["report"])
    if (report / PROVENANCE).is_file():
        receipt = receipt_of(find(str(report)))
        write_whole(output / RECEIPT, json_text(receipt.model_dump()))


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv, work=_work)


if __name__ == "__main__":
    main()
