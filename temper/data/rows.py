"""Read json, jsonl, csv and parquet as a stream of rows.

A row is a dict, column name -> value, and comes with its number, so that errors can say where it is. jsonl, csv and
parquet are read piece by piece; of a json file, the text is held in memory but not its rows.
"""

import collections
import csv
import dataclasses
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from temper.errors import UserError, lack, words
from temper.units import size

FORMATS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
BOM = b"\xef\xbb\xbf"
BOMS_16 = (b"\xff\xfe", b"\xfe\xff")
CSV_DEFAULTS = {"delimiter": ",", "quotechar": '"', "escapechar": None, "fieldnames": None}
LONGEST_LINE = 2**28  # bytes
# A gzipped file may unpack to so many times its size, or to so many bytes in any case.
MOST_GROWTH, SMALL = 200, 2**30
_BLANK = re.compile(r"[ \t\r\n]*")  # white space in JSON


@dataclasses.dataclass
class RawFile:
    """A file of rows. Iterate over it for ``(number, row)``; `place(number)` says where that is.

    Args:
        path: the file; json, jsonl and csv may be gzipped (``.gz``).
        format: json, jsonl, csv or parquet; None: from the file's extension.
        csv: delimiter, quotechar (None: quotes are ordinary), escapechar, fieldnames (None: from the first line).
        field: if a json file is one object, the field that holds the rows.

    Raises:
        UserError: at the first line that cannot be read, with file, line and reason.
    """

    path: Path
    format: str | None = None
    csv: dict = dataclasses.field(default_factory=dict)
    field: str | None = None

    def __post_init__(self):
        self.format = self.format or _format_by_ending(self.path)
        self.csv = {**CSV_DEFAULTS, **self.csv}
        refuse_unread(str(self.path), self.format, self.csv, self.field)
        if self.path.name.removesuffix(".gz").endswith(".tsv") and self.csv["delimiter"] == ",":
            self.csv["delimiter"] = "\t"

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        readers = {"json": self._json, "jsonl": self._jsonl, "csv": self._csv, "parquet": self._parquet}
        read = readers[str(self.format)]
        number = 0
        try:
            for number, row in read():
                if not isinstance(row, dict):
                    raise UserError(f"{self.place(number)}: expected an object with columns, found {_kind(row)}")
                yield number, row
        except UserError:
            raise
        except Exception as error:  # parsers raise anything on a damaged or hostile file
            if lack(error, str(self.path)):
                raise
            reason = "nested too deeply" if isinstance(error, RecursionError) else words(error)
            after = f" after {self.place(number)}" if number else ""
            raise UserError(f"{self.path}: cannot be read{after} ({reason})") from None

    def place(self, number: int) -> str:
        """``file:line``, or ``file, row n`` where a row's line is not known."""
        return f"{self.path}, row {number}" if self.counts_rows else self._line(number)

    @property
    def counts_rows(self) -> bool:
        """Whether numbers are of rows, because their lines are not known."""
        return self.format == "parquet" or self.field is not None

    def _line(self, number: int) -> str:
        return f"{self.path}:{number}"

    # --- one reader per format: (line number, or row number from 1; row) -------------------------

    def _jsonl(self):
        for number, line in self._lines():
            if line.strip():
                # With its line end, a fault at the end would be reported for the next line.
                yield number, self._parsed(number, lambda line=line: DECODER.decode(line.rstrip()))

    def _json(self):
        text = self._text()
        if self.field is not None:
            whole = self._parsed(1, lambda: DECODER.decode(text))
            rows = whole.get(self.field) if isinstance(whole, dict) else None
            if not isinstance(rows, list):
                raise UserError(f"{self.path}: has no list '{self.field}', which data.field names")
            yield from enumerate(rows, 1)
            return
        elements = _array_elements(text)
        number = 1
        while True:
            element = self._parsed(number, lambda: next(elements, None))
            if element is None:
                return
            number = element[0]
            yield element

    def _parsed(self, number: int, parse):
        """Call `parse` on JSON; an error names its line."""
        try:
            return parse()
        except json.JSONDecodeError as error:
            line = error.lineno if self.format == "json" else number
            raise UserError(f"{self._line(line)}: no valid JSON: {_json_reason(error)}") from None
        except _NoRowsError as error:
            raise UserError(f"{self.path}: {error}") from None
        except RecursionError:
            raise UserError(f"{self._line(number)}: nested too deeply") from None
        except ValueError as error:  # a key twice, a number of thousands of digits
            raise UserError(f"{self._line(number)}: {error}") from None

    def _csv(self):
        csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long document
        lines = _Remembered(line for _, line in self._lines())
        delimiter = _excels_delimiter(lines) or self.csv["delimiter"]
        quotes = {"quoting": csv.QUOTE_NONE} if self.csv["quotechar"] is None else {"quotechar": self.csv["quotechar"]}
        if self.csv["escapechar"] is not None:
            quotes["escapechar"] = self.csv["escapechar"]
        reader = csv.reader(lines, delimiter=delimiter, strict=True, **quotes)
        names, start = self.csv["fieldnames"], lines.count + 1
        before = lines.count
        try:
            for fields in reader:
                number, start = start, before + reader.line_num + 1  # quoted fields may hold line ends
                if not fields:
                    continue
                if names is None:
                    names = self._header(fields, number, delimiter)
                    continue
                if fields == names and len(names) > 1:
                    way_on = "remove it" if self.csv["fieldnames"] is None else "leave data.csv.fieldnames out"
                    raise UserError(f"{self.place(number)}: is a header, not a row: {way_on}")
                if len(fields) != len(names):
                    raise UserError(self._field_count(fields, names, number, delimiter))
                yield number, dict(zip(names, fields, strict=True))
        except csv.Error as error:
            raise UserError(f"{self.place(start)}: no valid csv: {error}{self._quote_hint(lines.last)}") from None

    def _quote_hint(self, line: str) -> str:
        if self.csv["quotechar"] is None or self.csv["escapechar"] is not None:
            return ""
        if f"\\{self.csv['quotechar']}" in line:
            return r"; a backslash stands before quotes in the text: data.csv.escapechar=\\"
        return "; if quotes are plain text in this file: data.csv.quotechar=null"

    def _header(self, fields: list[str], number: int, delimiter: str) -> list[str]:
        """The column names. An unnamed column, such as pandas' index, gets the name that pandas gives it."""
        other = next((sign for sign in ";\t|" if sign in fields[0]), None)
        if len(fields) == 1 and other and delimiter != other:
            shown = "\\t" if other == "\t" else other
            raise UserError(
                f"{self.place(number)}: the header is one column, '{fields[0][:60]}', because it has no {delimiter!r}: "
                f"set \"data.csv.delimiter='{shown}'\""
            )
        names = [name or f"Unnamed: {index}" for index, name in enumerate(fields)]
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise UserError(
                f"{self.place(number)}: the header has column '{twice[0]}' twice: rename one there; only if this line "
                "is a row, not a header, name the columns: data.csv.fieldnames=[a,b]"
            )
        return names

    def _field_count(self, fields: list[str], names: list[str], number: int, delimiter: str) -> str:
        return (
            f"{self.place(number)}: {len(fields)} fields, expected {len(names)} ({', '.join(names)}); check "
            f"data.csv.delimiter ({delimiter!r}), quotechar ({self.csv['quotechar']!r}) and the line itself"
        )

    def _parquet(self):
        from pyarrow import parquet

        number = 0
        with parquet.ParquetFile(self.path) as file:
            columns = collections.Counter(file.schema_arrow.names)
            twice = [name for name, count in columns.items() if count > 1]
            if twice:
                raise UserError(f"{self.path}: has column '{twice[0]}' twice: rename one")
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row

    # --- bytes to text ---------------------------------------------------------------------------

    def _open(self):
        return gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb")

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Line number from 1, and the line as text with its end. Only a line feed ends a line, as in JSON lines."""
        number = read = 0
        most = max(SMALL, MOST_GROWTH * self.path.stat().st_size)
        longest = most + 1 if self.format == "json" else LONGEST_LINE  # json may be one line, and is held anyway
        try:
            with self._open() as file:
                for number, line in enumerate(iter(lambda: file.readline(longest), b""), start=1):
                    read += len(line)
                    if read > most and self.path.suffix == ".gz":
                        raise UserError(
                            f"{self.path}: unpacks to over {size(most)}, {MOST_GROWTH} times its size: "
                            "if you trust it, unpack it yourself"
                        )
                    if len(line) == longest:
                        raise UserError(f"{self._line(number)}: is longer than {size(longest)}: is it text?")
                    if number == 1:
                        refuse_utf16(line, self._line(number))
                    yield number, (line.removeprefix(BOM) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise UserError(self._not_utf8(number, error)) from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self._line(number + 1)}: no valid gzip file: {error}") from None
        except PermissionError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); make it readable") from None

    def _text(self) -> str:
        return "".join(line for _, line in self._lines())

    def _not_utf8(self, number: int, error: UnicodeDecodeError) -> str:
        byte, start = error.object[error.start], error.object[:2]
        # cp1252 is Windows' version of Latin-1, with letters and quotes in place of control characters.
        encoding = "utf-16" if number == 1 and start in BOMS_16 else "cp1252"
        what = "UTF-16" if encoding == "utf-16" else "Latin-1 or of Windows"
        return (
            f"{self._line(number)}: byte 0x{byte:02x} at column {error.start + 1} is not UTF-8: convert the file "
            f"(iconv -f {encoding} -t utf-8, if it is {what})"
        )


def refuse_unread(what: str, format: str, csv: dict, field: str | None) -> None:
    """Refuse options that the format of `what` would ignore."""
    given = [name for name, value in csv.items() if value != CSV_DEFAULTS[name]]
    if field is not None and format != "json":
        raise UserError(
            f"{what}: data.field={field} is for json files, and this is {format}: leave data.field out (~data.field)"
        )
    if given and format != "csv":
        raise UserError(
            f"{what}: data.csv.{given[0]}={csv[given[0]]!r} is for csv files, and this is {format}: leave data.csv out "
            "(~data.csv)"
        )


def format_of(name: str) -> str | None:
    """The format by the file's extension, if known."""
    ending = Path(name.removesuffix(".gz")).suffix.lower()
    return None if ending == ".parquet" and name.endswith(".gz") else FORMATS.get(ending)


class _Remembered:
    """Lines; remembers the last one taken, and how many."""

    def __init__(self, lines: Iterator[str]):
        self.lines, self.last, self.count = lines, "", 0
        self.back: list[str] = []

    def __iter__(self):
        return self

    def __next__(self) -> str:
        self.last = self.back.pop() if self.back else next(self.lines)
        return self.last


def _excels_delimiter(lines: _Remembered) -> str | None:
    """The delimiter from Excel's extra first line, ``sep=;``, which is consumed; None if there is none."""
    first = next(lines, "")
    found = re.fullmatch(r"sep=(.)\r?\n?", first)
    if found:
        lines.count = 1
        return found[1]
    lines.back = [first] if first else []
    return None


def refuse_utf16(line: bytes, place: str) -> None:
    """Refuse a file whose first line is UTF-16 without a byte order mark: as UTF-8 every other byte would be 0."""
    if line.count(0) * 3 > len(line) and not line.startswith(BOMS_16):
        encoding = "utf-16be" if line.startswith(b"\0") else "utf-16le"
        raise UserError(f"{place}: every other byte is 0: convert the file (iconv -f {encoding} -t utf-8)")


class _NoRowsError(ValueError):
    """Valid JSON, but not an array of objects."""


def _unique(pairs: list[tuple]) -> dict:
    """A JSON object. Refuses a repeated key, of which Python's reader would keep the last value."""
    made = dict(pairs)
    if len(made) != len(pairs):
        [(twice, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"has '{twice}' twice: rename or remove one")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _format_by_ending(path: Path) -> str:
    found = format_of(path.name)
    if found is None:
        raise UserError(f"{path}: cannot tell the format by the ending: set data.format to json, jsonl, csv or parquet")
    return found


def _behind_blanks(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return found.end() if found else position


def _array_elements(text: str) -> Iterator[tuple[int, object]]:
    """(line number, element) of a JSON array, decoded one at a time."""
    position = _behind_blanks(text, 0)
    if not text.startswith("[", position):
        raise _no_array(text, position)
    line, counted, after = 1, 0, "["
    while True:
        position = _behind_blanks(text, position + 1)
        if after == "[" and text.startswith("]", position):
            break
        line, counted = line + text.count("\n", counted, position), position
        element, position = DECODER.raw_decode(text, position)
        yield line, element
        position = _behind_blanks(text, position)
        after = text[position : position + 1]
        if after == "]":
            break
        if after != ",":
            raise json.JSONDecodeError("Expecting ',' or ']' after an element", text, position)
    end = _behind_blanks(text, position + 1)
    if end != len(text):
        raise json.JSONDecodeError("Extra data after the array", text, end)


def _no_array(text: str, position: int) -> ValueError:
    """What is wrong with a json file that does not begin with a bracket, and what to do."""
    expected = "Expecting an array of objects, [{...}, ...]"
    try:
        return _NoRowsError(f"{expected.lower()}, found {_other_json(DECODER.decode(text))}")
    except (ValueError, RecursionError):  # the whole is not JSON
        hint = "objects one after another: put a comma between them, and brackets around all"
        if not text.startswith("{", position):
            hint = "is it json at all?"
        elif _is_json(text[position:].split("\n", 1)[0]):
            hint = "one object a line is data.format=jsonl"
        return json.JSONDecodeError(f"{expected} ({hint})", text, position)


def _is_json(text: str) -> bool:
    try:
        return bool(DECODER.decode(text))
    except (ValueError, RecursionError):
        return False


def _other_json(whole) -> str:
    """What a json file holds instead of an array, and what to do."""
    if not isinstance(whole, dict):
        return _kind(whole)
    lists = [name for name, value in whole.items() if isinstance(value, list)]
    of_rows = [name for name in lists if all(isinstance(row, dict) for row in whole[name])]
    if of_rows:
        return f"one object; if its rows are in '{of_rows[0]}': data.field='{of_rows[0]}'"
    if lists or (whole and all(isinstance(value, dict) for value in whole.values())):
        return "one object of columns: write rows (pandas: to_json(path, orient='records'))"
    return "one object: put brackets around it, [{...}], if it is a row"


def _json_reason(error: json.JSONDecodeError) -> str:
    return f"{error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"


def _kind(value) -> str:
    names = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)
