"""From rows to splits: examples, their hashes, and the split that each belongs to."""

import contextlib
import dataclasses
import functools
import hashlib
import heapq
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from temper.data import layouts
from temper.data.buckets import Buckets
from temper.data.columns import SPLITS
from temper.data.conversations import is_document
from temper.data.reading import Chunk, Reader, Seen
from temper.data.rejected import Rejected
from temper.data.rows import RawFile
from temper.data.workers import WORTH_READING, in_order, worth
from temper.progress import Progress

Found = layouts.Example | layouts.Tie | None  # in a row

# --- reading -------------------------------------------------------------------------------------


def examples(
    raw: Path, data: dict, system: str | None, rejected: Rejected | None = None
) -> Iterator[tuple[int, Found]]:
    """(row number from 1 through all files, an example of it); None when `data.where` leaves the row out.

    Args:
        rejected: takes the rows that cannot be read, or make no conversation, and are left out here; they are numbered
            like all others. None: the first is an error.
    """
    reader, seen = Reader(raw, data, system, skip=rejected is not None), Seen(data)
    for chunk in reader.chunks():
        yield from reader.examples(chunk, seen)
        _reject(rejected, reader.files[chunk.file], seen)
        seen.bad.clear()


def splits_named(reader: Reader, raw: Path) -> set[str]:
    """The splits that rows name in `data.splits.column`. `raw`: is read, for an error."""
    found: set[str] = set()
    made = in_order(functools.partial(_named, reader), reader.chunks(), worth(reader.size, WORTH_READING), raw)
    with contextlib.closing(made):
        for some in made:
            found |= some
            if len(found) == len(SPLITS):
                break
    return found


def _named(reader: Reader, chunk: Chunk) -> set[str]:
    some = (example for _, example in reader.examples(chunk, Seen(reader.data)) if isinstance(example, layouts.Example))
    return {example.split for example in some if example.split is not None}


def _reject(rejected: Rejected | None, file: RawFile, seen: Seen) -> None:
    for counted, number, row in seen.bad:
        assert rejected is not None  # else the first was an error
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


class Placed(NamedTuple):
    """An example in its split: the line to write, and hashes of its prompt, and of prompt and answer."""

    split: str
    rank: int
    line: str
    prompt: int
    said: int


def placed(number: int, example: layouts.Example, named: str | None, shares: dict[str, float]) -> Placed:
    """Find the split of the row `number`. `named`: that which its file or column says; `shares`: of the others, by
    hash."""
    hashed = prompt_hash(example.messages)
    said = example.messages[-1]
    answer = said["content"] if len(said) == layouts.PLAIN else json.dumps(said)
    answers = [answer, *([] if example.rejected is None else [example.rejected])]
    answers += [] if example.label is None else [str(example.label)]
    digest = hashlib.blake2b("\0".join(answers).encode(), digest_size=8, key=hashed.rank.to_bytes(8)).digest()
    split = named or example.split or "train"
    if split == "train":
        position = hashed.split if example.group is None else group_hash(example.group)
        split = split_of(position, shares)
    line = json.dumps(record(number, example), ensure_ascii=False)
    return Placed(split, hashed.rank, line, hashed.split, int.from_bytes(digest))


class Rows(NamedTuple):
    """Some examples in their splits: split -> (ranks, lines); hashes of all, as arrays of uint64; what is none."""

    of: dict[str, tuple[list[int], list[str]]]
    prompts: Any
    said: Any
    left_out: int
    ties: int


class Splits:
    """Writes conversations to the files of their splits. What it counts takes no more memory for more rows.

    Args:
        given: the splits that the data has itself; rows that it says are of train take the others' places by hash.
    """

    def __init__(self, folder: Path, shares: dict, limits: dict[str, int | None], given: Collection[str] = ()):
        self.shares = {name: 0.0 if name in given else shares[name] for name in ("validation", "test")}
        self.files = {name: _SplitFile(folder / f"{name}.jsonl", limits.get(name)) for name in SPLITS}
        self.left_out = self.ties = self.kept = 0
        self.prompts, self.said = Buckets(folder, "u8"), Buckets(folder, "u8")

    def add_all(self, reader: Reader, split_of: dict[Path, str], rejected: Rejected | None, raw: Path) -> None:
        """Add all rows, formatted by several processes if they are many.

        Args:
            split_of: file -> the split that it is.
            rejected: takes the rows that cannot be read, or make no conversation; None: the first is an error.
            raw: is read, for an error.
        """
        seen, workers = Seen(reader.data), worth(reader.size, WORTH_READING)
        made = in_order(functools.partial(self._formatted, reader, split_of), reader.chunks(), workers, raw)
        with Progress(None, "format", "rows") as progress, contextlib.closing(made):
            for chunk, rows, found in made:
                self.add(rows)
                seen.add(found)
                _reject(rejected, reader.files[chunk.file], found)
                progress.update(chunk.rows)
        seen.say()

    def _formatted(self, reader: Reader, split_of: dict[Path, str], chunk: Chunk) -> tuple[Chunk, Rows, Seen]:
        seen = Seen(reader.data)
        rows = self.place(reader.examples(chunk, seen), split_of.get(reader.paths[chunk.file]))
        return chunk.taken(), rows, seen

    def place(self, found: Iterable[tuple[int, Found]], named: str | None = None) -> Rows:
        """Find the splits of (row number, example). None counts as left out by `data.where`, and a tie makes no pair.

        Args:
            named: the split that their file is.
        """
        import numpy

        rows: dict[str, tuple[list[int], list[str]]] = {name: ([], []) for name in SPLITS}
        prompts, said, left_out, ties = [], [], 0, 0
        for number, example in found:
            if isinstance(example, layouts.Example):
                one = placed(number, example, named, self.shares)
                ranks, lines = rows[one.split]
                ranks.append(one.rank)
                lines.append(one.line)
                prompts.append(one.prompt)
                said.append(one.said)
            elif example is None:
                left_out += 1
            else:
                ties += 1
        return Rows(rows, numpy.array(prompts, dtype="u8"), numpy.array(said, dtype="u8"), left_out, ties)

    def add(self, rows: Rows) -> None:
        """Write rows behind those that are there."""
        self.left_out += rows.left_out
        self.ties += rows.ties
        self.kept += len(rows.prompts)
        self.prompts.add(rows.prompts, rows.prompts)
        self.said.add(rows.said, rows.said)
        for name, (ranks, lines) in rows.of.items():
            self.files[name].add(ranks, lines)

    def stats(self) -> dict:
        """Counts of rows; `ties` made no pair, for their scores or texts are the same; `duplicates` repeat prompt and
        answer of an earlier row (and are kept)."""
        return {
            "rows": self.kept + self.left_out,
            "left_out_by_where": self.left_out,
            **({"ties": self.ties} if self.ties else {}),
            "prompts": _distinct(self.prompts),
            "duplicates": self.kept - _distinct(self.said),
            "splits": {name: file.stats() for name, file in self.files.items()},
        }

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        for file in self.files.values():
            file.close()


def _distinct(hashes: Buckets) -> int:
    import numpy

    return sum(len(numpy.unique(some)) for some in hashes)


class _SplitFile:
    """One split's file. With a limit it keeps the rows of smallest rank, in their original order.

    The choice depends only on the prompts, so adding or removing a row changes at most one other.
    """

    def __init__(self, path: Path, limit: int | None):
        self.path, self.limit = path, limit
        self.file = path.open("w", encoding="utf-8")
        self.seen = self.written = 0
        self.kept: list[tuple[int, int]] = []  # heap of (-rank, -line), the largest rank on top

    def add(self, ranks: list[int], lines: list[str]) -> None:
        """Add rows, except those of which there are already `limit` of smaller rank."""
        self.seen += len(lines)
        if self.limit is None:
            self.file.writelines(f"{line}\n" for line in lines)
            return
        for rank, line in zip(ranks, lines, strict=True):
            entry = (-rank, -self.written)  # among rows with the same prompt, the earlier one is kept
            if len(self.kept) < self.limit:
                heapq.heappush(self.kept, entry)
            elif heapq.heappushpop(self.kept, entry) == entry:
                continue
            self.file.write(f"{line}\n")
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
