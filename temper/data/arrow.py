"""Parquet as people wrote it, and files packed by zstd: what Arrow reads for us.

Some columns hold what a person would write in another way, because the program that wrote the file had no better type:
pandas makes floats of whole numbers as soon as one is missing, and a timestamp of each day. Here they come out as whole
numbers and days again, and float32 in as few digits as it takes.
"""

import collections
import io
from collections.abc import Iterator
from pathlib import Path

from temper.errors import UserError

WHOLE, DAY, SHORT = "whole numbers", "days", "short floats"


def open_zstd(path: Path) -> io.BufferedReader:
    """The unpacked bytes. Damage is an OSError without errno."""
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))  # type: ignore[arg-type]


def rows(path: Path, plain: dict[str, str] | None = None) -> Iterator[dict]:
    """The rows of a parquet file: lists as lists, structs and maps as dicts, categories as their values.

    Args:
        plain: column -> how its values are written; None: as `PlainTypes` finds it of this file.

    Raises:
        UserError: a column's name stands twice.
    """
    from pyarrow import parquet

    if plain is None:
        alone = PlainTypes()
        alone.look_at(path)
        plain = alone.types()
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        _refuse_twice(path, names)
        # Five times slower, so only where it is needed.
        maps = {"maps_as_pydicts": "strict"} if "map<" in str(file.schema_arrow) else {}
        for batch in file.iter_batches(batch_size=1024):
            for name in names if plain else ():
                if name in plain:
                    at = names.index(name)
                    batch = batch.set_column(at, name, _as(batch.column(at), plain[name]))  # noqa: PLW2901
            yield from batch.to_pylist(**maps)


class PlainTypes:
    """Finds the columns that are to be written as WHOLE, DAY or SHORT in all of some parquet files.

    WHOLE are floats if all are whole numbers and some are missing (pandas has no other way to write those). DAY are
    timestamps without a time zone, all at midnight. SHORT are other float32.
    """

    def __init__(self):
        self.found: dict[str, set[str | None]] = collections.defaultdict(set)
        self.missing: set[str] = set()  # columns with values that are missing

    def look_at(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            _refuse_twice(path, file.schema_arrow.names)
            for field in file.schema_arrow:
                if pyarrow.types.is_floating(field.type):
                    short = None if pyarrow.types.is_float64(field.type) else SHORT
                    self.found[field.name].add(WHOLE if self._all(file, field.name, WHOLE) else short)
                elif pyarrow.types.is_timestamp(field.type) and field.type.tz is None:
                    self.found[field.name].add(DAY if self._all(file, field.name, DAY) else None)

    def _all(self, file, name: str, kind: str) -> bool:
        """Whether all values of a column can be written in a way without a change."""
        import pyarrow
        from pyarrow import compute

        for batch in file.iter_batches(batch_size=65536, columns=[name]):
            column = batch.column(0)
            try:
                same = compute.all(compute.equal(_as(column, kind).cast(column.type), column)).as_py()
            except pyarrow.ArrowInvalid:  # a fraction, NaN, infinity, too large
                same = False
            if same is False:  # None: all are missing
                return False
            if column.null_count:
                self.missing.add(name)
        return True

    def types(self) -> dict[str, str]:
        """Column -> WHOLE, DAY or SHORT; a column that differs from file to file is written as it is in them."""
        made = {}
        for name, kinds in self.found.items():
            kind = next(iter(kinds)) if len(kinds) == 1 else None
            if kind == WHOLE and name not in self.missing or SHORT in kinds:
                kind = SHORT  # no change to a float64
            if kind is not None:
                made[name] = kind
        return made


def _refuse_twice(path: Path, names: list[str]) -> None:
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: has column '{twice[0]}' twice: rename one")


def _as(column, kind: str):
    import pyarrow

    if kind == SHORT:  # by way of text, because there float32's 0.1 is 0.1, and as float64 0.10000000149011612
        return column if pyarrow.types.is_float64(column.type) else column.cast("string").cast("float64")
    if kind == DAY:
        return column.cast("date32") if pyarrow.types.is_timestamp(column.type) else column
    return column.cast("int64") if pyarrow.types.is_floating(column.type) else column
