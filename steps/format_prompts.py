r"""Turn raw rows into conversations and split them into train, validation and test.

    python -m steps.format_prompts --raw data/raw/movie_reviews --output results/prompts/by-hand \
        data=movie_reviews 'prompt.system=Is the review positive or negative?'

Reads:  the files of a data folder (given as the folder or its pin), or one file of rows; the config sections data
        and prompt.system.
Writes: train.jsonl, validation.jsonl, test.jsonl: {"id": row number in the raw data, from 1, "messages": [...]},
        where the last message is the assistant's answer; for a preference pair also "rejected", the worse answer to
        the same prompt; for single answers that are desirable or not also "label". stats.json counts the rows of each
        split. A row of scored responses makes a line for each of its pairs, with the same id. With
        data.on_bad_row=skip also rejected.jsonl: {"id", "file", "line" (or "row"), "kind", "reason"} of each row that
        is left out because it cannot be read or makes no conversation; stats.json counts them by kind.

A row's split is decided by a hash of its prompt: the messages before the last answer, without the system message; with
data.splits.group_by of its group. Editing, adding or moving rows therefore never moves another row to another split,
rows with the same prompt (or of one group) are always on the same side, and a new system message leaves the splits as
they are. A split that the data has itself, by data.source or data.splits.column, is as it is there.

Rows of validation and test that also stand in train, exactly or nearly (temper/data/overlap.py), are counted in
stats.json and listed in overlap.jsonl; data.on_overlap says what is done with them.

report.html shows what became of the rows, which repeat or contradict each other, and what they are like: labels,
lengths, languages. report.json has the same for programs.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Collection
from pathlib import Path

from temper.config.schema import SplitSources
from temper.config.stages import NOT_PLANNED, FormatPrompts, Planned
from temper.data import overlap, report
from temper.data.places import places
from temper.data.reading import Reader
from temper.data.rejected import FILE, Rejected
from temper.data.splitting import SPLITS, Splits, splits_named
from temper.errors import UserError
from temper.hashing import HashCache
from temper.planning.plan import HASHES
from temper.sources import pins as raw_data
from temper.step import run_command

STAGE = "format_prompts"
log = logging.getLogger("temper")


def run(config: FormatPrompts, raw: Path, output: Path, planned: Planned = NOT_PLANNED) -> dict:
    """Format the rows of `raw` into `output`.

    Args:
        config: sections data and prompt.system.
        raw: a data folder, its pin, or one file of rows.
        output: an empty folder.
        planned: its `raw`, the identity of the raw data when the workflow planned, is compared with what is there.

    Raises:
        UserError: a row that makes no conversation (with file and line), an empty split, or raw files that changed
            since the plan was made. With data.on_bad_row=skip: more bad rows than data.max_bad_share.
    """
    from temper.reports.data_page import write_page

    data = config.data.model_dump()
    hashes = HashCache(HASHES)  # of planning, which has read the files
    identity = raw_data.identity_on_disk(raw, hashes)
    raw_data.refuse_other_identity(raw, identity, planned.raw)
    files = raw_data.split_files(raw)
    if isinstance(config.data.source, SplitSources) and raw_data.ALL in files:
        raise UserError(f"--raw {raw}: is of no split, and data.source has one for each: name the folder of fetch_data")
    split_of = {path: split for split, paths in files.items() for path in paths if split != raw_data.ALL}
    reader = Reader(raw, data, config.prompt.system, skip=data["on_bad_row"] == "skip")
    given = _given(files, reader, raw)
    rejected = Rejected.by_policy(data, output / FILE)
    with (
        rejected or contextlib.nullcontext(),
        Splits(output, data["splits"], data["limit"], given) as splits,
    ):
        splits.add_all(reader, split_of, rejected, raw)
    raw_data.refuse_other_identity(raw, raw_data.identity_on_disk(raw, hashes), identity)
    stats = splits.stats()
    if rejected is not None:
        stats |= _of_rejected(raw, stats["rows"] + rejected.rows, data, rejected)
    _refuse_empty(raw, stats, data, given)
    drop = data["on_overlap"] == "drop"
    found, shared, near = overlap.find(output, stats["splits"]["train"]["rows"], drop)
    if drop:
        _leave_out(output, stats["splits"], shared)
    made = report.make(output, report.rows_of(output, stats), found, near)
    where = places(raw, data, made.ids)  # in one pass, for all that is told
    stats["overlap"] = overlap.tell(output, found, data["on_overlap"], where)
    (output / "stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    made.write(output, where)
    write_page(output, made.content)
    log.info("%s", _summary(stats))
    return {"raw": identity, "rows": stats}


def _of_rejected(raw: Path, rows: int, data: dict, rejected: Rejected) -> dict:
    """What bad rows add to the stats; says how many were left out, or refuses too many. `rows`: all."""
    rejected.refuse_many(raw, rows, data["max_bad_share"])
    if rejected.rows:
        log.warning("%s", rejected.said(rows))
    return {"rows": rows, "rejected": rejected.stats()}


def _leave_out(output: Path, splits: dict[str, dict], shared: dict[str, set[int]]) -> None:
    """Take rows out of the splits, and out of their stats."""
    for split, taken in overlap.leave_out(output, shared).items():
        splits[split]["rows"] -= taken
        splits[split]["left_out_by_overlap"] = taken


def _given(files: dict, reader: Reader, raw: Path) -> set[str]:
    """The splits that the data has itself, by its files or by a column."""
    if reader.data["splits"]["column"] is None:
        return {*files} - {raw_data.ALL}
    return splits_named(reader, raw)


def _refuse_empty(raw: Path, stats: dict, data: dict, given: Collection[str]) -> None:
    """An empty split is an error, unless its share is 0."""
    used = stats["rows"] - stats["left_out_by_where"] - stats.get("rejected", {"rows": 0})["rows"]
    if not used and "ties" in stats:
        raise UserError(f"{raw}: no pair is left: the scores, or the texts, of all {stats['ties']} are the same")
    if not stats["rows"]:
        raise UserError(f"{raw}: no rows in the raw files")
    if not used:
        raise UserError(f"{raw}: data.where ({data['where']}) leaves out all {stats['rows']} rows")
    for name in SPLITS:
        if stats["splits"][name]["rows"] == 0 and name in given and name != "train":
            raise UserError(f"{raw}: no row of the {name} split is left; see data.where and data.source")
        if stats["splits"][name]["rows"] == 0 and data["splits"].get(name) != 0:
            share = data["splits"].get(name, 1 - data["splits"]["validation"] - data["splits"]["test"])
            key = "data.splits.validation and data.splits.test" if name == "train" else f"data.splits.{name}"
            what = "lower" if name == "train" else "raise"
            without = "" if name == "train" else " (0: do without)"
            raise UserError(
                f"{raw}: no row fell into the {name} split (its share is {share:.3g}; {used} rows with "
                f"{stats['prompts']} different prompts): {what} {key}{without}, or use more rows"
            )


def _summary(stats: dict) -> str:
    parts = [f"{name} {split['rows']}" for name, split in stats["splits"].items()]
    limited = sum(split["left_out_by_limit"] for split in stats["splits"].values())
    parts += [f"left out by data.limit {limited}", f"left out by data.where {stats['left_out_by_where']}"]
    taken = sum(split["left_out_by_overlap"] for split in stats["splits"].values())
    parts += [f"left out by data.on_overlap {taken}"] if taken else []
    parts += [f"no pair because scores or texts are the same {stats['ties']}"] if "ties" in stats else []
    return f"{stats['rows']} rows: {', '.join(parts)}; duplicates {stats['duplicates']}"


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
