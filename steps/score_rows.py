"""List the rows of training and validation whose answers are likely wrong, by a trained model.

By hand::

    python -m steps.score_rows --model results/models/W --adapter results/adapters/X --splits results/splits/Y \\
        --prompts results/prompts/Z --raw data/raw/movie_reviews/pin-3f9c596580.json --output results/suspects/new \\
        experiment=demo

Reads   the model and what was trained on it, merged in memory (or, without --adapter, a merged model); the splits; of
        the prompts how the raw data is read; the raw data, for files and lines.
Writes  suspects.csv and suspects.json: the `eval.suspects` most suspicious rows, the worst first, each with its file
        and line. scores.jsonl: how suspicious each row is (see temper/evaluation/suspects.py).

The workflow does this for the run that a sweep chooses.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from temper.config.stages import ScoreRows
from temper.data.columns import with_right_answers
from temper.data.places import Part, Place, of_mixture, parts_of, raw_of
from temper.errors import UserError
from temper.evaluation import suspects
from temper.files import json_lines, json_text, load_rows, read_json, write_whole
from temper.model.loading import load_tokenizer
from temper.model.merging import source_of
from temper.model.threads import computing_threads
from temper.progress import quiet_libraries
from temper.reports.suspects import CSV, FILE, csv_text
from temper.sources.pins import identity_on_disk
from temper.step import run_command

if TYPE_CHECKING:
    from datasets import DatasetDict

STAGE = "score_rows"
log = logging.getLogger("temper")


def run(
    config: ScoreRows,
    model: Path,
    splits: Path,
    prompts: Path,
    output: Path,
    adapter: Path | None = None,
    raw: Path | None = None,
) -> dict:
    """Score all rows of training and validation and list the most suspicious.

    Raises:
        UserError: splits, prompts and raw data are not of each other, the training of the model diverged, or nothing
            is to be listed.
    """
    quiet_libraries()
    settings = config.eval.model_dump()
    if not settings["suspects"]:
        raise UserError("config: 'eval.suspects': 0 lists no rows: give the number of rows to list")
    source = source_of(config, model, adapter, splits, compares=False)  # its report did
    source.refuse_diverged("to ask about the rows")
    parts = parts_of(prompts)
    _check_lineage(splits, prompts, parts, raw)
    rows = with_right_answers(load_rows(splits))
    with computing_threads(config.num_threads):
        scores = suspects.scores(source, config.model_dump(), _once(rows), load_tokenizer(model))
    worst = suspects.most_suspicious(scores, settings["suspects"])
    where = of_mixture(parts, {score.id for score in worst}, raw)
    listed = [_line(rank, score, where[score.id]) for rank, score in enumerate(worst, 1)]
    figure = suspects.FIGURES[settings["task"]]
    counts = {split: sum(score.split == split for score in scores) for split in suspects.SPLITS}
    content = {"figure": figure, "rows": counts, "suspects": listed}
    write_whole(output / FILE, json_text(content))
    write_whole(output / CSV, csv_text(listed, figure))
    write_whole(output / "scores.jsonl", json_lines([_score_line(score) for score in scores]))
    log.info("the most suspicious of %d rows: %s", len(scores), _said(listed[0]))
    return {"rows": counts}


def _once(rows: DatasetDict) -> DatasetDict:
    """The rows of a mixture without those that a weight repeats; other rows as they are."""
    found = {}
    for split, part in rows.items():
        found[split] = part
        if "source" in part.column_names:
            texts = zip(part["id"], map(tuple, part["input_ids"]), strict=True)
            first = {text: place for place, text in reversed(list(enumerate(texts)))}
            found[split] = part.select(sorted(first.values()))
    return type(rows)(found)


def _check_lineage(splits: Path, prompts: Path, parts: list[Part], raw: Path | None) -> None:
    """Refuse inputs that are not of each other: the list would name other rows' lines."""
    made_of = read_json(splits / "provenance.json", {"inputs": dict[str, str]})["inputs"].get("prompts")
    if made_of is None or Path(made_of).name != prompts.name:
        raise UserError(f"--prompts {prompts}: --splits {splits} was made of {made_of}; name that folder")
    if (raw is None) == (len(parts) == 1 and not parts[0].source):
        what = "leave it out: a mixture knows its raw data" if raw else "is missing: name the raw data of the prompts"
        raise UserError(f"--raw {raw or ''}: {what}")
    for part in map(Path, (part.prompts for part in parts)):
        recorded = read_json(part / "provenance.json", {"inputs": dict[str, str], "raw": dict})
        now = raw or raw_of(part)
        if identity_on_disk(now) != recorded["raw"]:
            raise UserError(
                f"--raw {now}: is not the raw data that --prompts {part} was made of, which was "
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
