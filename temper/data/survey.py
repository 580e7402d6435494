"""What the rows of the splits are like: which repeat each other or contradict each other, their labels and lengths.

All of it is of the rows as they are trained and judged on: after data.where, data.limit and data.on_overlap. A row that
a mixture's weight repeats counts once. A row's prompt is all that stands before its last answer, here with its system
message, tools and template arguments: with another one of these, another answer may be right.
"""

import array
import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from temper.data.columns import SPLITS
from temper.data.conversations import PLAIN, is_document
from temper.data.languages import LONGEST
from temper.data.sample import Sample

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


class Survey:
    """One pass over the files of the splits. Holds 36 bytes a row in memory, 40 of preference pairs.

    Args:
        folder: of format_prompts or mix_prompts.
        rows: in all splits, to take a sample of them.
    """

    def __init__(self, folder: Path, rows: int):
        self.ids, self.lines = array.array("q"), array.array("I")
        self.topics, self.said = array.array("q"), array.array("q")  # hashes: of what is answered, and of the answer
        self.lengths = {name: array.array("I") for name in TEXTS}
        self.ranges: dict[str, slice] = {}
        self.labels = _Labels()
        self.kind = ANSWERS
        self.repeated = 0  # rows more that weights make
        self.sampled: list[tuple[str, str]] = []  # beginnings of the last user message and of its answer
        self._sample = Sample(SAMPLED, rows)
        for split in SPLITS:
            start = len(self.ids)
            with (folder / f"{split}.jsonl").open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    self._add(split, number, line)
            self.ranges[split] = slice(start, len(self.ids))

    def _add(self, split: str, number: int, line: bytes) -> None:
        record = json.loads(line.decode())
        *before, last = record["messages"]
        answer = last["content"]
        document = is_document(record["messages"])
        topic, said, label = _told(record, document)
        if self.ids and (record["id"], topic, said) == (self.ids[-1], self.topics[-1], self.said[-1]):
            self.repeated += 1
            return
        self.kind = _kind(record, document)
        self.ids.append(record["id"])
        self.lines.append(number)
        self.topics.append(topic)
        self.said.append(said)
        if document:
            self.lengths["document"].append(len(answer))
        else:
            self.lengths["prompt"].append(sum(len(message["content"]) for message in before))
            self.lengths["answer"].append(len(answer))
        if self.kind == PAIRS:
            self.lengths["rejected"].append(len(record["rejected"]))
        self.labels.add(split, label)
        if line in self._sample:
            asked = next((message["content"] for message in reversed(before) if message["role"] == "user"), "")
            self.sampled.append((answer[:LONGEST] if document else asked[:LONGEST], answer[:LONGEST]))

    def row(self, index: int) -> Row:
        """The row at a place in the survey."""
        split = next(split for split, rows in self.ranges.items() if rows.start <= index < rows.stop)
        return Row(split, self.lines[index], self.ids[index])

    def find(self, split: str, number: int) -> Row:
        """The first row of a split with an id."""
        import numpy as np

        rows = self.ranges[split]
        at = np.flatnonzero(_numbers(self.ids)[rows] == number)
        return self.row(rows.start + int(at[0])) if len(at) else Row(split, None, number)

    def repeats(self, most: int) -> Repeats:
        """Rows with the prompt and the answer of an earlier row of their split. `most`: to name, of each split."""
        import numpy as np

        counts: dict[str, int] = {}
        first: list[list[Row]] = []
        for split, rows in self.ranges.items():
            both = _numbers(self.topics)[rows] * np.int64(MIX) + _numbers(self.said)[rows]
            _, starts, which = np.unique(both, return_index=True, return_inverse=True)
            earliest = starts[which]
            again = np.flatnonzero(earliest != np.arange(len(both)))
            counts[split] = len(again)
            for at in again[: most - len(first)] if len(first) < most else ():
                first.append([self.row(rows.start + int(earliest[at])), self.row(rows.start + int(at))])
        return Repeats(counts, first)

    def several(self, most: int, most_answers: int) -> Several:
        """What has different answers: prompts; of judged answers, those judged both ways; of pairs, those ranked both
        ways. `most`, `most_answers`: to name."""
        import numpy as np

        rows, starts = self._contradicting(slice(0, len(self.ids)))
        if not len(rows):
            return Several(0, 0, 0, 0, [])
        splits = np.searchsorted([found.stop for found in self.ranges.values()], rows, side="right")
        across = np.maximum.reduceat(splits, starts) > np.minimum.reduceat(splits, starts)
        topics = np.split(rows, starts[1:])
        first = [
            self._one_of_each(topics[at], most_answers) for at in np.argsort(np.minimum.reduceat(rows, starts))[:most]
        ]
        in_train = len(self._contradicting(self.ranges["train"])[1])
        return Several(len(starts), len(rows), in_train, int(across.sum()), first)

    def _contradicting(self, part: slice):
        """(rows with a topic of which the part says different things, topic by topic; where each topic starts)."""
        import numpy as np

        topics, said = _numbers(self.topics)[part], _numbers(self.said)[part]
        order = np.lexsort((said, topics))  # stable: rows that say the same stay in their order
        topics, said = topics[order], said[order]
        begins = np.concatenate([[True], topics[1:] != topics[:-1]])[: len(order)]
        others = np.concatenate([[False], (said[1:] != said[:-1]) & ~begins[1:]])[: len(order)]
        group = np.cumsum(begins) - 1
        many = np.bincount(group, others) > 0
        rows = order[many[group]] + part.start
        sizes = np.bincount(group)[many]
        return rows, np.cumsum(sizes) - sizes

    def _one_of_each(self, rows, most: int) -> list[Row]:
        """The first row for each thing that is said, in the order of the rows."""
        found: dict[int, int] = {}
        for index in sorted(rows.tolist()):
            found.setdefault(self.said[index], index)
        return [self.row(index) for index in list(found.values())[:most]]

    def lengths_of(self) -> dict[str, dict]:
        """Of prompts and answers, in characters: by split the quantiles, and the rows of each span of lengths."""
        import numpy as np

        found = {}
        for name, lengths in self.lengths.items():
            if not lengths:
                continue
            numbers = np.frombuffer(lengths, dtype=np.uint32)
            parts = {split: numbers[rows] for split, rows in self.ranges.items() if rows.stop > rows.start}
            quantiles = {split: _quantiles(part) for split, part in parts.items()}
            found[name] = {"quantiles": quantiles, "histogram": dict(_histogram(numbers))}
        return found


def _kind(record: dict, document: bool) -> str:
    if document:
        return DOCUMENTS
    return PAIRS if "rejected" in record else JUDGED if "label" in record else ANSWERS


def _told(record: dict, document: bool) -> tuple[int, int, str | None]:
    """(hash of what is answered, hash of the answer, its text if it may be a label).

    Rows of the same topic that say different things contradict each other. The hashes are for this process alone.
    """
    *before, said = map(_whole, record["messages"])
    if document:
        return hash(said), 0, None
    with_it = [repr(record[name]) for name in ("tools", "chat_template_kwargs") if name in record]
    prompt, answer = (*before, *with_it), record["messages"][-1]["content"]
    if "rejected" in record:
        return hash((prompt, frozenset((answer, record["rejected"])))), hash(answer), None
    if "label" in record:
        return hash((prompt, said)), int(record["label"]), "desirable" if record["label"] else "undesirable"
    return hash(prompt), hash(said), answer if isinstance(said, tuple) else None


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

    def table(self) -> dict[str, dict[str, int]] | None:
        """Label -> its rows in each split, the most frequent first; None where answers are no labels."""
        if self.counts is None or len(self.names) * ROWS_A_LABEL > self.rows:
            return None
        table = {name: {split: counts[name] for split, counts in self.counts.items()} for name in self.names}
        return dict(sorted(table.items(), key=lambda entry: (-sum(entry[1].values()), entry[0])))


def _numbers(some: array.array):
    import numpy as np

    return np.frombuffer(some, dtype=np.int64)


def _quantiles(lengths) -> list[int]:
    import numpy as np

    return np.quantile(lengths, QUANTILES, method="inverted_cdf").astype(int).tolist()


def _histogram(lengths) -> Iterator[tuple[str, int]]:
    """(first to last length, rows): 0, 1, 2 to 3, 4 to 7 and so on, without the empty spans at both ends."""
    import numpy as np

    bits = np.frexp(lengths.astype(float))[1]  # 0 for 0, else how many binary digits the length has
    counts = np.bincount(bits)
    for digits in range(int(bits.min()), len(counts)):
        low, high = (1 << digits) >> 1, (1 << digits) - 1
        yield (f"{low} to {high}" if high > low else f"{high}"), int(counts[digits])
