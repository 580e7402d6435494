"""Read json, jsonl, csv and parquet as a stream of rows.

A row is a dict, column name -> value, and comes with its number, so that errors can say where it is. jsonl, csv and
parquet are read piece by piece; of a json file, the text is held in memory but not its rows.
"""

import codecs
import collections
import csv
import dataclasses
import functools
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from temper.data import arrow, encodings
from temper.errors import UserError, lack, words
from temper.units import size

FORMATS = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TEXTS = (".txt", ".md")  # of files that are one text
PACKED = (".gz", ".zst")
CSV_DEFAULTS = {"delimiter": ",", "quotechar": '"', "escapechar": None, "fieldnames": None}
UTF_8 = "utf-8"
NULL = "\\N"  # a csv cell without a value, as MySQL, Hive and PostgreSQL write it
# In text without quotes, a line end or tab of a value is written as a letter (PostgreSQL, mysql --batch).
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v"}
LONGEST_LINE = 2**28  # bytes
# A packed file may unpack to so many times its size, or to so many bytes in any case.
MOST_GROWTH, SMALL = 200, 2**30
_BLANK = re.compile(r"[ \t\r\n]*")  # white space in JSON


class BadRow(NamedTuple):
    """A row that cannot be read, though those after it can.

    `kind`: of the reason, for counts: json, object, fields, header, quotes, encoding. `reason`: in words, without the
    place. `lines`: how many lines it takes; a quote that is not closed may hide as many rows.
    """

    kind: str
    reason: str
    lines: int = 1


@dataclasses.dataclass
class RawFile:
    """A file of rows. Iterate over it for ``(number, row)``; `place(number)` says where that is.

    Args:
        path: the file; json, jsonl and csv may be packed (``.gz``, ``.zst``).
        format: json, jsonl, csv, parquet or text (one row, whose column text is all of the file); None: from the
            file's extension.
        csv: delimiter, quotechar (None: quotes are ordinary), escapechar, fieldnames (None: from the first line).
        field: if a json file is one object, the field that holds the rows; ``a.b`` is field b of the objects in a.
        encoding: of the text, by Python's name. A byte order mark in the file comes before it.
        plain: for parquet, column -> its type as people write it (`temper.data.arrow.PlainTypes`), where several files
            are read as one; None: by this file alone.
        settable: whether the reader of messages can set data.encoding; if not, they say how to convert the file.

    Raises:
        UserError: at the first line that cannot be read, with file, line and reason.
    """

    path: Path
    format: str | None = None
    csv: dict = dataclasses.field(default_factory=dict)
    field: str | None = None
    encoding: str = UTF_8
    plain: dict | None = None
    settable: bool = True

    @classmethod
    def of(cls, path: Path, data: dict, plain: dict | None = None) -> "RawFile":
        """A file as a config section (`data`, `probe`) says that it is to be read."""
        options = (data.get("format"), data.get("csv") or {}, data.get("field"), data.get("encoding") or UTF_8)
        return cls(path, *options, plain=plain)

    def __post_init__(self):
        self.format = self.format or _format_by_ending(self.path)
        self.csv = {**CSV_DEFAULTS, **self.csv}
        refuse_unread(str(self.path), self.format, self.csv, self.field, self.encoding)
        if unpacked(self.path.name).endswith(".tsv") and self.csv["delimiter"] == ",":
            self.csv["delimiter"] = "\t"

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        return self._read(strict=True)  # type: ignore[return-value]

    def entries(self) -> Iterator[tuple[int, dict | BadRow]]:
        """Like iterating, but a row that cannot be read is given as a BadRow, as long as others can be read."""
        return self._read(strict=False)

    def _read(self, strict: bool) -> Iterator[tuple[int, dict | BadRow]]:
        for number, piece in self.pieces():
            row = self.parsed(piece)
            if strict and isinstance(row, BadRow):
                raise UserError(f"{self.place(number)}: {row.reason}")
            yield number, row

    def pieces(self) -> Iterator[tuple[int, dict | BadRow | str]]:
        """Like `entries`, but a row of jsonl is still text, for `parsed`, which other processes may call."""
        readers = {
            "json": self._json,
            "jsonl": self._jsonl,
            "csv": self._csv,
            "parquet": self._parquet,
            "text": self._text,
        }
        read, whole = readers[str(self.format)], (dict, BadRow, str if self.format == "jsonl" else dict)
        number = 0
        try:
            for number, piece in read():
                yield number, piece if isinstance(piece, whole) else BadRow("object", _no_object(piece))
        except UserError:
            raise
        except Exception as error:  # parsers raise anything on a damaged or hostile file
            raise _unreadable(self.path, error, f" after {self.place(number)}" if number else "") from None

    def parsed(self, piece: dict | BadRow | str) -> dict | BadRow:
        """The row of a piece."""
        return _parsed_line(piece) if isinstance(piece, str) else piece

    def place(self, number: int) -> str:
        """``file:line``, or ``file, row n`` where a row's line is not known."""
        return f"{self.path}, row {number}" if self.counts_rows else self._line(number)

    @property
    def counts_rows(self) -> bool:
        """Whether numbers are of rows, because their lines are not known."""
        return self.format == "parquet" or self.field is not None

    @property
    def without_header(self) -> str:
        """What to do if a column is missing because the first line was taken for a header; empty if it was not."""
        read = self.format == "csv" and self.csv["fieldnames"] is None
        return "; if the file has no header line, name the columns: data.csv.fieldnames=[a,b]" if read else ""

    def _line(self, number: int) -> str:
        return f"{self.path}:{number}"

    # --- one reader per format: (line number, or row number from 1; row) -------------------------

    def _text(self):
        """A file that is one text is one row."""
        yield 1, {"text": self.text().strip("\ufeff")}

    def _jsonl(self):
        for number, line in self._lines():
            if type(line) is _WrongBytes:
                yield number, BadRow("encoding", line.reason)
            elif text := line.rstrip():  # with its line end, a fault at the end would be reported for the next line
                yield number, text

    def _json(self):
        text = self.text()
        if self.field is not None:
            whole = self._parsed(1, lambda: DECODER.decode(text))
            yield from enumerate(_rows_of_field(self.path, whole, self.field), 1)
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
        """Call `parse` on the text of a json file; an error names its line."""
        try:
            return parse()
        except _NoRowsError as error:
            raise UserError(f"{self.path}: {error}") from None
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else number
            raise UserError(f"{self._line(line)}: {_json_fault(error)}") from None

    def _csv(self):
        csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long document
        lines = _CsvLines(self)
        delimiter = lines.delimiter
        quotes = {"quoting": csv.QUOTE_NONE} if self.csv["quotechar"] is None else {"quotechar": self.csv["quotechar"]}
        if self.csv["escapechar"] is not None:
            quotes["escapechar"] = self.csv["escapechar"]
        reader = csv.reader(lines.texts, delimiter=delimiter, strict=True, **quotes)
        names, before = self.csv["fieldnames"], lines.before
        start, ended = before + 1, False
        while not ended:
            try:
                for fields in reader:
                    number, start = start, before + reader.line_num + 1  # quoted fields may hold line ends
                    if not fields:
                        continue
                    if names is None:
                        self._refuse_header(number, lines.fault)
                        names = self._header(fields, number, delimiter)
                    elif (
                        lines.fault
                        or len(fields) != len(names)
                        or (fields == names and len(names) > 1)
                        or (number == before + 1 and _is_header(fields, names))
                    ):
                        yield number, self._bad_row(fields, names, delimiter, lines, start - number)
                    else:
                        row = dict(zip(names, fields, strict=True))
                        yield number, row if NULL not in fields else _with_nulls(row)
                ended = True
            except csv.Error as error:  # the reader goes on with the next line
                number, start = start, before + reader.line_num + 1
                reason = f"no valid csv: {error}{self._quote_hint(str(error), lines.last)}"
                if names is None or str(error) == "unexpected end of data":
                    raise UserError(f"{self.place(number)}: {reason}") from None
                lines.fault = None
                yield number, BadRow("quotes", reason, start - number)

    def _refuse_header(self, number: int, fault: "_WrongBytes | None") -> None:
        if fault is not None:
            raise UserError(f"{self.place(number)}: {fault.reason}")

    def _bad_row(self, fields: list[str], names: list[str], delimiter: str, lines: "_CsvLines", count: int) -> BadRow:
        """What is wrong with a row of `count` lines."""
        if lines.fault is not None:
            reason, lines.fault = lines.fault.reason, None
            return BadRow("encoding", reason, count)
        if len(fields) != len(names):
            return BadRow("fields", self._field_count(fields, names, delimiter, lines.last, count), count)
        way_on = "remove it" if self.csv["fieldnames"] is None else "leave data.csv.fieldnames out"
        return BadRow("header", f"is a header, not a row: {way_on}", count)

    def _quote_hint(self, error: str, line: str) -> str:
        if error.startswith("new-line character"):
            return r"; put such cells in quotes; if carriage returns end the rows: tr '\r' '\n'"
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

    def _field_count(self, fields: list[str], names: list[str], delimiter: str, line: str, count: int) -> str:
        over = f" over {count} lines (is a quote not closed?)" if count > 1 else ""
        way_on = f"check data.csv.delimiter ({delimiter!r}), quotechar ({self.csv['quotechar']!r}) and the line itself"
        if self.csv["escapechar"] is None and re.search(rf"\\({re.escape(delimiter)}|\r?\n)", line):
            way_on = r"a backslash stands before a delimiter or a line end: data.csv.escapechar=\\"
        return f"{len(fields)} fields{over}, expected {len(names)} ({', '.join(names)}); {way_on}"

    def _parquet(self):
        yield from enumerate(arrow.rows(self.path, self.plain), 1)

    # --- bytes to text ---------------------------------------------------------------------------

    @property
    def _packed(self) -> str | None:
        """The ending of a packed file."""
        ending = self.path.suffix.lower()
        return ending if ending in PACKED else None

    def _open(self):
        if self._packed == ".zst":
            return arrow.open_zstd(self.path)
        return gzip.open(self.path) if self._packed else self.path.open("rb")

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Line number from 1, and the line as text with its end. Only a line feed ends a line, as in JSON lines.

        A line with bytes that the encoding has not is a `_WrongBytes`.
        """
        number = read = 0
        most = max(SMALL, MOST_GROWTH * self.path.stat().st_size) if self._packed else sys.maxsize
        longest = min(most + 1, sys.maxsize if self.format == "json" else LONGEST_LINE)  # json may be one line
        try:
            with self._open() as file:
                encoding = self._encoding_of(file.peek(4)[:4])
                wide, mixed = encodings.is_wide(encoding), _Mixed(self, encoding)
                watches = mixed.watches
                for number, line in enumerate(_split(file, encoding, longest), 1):
                    read += len(line)
                    if read > most or len(line) == longest:
                        raise self._too_much(number, most if read > most else None, longest)
                    if wide:
                        yield number, line
                        continue
                    if number == 1:
                        line = self._without_mark(line)  # noqa: PLW2901
                    if watches and not line.isascii():
                        mixed.look_at(line)
                    try:
                        yield number, line.decode(encoding)
                    except UnicodeDecodeError as error:
                        yield number, _WrongBytes(line, encoding, self._wrong_bytes(error, encoding))
                mixed.refuse()
        except (UnicodeError, EOFError, zlib.error, OSError) as error:
            raise self._damage(number, error) from None

    def _too_much(self, number: int, most: int | None, longest: int) -> UserError:
        if most is not None:
            return UserError(
                f"{self.path}: unpacks to over {size(most)}, {MOST_GROWTH} times its size: "
                "if you trust it, unpack it yourself"
            )
        return UserError(f"{self._line(number)}: is longer than {size(longest)}: is it text?")

    def _damage(self, number: int, error: Exception) -> Exception:
        """What ended the reading after line `number`."""
        if isinstance(error, UnicodeError):
            name = getattr(error, "encoding", self.encoding)
            return UserError(f"{self.path}: is no {name} after line {number}: {words(error)}")
        if isinstance(error, PermissionError):
            return UserError(f"{self.path}: cannot be read ({error.strerror}); make it readable")
        if isinstance(error, OSError) and (error.errno is not None or not self._packed):
            return error
        kind = "zstd" if self._packed == ".zst" else "gzip"
        return UserError(f"{self._line(number + 1)}: no valid {kind} file: {error}")

    def _encoding_of(self, start: bytes) -> str:
        """The encoding in which to read the file, by its first bytes and `encoding`."""
        marked = encodings.by_mark(start)
        what = None if marked else encodings.no_text(start)
        if what:
            raise UserError(f"{self.path}: {what}")
        if start and not marked and codecs.lookup(self.encoding).name in ("utf-16", "utf-32"):
            raise UserError(
                f"{self.path}: begins without the byte order mark of {self.encoding}: name the kind, "
                f"data.encoding={self.encoding}-le or {self.encoding}-be"
            )
        found = marked or self.encoding
        return UTF_8 if encodings.is_utf8(found) else found

    def _without_mark(self, line: bytes) -> bytes:
        """The first line, without UTF-8's byte order mark."""
        if kind := encodings.unmarked_utf16(line):
            raise UserError(f"{self._line(1)}: every other byte is 0: {self._read_as(kind)}")
        return line.removeprefix(codecs.BOM_UTF8)

    def _read_as(self, encoding: str) -> str:
        if self.settable:
            return f"set data.encoding={encoding}"
        return f"convert the file ({encodings.to_utf8(encoding)})"

    def text(self) -> str:
        """All of a text file, its line ends as they are."""
        return "".join(self._whole_lines())

    def _whole_lines(self) -> Iterator[str]:
        for number, line in self._lines():
            if isinstance(line, _WrongBytes):
                raise UserError(f"{self._line(number)}: {line.reason}")
            yield line

    def _wrong_bytes(self, error: UnicodeDecodeError, encoding: str) -> str:
        name = "UTF-8" if encoding == UTF_8 else encoding
        wrong = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1} is not {name}"
        if encoding != UTF_8 or self._likely is None:
            return f"{wrong}: what is the file's encoding? {self._read_as('cp1250')} (shift_jis, koi8-r, ...)"
        if self._likely == UTF_8:
            skip = ", or leave such rows out (data.on_bad_row=skip)" if self.settable and self.format != "json" else ""
            return f"{wrong}, as most of the file is: correct the line{skip}"
        return f"{wrong}: {self._read_as(self._likely)}, if the file is of Windows or Latin-1"

    @functools.cached_property
    def _likely(self) -> str | None:
        """What encoding the file seems to be in."""
        with self._open() as file:
            return encodings.likely(file)


def _split(file, encoding: str, longest: int) -> Iterator:
    """The lines of a file: as bytes, or as text where a byte of a line feed ends no line."""
    if encodings.is_wide(encoding):
        return iter(functools.partial(io.TextIOWrapper(file, encoding, newline="\n").readline, longest), "")
    return iter(functools.partial(file.readline, longest), b"")


class _WrongBytes(str):
    """A line with bytes that the encoding has not, each as half a character. `reason`: what to say about it."""

    reason: str

    def __new__(cls, line: bytes, encoding: str, reason: str):
        made = super().__new__(cls, line.decode(encoding, "surrogateescape"))
        made.reason = reason
        return made


class _Mixed:
    """Notices a file of UTF-8 that is read in an encoding of one byte a character, which reads anything."""

    def __init__(self, file: RawFile, encoding: str):
        self.file, self.encoding = file, encoding
        self.utf8 = self.other = 0  # lines beyond ASCII
        self.watches = encoding != UTF_8 and not encodings.is_wide(encoding) and encodings.has_one_byte_each(encoding)

    def look_at(self, line: bytes) -> None:
        if encodings.decodes(line, UTF_8):
            self.utf8 += 1
        else:
            self.other += 1

    def refuse(self) -> None:
        if self.utf8 > self.other:
            raise UserError(
                f"{self.file.path}: is UTF-8, not {self.encoding}, in {self.utf8:,} of {self.utf8 + self.other:,} "
                "lines with letters beyond ASCII: leave data.encoding out (other files with another one: convert them)"
            )


def _with_nulls(row: dict[str, str]) -> dict[str, str | None]:
    return {name: None if value == NULL else value for name, value in row.items()}


class _CsvLines:
    """The lines of a csv file for Python's csv module.

    `texts`: to read from. `delimiter`. `before`: lines that are no part of the table (``sep=;``, which Excel writes
    and reads). `last`: the last line taken. `fault`: the first with wrong bytes since it was last cleared.
    """

    def __init__(self, file: RawFile):
        self.last = ""
        self.fault: _WrongBytes | None = None
        numbered = file._lines()
        first = next(numbered, None)
        found = re.fullmatch(r"sep=(.)\r?\n?", first[1]) if first else None
        self.before = 1 if found else 0
        self.delimiter = found[1] if found else file.csv["delimiter"]
        taken = () if found or first is None else (first,)
        self.texts = self._watched(itertools.chain(taken, numbered), file.csv)

    def _watched(self, numbered, options: dict) -> Iterator[str]:
        escape = options["escapechar"]
        as_csv = _escapes(options, self.delimiter)
        for _, line in numbered:
            if type(line) is _WrongBytes:
                self.fault = self.fault or line
            self.last = line
            yield as_csv(line) if escape is not None and escape in line else line


def _escapes(options: dict, delimiter: str):
    r"""A function that makes of a line one in which Python's csv module reads escapes as their writers mean them.

    It would drop an escape character before any character. pandas, MySQL and Spark write one before quotes, line ends,
    delimiters and itself; elsewhere it is text (``\frac`` in Spark's files) or the null ``\N``. In text without quotes,
    ``\n`` is a line end.
    """
    escape, quote = options["escapechar"], options["quotechar"]
    if escape is None:
        return None
    meant = {escape, quote, delimiter, "\n", "\r"}
    letters = CONTROLS if quote is None and escape == "\\" else {}

    def one(found: re.Match) -> str:
        char = found[1]
        if char in meant:
            return found[0]
        return escape + (letters[char] if char in letters else found[0])

    return functools.partial(re.compile(f"{re.escape(escape)}(.)", re.DOTALL).sub, one)


def _is_header(fields: list[str], names: list[str]) -> bool:
    """Whether a first line names the columns that data.csv.fieldnames names: two of them do, as pandas' index has no
    name there."""
    return sum(field == name for field, name in zip(fields, names, strict=True)) > 1


def _unreadable(path: Path, error: Exception, after: str = "") -> Exception:
    """What to raise for any error of a parser."""
    if lack(error, str(path)):
        return error
    reason = "nested too deeply" if isinstance(error, RecursionError) else words(error)
    return UserError(f"{path}: cannot be read{after} ({reason})")


def plain_types(paths: Iterable[Path], data: dict) -> dict[str, str]:
    """How columns of those of `paths` that are parquet are to be written (see `temper.data.arrow.PlainTypes`)."""
    found = arrow.PlainTypes()
    for path in paths:
        if (data.get("format") or format_of(path.name)) == "parquet":
            try:
                found.look_at(path)
            except UserError:
                raise
            except Exception as error:
                raise _unreadable(path, error) from None
    return found.types()


def refuse_unread(what: str, format: str, csv: dict, field: str | None, encoding: str = UTF_8) -> None:
    """Refuse options that the format of `what` would ignore."""
    given = [name for name, value in csv.items() if value != CSV_DEFAULTS[name]]
    if field is not None and format != "json":
        raise UserError(
            f"{what}: data.field={field} is for json files, and this is {format}: leave data.field out (~data.field)"
        )
    if format == "parquet" and encoding != UTF_8:
        raise UserError(
            f"{what}: data.encoding={encoding} is for text, and this is {format}: "
            "leave data.encoding out (~data.encoding)"
        )
    if given and format != "csv":
        raise UserError(
            f"{what}: data.csv.{given[0]}={csv[given[0]]!r} is for csv files, and this is {format}: leave data.csv out "
            "(~data.csv)"
        )


def unpacked(name: str) -> str:
    """A file's name, in small letters, without the ending of packed files."""
    ending = Path(name).suffix.lower()
    return name.lower().removesuffix(ending) if ending in PACKED else name.lower()


def format_of(name: str) -> str | None:
    """The format by the file's extension, if known."""
    inner = unpacked(name)
    found = FORMATS.get(Path(inner).suffix)
    return None if found == "parquet" and inner != name.lower() else found


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


def _parsed_line(text: str) -> dict | BadRow:
    """The row of a line of jsonl."""
    try:
        row, end = DECODER.raw_decode(text) if text[0] == "{" else (None, None)  # faster than decode
        if end != len(text):
            row = DECODER.decode(text)  # skips blanks, and says what comes after an object
    except (ValueError, RecursionError) as error:
        return BadRow("json", _json_fault(error))
    return row if isinstance(row, dict) else BadRow("object", _no_object(row))


def format_by_ending(name: str) -> str | None:
    """The same; files that are one text are of the format text."""
    return "text" if Path(unpacked(name)).suffix in TEXTS else format_of(name)


def _format_by_ending(path: Path) -> str:
    found = format_by_ending(path.name)
    if found is None:
        raise UserError(
            f"{path}: cannot tell the format by the ending: set data.format to json, jsonl, csv, parquet or text"
        )
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
    of_rows = list(_paths_of_rows(whole))
    if of_rows:
        deeper = f"; or deeper, in {', '.join(map(repr, of_rows[1:]))}" if len(of_rows) > 1 else ""
        return f"one object; if its rows are in '{of_rows[0]}': data.field='{of_rows[0]}'{deeper}"
    if lists or (whole and all(isinstance(value, dict) for value in whole.values())):
        return "one object of columns: write rows (pandas: to_json(path, orient='records'))"
    return "one object: put brackets around it, [{...}], if it is a row"


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no valid JSON: {error.msg[0].lower()}{error.msg[1:]} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)  # a key twice, a number of thousands of digits


def _rows_of_field(path: Path, whole, field: str) -> Iterator:
    """The rows of a json file in `field`: a name, or names from outside to inside with dots between them.

    A row has the columns of the objects around it, too, except those of the outermost, and those that it has itself:
    in SQuAD's ``data.paragraphs.qas``, `context` and `title`.
    """
    names = [field] if isinstance(whole, dict) and field in whole else field.split(".")
    first = names[0]

    def rows_in(value, names: list[str], around: dict | None):
        if isinstance(value, dict) and names and names[0] in value:
            if around is not None:
                around = {**around, **{name: found for name, found in value.items() if name != names[0]}}
            yield from rows_in(value[names[0]], names[1:], around)
        elif isinstance(value, list):
            for element in value:
                if names:
                    yield from rows_in(element, names, around or {})
                else:
                    yield {**(around or {}), **element} if isinstance(element, dict) else element
        else:
            where = f" (there is no list '{names[0]}' in some object)" if names and names[0] != first else ""
            raise UserError(f"{path}: has no list '{field}', which data.field names{where}")

    return rows_in(whole, names, None)


def _paths_of_rows(value: dict, deep: int = 4) -> Iterator[str]:
    """The names of lists of objects in an object, those in their first elements with dots between the names."""
    for name, inner in value.items() if deep else ():
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            yield name
            yield from (f"{name}.{below}" for below in _paths_of_rows(inner[0], deep - 1))
        elif isinstance(inner, dict):
            yield from (f"{name}.{below}" for below in _paths_of_rows(inner, deep - 1))


def _no_object(row) -> str:
    return f"expected an object with columns, found {_kind(row)}"


def _kind(value) -> str:
    names = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(type(value), type(value).__name__)
