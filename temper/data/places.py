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


def places(raw: Path, data: dict, wanted: Collection[int]) -> dict[int, Place]:
    """Row number from 1 through all files, as `temper.data.splitting.examples` counts -> where that row is.

    Args:
        raw: a data folder, its pin, or one file of rows.
        data: the config section; format, csv, field and encoding are used.
        wanted: the row numbers to look for; those beyond the data's end are left out.

    Raises:
        UserError: a file that cannot be read on.
    """
    found: dict[int, Place] = {}
    count, wanted = itertools.count(1), set(wanted)
    for path in data_files(raw):
        file = RawFile.of(path, data, plain={})
        for number, _ in file.entries():  # a row that is left out as bad is counted, too
            row = next(count)
            if row in wanted:
                found[row] = Place(str(path), number, file.counts_rows)
            if len(found) == len(wanted):
                return found
    return found
