"""Where a row of the raw data stands: its file, and its line or number there."""

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from temper.data.rows import RawFile
from temper.sources.pins import data_files


class Place(NamedTuple):
    """`number`: of the line, or of the row where lines are not known (`counts_rows`), in the file from 1."""

    file: str
    number: int
    counts_rows: bool

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}" if self.counts_rows else f"{self.file}:{self.number}"


def places(raw: Path, data: dict, wanted: Collection[int]) -> dict[int, Place]:
    """Row number from 1 through all files, as `temper.data.splitting.examples` counts -> where that row is.

    Args:
        raw: a data folder, its pin, or one file of rows.
        data: the config section; format, csv and field are used.
        wanted: the row numbers to look for; those beyond the data's end are left out.

    Raises:
        UserError: a line that cannot be read.
    """
    found: dict[int, Place] = {}
    count, wanted = itertools.count(1), set(wanted)
    for path in data_files(raw):
        file = RawFile(path, data.get("format"), data.get("csv") or {}, data.get("field"))
        for number, _ in file:
            row = next(count)
            if row in wanted:
                found[row] = Place(str(path), number, file.counts_rows)
            if len(found) == len(wanted):
                return found
    return found
