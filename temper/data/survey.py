"""What the rows of the splits are like: which repeat each other or contradict each other, their labels and lengths.

All of it is of the rows as they are trained and judged on: after data.where, data.limit and data.on_overlap. A row that
a mixture's weight repeats counts once. A row's prompt is all that stands before its last answer, here with its system
message, tools and template arguments: with another one of these, another answer may be right.
"""

import array
import collections
import contextlib
import functools
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from temper.data.buckets import Buckets
from temper.data.columns import SPLITS
from temper.data.conversations import PLAIN, is_document
from temper.data.languages import LONGEST
from temper.data.sample import Sample
from temper.data.workers import LINES, WORTH_READING, in_order, worth
from temper.files import line_chunks
from temper.progress import Progress

# A row, as numpy has it: hashes of what is answered and of the answer, its id, its split's place in SPLITS, its line.
ROW = [("topic", "i8"), ("said", "i8"), ("id", "i8"), ("split", "i1"), ("line", "i8")]
TRAIN = SPLITS.index("train")
SAMPLED = 1000  # rows whose language is looked at
MOST_LABELS, LONGEST_LABEL = 50, 100  # different answers, and characters of one, up to which answers are labels
ROWS_A_LABEL = 4  # rows for each, on average, from which they are
MIX = 0x9E3779B97F4A7C15 - 2**64  # an odd number without pattern, to make one hash of two
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
TEXTS = ("document", "prompt", "answer", "rejected")
ANSWERS, PAIRS, JUDGED, DOCUMENTS = "answers", "pairs", "judged", "documents"  # kinds of rows


class Row(NamedTuple):
    """A row of a split. `line`: in the split's file, from 1; None where data.on_overlap took the row out."""

    split: str
    line: int | None
    id: int


class Repeats(NamedTuple):
    """Rows that repeat an earlier one of their split. `first`: a few of them, each behind the one that it repeats."""

    rows: dict[str, int]
    first: list[list[Row]]


class Several(NamedTuple):
    """Rows that say different things of the same.

    `prompts`, `rows`: how many; `across`: of the prompts, those that stand in several splits. `in_train`: prompts of
    which this is so within train. `first`: of a few of them one row for each answer.
    """

    prompts: int
    rows: int
    in_train: int
    across: int
    first: list[list[Row]]


class _Looked(NamedTuple):
    """What some lines of a split are like. `rows`: as `ROW`; `repeated`: how many lines more are those that a weight
    makes; `lengths`: of each kind of text, the different ones and how many have each."""

    rows: Any
    kind: str
    repeated: int
    lengths: dict[str, tuple[Any, Any]]
    labels: "_Labels"
    sampled: list[tuple[str, str]]


class Survey:
    """One pass over the files of the splits, by several processes if they are large.

    Args:
        folder: of format_prompts or mix_prompts.
        rows: in all splits, to take a sample of them.
        wanted: (split, id) of rows that `find` is to know.
    """

    def __init__(self, folder: Path, rows: int, wanted: Collection[tuple[str, int]] = ()):
        self.rows = Buckets(folder, ROW)
        self.lengths: dict[str, dict[str, collections.Counter[int]]] = {name: {} for name in TEXTS}
        self.labels = _Labels()
        self.kind = ANSWERS
        self.repeated = 0  # rows more that weights make
        self.sampled: list[tuple[str, str]] = []  # beginnings of the last user message and of its answer
        self._sample = Sample(SAMPLED, rows)
        self._wanted = {split: [number for of, number in wanted if of == split] for split in SPLITS}
        self._found: dict[tuple[str, int], Row] = {}
        with Progress(None, "look at rows", "rows") as progress:
            for place, split in enumerate(SPLITS):
                for some in self._read(place, folder / f"{split}.jsonl"):
                    self._add(split, some)
                    progress.update(len(some.rows))

    def _read(self, place: int, path: Path) -> Iterator[_Looked]:
        workers = worth(path.stat().st_size, WORTH_READING)
        made = in_order(functools.partial(self._look_at, place), _chunks(path), workers, path)
        with contextlib.closing(made):
            yield from made

    def _look_at(self, place: int, chunk: tuple[int, bytes | None, list[bytes]]) -> _Looked:
        """What lines are like. `chunk`: see `_chunks`."""
        import numpy as np

        first, before, lines = chunk
        known = _told(json.loads(before.decode())) if before is not None else None
        rows, lengths, labels = [], {name: array.array("I") for name in TEXTS}, _Labels()
        sampled, kind, repeated = [], ANSWERS, 0
        for number, line in enumerate(lines, first):
            record = json.loads(line.decode())
            told = _told(record)
            if told[:3] == (known and known[:3]):
                repeated += 1
                continue
            known, document = told, is_document(record["messages"])
            kind = _kind(record, document)
            rows.append((*told[1:3], told[0], place, number))
            *earlier, last = record["messages"]
            answer = last["content"]
            if document:
                lengths["document"].append(len(answer))
            else:
                lengths["prompt"].append(sum(len(message["content"]) for message in earlier))
                lengths["answer"].append(len(answer))
            if kind == PAIRS:
                lengths["rejected"].append(len(record["rejected"]))
            labels.add(SPLITS[place], told[3])
            if line in self._sample:
                asked = next((message["content"] for message in reversed(earlier) if message["role"] == "user"), "")
                sampled.append((answer[:LONGEST] if document else asked[:LONGEST], answer[:LONGEST]))
        counts = {name: np.unique(some, return_counts=True) for name, some in lengths.items() if some}
        return _Looked(np.array(rows, dtype=ROW), kind, repeated, counts, labels, sampled)

    def _add(self, split: str, some: _Looked) -> None:
        import numpy as np

        self.repeated += some.repeated
        self.labels.add_all(some.labels)
        self.sampled += some.sampled
        if not len(some.rows):
            return
        self.kind = some.kind
        self.rows.add(some.rows["topic"], some.rows)
        for name, (lengths, rows) in some.lengths.items():
            counted = self.lengths[name].setdefault(split, collections.Counter())
            counted.update(dict(zip(lengths.tolist(), rows.tolist(), strict=True)))
        for row in some.rows[np.isin(some.rows["id"], self._wanted[split])] if self._wanted[split] else ():
            self._found.setdefault((split, int(row["id"])), _row(row))

    def find(self, split: str, number: int) -> Row:
        """The first row of a split with an id that was asked for."""
        return self._found.get((split, number), Row(split, None, number))

    def repeats(self, most: int) -> Repeats:
        """Rows with the prompt and the answer of an earlier row of their split. `most`: to name."""
        import numpy as np

        counts = dict.fromkeys(SPLITS, 0)
        first: list[tuple[Any, Any]] = []  # (row that repeats, the earlier one)
        for bucket in self.rows:
            both = bucket["topic"] * np.int64(MIX) + bucket["said"]
            for place, split in enumerate(SPLITS):
                rows = bucket[bucket["split"] == place]
                _, starts, which = np.unique(both[bucket["split"] == place], return_index=True, return_inverse=True)
                earliest = starts[which]
                again = np.flatnonzero(earliest != np.arange(len(rows)))
                counts[split] += len(again)
                first += [(rows[at], rows[earliest[at]]) for at in again[:most]]
        first.sort(key=lambda pair: _place(pair[0]))
        return Repeats(counts, [[_row(earlier), _row(again)] for again, earlier in first[:most]])

    def several(self, most: int, most_answers: int) -> Several:
        """What has different answers: prompts; of judged answers, those judged both ways; of pairs, those ranked both
        ways. `most`, `most_answers`: to name."""
        import numpy as np

        prompts = number = across = in_train = 0
        first: list[Any] = []  # of each of some topics, its rows
        for bucket in self.rows:
            rows, starts = _contradicting(bucket)
            in_train += len(_contradicting(bucket[bucket["split"] == TRAIN])[1])
            if not len(rows):
                continue
            splits = rows["split"]
            across += int((np.maximum.reduceat(splits, starts) > np.minimum.reduceat(splits, starts)).sum())
            prompts, number = prompts + len(starts), number + len(rows)
            # The rows of a topic are in order of what they say, and in their own where they say the same.
            topics = np.split(rows, starts[1:])
            order = np.argsort(np.minimum.reduceat(_order(rows), starts))
            first = sorted([*first, *(topics[at] for at in order[:most])], key=lambda some: _order(some).min())[:most]
        return Several(prompts, number, in_train, across, [_one_of_each(rows, most_answers) for rows in first])

    def lengths_of(self) -> dict[str, dict]:
        """Of prompts and answers, in characters: by split the quantiles, and the rows of each span of lengths."""
        found = {}
        for name, parts in self.lengths.items():
            if parts:
                quantiles = {split: _quantiles(counts) for split, counts in parts.items()}
                found[name] = {"quantiles": quantiles, "histogram": dict(_histogram(_sum(parts.values())))}
        return found


def _chunks(path: Path) -> Iterator[tuple[int, bytes | None, list[bytes]]]:
    """(number of the first line, the line before it, lines) for all lines of a file."""
    number, before = 1, None
    for lines in line_chunks(path, LINES):
        yield number, before, lines
        number, before = number + len(lines), lines[-1]


def _row(row) -> Row:
    return Row(SPLITS[row["split"]], int(row["line"]), int(row["id"]))


def _place(row) -> tuple[int, int]:
    """Where a row is in the order of all."""
    return int(row["split"]), int(row["line"])


def _order(rows):
    """The same as one number for each of some rows."""
    import numpy as np

    return (rows["split"].astype(np.int64) << 48) | rows["line"]


def _contradicting(rows):
    """(rows with a topic of which they say different things, topic by topic; where each topic starts)."""
    import numpy as np

    order = np.lexsort((rows["said"], rows["topic"]))  # stable: rows that say the same stay in their order
    topics, said = rows["topic"][order], rows["said"][order]
    begins = np.concatenate([[True], topics[1:] != topics[:-1]])[: len(order)]
    others = np.concatenate([[False], (said[1:] != said[:-1]) & ~begins[1:]])[: len(order)]
    group = np.cumsum(begins) - 1
    many = np.bincount(group, others) > 0
    sizes = np.bincount(group)[many]
    return rows[order[many[group]]], np.cumsum(sizes) - sizes


def _one_of_each(rows, most: int) -> list[Row]:
    """The first row for each thing that is said, in the order of the rows."""
    found: dict[int, Row] = {}
    for row in sorted(rows, key=_place):
        found.setdefault(int(row["said"]), _row(row))
    return list(found.values())[:most]


def _kind(record: dict, document: bool) -> str:
    if document:
        return DOCUMENTS
    return PAIRS if "rejected" in record else JUDGED if "label" in record else ANSWERS


def _told(record: dict) -> tuple[int, int, int, str | None]:
    """(id, hash of what is answered, hash of the answer, its text if it may be a label).

    Rows of the same topic that say different things contradict each other. The hashes are for this process and its
    forks alone.
    """
    *before, said = map(_whole, record["messages"])
    number = record["id"]
    if is_document(record["messages"]):
        return number, hash(said), 0, None
    with_it = [repr(record[name]) for name in ("tools", "chat_template_kwargs") if name in record]
    prompt, answer = (*before, *with_it), record["messages"][-1]["content"]
    if "rejected" in record:
        return number, hash((prompt, frozenset((answer, record["rejected"])))), hash(answer), None
    if "label" in record:
        label = "desirable" if record["label"] else "undesirable"
        return number, hash((prompt, said)), int(record["label"]), label
    return number, hash(prompt), hash(said), answer if isinstance(said, tuple) else None


def _whole(message: dict) -> tuple[str, str] | str:
    """All that a message is, to be compared."""
    return (message["role"], message["content"]) if len(message) == PLAIN else repr(message)


class _Labels:
    """Counts the answers of each split while they are few and short: then they are labels."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] | None = {split: collections.Counter() for split in SPLITS}
        self.names: set[str] = set()
        self.rows = 0

    def add(self, split: str, answer: str | None) -> None:
        if self.counts is None:
            return
        if answer is not None:
            self.names.add(answer)
        if answer is None or len(answer) > LONGEST_LABEL or len(self.names) > MOST_LABELS:
            self.counts = None
            return
        self.counts[split][answer] += 1
        self.rows += 1

    def add_all(self, later: "_Labels") -> None:
        """Count the rows behind these."""
        self.names |= later.names
        if self.counts is None or later.counts is None or len(self.names) > MOST_LABELS:
            self.counts = None
            return
        self.rows += later.rows
        for split, counts in later.counts.items():
            self.counts[split] += counts

    def table(self) -> dict[str, dict[str, int]] | None:
        """Label -> its rows in each split, the most frequent first; None where answers are no labels."""
        if self.counts is None or len(self.names) * ROWS_A_LABEL > self.rows:
            return None
        table = {name: {split: counts[name] for split, counts in self.counts.items()} for name in self.names}
        return dict(sorted(table.items(), key=lambda entry: (-sum(entry[1].values()), entry[0])))


def _sum(parts: Iterable[collections.Counter[int]]) -> collections.Counter[int]:
    return sum(parts, collections.Counter())


def _quantiles(lengths: collections.Counter[int]) -> list[int]:
    """Of so many rows of each length, as numpy's method ``inverted_cdf``: each is the length of a row."""
    import numpy as np

    different = np.array(sorted(lengths))
    rows_up_to = np.cumsum([lengths[length] for length in different.tolist()])
    at = np.maximum(np.ceil(np.array(QUANTILES) * rows_up_to[-1] - 1), 0)
    return different[np.searchsorted(rows_up_to, at, side="right")].tolist()


def _histogram(lengths: collections.Counter[int]) -> Iterator[tuple[str, int]]:
    """(first to last length, rows): 0, 1, 2 to 3, 4 to 7 and so on, without the empty spans at both ends."""
    counts: collections.Counter[int] = collections.Counter()
    for length, rows in lengths.items():
        counts[length.bit_length()] += rows
    for digits in range(min(counts), max(counts) + 1):
        low, high = (1 << digits) >> 1, (1 << digits) - 1
        yield (f"{low} to {high}" if high > low else f"{high}"), counts[digits]
