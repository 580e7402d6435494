"""List the rows of training and validation whose answers are likely wrong, by a trained model.

By hand::

    python -m steps.score_rows --model results/merged/X --splits results/splits/Y --prompts results/prompts/Z \\
        --raw data/raw/movie_reviews/pin-3f9c596580.json --output results/suspects/new experiment=demo

Reads   the merged model; the splits; of the prompts how the raw data is read; the raw data, for files and lines.
Writes  suspects.csv and suspects.json: the `eval.suspects` most suspicious rows, the worst first, each with its file
        and line. scores.jsonl: how suspicious each row is (see temper/evaluation/suspects.py).

The workflow does this for the run that a sweep chooses.
"""

import logging
import sys
from pathlib import Path

from temper.config.stages import ScoreRows
from temper.data.columns import with_right_answers
from temper.data.places import Place, places
from temper.errors import UserError
from temper.evaluation import suspects
from temper.files import json_lines, json_text, load_rows, read_json, read_yaml, write_whole
from temper.model.adapters import refuse_diverged
from temper.model.loading import load_tokenizer
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.reports.suspects import CSV, FILE, csv_text
from temper.sources.pins import identity_on_disk
from temper.step import run_command

STAGE = "score_rows"
log = logging.getLogger("temper")


def run(config: ScoreRows, model: Path, splits: Path, prompts: Path, raw: Path, output: Path) -> dict:
    """Score all rows of training and validation and list the most suspicious.

    Raises:
        UserError: splits, prompts and raw data are not of each other, the training of the model diverged, or nothing
            is to be listed.
    """
    quiet_libraries()
    settings = config.eval.model_dump()
    if not settings["suspects"]:
        raise UserError("config: 'eval.suspects': 0 lists no rows: give the number of rows to list")
    refuse_diverged(model, "to ask about the rows")
    _check_lineage(splits, prompts, raw)
    rows = with_right_answers(load_rows(splits))
    with computing_threads(config.num_threads):
        scores = suspects.scores(model, config.model_dump(), rows, load_tokenizer(model))
    worst = suspects.most_suspicious(scores, settings["suspects"])
    data = read_yaml(prompts / "config.yaml")["data"]
    where = places(raw, data, {score.id for score in worst})
    listed = [_line(rank, score, where[score.id]) for rank, score in enumerate(worst, 1)]
    figure = suspects.FIGURES[settings["task"]]
    counts = {split: sum(score.split == split for score in scores) for split in suspects.SPLITS}
    content = {"figure": figure, "rows": counts, "suspects": listed}
    write_whole(output / FILE, json_text(content))
    write_whole(output / CSV, csv_text(listed, figure))
    write_whole(output / "scores.jsonl", json_lines([_score_line(score) for score in scores]))
    log.info("the most suspicious of %d rows: %s", len(scores), _said(listed[0]))
    return {"rows": counts}


def _check_lineage(splits: Path, prompts: Path, raw: Path) -> None:
    """Refuse inputs that are not of each other: the list would name other rows' lines."""
    made_of = read_json(splits / "provenance.json", {"inputs": dict[str, str]})["inputs"].get("prompts")
    if made_of is None or Path(made_of).name != prompts.name:
        raise UserError(f"--prompts {prompts}: --splits {splits} was made of {made_of}; name that folder")
    recorded = read_json(prompts / "provenance.json", {"inputs": dict[str, str], "raw": dict})
    if identity_on_disk(raw) != recorded["raw"]:
        raise UserError(
            f"--raw {raw}: is not the raw data that --prompts {prompts} was made of, which was "
            f"{recorded['inputs'].get('raw')}, or was edited since: name that, or run the workflow again"
        )


def _line(rank: int, score: suspects.Score, place: Place) -> dict:
    """A line of the list."""
    line = {"rank": rank, "file": place.file, "row" if place.counts_rows else "line": place.number}
    line |= {"split": score.split, "given": score.given}
    if score.other is not None:
        line["likelier"] = score.other
    return {**line, "suspicion": score.suspicion, "prompt": score.prompt, "id": score.id}


def _score_line(score: suspects.Score) -> dict:
    return {"id": score.id, "split": score.split, "suspicion": score.suspicion}


def _said(line: dict) -> str:
    place = f"{line['file']}:{line['line']}" if "line" in line else f"{line['file']}, row {line['row']}"
    return f"{place}, given '{line['given'][:60]}'"


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
