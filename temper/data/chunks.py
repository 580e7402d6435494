"""Rows in chunks, so that long ones take no more memory than short ones."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def chunks(items: Iterable, size_of: Callable[[Any], int], most: int, most_items: float = math.inf) -> Iterator[list]:
    """The items in chunks that end with the one that brings their size to `most`, or their number to `most_items`."""
    chunk: list = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if size >= most or len(chunk) >= most_items:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
