"""Reading rows: what is written is read back, and every fault names file and line."""

import csv
import gzip
import io
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from temper.data.rows import RawFile
from temper.errors import UserError

COLUMNS = ["id", "text", "label"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tables = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, texts)), max_size=6)
objects = st.lists(st.dictionaries(texts, st.none() | st.integers() | texts | st.lists(texts, max_size=3)), max_size=6)


def read(path, format=None, **options):
    return [row for _, row in RawFile(path, format, options)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


# --- round trips ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(objects, st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans(), st.booleans())
def test_jsonl_round_trip(folder, rows, end, ascii_only, bom):
    lines = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    path = folder / "rows.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + lines.encode())
    assert read(path) == rows


@settings(deadline=None)
@given(objects, st.sampled_from([None, 2]))
def test_json_round_trip(folder, rows, indent):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8", newline="")
    assert read(path) == rows


@settings(deadline=None)
@given(tables, st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]))
@example(rows=[{"id": "1", "text": r"a \N", "label": r"\N"}], delimiter=",", end="\n")
def test_csv_round_trip(folder, rows, delimiter, end):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    path = folder / "rows.csv"
    path.write_bytes(text.getvalue().encode())
    null = r"\N"  # as MySQL writes it: alone in a cell it is no text
    expected = [{name: None if cell == null else cell for name, cell in row.items()} for row in rows]
    assert read(path, delimiter=delimiter) == expected


@settings(deadline=None)
@given(tables)
def test_parquet_round_trip(folder, rows):
    import pyarrow
    from pyarrow import parquet

    path = folder / "rows.parquet"
    schema = pyarrow.schema([(name, pyarrow.string()) for name in COLUMNS])
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    assert read(path) == rows


def test_gzip_tsv_and_a_last_line_without_end(tmp_path):
    path = tmp_path / "rows.tsv.gz"
    path.write_bytes(gzip.compress(b'id\ttext\r\n1\tsay "hi"\r\n2\tlast'))
    assert read(path, quotechar=None) == [{"id": "1", "text": 'say "hi"'}, {"id": "2", "text": "last"}]


def test_csv_without_header_takes_fieldnames(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b'1\t0.5\tgood\r\n\r\n2\t-1\tit\'s "bad"\r\n')
    rows = RawFile(path, "csv", {"delimiter": "\t", "quotechar": None, "fieldnames": ["id", "rating", "text"]})
    assert list(rows) == [
        (1, {"id": "1", "rating": "0.5", "text": "good"}),
        (3, {"id": "2", "rating": "-1", "text": 'it\'s "bad"'}),
    ]


def test_long_fields_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 500_000 + "\n")
    assert len(read(path)[0]["text"]) == 500_000


def test_numbers_are_those_of_the_line_a_row_starts_in(tmp_path):
    table, lines, array = tmp_path / "rows.csv", tmp_path / "rows.jsonl", tmp_path / "rows.json"
    table.write_text('a,b\n1,"two\nlines"\n3,4\n')
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    array.write_text('[\n {"a":\n  1},\n {"a": 2}]\n')
    assert [number for number, _ in RawFile(table)] == [2, 4]
    assert [number for number, _ in RawFile(lines)] == [1, 3]
    assert [number for number, _ in RawFile(array)] == [2, 4]


# --- faults --------------------------------------------------------------------------------------

GOOD_LINE = b'{"a": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", GOOD_LINE + b'{"a": }\n', "x.jsonl:2: no valid JSON: expecting value (column 7)"),
        ("x.jsonl", GOOD_LINE * 2 + b"[1]\n", "x.jsonl:3: expected an object with columns, found a list"),
        (
            "x.jsonl",
            GOOD_LINE + b'{"a": "caf\xe9"}\n',
            "x.jsonl:2: byte 0xe9 at column 11 is not UTF-8: set data.encoding=cp1252, if",
        ),
        (
            "x.json",
            b'[\n{"a": 1},\n{"a": 2}\n{"a": 3}]',
            "x.json:4: no valid JSON: expecting ',' or ']' after an element",
        ),
        ("x.json", b'[{"a": 1},\n]', "x.json:2: no valid JSON: expecting value (column 1)"),
        ("x.json", b'[{"a": 1}', "x.json:1: no valid JSON: expecting ',' or ']' after an element (column 10)"),
        ("x.json", b'[\n{"a": 1}\n]\n[]', "x.json:4: no valid JSON: extra data after the array"),
        (
            "x.json",
            GOOD_LINE * 2,
            "x.json:1: no valid JSON: expecting an array of objects, [{...}, ...] (one object a line is",
        ),
        ("x.json", b'[\n{"a": 1},\n7]', "x.json:3: expected an object with columns, found a number"),
        ("x.json", b'[\n"\xff"]', "x.json:2: byte 0xff at column 2 is not UTF-8"),
        ("x.csv", b"a,b\n1,2\n3\n", "x.csv:3: 1 fields, expected 2 (a, b); check data.csv.delimiter (',')"),
        ("x.csv", b'a,b\n1,"2" x\n', "x.csv:2: no valid csv: ',' expected after '\"'; if quotes are plain text"),
        ("x.csv", b'a,b\n1,2\n3,"4\n', "x.csv:3: no valid csv: unexpected end of data"),
        ("x.csv", b"a,b,a\n1,2,3\n", "x.csv:1: the header has column 'a' twice"),
        ("x.csv", b"a,b\n1,\xff\n", "x.csv:2: byte 0xff at column 3 is not UTF-8"),
        ("x.csv", b"a,b\n1,2\r3,4\n", "x.csv:2: no valid csv: new-line character seen in unquoted field"),
        ("x.jsonl.gz", b"plain", "x.jsonl.gz:1: no valid gzip file"),
        ("x.parquet", b"plain text", "x.parquet: cannot be read (Parquet magic bytes not found"),
        ("x.dat", b"", "x.dat: cannot tell the format by the ending: set data.format"),
        ("x.parquet.gz", b"", "x.parquet.gz: cannot tell the format by the ending"),
    ],
)
def test_faults_name_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="^" + re.escape(f"{tmp_path}/{message}")) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_rows_before_a_fault_have_been_given(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\noops\n')
    rows = iter(RawFile(path))
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(UserError, match="rows.jsonl:3"):
        next(rows)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_a_text_file_is_one_row(tmp_path, name):
    path, content = tmp_path / name, '\ufeffOne line,\n\nand "another"\n'
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    assert list(RawFile(path)) == [(1, {"text": content[1:]})]
