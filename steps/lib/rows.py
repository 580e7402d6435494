"""Read json, jsonl, csv and parquet as a stream of rows.

A row is a dict, column name -> value. With each row comes its number, so that a complaint about it can say where
it is. jsonl, csv and parquet are read piece by piece; of a json file the text is held in memory, its rows are not.
"""

import collections
import csv
import dataclasses
import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from steps.lib.errors import UserError

FORMATS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
BOM = b"\xef\xbb\xbf"
CSV_DEFAULTS = {"delimiter": ",", "quotechar": '"', "fieldnames": None}

_BLANK = re.compile(r"[ \t\r\n]*")  # JSON's idea of white space


@dataclasses.dataclass
class RawFile:
    """A file of rows. Iterate over it for ``(number, row)``; `place(number)` says where that is.

    Args:
        path: the file; json, jsonl and csv may be gzipped (``.gz``).
        format: json, jsonl, csv or parquet; None: by the file's ending.
        csv: delimiter, quotechar (None: quotes have no meaning), fieldnames (None: from the first line).

    Raises:
        UserError: at the first line that cannot be read, with file, line and reason.
    """

    path: Path
    format: str | None = None
    csv: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.format = self.format or _format_by_ending(self.path)
        self.csv = {**CSV_DEFAULTS, **self.csv}
        if self.path.name.removesuffix(".gz").endswith(".tsv") and self.csv["delimiter"] == ",":
            self.csv["delimiter"] = "\t"

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        read = {"json": self._json, "jsonl": self._jsonl, "csv": self._csv, "parquet": self._parquet}[self.format]
        for number, row in read():
            if not isinstance(row, dict):
                raise UserError(f"{self.place(number)}: expected an object with columns, found {_kind(row)}")
            yield number, row

    def place(self, number: int) -> str:
        """``file:line``, or ``file, row n`` where there are no lines."""
        return f"{self.path}, row {number}" if self.format == "parquet" else f"{self.path}:{number}"

    # --- one reader per format: (line number, or row number from 1; row) -------------------------

    def _jsonl(self):
        for number, line in self._lines():
            if line.strip():
                try:
                    row = json.loads(line.rstrip())  # with its end, a fault there would count as the next line's
                except json.JSONDecodeError as error:
                    raise UserError(f"{self.place(number)}: no valid JSON: {_json_reason(error)}") from None
                yield number, row

    def _json(self):
        text = self._text()
        try:
            yield from _array_elements(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{self.place(error.lineno)}: no valid JSON: {_json_reason(error)}") from None

    def _csv(self):
        csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long document
        quotes = {"quoting": csv.QUOTE_NONE} if self.csv["quotechar"] is None else {"quotechar": self.csv["quotechar"]}
        reader = csv.reader((line for _, line in self._lines()), delimiter=self.csv["delimiter"], strict=True, **quotes)
        names, start = self.csv["fieldnames"], 1
        try:
            for fields in reader:
                number, start = start, reader.line_num + 1  # quoted fields may hold line ends
                if not fields:
                    continue
                if names is None:
                    names = self._header(fields, number)
                    continue
                if len(fields) != len(names):
                    raise UserError(self._field_count(fields, names, number))
                yield number, dict(zip(names, fields, strict=True))
        except csv.Error as error:
            hint = "; if quotes are plain text in this file: data.csv.quotechar=null" if self.csv["quotechar"] else ""
            raise UserError(f"{self.place(start)}: no valid csv: {error}{hint}") from None

    def _header(self, fields: list[str], number: int) -> list[str]:
        twice = [name for name, count in collections.Counter(fields).items() if count > 1]
        if twice or "" in fields:
            what = f"column '{twice[0]}' twice" if twice else "a column without a name"
            raise UserError(
                f"{self.place(number)}: the header has {what}; if this is no header, name the columns: "
                "data.csv.fieldnames=[a,b]"
            )
        return fields

    def _field_count(self, fields: list[str], names: list[str], number: int) -> str:
        return (
            f"{self.place(number)}: {len(fields)} fields, expected {len(names)} ({', '.join(names)}); check "
            f"data.csv.delimiter ({self.csv['delimiter']!r}), quotechar ({self.csv['quotechar']!r}) and the line itself"
        )

    def _parquet(self):
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                number = 0
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
        except ArrowException as error:
            raise UserError(f"{self.path}: no valid parquet file: {str(error).splitlines()[0]}") from None

    # --- bytes to text ---------------------------------------------------------------------------

    def _open(self):
        return gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb")

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Line number from 1, and the line as text with its end. Only a line feed ends a line, as in JSON lines."""
        number = 0
        try:
            with self._open() as file:
                for number, line in enumerate(file, start=1):
                    yield number, (line.removeprefix(BOM) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise UserError(self._not_utf8(number, error)) from None
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"{self.place(number + 1)}: no valid gzip file: {error}") from None

    def _text(self) -> str:
        return "".join(line for _, line in self._lines())

    def _not_utf8(self, number: int, error: UnicodeDecodeError) -> str:
        byte = error.object[error.start]
        return (
            f"{self.place(number)}: byte 0x{byte:02x} at column {error.start + 1} is no UTF-8: "
            "convert the file (iconv -f latin1 -t utf-8, if it is Latin-1)"
        )


def _format_by_ending(path: Path) -> str:
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    if ending not in FORMATS or (ending == ".parquet" and path.suffix == ".gz"):
        raise UserError(f"{path}: cannot tell the format by the ending: set data.format to json, jsonl, csv or parquet")
    return FORMATS[ending]


def _array_elements(text: str) -> Iterator[tuple[int, object]]:
    """(line number, element) of a JSON array, decoded one at a time."""
    decoder = json.JSONDecoder()
    position = _BLANK.match(text).end()
    if not text.startswith("[", position):
        what = "one object a line is data.format=jsonl" if text.startswith("{", position) else "is it json at all?"
        raise json.JSONDecodeError(f"Expecting an array of objects, [{{...}}, ...] ({what})", text, position)
    line, counted, after = 1, 0, "["
    while True:
        position = _BLANK.match(text, position + 1).end()
        if after == "[" and text.startswith("]", position):
            break
        line, counted = line + text.count("\n", counted, position), position
        element, position = decoder.raw_decode(text, position)
        yield line, element
        position = _BLANK.match(text, position).end()
        after = text[position : position + 1]
        if after == "]":
            break
        if after != ",":
            raise json.JSONDecodeError("Expecting ',' or ']' after an element", text, position)
    end = _BLANK.match(text, position + 1).end()
    if end != len(text):
        raise json.JSONDecodeError("Extra data after the array", text, end)


def _json_reason(error: json.JSONDecodeError) -> str:
    return f"{error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"


def _kind(value) -> str:
    names = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)
