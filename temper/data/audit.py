"""Counts and shows what tokenizing did to the rows."""

import bisect
import collections
import itertools
import logging

from temper.data.columns import IGNORED
from temper.data.encoder import Encoded, Encoder

log = logging.getLogger("temper")

SHOWN = 5  # rows in audit.txt
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
    "reasoning_not_in_template": "the chat template leaves out an answer's reasoning; it is learned as the row has it, "
    "behind the prompt's <think>",
    "without_reasoning": "an answer has no reasoning, and the empty block that the chat template writes for it is "
    "learned (prompt.chat_template_kwargs.enable_thinking=false, where the template knows it, puts it into the prompt)",
}
NOTABLE = 0.05  # warn if more than this share of rows exceeds max_length


class Audit:
    """What happened to the rows of one split.

    Args:
        special_allowed: whether texts that spell control tokens become control tokens.
    """

    def __init__(self, special_allowed: bool = False):
        self.special_allowed = special_allowed
        self.lengths: collections.Counter[int] = collections.Counter()  # length -> rows, including dropped ones
        self.too_long = self.nothing_left = self.retokenized = self.ended_early = self.equal = 0
        self.last_only = self.several = self.more = self.special = self.written = self.without_reasoning = 0
        self.rows = self.tokens = self.learned = self.rejected = 0

    @property
    def read(self) -> int:
        return self.lengths.total()

    def count(self, encoded: list[Encoded], max_length: int) -> None:
        """Count a row: its length is that of its text, or of the longer text of a pair."""
        length = max(one.length for one in encoded)
        self.lengths[length] += 1
        self.too_long += length > max_length
        self.retokenized += any(one.retokenized for one in encoded)

    def keep(self, encoded: list[Encoded]) -> None:
        self.rows += 1
        self.tokens += sum(one.tokens for one in encoded)
        self.learned += _learned(encoded[0])
        self.rejected += sum(_learned(one) for one in encoded[1:])

    def summary(self) -> dict:
        """Counts, quantiles and a histogram of lengths, and the `max_length` that would keep 99% of the rows."""
        read = self.read
        quantile = {str(q): self._length_of(min(read - 1, int(q * read))) for q in (0.5, 0.9, 0.99)} if read else {}
        suggested = -(-quantile["0.99"] // 8) * 8 if quantile else None
        return {
            "rows": self.rows,
            "read": read,
            "longer_than_max_length": self.too_long,
            "dropped": read - self.rows,
            "answer_cut_off_entirely": self.nothing_left,
            "answer_with_end_token": self.ended_early,
            "equal_pairs": self.equal,
            "only_last_answer_learned": self.last_only,
            "became_several_rows": self.several,
            "rows_from_earlier_answers": self.more,
            "special_text": 0 if self.special_allowed else self.special,
            "special_text_allowed": self.special if self.special_allowed else 0,
            "reasoning_not_in_template": self.written,
            "without_reasoning": self.without_reasoning,
            "tokenized_piecewise": self.retokenized,
            "tokens": self.tokens,
            "learned_tokens": self.learned,
            **({"rejected_tokens": self.rejected} if self.rejected else {}),
            "longest": max(self.lengths, default=None),
            "quantiles": quantile,
            "suggested_max_length": suggested,
            "histogram": _histogram(self.lengths),
        }

    def _length_of(self, rank: int) -> int:
        """The length of the row with this number, from 0, in the order of lengths."""
        lengths = sorted(self.lengths)
        rows_up_to = list(itertools.accumulate(self.lengths[length] for length in lengths))
        return lengths[bisect.bisect_right(rows_up_to, rank)]


def _learned(encoded: Encoded) -> int:
    return len(encoded.labels) - encoded.labels.count(IGNORED)


def _histogram(lengths: collections.Counter[int]) -> dict[str, int]:
    """Rows per power of two: ``{"33-64": 12, ...}``."""
    counts: collections.Counter[int] = collections.Counter()
    for length, rows in lengths.items():
        counts[max(1, 1 << (length - 1).bit_length())] += rows
    return {f"{top // 2 + 1}-{top}": counts[top] for top in sorted(counts)}


def shown_rows(train, encoder: Encoder) -> str:
    """The first rows as text, with the learned parts between >>> and <<<."""
    pairs = "rejected" in train.column_names
    lines = ["What the model reads in training. It learns what stands between >>> and <<<, nothing else.\n"]
    if pairs:
        lines = [
            "What the model reads in training, the chosen answer first. Supervised fine-tuning learns what stands\n"
            "between >>> and <<< in it; preference optimization compares the last answers of the two.\n"
        ]
    if encoder.apart:
        lines[0] += "The encoder reads what stands before =>, the decoder makes what follows.\n"
    for row in train.select(range(min(SHOWN, len(train)))):
        title = f"--- row {row['id']}"
        if "label" in row:
            title += f", {'desirable' if row['label'] else 'undesirable'}"
        lines.append(f"{title}{', chosen' if pairs else ''}\n{_marked(row['input_ids'], row['labels'], encoder)}\n")
        if pairs:
            lines.append(f"{title}, rejected\n{_marked(row['rejected_input_ids'], row['rejected_labels'], encoder)}\n")
    return "\n".join(lines)


def _marked(ids: list[int], labels: list[int], encoder: Encoder) -> str:
    tokenizer = encoder.tokenizer
    if encoder.apart:
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
        if audit["longer_than_max_length"] > NOTABLE * audit["read"]:
            log.warning(
                "warning: %d of %d rows of %s are longer than tokenize.max_length; %s would keep 99%% of them",
                audit["longer_than_max_length"],
                audit["read"],
                split,
                audit["suggested_max_length"],
            )
