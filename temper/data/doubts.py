"""Rows that can be read but may not say what was meant: they are kept, counted, and named in the log."""

import collections
import logging
import re

from temper.data import encodings
from temper.data.layouts import Example
from temper.data.rows import RawFile

log = logging.getLogger("temper")


class Controls:
    """Counts rows with C1 control characters. No text has them; they come from reading Windows text as Latin-1."""

    PATTERN = re.compile("[\x80-\x84\x86-\x9f]")

    def __init__(self, encoding: str):
        self.rows, self.first = 0, ""
        self.as_latin1 = encodings.is_latin1(encoding)

    def look_at(self, example: Example, file: RawFile, number: int) -> None:
        texts = [message["content"] for message in example.messages] + [example.rejected or ""]
        if any(self.PATTERN.search(text) for text in texts):
            self.rows, self.first = self.rows + 1, self.first or file.place(number)

    def add(self, later: "Controls") -> None:
        """Count the rows behind these."""
        self.rows, self.first = self.rows + later.rows, self.first or later.first

    def say(self) -> None:
        if self.rows:
            way_on = "converted from Latin-1: read the original with data.encoding=cp1252"
            if self.as_latin1:
                way_on = "read as Latin-1: set data.encoding=cp1252"
            log.warning(
                "%d rows hold control characters (the first: %s), as a file of Windows does that was %s",
                self.rows,
                self.first,
                way_on,
            )


class Words:
    """Counts rows in which a cell that becomes text is a program's word for "missing", and answers like ``1.0``.

    Args:
        columns: the file's columns that become text -> their names in templates.
    """

    MISSING = frozenset({"None", "nan", "NaN", "NAN", "null", "NULL", "<NA>", "NaT", "#N/A"})
    WHOLE = re.compile(r"-?\d+\.0")

    def __init__(self, columns: dict[str, str]):
        self.columns = columns
        self.rows: collections.Counter[tuple[str, str]] = collections.Counter()  # (column, word) -> rows
        self.first: dict[tuple[str, str], str] = {}  # -> place
        self.whole: str | None = ""  # the first answer, while all are whole numbers with .0

    def look_at(self, row: dict, example: Example, file: RawFile, number: int) -> None:
        for column, name in self.columns.items():
            value = row.get(column)
            if type(value) is str and value in self.MISSING and _shows(example, value):
                self.rows[name, value] += 1
                self.first.setdefault((name, value), file.place(number))
        if self.whole is not None:
            answer = example.messages[-1]["content"]
            self.whole = self.whole or answer if self.WHOLE.fullmatch(answer) else None

    def add(self, later: "Words") -> None:
        """Count the rows behind these."""
        self.rows += later.rows
        self.first = later.first | self.first
        self.whole = None if None in (self.whole, later.whole) else self.whole or later.whole

    def say(self) -> None:
        for (name, word), rows in self.rows.items():
            log.warning(
                "%d rows have '%s' in column '%s' (the first: %s), which is learned as a word; if it says that a value "
                "is missing, leave such rows out: set data.where to \"%s != '%s'\"",
                rows,
                word,
                name,
                self.first[name, word],
                name,
                word,
            )
        if self.whole:
            log.warning(
                "all answers are whole numbers with .0, as in %s: pandas writes them so where one is missing; to learn "
                "%s, use data.layout=template and the filter int: data.completion='{{ COLUMN | int }}'",
                self.whole,
                self.whole.removesuffix(".0"),
            )


def _shows(example: Example, word: str) -> bool:
    """Whether a word stands in the conversation: a template may have put something else in its place."""
    texts = [message["content"] for message in example.messages] + [example.rejected or ""]
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for text in texts)
