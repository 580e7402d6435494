r"""Turn raw rows into conversations and split them into train, validation and test.

    python -m steps.format_prompts --raw data/raw/movie_reviews --output results/prompts/by-hand \
        data=movie_reviews 'prompt.system=Is the review positive or negative?'

Reads:  the files of a data folder (named by the folder or its pin), or one file of rows; the config sections data
        and prompt.system.
Writes: train.jsonl, validation.jsonl, test.jsonl: {"id": row number in the raw data, from 1, "messages": [...]},
        where the last message is the assistant's answer, and of a preference pair "rejected": the worse answer to
        the same prompt; stats.json: how many rows went where.

A row's split is decided by a hash of its prompt: the messages before the last answer, without the system message.
Editing, adding or moving rows therefore never moves another row to another split, rows with the same prompt are
always on the same side, and a new system message leaves the splits as they are.
"""

import array
import dataclasses
import hashlib
import heapq
import itertools
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from steps.lib import layouts
from steps.lib import raw as raw_data
from steps.lib.errors import UserError
from steps.lib.progress import Progress
from steps.lib.rows import RawFile
from steps.lib.step import run_command

STAGE = "format_prompts"
SPLITS = ("train", "validation", "test")

log = logging.getLogger("temper")


def run(config: dict, raw: Path, output: Path) -> dict:
    """Format the rows of `raw` into `output`.

    Args:
        config: sections data and prompt.system. An entry `raw`, the identity of the raw data when the
            workflow planned, is compared with what is on the disk.
        raw: a data folder, its pin, or one file of rows.
        output: an empty folder.

    Raises:
        UserError: a row that makes no conversation (with file and line), an empty split, or raw files that changed
            since the plan was made.
    """
    data = config["data"]
    identity = raw_data.identity_on_disk(raw)
    _refuse_other_identity(raw, identity, config.get("raw", identity))
    limits = data["limit"]
    with Splits(output, data["splits"], limits) as splits, Progress(None, "format", "rows") as progress:
        for number, example in examples(raw, data, config["prompt"]["system"]):
            splits.add(number, example)
            progress.update()
    _refuse_other_identity(raw, raw_data.identity_on_disk(raw), identity)
    stats = splits.stats()
    _refuse_empty(raw, stats, data)
    (output / "stats.json").write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    log.info("%s", _summary(stats))
    return {"raw": identity, "rows": stats}


def _refuse_other_identity(raw: Path, found: dict, expected: dict) -> None:
    if found != expected:
        raise UserError(
            f"{raw}: the raw files changed since the plan was made: run again, to plan with the new content"
        )


def _refuse_empty(raw: Path, stats: dict, data: dict) -> None:
    """An empty split is an error, unless nothing was asked for."""
    if not stats["rows"]:
        raise UserError(f"{raw}: no rows in the raw files")
    used = stats["rows"] - stats["left_out_by_where"]
    if not used:
        raise UserError(f"{raw}: data.where ({data['where']}) leaves out all {stats['rows']} rows")
    for name in SPLITS:
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
    return f"{stats['rows']} rows: {', '.join(parts)}; duplicates {stats['duplicates']}"


# --- reading -------------------------------------------------------------------------------------


def examples(raw: Path, data: dict, system: str | None) -> Iterator[tuple[int, layouts.Example | None]]:
    """(row number from 1 through all files, its example; None when `data.where` leaves the row out)."""
    convert = layouts.converter(data, system)
    count, controls = itertools.count(1), _Controls()
    for path in raw_data.data_files(raw):
        file = RawFile(path, data.get("format"), data.get("csv") or {}, data.get("field"))
        for number, row in file:
            try:
                example = convert(row)
            except UserError as error:
                raise UserError(f"{file.place(number)}: {error}") from None
            if example:
                controls.look_at(example, file.place(number))
            yield next(count), example
    controls.say()


class _Controls:
    """Counts rows with C1 control characters, which no text has: Latin-1 read them where Windows had quotes."""

    PATTERN = re.compile("[\x80-\x84\x86-\x9f]")

    def __init__(self):
        self.rows, self.first = 0, ""

    def look_at(self, example: layouts.Example, place: str) -> None:
        texts = [message["content"] for message in example.messages] + [example.rejected or ""]
        if any(self.PATTERN.search(text) for text in texts):
            self.rows, self.first = self.rows + 1, self.first or place

    def say(self) -> None:
        if self.rows:
            log.warning(
                "%d rows hold control characters (the first: %s), as a file of Windows does that was converted from "
                "Latin-1: convert the original with iconv -f cp1252 -t utf-8",
                self.rows,
                self.first,
            )


# --- splitting -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PromptHash:
    """Two independent 64-bit hashes of a prompt: `split` decides its side, `rank` which rows a limit keeps."""

    split: int
    rank: int


def prompt_hash(messages: layouts.Messages) -> PromptHash:
    """Hash what the model is asked: the messages before the last answer.

    The system message stays out. Changing it must not reshuffle the splits, and rows that differ only in a system
    message which `prompt.system` then replaces must not end up on both sides.
    """
    asked = [[message["role"], message["content"]] for message in layouts.without_system(messages[:-1])]
    value = hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).digest()
    return PromptHash(int.from_bytes(value[:8]), int.from_bytes(value[8:16]))


def split_of(position: int, shares: dict[str, float]) -> str:
    """The split at a position in the hash space: [0, test) test, [test, test + validation) validation, else train."""
    position /= 2**64
    if position < shares["test"]:
        return "test"
    return "validation" if position < shares["test"] + shares["validation"] else "train"


def record(number: int, example: layouts.Example) -> dict:
    """A line of train.jsonl and its likes."""
    pair = {} if example.rejected is None else {"rejected": example.rejected}
    return {"id": number, "messages": example.messages, **pair}


class Splits:
    """Writes conversations to the files of their splits. Holds 16 bytes a row in memory, for the counts."""

    def __init__(self, folder: Path, shares: dict[str, float], limits: dict[str, int | None]):
        self.shares = shares
        self.files = {name: _SplitFile(folder / f"{name}.jsonl", limits.get(name)) for name in SPLITS}
        self.left_out = 0
        self.prompts, self.rows = array.array("Q"), array.array("Q")  # hash of each prompt; of prompt and answer

    def add(self, number: int, example: layouts.Example | None) -> None:
        """Take the row `number`; None counts as left out by `data.where`."""
        if example is None:
            self.left_out += 1
            return
        hashed = prompt_hash(example.messages)
        self.prompts.append(hashed.split)
        answers = [example.messages[-1]["content"], *([] if example.rejected is None else [example.rejected])]
        answer = hashlib.blake2b("\0".join(answers).encode(), digest_size=8, key=hashed.rank.to_bytes(8)).digest()
        self.rows.append(int.from_bytes(answer))
        line = json.dumps(record(number, example), ensure_ascii=False)
        self.files[split_of(hashed.split, self.shares)].add(hashed.rank, line)

    def stats(self) -> dict:
        """Counts of rows; `duplicates` have prompt and answer of an earlier row (they are kept)."""
        return {
            "rows": len(self.rows) + self.left_out,
            "left_out_by_where": self.left_out,
            "prompts": _distinct(self.prompts),
            "duplicates": len(self.rows) - _distinct(self.rows),
            "splits": {name: file.stats() for name, file in self.files.items()},
        }

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for file in self.files.values():
            file.close()


def _distinct(hashes: array.array) -> int:
    import numpy

    return len(numpy.unique(numpy.frombuffer(hashes, dtype=numpy.uint64))) if hashes else 0


class _SplitFile:
    """One split's file. With a limit it keeps the rows of the smallest rank, in the order they came.

    Which rows that are depends on their prompts alone: a row more or less changes at most one other.
    """

    def __init__(self, path: Path, limit: int | None):
        self.path, self.limit = path, limit
        self.file = path.open("w", encoding="utf-8")
        self.seen = self.written = 0
        self.kept: list[tuple[int, int]] = []  # heap of (-rank, -line), the largest rank on top

    def add(self, rank: int, line: str) -> None:
        """Take a row, unless `limit` rows of smaller rank are there already."""
        self.seen += 1
        if self.limit is not None:
            entry = (-rank, -self.written)  # of rows with the same prompt, the earlier one is kept
            if len(self.kept) < self.limit:
                heapq.heappush(self.kept, entry)
            elif heapq.heappushpop(self.kept, entry) == entry:
                return
        self.file.write(line + "\n")
        self.written += 1

    def close(self) -> None:
        """Finish the file: drop the lines that later rows pushed out."""
        self.file.close()
        if self.limit is not None and self.written > self.limit:
            self._drop(keep={-line for _, line in self.kept})

    def _drop(self, keep: set[int]) -> None:
        everything = self.path.rename(self.path.with_suffix(".all"))
        with everything.open("rb") as lines, self.path.open("wb") as file:
            file.writelines(line for index, line in enumerate(lines) if index in keep)
        everything.unlink()

    def stats(self) -> dict:
        rows = self.seen if self.limit is None else len(self.kept)
        return {"rows": rows, "left_out_by_limit": self.seen - rows}


def main(argv=None) -> None:
    run_command(sys.modules[__name__], {"raw": "data folder, its pin, or one file of rows"}, argv)


if __name__ == "__main__":
    main()
