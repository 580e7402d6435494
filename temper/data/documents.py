"""Raw text to learn: documents as token ids, cut where they are too long, and put together to rows of even length.

A document begins with the token that begins a text (that which ends one, where the tokenizer has no other), which is
only read, and ends with the token that ends a text. So each of its own tokens is predicted once, and the model learns
where documents end. One that is longer than a row goes on in another, behind its last token there.

Several documents share a training row, but see nothing of each other: before they go through the model, `apart` takes
them apart again, and each is computed as if it were alone (Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination"). A row is a unit of batches: so many tokens of whole documents.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from temper.data.chunks import chunks
from temper.data.columns import DOCUMENTS, IGNORED
from temper.model.reading import reading

T = TypeVar("T")
STRETCH = 2**20  # tokens that are put into rows together: memory does not grow with the data


class Piece(NamedTuple):
    """A document, or a part of one: its tokens, of which the first is only read, and its text."""

    ids: list[int]
    text: str

    @property
    def labels(self) -> list[int]:
        return [IGNORED, *self.ids[1:]]


def beginning(tokenizer) -> int:
    """The token before a text's first one."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def windows(tokens: list[int], first: int, most: int) -> Iterator[tuple[int, list[int]]]:
    """(where it begins, at most `most` tokens: one that is only read, then those that are predicted) for each part."""
    for start in range(0, len(tokens), most - 1):
        yield start, [tokens[start - 1] if start else first, *tokens[start : start + most - 1]]


class Documents:
    """Tokenizes documents for one tokenizer.

    Args:
        allow_special_text: whether a text that spells a special token becomes that token.
    """

    def __init__(self, tokenizer, allow_special_text: bool = False):
        self.tokenizer, self.allow_special_text = tokenizer, allow_special_text
        self.first, self.end = beginning(tokenizer), tokenizer.eos_token_id

    def tokens(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """(its tokens with the end, where each begins in the text) of each document."""
        with reading(self.tokenizer.name_or_path):
            made = self.tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=not self.allow_special_text,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
        return [
            ([*ids, self.end], [*(start for start, _ in offsets), len(text)])
            for text, ids, offsets in zip(texts, made["input_ids"], made["offset_mapping"], strict=True)
        ]

    def pieces(self, text: str, tokens: list[int], starts: list[int], most: int) -> list[Piece]:
        """A document in parts of at most `most` tokens; their texts together are its own.

        Args:
            tokens, starts: as `tokens` gives them.
        """
        parts = list(windows(tokens, self.first, most))
        borders = [0, *(starts[at] for at, _ in parts[1:]), len(text)]
        return [Piece(ids, text[borders[at] : borders[at + 1]]) for at, (_, ids) in enumerate(parts)]


def packed(items: Iterable[T], most: int, length_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Rows of items with at most `most` tokens together; an item longer than that is a row.

    Items of similar length share a row: attention computes as many places for each as for the longest, while the room
    that a row has left costs nothing, because rows are not padded.
    """
    for stretch in chunks(items, length_of, STRETCH):
        yield from _of_similar_length(stretch, most, length_of)


def _of_similar_length(items: list[T], most: int, length_of: Callable[[T], int]) -> Iterator[list[T]]:
    row: list[T] = []
    room = 0
    for item in sorted(items, key=length_of):
        if length_of(item) > room:
            if row:
                yield row
            row, room = [], most
        row.append(item)
        room -= length_of(item)
    if row:
        yield row


def apart(row: dict) -> list[dict]:
    """The documents of a training row, each a row of its own; other rows as they are."""
    lengths = row.get(DOCUMENTS)
    if lengths is None or len(lengths) == 1:
        return [row]
    made, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        made.append({"input_ids": row["input_ids"][part], "labels": row["labels"][part], "prompt_length": 1})
        start += length
    return made
