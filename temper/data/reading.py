"""Raw rows, chunk by chunk, and the examples that a layout makes of them: what several processes share out."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from temper.data import doubts, layouts
from temper.data.chunks import chunks
from temper.data.rejected import LAYOUT
from temper.data.rows import UTF_8, BadRow, RawFile, plain_types
from temper.errors import UserError
from temper.sources import pins as raw_data

BYTES, ROWS = 2**18, 2**10  # of a chunk, at most
OF_A_ROW = 2**8  # bytes that a row counts as whose text is not known


class Chunk(NamedTuple):
    """Some rows of a file. `file`: its place among the files. `first`: the number of the first row through all files.
    `pieces`: as `RawFile.pieces` gives them."""

    file: int
    first: int
    rows: int
    pieces: list[tuple[int, dict | BadRow | str]]

    def taken(self) -> "Chunk":
        """The same without its pieces, to be sent back."""
        return self._replace(pieces=[])


class Seen:
    """What was seen in some rows besides their examples. `bad`: (number through all files, number in its file, row)."""

    def __init__(self, data: dict):
        self.controls = doubts.Controls(data.get("encoding") or UTF_8)
        self.words = doubts.Words(layouts.text_columns(data))
        self.bad: list[tuple[int, int, BadRow]] = []

    def add(self, later: "Seen") -> None:
        """Take over doubts about the rows behind these."""
        self.controls.add(later.controls)
        self.words.add(later.words)

    def say(self) -> None:
        """Name doubtful values in the log."""
        self.controls.say()
        self.words.say()


class Reader:
    """Reads the rows of raw data.

    Args:
        raw: a data folder, its pin, or one file of rows.
        data: the config section.
        system: a system message, replacing one in the data.
        skip: whether bad rows are left out; else the first is an error.
    """

    def __init__(self, raw: Path, data: dict, system: str | None, skip: bool):
        self.data, self.skip = data, skip
        self.expand = layouts.expander(data, system)
        self.paths = raw_data.data_files(raw)
        plain = plain_types(self.paths, data)
        self.files = [RawFile.of(path, data, plain) for path in self.paths]

    @property
    def size(self) -> int:
        """Bytes of all files, as they are on the disk."""
        return sum(path.stat().st_size for path in self.paths)

    def chunks(self) -> Iterator[Chunk]:
        """All rows. Those that cannot be read count, too."""
        first = 1
        for place, file in enumerate(self.files):
            for pieces in chunks(file.pieces(), _size, BYTES, ROWS):
                yield Chunk(place, first, len(pieces), pieces)
                first += len(pieces)

    def examples(self, chunk: Chunk, seen: Seen) -> Iterator[tuple[int, layouts.Example | layouts.Tie | None]]:
        """(row number from 1 through all files, an example of it); None when `data.where` leaves the row out.

        Raises:
            UserError: a row that cannot be read or makes no conversation, unless these are skipped.
        """
        file = self.files[chunk.file]
        for counted, (number, piece) in enumerate(chunk.pieces, chunk.first):
            row = file.parsed(piece)
            made = row if isinstance(row, BadRow) else self._expanded(file, row)
            if isinstance(made, BadRow):
                if not self.skip:
                    raise UserError(f"{file.place(number)}: {made.reason}")
                seen.bad.append((counted, number, made))
                continue
            for example in made:
                if isinstance(example, layouts.Example):
                    seen.controls.look_at(example, file, number)
                    seen.words.look_at(row, example, file, number)  # type: ignore[arg-type]
                yield counted, example

    def _expanded(self, file: RawFile, row: dict) -> list[layouts.Example | layouts.Tie | None] | BadRow:
        try:
            return self.expand(row)
        except UserError as error:
            way_on = file.without_header if isinstance(error, layouts.NoColumnError) else ""
            return BadRow(LAYOUT, f"{error}{way_on}")


def _size(piece: tuple[int, dict | BadRow | str]) -> int:
    return len(piece[1]) if isinstance(piece[1], str) else OF_A_ROW
