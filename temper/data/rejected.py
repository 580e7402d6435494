"""Rows that `data.on_bad_row: skip` leaves out: listed with file, line and reason, counted, and bounded."""

import collections
import json
from pathlib import Path
from typing import TextIO

from temper.data.rows import BadRow, RawFile
from temper.errors import UserError, short

FILE = "rejected.jsonl"
SHOWN = 3  # rows in a message
LAYOUT = "layout"  # the kind of reason of a row that can be read but makes no conversation


class Rejected:
    """Collects bad rows. Holds the first few in memory.

    Args:
        path: the file to list them in; None: they are only counted.
    """

    def __init__(self, path: Path | None = None):
        self.rows = self.lines = 0
        self.by_reason: collections.Counter[str] = collections.Counter()
        self.first: list[str] = []
        self.file: TextIO | None = path.open("w", encoding="utf-8") if path else None

    @classmethod
    def by_policy(cls, data: dict, path: Path | None = None) -> "Rejected | None":
        """One for `data.on_bad_row` skip; None for error."""
        return cls(path) if data.get("on_bad_row") == "skip" else None

    def add(self, counted: int, file: RawFile, number: int, row: BadRow) -> None:
        """A bad row.

        Args:
            counted: its number through all files, from 1: the id that it would have.
            number: its line, or number, in `file`.
        """
        kind, reason, lines = row
        self.rows, self.lines = self.rows + 1, self.lines + lines
        self.by_reason[kind] += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{file.place(number)}: {short(reason)}")
        if self.file is not None:
            place = {"file": str(file.path), "row" if file.counts_rows else "line": number}
            listed = {"id": counted, **place, **({"lines": lines} if lines > 1 else {}), "kind": kind, "reason": reason}
            # A reason may quote half a character, which no UTF-8 file can hold.
            self.file.write(json.dumps(listed, ensure_ascii=False).encode(errors="replace").decode() + "\n")

    def stats(self) -> dict:
        """How many, and how many for each kind of reason."""
        return {"rows": self.rows, "by_reason": dict(sorted(self.by_reason.items()))}

    def refuse_many(self, raw: Path, rows: int, most: float) -> None:
        """Refuse more than a share `most` of all `rows`.

        A row counts as many times as it has lines, since a quote that is not closed hides the rows behind it.
        """
        share = self.lines / max(rows - self.rows + self.lines, 1)
        if share > most:
            limit = f"data.max_bad_share={most:g}"
            over = "" if self.lines == self.rows else f" (in {self.lines:,} lines)"
            more = f"; and {self.rows - len(self.first):,} more" if self.rows > len(self.first) else ""
            raise UserError(
                f"{raw}: {self.rows:,} of {rows:,} rows{over} are bad, {share:.2%}, more than {limit}: "
                f"{'; '.join(self.first)}{more}: correct them, leave them out by data.where, or raise the share"
            )

    def said(self, rows: int) -> str:
        """One line for the log."""
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.by_reason.items()))
        return (
            f"{self.rows:,} of {rows:,} rows are bad and left out ({kinds}), listed in {FILE}; the first: "
            f"{self.first[0]}"
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.file is not None:
            self.file.close()
