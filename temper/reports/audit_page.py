"""The page of a data set's tokens: what the model reads in training, and what of it is learned."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from temper.data.audit import DROPPED, LENGTHS, TOLD
from temper.data.columns import DOCUMENTS, IGNORED
from temper.reports import html

ROWS = 20  # shown, spread evenly over the training split


class Token(NamedTuple):
    """A token as people read it. `text`: of several tokens that only together make a character, all of it."""

    text: str
    ids: list[int]
    learned: bool


def write_page(output: Path, audit: dict, train, tokenizer, apart: bool) -> None:
    """Write audit.html.

    Args:
        audit: as in audit.json.
        train: the training split.
        apart: whether the model is an encoder-decoder, whose labels are a sequence of their own.
    """
    numbers = [at * len(train) // min(ROWS, len(train)) for at in range(min(ROWS, len(train)))]
    html.render(
        "audit.html",
        output / "audit.html",
        max_length=audit["max_length"],
        splits=audit["splits"],
        reasons=_found(audit, {**LENGTHS, **DROPPED}),
        remarks=_found(audit, TOLD),
        histogram=_histogram(audit["splits"]["train"]["histogram"]),
        rows=[_shown(row, tokenizer, apart) for row in train.select(numbers)],
        total=len(train),
        pairs="rejected" in train.column_names,
        documents=DOCUMENTS in train.column_names,
    )


def _found(audit: dict, messages: dict[str, str]) -> dict[str, str]:
    """The messages about what happened to rows of some split."""
    return {name: what for name, what in messages.items() if any(split[name] for split in audit["splits"].values())}


def _histogram(rows: dict[str, int]) -> list[tuple[str, int, float]]:
    """(tokens, rows, share of the most frequent length) for a bar each."""
    most = max(rows.values(), default=1)
    return [(span, count, count / most) for span, count in rows.items()]


def _shown(row: dict, tokenizer, apart: bool) -> dict:
    texts = [("", row["input_ids"], row["labels"])]
    if "rejected_input_ids" in row:
        texts = [("chosen", *texts[0][1:]), ("rejected", row["rejected_input_ids"], row["rejected_labels"])]
    return {
        "id": row["id"],
        "source": row.get("source"),
        "texts": [(name, tokens(ids, labels, tokenizer, apart)) for name, ids, labels in texts],
    }


def tokens(ids: list[int], labels: list[int], tokenizer, apart: bool = False) -> list[Token]:
    """The tokens of a row in reading order; for an encoder-decoder first the prompt's, then the labels."""
    marked = [(token, label != IGNORED) for token, label in zip(ids, labels, strict=True)] if not apart else []
    if apart:
        marked = [(token, False) for token in ids] + [(token, True) for token in labels]
    made: list[Token] = []
    waiting: list[int] = []
    for at, (token, learned) in enumerate(marked):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        more = at + 1 < len(marked) and marked[at + 1][1] == learned and len(waiting) < LONGEST
        if text.endswith("\ufffd") and more:  # the beginning of a character
            continue
        made.append(Token(text, waiting, learned))
        waiting = []
    return made


LONGEST = 4  # bytes of a character, of which a token holds at least one
