"""Where a row of the raw data stands: its file, and its line or number there."""

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from temper.data.rows import RawFile
from temper.files import read_json, read_yaml
from temper.sources.pins import data_files


class Place(NamedTuple):
    """`number`: of the line, or of the row where lines are not known (`counts_rows`), in the file from 1."""

    file: str
    number: int
    counts_rows: bool

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}" if self.counts_rows else f"{self.file}:{self.number}"


def named_place(where: dict[int, Place], number: int) -> str:
    """Where a row is, or its number where that is not known."""
    return str(where[number]) if number in where else f"row {number}"


MIXTURE = "mixture.json"


class Part(NamedTuple):
    """A data set of a mixture: its folder of format_prompts, and the ids of its rows there: `rows` from `first`."""

    source: str
    prompts: str
    first: int
    rows: int


def parts_of(prompts: Path) -> list[Part]:
    """The data sets of a folder of mix_prompts; of one of format_prompts that one."""
    if not (prompts / MIXTURE).is_file():
        return [Part("", str(prompts), 1, ids_of(prompts))]
    return [Part(**part) for part in read_json(prompts / MIXTURE, list[dict[str, str | int]])]


def ids_of(prompts: Path) -> int:
    """How many ids the rows of a folder of format_prompts may have: at least as many as the raw data has rows, of which
    one may make several pairs, or none."""
    stats = read_json(prompts / "stats.json", {"rows": int})
    return stats["rows"] + stats.get("ties", 0)


def raw_of(prompts: Path) -> Path:
    """The raw data that a folder of format_prompts was made of."""
    return Path(read_json(prompts / "provenance.json", {"inputs": dict[str, str]})["inputs"]["raw"])


def of_mixture(parts: list[Part], wanted: Collection[int], raw: Path | None = None) -> dict[int, Place]:
    """As `places`, of row numbers in a mixture. `raw`: where the raw data is, if it is not where it was then."""
    found: dict[int, Place] = {}
    for part in parts:
        before = part.first - 1
        mine = {number - before for number in wanted if part.first <= number < part.first + part.rows}
        if mine:
            prompts = Path(part.prompts)
            at = places(raw or raw_of(prompts), read_yaml(prompts / "config.yaml")["data"], mine)
            found |= {number + before: place for number, place in at.items()}
    return found


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
