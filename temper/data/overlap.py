"""Rows of one split that stand in another: with the same prompt, with nearly the same one, or of the same group.

A row of the test split that was trained on makes a figure better than the model is. Which rows are the same is known by
a hash of the prompt. Nearly the same are those whose prompts have a Jaccard similarity of `NEAR` or more, over the
distinct runs of `WIDTH` characters, without those that many rows have (the words of an instruction around each text).
Candidates come from bottom-k sketches (Broder 1997, "On the resemblance and containment of documents"): the `SKETCH`
smallest hashes of a row, of which two similar rows share most. Each candidate's similarity is then computed exactly, so
what is reported is so.

Only the rows of validation and test are held in memory, with some 500 bytes each, and a sample of `HELD_OF_TRAIN` rows
of train; all others pass by, read by several processes where they are many. The rows of train are compared with that
sample, too. That tells which of its prompts nearly repeat another: of all of train when it has no more rows than that.
"""

import collections
import functools
import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from temper.data.chunks import chunks
from temper.data.places import Place, named_place
from temper.data.sample import Sample
from temper.data.splitting import asked, keep_lines
from temper.data.workers import of_lines
from temper.errors import UserError
from temper.files import json_lines, write_whole
from temper.progress import Progress

log = logging.getLogger("temper")
FILE = "overlap.jsonl"

NEAR = 0.7  # Jaccard similarity from which two prompts count as nearly the same: one other word of twelve
WIDTH = 5  # characters
SKETCH = 24  # hashes a row
LIKELY = (
    0.4  # share of them from which the similarity is computed; rows of similarity 0.7 have that in 99.9% of the cases
)
MOST_LOOKED_AT = 8 * SKETCH  # hashes of a row that a sketch is chosen from, so that long rows need no long sorting
BITS = 48  # of a hash; the 16 above hold the row's place in its batch
MOST_ROWS, MOST_CHARACTERS = 2**15, 2**20  # of a batch
COMMON, SAMPLE = 0.05, 2000  # runs of characters in more than this share of so many rows tell nothing
HELD_OF_TRAIN = 3_000  # rows of train that all others there are compared with
MOST_COMPARED = 50  # prompts that one of them is compared with, at most, until a near one is found
COMPARED, LOOKED_THROUGH = 256, 2**16  # pairs that are compared at once, and among how many they are looked for
MOST_HOLDERS = 500  # a hash that more rows of a split have is not looked up: that would take rows x rows
NO_GROUP = 0
KINDS = {"prompt": "with the same prompt", "near": "with nearly the same", "group": "of the same group"}
PAIRS = (("train", "test"), ("train", "validation"), ("validation", "test"))  # (the one that is learned from, the held)


class Overlap(NamedTuple):
    """A row `id` of `split` that stands as row `other_id` in the split `other`.

    `kind`: prompt, near or group. `similarity`: of the prompts; None for a group.
    """

    split: str
    id: int
    other: str
    other_id: int
    kind: str
    similarity: float | None


class NearTrain(NamedTuple):
    """Prompts of train that nearly repeat another prompt there.

    `prompts`: that were looked at, all different. `whole`: whether that is every prompt of train. `found`: one overlap
    of train with itself for each of them that has one, in the order of the rows.
    """

    prompts: int
    whole: bool
    found: list[Overlap]


def find(folder: Path, rows: int, drop: bool) -> tuple[list[Overlap], dict[str, set[int]], NearTrain]:
    """Compare the splits in a folder of format_prompts, and train with itself.

    Args:
        rows: of train, roughly, to take a sample of them.
        drop: whether rows that stand in the split held against theirs are to be taken out, so that they do not count
            in train.

    Returns:
        (each row of test and validation that stands in a split that is learned from, or in that which chooses, with
        the first row there; split -> ids of its rows that stand in the split held against it; what nearly stands twice
        in train)
    """
    train = folder / "train.jsonl"
    common = _common(_every(train, max(1, rows // SAMPLE)))
    held = {split: _Held(split, folder / f"{split}.jsonl", common, every=drop) for split in ("validation", "test")}
    sample = _SampleOfTrain("train", train, common, Sample(HELD_OF_TRAIN, rows))
    shared: dict[str, set[int]] = {"train": set(), "validation": set()}
    with Progress(None, "compare splits", "rows") as progress:
        for split in shared:
            others = [held[other] for learned, other in PAIRS if learned == split and len(held[other].prompts)]
            itself = [sample] if split == "train" else []
            look = functools.partial(_looked_up, [*others, *itself], common)
            for rows, found in of_lines(folder / f"{split}.jsonl", look) if others or itself else ():
                for other, one in zip(others, found, strict=False):
                    shared[split] |= other.compare(split, one)
                if itself:
                    sample.look_at(found[-1], shared["train"] if drop else set())
                progress.update(rows)
    return [found for one in held.values() for found in one.overlaps()], shared, sample.near(drop, shared["train"])


def _looked_up(held: list["_Held"], common, lines: list[bytes]) -> tuple[int, list["Looked"]]:
    """(how many lines, what they have in common with each of `held`)."""
    rows = list(map(_row, lines))
    sketches = _sketches([row.text for row in rows], common)
    return len(rows), [one.look_up(rows, sketches) for one in held]


def tell(folder: Path, found: list[Overlap], policy: str, where: dict[int, Place]) -> list[dict]:
    """List the overlaps in a file of the folder, and warn of them, or refuse them where the policy is ``error``.

    Args:
        where: the places of the first of each two splits.

    Returns:
        for each two splits that share rows: how many, by kind, and the places of the first, for stats.json.
    """
    write_whole(folder / FILE, json_lines([one._asdict() for one in found]))
    told = [_told(some, where) for some in by_pair(found)]
    for line in map(_sentence, told):
        if policy == "error":
            raise UserError(f"{line}; move or remove them, or let data.on_overlap=drop leave them out of training")
        log.warning("warning: %s (%s lists all)", line, FILE)
    return told


def leave_out(folder: Path, shared: dict[str, set[int]]) -> dict[str, int]:
    """Take rows out of the splits; how many of each."""
    taken = {}
    for split, ids in shared.items():
        path, before, after = folder / f"{split}.jsonl", 0, 0

        def keeps(_index: int, line: bytes, ids=ids) -> bool:
            return json.loads(line)["id"] not in ids

        before = _lines(path)
        if ids:
            keep_lines(path, keeps)
        after = _lines(path)
        if ids and not after:
            raise UserError(f"data.on_overlap=drop leaves nothing: all {before} rows of {split} stand in other splits")
        taken[split] = before - after
    return taken


def _lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def _told(found: list[Overlap], where: dict[int, Place]) -> dict:
    kinds = collections.Counter(one.kind for one in found)
    return {
        "split": found[0].split,
        "other": found[0].other,
        "rows": len(found),
        **{kind: kinds[kind] for kind in KINDS},
        "first": named_place(where, found[0].id),
        "first_in_other": named_place(where, found[0].other_id),
    }


def _sentence(told: dict) -> str:
    kinds = ", ".join(f"{told[kind]} {words}" for kind, words in KINDS.items() if told[kind])
    return (
        f"{told['rows']} rows of {told['split']} stand in {told['other']}, too ({kinds}): the first is "
        f"{told['first']}, as {told['first_in_other']}"
    )


def by_pair(found: list[Overlap]) -> list[list[Overlap]]:
    """The overlaps of each two splits that have some."""
    pairs = [[one for one in found if (one.other, one.split) == pair] for pair in PAIRS]
    return [some for some in pairs if some]


# --- the rows ------------------------------------------------------------------------------------


class _Row(NamedTuple):
    id: int
    hash: int
    text: str  # the prompt, in small letters and with single blanks
    group: str | None


def _row(line: bytes) -> _Row:
    record = json.loads(line)
    prompt = asked(record["messages"])
    text = " ".join(" ".join([content for _, content, *_ in prompt]).casefold().split())
    same = hash(repr(prompt))  # 64 bits, for this process alone
    return _Row(record["id"], same, text.ljust(WIDTH), record.get("group"))


def _group(row: _Row) -> int:
    """A hash of its group."""
    return NO_GROUP if row.group is None else hash(row.group)


def _every(path: Path, step: int) -> list[_Row]:
    with path.open("rb") as lines:
        return [_row(line) for index, line in enumerate(lines) if index % step == 0][:SAMPLE]


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    return chunks(rows, lambda row: len(row.text), MOST_CHARACTERS, MOST_ROWS)


# --- sketches ------------------------------------------------------------------------------------


def _runs(texts: list[str], most: int | None = None):
    """The distinct runs of `WIDTH` characters of each text, sorted: its place in the list above `BITS` bits of hash.

    Args:
        most: only the smallest hashes of each text, about so many.
    """
    import numpy as np

    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in texts])
    starts = len(codes) - WIDTH + 1
    hashes = codes[:starts].copy()
    for offset in range(1, WIDTH):
        hashes *= np.uint64(0x100000001B3)
        hashes += codes[offset : offset + starts]
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64: all bits of the text change all bits
        hashes ^= hashes >> np.uint64(31)
        hashes *= np.uint64(factor)
    hashes >>= np.uint64(64 - BITS)
    ends = np.cumsum(lengths)
    whole = np.ones(starts, dtype=bool)
    for back in range(1, WIDTH):  # those that begin less than WIDTH characters before the end of a text go over it
        whole[ends[:-1] - back] = False
    if most is not None:
        bounds = np.minimum(1.0, most / lengths) * 2.0**BITS
        whole &= hashes < np.repeat(bounds.astype(np.uint64), lengths)[:starts]
    at = np.flatnonzero(whole)
    places = np.searchsorted(ends, at, side="right").astype(np.uint64)
    runs = (places << np.uint64(BITS)) | hashes[at]
    runs.sort()
    return runs[np.concatenate([[True], runs[1:] != runs[:-1]])] if len(runs) else runs


def _hashes(runs):
    import numpy as np

    return runs & np.uint64(2**BITS - 1)


def _places(runs):
    import numpy as np

    return (runs >> np.uint64(BITS)).astype(np.int64)


def _found(hashes, some):
    """The place of each hash in `some`, which are sorted and different; -1 where it is none of these."""
    import numpy as np

    if not len(some):
        return np.full(len(hashes), -1)
    at = np.minimum(np.searchsorted(some, hashes), len(some) - 1)
    return np.where(some[at] == hashes, at, -1)


def _in(hashes, some):
    """Which of the hashes are among `some`."""
    return _found(hashes, some) >= 0


def _without(runs, some):
    return runs[~_in(_hashes(runs), some)]


def _common(rows: list[_Row]):
    """Hashes of the runs that tell nothing, sorted."""
    import numpy as np

    counts: tuple = ([], [])
    if rows:
        runs = np.concatenate([_hashes(_runs([row.text for row in batch])) for batch in _batches(rows)])
        counts = np.unique(runs, return_counts=True)
    hashes, number = map(np.asarray, counts)
    return hashes[number > max(10, COMMON * len(rows))].astype(np.uint64)


def _sketches(texts: list[str], common):
    """The `SKETCH` smallest runs of each text, without the common ones."""
    import numpy as np

    if not texts:
        return np.empty(0, dtype=np.uint64)
    runs = _without(_runs(texts, MOST_LOOKED_AT), common)
    places = _places(runs)
    first = np.searchsorted(places, places)
    return runs[np.arange(len(runs)) - first < SKETCH]


# --- a split that others are held against --------------------------------------------------------


class Looked(NamedTuple):
    """Rows of another split that may stand in one that is held.

    `same`, `grouped`: each row with the place of its prompt, or of its group. `rows`: those with a prompt that is
    likely near; `at`, `places`: of each two such prompts, the place of the row in `rows`, in order, and of the other.
    """

    same: list[tuple[_Row, int]]
    grouped: list[tuple[_Row, int]]
    rows: list[_Row]
    at: Any
    places: Any


class _Places:
    """The different ones of some hashes, in the order in which they first come, each with the ids of its rows."""

    def __init__(self, hashes, ids):
        import numpy as np

        self.hashes, first, which = np.unique(hashes, return_index=True, return_inverse=True)
        self.order = np.argsort(np.argsort(first)).astype(np.int32)  # hash -> its place
        at = self.order[which]
        self.ids = ids[np.argsort(at, kind="stable")]
        self.ends = np.cumsum(np.bincount(at, minlength=len(first)))
        self.first = np.sort(first)  # of each place, the first row

    def __len__(self) -> int:
        return len(self.hashes)

    def of(self, hashes):
        """The place of each hash; -1 where it is none of these."""
        import numpy as np

        at = _found(hashes, self.hashes)
        return np.where(at >= 0, self.order[at], -1) if len(self) else at

    def ids_at(self, place: int) -> list[int]:
        return self.ids[self.ends[place - 1] if place else 0 : self.ends[place]].tolist()


class _Taken(NamedTuple):
    """What is held of some lines, as arrays: of each line its length and whether it is held; of each row that is held
    its id and the hashes of its prompt and group; of each hash of a sketch the place of its row, and itself."""

    lengths: Any
    kept: Any
    ids: Any
    prompts: Any
    groups: Any
    of: Any
    sketches: Any

    @classmethod
    def none(cls) -> "_Taken":
        """Of no lines."""
        import numpy as np

        return cls(*(np.empty(0, dtype=kind) for kind in ("i8", "?", "i8", "i8", "i8", "i8", "u8")))


class _Held:
    """The rows of a split, one for each prompt, and which of them were found in others.

    Args:
        every: whether all rows of others that stand here are looked for, and not one for each that is held.
        sample: hold only its rows.
    """

    def __init__(self, split: str, path: Path, common, every: bool = False, sample: Sample | None = None):
        self.split, self.path, self.common, self.every = split, path, common, every
        self.sample = sample or Sample(1, 1)
        # Other split -> whether it has a row with the prompt of each place, or a near one.
        self.told: dict[str, Any] = {}
        self.found: dict[tuple[str, int], Overlap] = {}  # (other split, id) -> the overlap that is told
        self._read()

    def _read(self) -> None:
        import numpy as np

        made = [_Taken.none(), *of_lines(self.path, self._taken)]
        rows = np.cumsum([0, *(len(some.ids) for some in made[:-1])])
        of = np.concatenate([some.of + before for some, before in zip(made, rows, strict=True)])
        lengths, kept, ids, hashes, groups, _, sketches = map(np.concatenate, zip(*made, strict=True))
        self.prompts = _Places(hashes, ids)
        self.groups = _Places(groups[groups != NO_GROUP], ids[groups != NO_GROUP])
        self.starts = (np.cumsum(lengths) - lengths)[kept][self.prompts.first]  # of a prompt's first line in the file
        first = np.zeros(len(ids), dtype=bool)
        first[self.prompts.first] = True
        self._index(self.prompts.of(hashes)[of[first[of]]], sketches[first[of]])

    def _taken(self, lines: list[bytes]) -> "_Taken":
        """What is held of some lines."""
        import numpy as np

        kept = [line in self.sample for line in lines]
        rows = [_row(line) for line in itertools.compress(lines, kept)]
        runs = _sketches([row.text for row in rows], self.common)
        numbers = [(row.id, row.hash, _group(row)) for row in rows]
        ids, prompts, groups = np.array(numbers, dtype=np.int64).reshape(-1, 3).T
        lengths = np.array([len(line) for line in lines])
        return _Taken(lengths, np.array(kept), ids, prompts, groups, _places(runs), _hashes(runs))

    def _index(self, places, hashes) -> None:
        """Make the matrix of which prompt has which hash, without those that too many have."""
        import numpy as np
        from scipy.sparse import csr_array

        known, number = np.unique(hashes, return_counts=True)
        self.crowded = known[number > MOST_HOLDERS]
        keep = ~_in(hashes, self.crowded)
        places, hashes = places[keep].astype(np.int32), hashes[keep]
        self.known = known[number <= MOST_HOLDERS]
        at = np.searchsorted(self.known, hashes).astype(np.int32)
        shape = (len(self.known), len(self.prompts))
        self.holders = csr_array((np.ones(len(at), dtype=np.int16), (at, places)), shape=shape)
        self.sizes = np.bincount(places, minlength=len(self.prompts))

    def look_up(self, rows: list[_Row], sketches) -> Looked:
        """What rows of another split, or of this one, have in common with those that are held."""
        import numpy as np

        same = self.prompts.of(np.array([row.hash for row in rows], dtype=np.int64))
        groups = self.groups.of(np.array(list(map(_group, rows)), dtype=np.int64))
        at, places = self._likely(len(rows), sketches, same)
        which, at = np.unique(at, return_inverse=True)
        return Looked(
            [(rows[row], int(same[row])) for row in np.flatnonzero(same >= 0)],
            [(rows[row], int(groups[row])) for row in np.flatnonzero(groups >= 0)],
            [rows[row] for row in which],
            at,
            places,
        )

    def compare(self, other: str, looked: Looked) -> set[int]:
        """Tell of rows of another split; gives the ids of those that stand in this one (some, unless `every`)."""
        import numpy as np

        shared = set()
        told = self.told.setdefault(other, np.zeros(len(self.prompts), dtype=bool))
        for row, place in looked.same:
            shared.add(row.id)
            told[place] = True
            self._tell(self.prompts.ids_at(place), other, row, "prompt", 1.0)
        for row, place in looked.grouped:
            shared.add(row.id)
            self._tell(self.groups.ids_at(place), other, row, "group", None)
        open_rows = np.array([self.every and row.id not in shared for row in looked.rows], dtype=bool)
        for row, place, similarity in self._near(looked, open_rows, ~told):
            shared.add(row.id)
            told[place] = True
            self._tell(self.prompts.ids_at(place), other, row, "near", similarity)
        return shared

    def _tell(self, ids: list[int], other: str, row: _Row, kind: str, similarity: float | None) -> None:
        """Keep one overlap of each row: the first, and rather the same prompt than another kind."""
        for number in ids:
            known = self.found.get((other, number))
            if known is None or (kind == "prompt") > (known.kind == "prompt"):
                self.found[other, number] = Overlap(self.split, number, other, row.id, kind, similarity)

    def _near(self, looked: Looked, open_rows, open_places) -> Iterator[tuple[_Row, int, float]]:
        """(a row, the place of a prompt here that is nearly the same, how similar it is).

        A pair is compared only while its row or its place is open, and a near one closes both: where a thousand rows
        are near each other, one comparison of each is enough.
        """
        import numpy as np

        rows, places = looked.at, looked.places
        if self.every:  # the first candidate of each row, then the second of those that are still open, ...
            order = np.argsort(np.arange(len(rows)) - np.searchsorted(rows, rows), kind="stable")
            rows, places = rows[order], places[order]
        start = 0
        while start < len(rows):
            part = slice(start, start + LOOKED_THROUGH)
            wanted = np.flatnonzero(open_rows[rows[part]] | open_places[places[part]])[:COMPARED] + start
            start = int(wanted[-1]) + 1 if len(wanted) == COMPARED else part.stop
            for at, place, similarity in self._compared(looked.rows, rows[wanted].tolist(), places[wanted].tolist()):
                open_rows[at] = open_places[place] = False
                yield looked.rows[at], place, similarity

    def _likely(self, number: int, sketches, same) -> tuple[Any, Any]:
        """(places of some of `number` rows, places of another prompt here each that may be nearly the same).

        Args:
            same: the place here of each row's own prompt, or -1.
        """
        import numpy as np
        from scipy.sparse import csr_array

        sketches = _without(sketches, self.crowded)
        sizes = np.bincount(_places(sketches), minlength=number)
        at = _found(_hashes(sketches), self.known)
        some, at = sketches[at >= 0], at[at >= 0]
        if not len(some):
            return np.array([], dtype=int), np.array([], dtype=int)
        shape = (number, len(self.known))
        matches = csr_array((np.ones(len(at), dtype=np.int16), (_places(some), at)), shape=shape) @ self.holders
        pairs = matches.tocoo()
        likely = pairs.data >= LIKELY * np.minimum(sizes[pairs.coords[0]], self.sizes[pairs.coords[1]])
        likely &= same[pairs.coords[0]] != pairs.coords[1]
        return pairs.coords[0][likely], pairs.coords[1][likely]

    def _compared(self, some: list[_Row], rows: list[int], places: list[int]) -> Iterator[tuple[int, int, float]]:
        """Those of the pairs of a row (its place in `some`) and a place that are near, and how similar."""
        if not rows:
            return
        with self.path.open("rb") as lines:
            texts = [
                text
                for row, place in zip(rows, places, strict=True)
                for text in (some[row].text, self._text(lines, place))
            ]
        for row, place, similarity in zip(rows, places, _jaccard(texts, self.common), strict=True):
            if similarity >= NEAR:
                yield row, place, float(similarity)

    def _text(self, lines, place: int) -> str:
        lines.seek(int(self.starts[place]))
        return _row(lines.readline()).text

    def overlaps(self) -> list[Overlap]:
        return sorted(self.found.values(), key=lambda one: (one.other, one.id))


class _SampleOfTrain(_Held):
    """Rows of train that all rows of train are compared with, each until a near one is found."""

    def __init__(self, split: str, path: Path, common, sample: Sample):
        super().__init__(split, path, common, sample=sample)
        self.one: dict[int, Overlap] = {}  # place of a prompt -> the first that it nearly repeats
        self.times: collections.Counter[int] = collections.Counter()  # that a prompt was compared with another

    def look_at(self, looked: Looked, gone: set[int]) -> None:
        """Find near prompts among some rows of train. `gone`: the ids of those that are to be taken out."""
        import numpy as np

        rows, places = looked.at, looked.places
        if gone:
            kept = ~np.array([row.id in gone for row in looked.rows], dtype=bool)[rows]
            rows, places = rows[kept], places[kept]
        for start in range(0, len(rows), COMPARED):
            part = slice(start, start + COMPARED)
            pairs = zip(rows[part].tolist(), places[part].tolist(), strict=True)
            waiting = [(row, place) for row, place in pairs if self._is_open(place)]
            for _, place in waiting:
                self.times[place] += 1
            some = [row for row, _ in waiting], [place for _, place in waiting]
            for row, place, similarity in self._compared(looked.rows, *some):
                ids = self.prompts.ids_at(place)[0], looked.rows[row].id
                self.one.setdefault(place, Overlap(self.split, ids[0], self.split, ids[1], "near", similarity))

    def _is_open(self, place: int) -> bool:
        return place not in self.one and self.times[place] < MOST_COMPARED

    def near(self, drop: bool, shared: set[int]) -> NearTrain:
        """What was found. `drop`: whether the rows `shared` are taken out."""
        places = range(len(self.prompts))
        kept = [place for place in places if not (drop and shared.issuperset(self.prompts.ids_at(place)))]
        return NearTrain(len(kept), self.sample.whole, [self.one[place] for place in kept if place in self.one])


def _jaccard(texts: list[str], common):
    """How similar each text at an even place is to the one after it."""
    import numpy as np

    runs = _without(_runs(texts), common)
    pairs = np.uint64(1) << np.uint64(BITS)
    of_pairs = np.sort(((runs // pairs) >> np.uint64(1)) * pairs + runs % pairs)
    number = len(texts) // 2
    both = np.bincount(_places(of_pairs[1:][of_pairs[1:] == of_pairs[:-1]]), minlength=number)
    return both / np.maximum(np.bincount(_places(of_pairs), minlength=number) - both, 1)
