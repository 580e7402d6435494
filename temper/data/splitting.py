"""From rows to splits: examples, their hashes, and the split that each belongs to."""

import array
import dataclasses
import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from temper.data import doubts, layouts
from temper.data.columns import SPLITS
from temper.data.conversations import is_document
from temper.data.rejected import LAYOUT, Rejected
from temper.data.rows import UTF_8, BadRow, RawFile, plain_types
from temper.errors import UserError
from temper.sources import pins as raw_data

# --- reading -------------------------------------------------------------------------------------


def examples(
    raw: Path, data: dict, system: str | None, rejected: Rejected | None = None
) -> Iterator[tuple[int, layouts.Example | layouts.Tie | None, Path]]:
    """(row number from 1 through all files, an example of it, its file); None when `data.where` leaves the row out.

    Args:
        rejected: takes the rows that cannot be read, or make no conversation, and are left out here; they are numbered
            like all others. None: the first is an error.
    """
    expand = layouts.expander(data, system)
    count, controls = itertools.count(1), doubts.Controls(data.get("encoding") or UTF_8)
    words = doubts.Words(layouts.text_columns(data))
    files = raw_data.data_files(raw)
    plain = plain_types(files, data)
    for path in files:
        file = RawFile.of(path, data, plain)
        for (number, row), counted in zip(file.entries(), count, strict=False):
            if isinstance(row, BadRow):
                _reject(rejected, counted, file, number, row)
                continue
            try:
                made = expand(row)
            except UserError as error:
                way_on = file.without_header if isinstance(error, layouts.NoColumnError) else ""
                _reject(rejected, counted, file, number, BadRow(LAYOUT, f"{error}{way_on}"))
                continue
            for example in made:
                if isinstance(example, layouts.Example):
                    controls.look_at(example, file, number)
                    words.look_at(row, example, file, number)
                yield counted, example, path
    controls.say()
    words.say()


def _reject(rejected: Rejected | None, counted: int, file: RawFile, number: int, row: BadRow) -> None:
    if rejected is None:
        raise UserError(f"{file.place(number)}: {row.reason}") from None
    rejected.add(counted, file, number, row)


# --- splitting -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PromptHash:
    """Two independent 64-bit hashes of a prompt: `split` selects its split, `rank` the rows that a limit keeps."""

    split: int
    rank: int


def asked(messages: layouts.Messages) -> list[list]:
    """The prompt: role, content and calls of the messages before the last answer, without the system message.

    Of a document its text.
    """
    before = messages if is_document(messages) else messages[:-1]
    return [
        [message["role"], message["content"], *message.get("tool_calls", ())]
        for message in layouts.without_system(before)
    ]


def prompt_hash(messages: layouts.Messages) -> PromptHash:
    """Hash the prompt: the messages before the last answer.

    The system message stays out. Changing it must not reshuffle the splits, and rows that differ only in a system
    message which `prompt.system` then replaces must not end up on both sides.
    """
    value = hashlib.sha256(json.dumps(asked(messages), ensure_ascii=False).encode()).digest()
    return PromptHash(int.from_bytes(value[:8]), int.from_bytes(value[8:16]))


def split_of(position: int, shares: dict[str, float]) -> str:
    """The split at a position in the hash space: [0, test) test, [test, test + validation) validation, else train."""
    at = position / 2**64
    if at < shares["test"]:
        return "test"
    return "validation" if at < shares["test"] + shares["validation"] else "train"


def group_hash(group: str) -> int:
    """The hash that selects the split of a group, from 0 to 2**64."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8])


def record(number: int, example: layouts.Example) -> dict:
    """A line of train.jsonl, validation.jsonl or test.jsonl."""
    given = example._asdict()
    names = ("tools", "chat_template_kwargs", "rejected", "label", "group")
    more = {name: given[name] for name in names if given[name] is not None}
    return {"id": number, "messages": example.messages, **more}


class Splits:
    """Writes conversations to the files of their splits. Holds 16 bytes a row in memory, for the counts.

    Args:
        given: the splits that the data has itself; rows that it says are of train take the others' places by hash.
    """

    def __init__(self, folder: Path, shares: dict, limits: dict[str, int | None], given: Collection[str] = ()):
        self.shares = {name: 0.0 if name in given else shares[name] for name in ("validation", "test")}
        self.files = {name: _SplitFile(folder / f"{name}.jsonl", limits.get(name)) for name in SPLITS}
        self.left_out = self.ties = 0
        self.prompts, self.rows = array.array("Q"), array.array("Q")  # hash of each prompt; of prompt and answer

    def add(self, number: int, example: layouts.Example | layouts.Tie | None, split: str | None = None) -> None:
        """Add the row `number`; None counts as left out by `data.where`, and a tie makes no pair. `split`: of the file
        that it is in."""
        if isinstance(example, layouts.Tie):
            self.ties += 1
            return
        if example is None:
            self.left_out += 1
            return
        hashed = prompt_hash(example.messages)
        self.prompts.append(hashed.split)
        said = example.messages[-1]
        answer = said["content"] if len(said) == layouts.PLAIN else json.dumps(said)
        answers = [answer, *([] if example.rejected is None else [example.rejected])]
        answers += [] if example.label is None else [str(example.label)]
        digest = hashlib.blake2b("\0".join(answers).encode(), digest_size=8, key=hashed.rank.to_bytes(8)).digest()
        self.rows.append(int.from_bytes(digest))
        line = json.dumps(record(number, example), ensure_ascii=False)
        named = split or example.split or "train"
        if named == "train":
            position = hashed.split if example.group is None else group_hash(example.group)
            named = split_of(position, self.shares)
        self.files[named].add(hashed.rank, line)

    def stats(self) -> dict:
        """Counts of rows; `ties` made no pair, for their scores or texts are the same; `duplicates` repeat prompt and
        answer of an earlier row (and are kept)."""
        return {
            "rows": len(self.rows) + self.left_out,
            "left_out_by_where": self.left_out,
            **({"ties": self.ties} if self.ties else {}),
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
    """One split's file. With a limit it keeps the rows of smallest rank, in their original order.

    The choice depends only on the prompts, so adding or removing a row changes at most one other.
    """

    def __init__(self, path: Path, limit: int | None):
        self.path, self.limit = path, limit
        self.file = path.open("w", encoding="utf-8")
        self.seen = self.written = 0
        self.kept: list[tuple[int, int]] = []  # heap of (-rank, -line), the largest rank on top

    def add(self, rank: int, line: str) -> None:
        """Add a row, unless there are already `limit` rows of smaller rank."""
        self.seen += 1
        if self.limit is not None:
            entry = (-rank, -self.written)  # among rows with the same prompt, the earlier one is kept
            if len(self.kept) < self.limit:
                heapq.heappush(self.kept, entry)
            elif heapq.heappushpop(self.kept, entry) == entry:
                return
        self.file.write(line + "\n")
        self.written += 1

    def close(self) -> None:
        """Finish the file: drop the lines that later rows replaced."""
        self.file.close()
        if self.limit is not None and self.written > self.limit:
            self._drop(keep={-line for _, line in self.kept})

    def _drop(self, keep: set[int]) -> None:
        keep_lines(self.path, lambda index, _line: index in keep)

    def stats(self) -> dict:
        rows = self.seen if self.limit is None else len(self.kept)
        return {"rows": rows, "left_out_by_limit": self.seen - rows, "left_out_by_overlap": 0}


def keep_lines(path: Path, keeps: Callable[[int, bytes], bool]) -> None:
    """Rewrite a file with the lines for which `keeps` (index, line) holds."""
    everything = path.rename(path.with_suffix(".all"))
    with everything.open("rb") as lines, path.open("wb") as file:
        file.writelines(line for index, line in enumerate(lines) if keeps(index, line))
    everything.unlink()
