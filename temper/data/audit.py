"""Counts and shows what tokenizing did to the rows."""

import bisect
import collections
import itertools
import logging
from collections.abc import Collection

from temper.data.columns import IGNORED
from temper.data.encoder import Encoded

log = logging.getLogger("temper")

SHOWN = 5  # rows in audit.txt
FIRST = 3  # rows that are named of what was found
DROPPED = {  # messages about rows that are dropped whatever their length
    "answer_cut_off_entirely": "tokenize.max_length cuts their last answer off",
    "answer_with_end_token": "an answer holds a token that ends answers, and what follows it could not be learned",
    "equal_pairs": "the chosen and the rejected answer are the same tokens",
}
TOLD = {  # messages about rows that are kept
    "only_last_answer_learned": "only the last answer is learned, for the chat template shows earlier turns otherwise "
    "than when they were answered",
    "became_several_rows": "each answer is a row of its own, behind the history that it has at inference, for the chat "
    "template shows earlier turns otherwise than when they were answered",
    "special_text": "a text spells a control token, which is text for the model too (prompt.allow_special_text=true "
    "makes control tokens of them)",
    "special_text_allowed": "a text spells a control token, which the model reads as that token",
    "end_spelled": "an answer ends with the text of a token that ends answers, so the model learns to write that text "
    "before the token itself",
    "reasoning_not_in_template": "the chat template leaves out an answer's reasoning; it is learned as the row has it, "
    "behind the prompt's <think>",
    "without_reasoning": "an answer has no reasoning, and the empty block that the chat template writes for it is "
    "learned (prompt.chat_template_kwargs.enable_thinking=false, where the template knows it, puts it into the prompt)",
    "doubled_begin": "a text begins with two begin tokens (the tokenizer puts one before each text, and a template may "
    "have another)",
    "doubled_end": "a token that ends answers comes twice in a row",
}
LENGTHS = {  # messages about rows that are longer than tokenize.max_length
    "dropped": "are left out",
    "longer_than_max_length": "are longer than tokenize.max_length",
    "truncated": "are cut to tokenize.max_length",
    "continued": "are longer than tokenize.max_length, and go on in another row behind their last token there",
    "end_not_learned": "have lost the end of an answer by that, so nothing teaches the model to stop there",
}
FINDINGS = (*LENGTHS, *DROPPED, *TOLD, "tokenized_piecewise")  # what audit.json counts of each split
NOTABLE = 0.05  # warn if more than this share of rows exceeds max_length


class Audit:
    """What happened to the rows of one split: counts by what was found, and the ids of the first rows of each.

    Args:
        special_allowed: whether texts that spell control tokens become control tokens.
    """

    def __init__(self, special_allowed: bool = False):
        self.special = "special_text_allowed" if special_allowed else "special_text"
        self.lengths: collections.Counter[int] = collections.Counter()  # length -> rows, including dropped ones
        self.counts: collections.Counter[str] = collections.Counter()
        self.first: dict[str, list[int]] = {}
        self.rows = self.tokens = self.learned = self.rejected = 0

    @property
    def read(self) -> int:
        return self.lengths.total()

    def find(self, what: str, number: int) -> None:
        """Something was found in the row with this id."""
        self.counts[what] += 1
        self._name(what, number)

    def _name(self, what: str, number: int) -> None:
        first = self.first.setdefault(what, [])
        if len(first) < FIRST and number not in first:
            first.append(number)

    def add(self, later: "Audit") -> None:
        """Count what happened to the rows behind these."""
        self.lengths += later.lengths
        self.counts += later.counts
        for what, numbers in later.first.items():
            for number in numbers:
                self._name(what, number)
        self.rows += later.rows
        self.tokens += later.tokens
        self.learned += later.learned
        self.rejected += later.rejected

    def count(self, number: int, encoded: list[Encoded], max_length: int) -> None:
        """Count a row: its length is that of its text, or of the longer text of a pair."""
        length = max(one.length for one in encoded)
        self.lengths[length] += 1
        if length > max_length:
            self.find("longer_than_max_length", number)
        if any(one.retokenized for one in encoded):
            self.find("tokenized_piecewise", number)

    def keep(self, number: int, encoded: list[Encoded], stop_ids: Collection[int]) -> None:
        self.rows += 1
        self.tokens += sum(one.tokens for one in encoded)
        self.learned += _learned(encoded[0])
        self.rejected += sum(_learned(one) for one in encoded[1:])
        if any(one.labels[-1] not in stop_ids for one in encoded):
            self.find("end_not_learned", number)

    def summary(self) -> dict:
        """Counts, quantiles and a histogram of lengths, and the `max_length` that would keep 99% of the rows.

        `first` has the ids of the first rows of what was found.
        """
        read = self.read
        quantile = {str(q): self._length_of(min(read - 1, int(q * read))) for q in (0.5, 0.9, 0.99)} if read else {}
        suggested = -(-quantile["0.99"] // 8) * 8 if quantile else None
        return {
            "rows": self.rows,
            "read": read,
            **{name: self.counts[name] for name in FINDINGS},
            "rows_from_earlier_answers": self.counts["rows_from_earlier_answers"],
            "tokens": self.tokens,
            "learned_tokens": self.learned,
            **({"rejected_tokens": self.rejected} if self.rejected else {}),
            "longest": max(self.lengths, default=None),
            "quantiles": quantile,
            "suggested_max_length": suggested,
            "histogram": _histogram(self.lengths),
            "first": {name: self.first[name] for name in FINDINGS if name in self.first},
        }

    def _length_of(self, rank: int) -> int:
        """The length of the row with this number, from 0, in the order of lengths."""
        lengths = sorted(self.lengths)
        rows_up_to = list(itertools.accumulate(self.lengths[length] for length in lengths))
        return lengths[bisect.bisect_right(rows_up_to, rank)]


def doubled(texts, tokens: Collection[int]) -> tuple[list[int], list[int]]:
    """Texts of a `pyarrow.ListArray` of token ids that (begin with, have further on) one of `tokens` twice in a row."""
    import numpy as np

    ids, starts = texts.flatten().to_numpy(zero_copy_only=False), texts.offsets.to_numpy() - texts.offsets[0].as_py()
    at = np.flatnonzero((ids[1:] == ids[:-1]) & np.isin(ids[1:], list(tokens)))
    rows = np.searchsorted(starts, at, side="right") - 1
    same = at + 1 < starts[rows + 1]  # not the end of one text and the beginning of the next
    begins = at == starts[rows]
    return np.unique(rows[same & begins]).tolist(), np.unique(rows[same & ~begins]).tolist()


def _learned(encoded: Encoded) -> int:
    return len(encoded.labels) - encoded.labels.count(IGNORED)


def _histogram(lengths: collections.Counter[int]) -> dict[str, int]:
    """Rows per power of two: ``{"33-64": 12, ...}``."""
    counts: collections.Counter[int] = collections.Counter()
    for length, rows in lengths.items():
        counts[max(1, 1 << (length - 1).bit_length())] += rows
    return {f"{top // 2 + 1}-{top}": counts[top] for top in sorted(counts)}


def shown_rows(train, tokenizer, apart: bool) -> str:
    """The first rows as text, with the learned parts between >>> and <<<.

    Args:
        apart: whether the model is an encoder-decoder.
    """
    pairs = "rejected" in train.column_names
    lines = ["What the model reads in training. It learns what stands between >>> and <<<, nothing else.\n"]
    if pairs:
        lines = [
            "What the model reads in training, the chosen answer first. Supervised fine-tuning learns what stands\n"
            "between >>> and <<< in it; preference optimization compares the last answers of the two.\n"
        ]
    if apart:
        lines[0] += "The encoder reads what stands before =>, the decoder makes what follows.\n"
    for row in train.select(range(min(SHOWN, len(train)))):
        title = f"--- row {row['id']}"
        if "label" in row:
            title += f", {'desirable' if row['label'] else 'undesirable'}"
        lines.append(
            f"{title}{', chosen' if pairs else ''}\n{_marked(row['input_ids'], row['labels'], tokenizer, apart)}\n"
        )
        if pairs:
            lines.append(
                f"{title}, rejected\n{_marked(row['rejected_input_ids'], row['rejected_labels'], tokenizer, apart)}\n"
            )
    return "\n".join(lines)


def _marked(ids: list[int], labels: list[int], tokenizer, apart: bool) -> str:
    if apart:
        return f"{tokenizer.decode(ids)}\n=> >>>{tokenizer.decode(labels)}<<<"
    text, learning = "", False
    for token, label in zip(ids, labels, strict=True):
        if (label != IGNORED) != learning:
            text += "<<<" if learning else ">>>"
            learning = not learning
        text += tokenizer.decode([token])
    return text + ("<<<" if learning else "")


def report(audits: dict[str, dict]) -> None:
    for split, audit in audits.items():
        log.info(
            "%s: %d rows, %d tokens, %d learned; dropped %d of %d rows (longest %s, 99%% within %s)",
            split,
            audit["rows"],
            audit["tokens"],
            audit["learned_tokens"],
            audit["dropped"],
            audit["read"],
            audit["longest"],
            audit["quantiles"].get("0.99"),
        )
        for name, what in TOLD.items():
            if audit[name]:
                log.warning("warning: %d of %d rows of %s: %s", audit[name], audit["read"], split, what)
        for name, what in DROPPED.items():
            if audit[name]:
                log.warning("warning: %d of %d rows of %s are left out: %s", audit[name], audit["read"], split, what)
        if audit["end_not_learned"]:
            log.warning(
                "warning: %d of %d rows of %s %s",
                audit["end_not_learned"],
                audit["read"],
                split,
                LENGTHS["end_not_learned"],
            )
        if audit["continued"]:
            log.info(
                "note: %d of %d documents of %s %s", audit["continued"], audit["read"], split, LENGTHS["continued"]
            )
        elif audit["longer_than_max_length"] > NOTABLE * audit["read"]:
            log.warning(
                "warning: %d of %d rows of %s are longer than tokenize.max_length; %s would keep 99%% of them",
                audit["longer_than_max_length"],
                audit["read"],
                split,
                audit["suggested_max_length"],
            )
