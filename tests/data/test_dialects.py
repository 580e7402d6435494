"""Files as other programs write them: what was written comes back equal, or a line says what to write."""

import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import re

import pandas
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from temper.data.rows import RawFile, format_of, plain_types
from temper.errors import UserError

COLUMNS = ["question", "answer"]
# Letters, and what is special in some dialect.
texts = st.text(st.sampled_from("aé€ħ ,;\t\"'\\nN\n") | st.characters(codec="utf-16"), min_size=1, max_size=8)
texts = texts.filter(lambda text: "\r" not in text and text != "\\N")  # csv's line end; null
tables = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, texts)), min_size=1, max_size=4)
few = settings(deadline=None, max_examples=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dialects")


def written(folder, content: bytes | str, name: str = "rows.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **options) -> list[dict]:
    return [row for _, row in RawFile(path, **options)]


def table(rows: list[dict], **dialect) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- csv -----------------------------------------------------------------------------------------


@few
@given(tables, st.sampled_from(["utf-8-sig", "utf-16", "utf-8"]))
def test_excel(folder, rows, encoding):
    """Semicolons behind ``sep=;``; or tabs in UTF-16, or a byte order mark."""
    text = table(rows, delimiter=";", lineterminator="\r\n")
    assert read(written(folder, ("sep=;\r\n" + text).encode(encoding))) == rows
    assert read(written(folder, text.encode(encoding)), csv={"delimiter": ";"}) == rows


@few
@given(tables)
def test_pandas(folder, rows):
    """With its index, and with backslashes."""
    frame = pandas.DataFrame(rows)
    assert read(written(folder, frame.to_csv())) == [
        {"Unnamed: 0": str(number), **row} for number, row in enumerate(rows)
    ]
    escaped = frame.to_csv(index=False, doublequote=False, escapechar="\\")
    assert read(written(folder, escaped), csv={"escapechar": "\\"}) == rows


def mysql(text: str | None, special: str) -> str:
    """A field of SELECT ... INTO OUTFILE with ESCAPED BY '\\'."""
    return "\\N" if text is None else re.sub(f"([\\\\\n{special}])", r"\\\1", text)


@few
@given(st.lists(st.lists(st.none() | texts, min_size=2, max_size=2), min_size=1, max_size=4))
def test_mysql(folder, rows):
    """Its default, tabs without quotes; and as csv. A null is a null, not the text N."""
    made = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    tabs = "".join("\t".join(mysql(text, "\t") for text in row) + "\n" for row in rows)
    options = {"fieldnames": COLUMNS, "escapechar": "\\"}
    assert read(written(folder, tabs), csv={**options, "delimiter": "\t", "quotechar": None}) == made
    quoted = [[mysql(text, '"') if text is None else f'"{mysql(text, chr(34))}"' for text in row] for row in rows]
    commas = "".join(",".join(row) + "\n" for row in quoted)
    assert read(written(folder, commas), csv=options) == made


def test_text_of_postgresql(folder):
    path = written(folder, "1\ta\\nb\\\\c\\td\n2\t\\N\n")
    options = {"fieldnames": ["id", "text"], "escapechar": "\\", "delimiter": "\t", "quotechar": None}
    assert read(path, csv=options) == [{"id": "1", "text": "a\nb\\c\td"}, {"id": "2", "text": None}]


def test_spark(folder):
    r"""It writes \" for quotes, and other backslashes as they are."""
    path = written(folder, 'question,answer\nWhat is $\\frac{1}{2}$?,"a \\"half\\", \\o/"\n', "part-00000-3f.c000.csv")
    rows = [{"question": "What is $\\frac{1}{2}$?", "answer": 'a "half", \\o/'}]
    assert read(path, csv={"escapechar": "\\"}) == rows
    with pytest.raises(UserError, match=r"data\.csv\.escapechar=\\\\$"):
        read(path)


def test_null_without_an_escape(folder):
    assert read(written(folder, "question,answer\n\\N,a\\N\n")) == [{"question": None, "answer": "a\\N"}]


def test_rows_are_numbered_by_the_line_that_they_start_in(folder):
    path = written(folder, 'sep=;\nquestion;answer\n"two\nlines";1\n\n3;4\n')
    assert [number for number, _ in RawFile(path)] == [3, 6]


def test_line_ends_of_old_macs(folder):
    with pytest.raises(UserError, match=r"rows.csv:1: no valid csv: new-line .*tr '\\r' '\\n'$"):
        read(written(folder, "question,answer\ra,b\r"))


# --- encodings -----------------------------------------------------------------------------------

LETTERS = "“é” – ž\n"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "iso8859-15", "koi8-r"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json"])
def test_encodings_by_name(folder, name, encoding):
    text = {"iso8859-15": "été 5 €", "koi8-r": "привет"}.get(encoding, LETTERS)
    rows = [{"question": text, "answer": str(number)} for number in range(3)]
    content = {
        "rows.csv": table(rows, lineterminator="\r\n"),
        "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "rows.json": json.dumps(rows, ensure_ascii=False, indent=1),
    }[name]
    assert read(written(folder, content.encode(encoding), name), encoding=encoding) == rows


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "latin-1"])
def test_a_byte_order_mark_comes_before_the_name(folder, encoding):
    rows = [{"question": LETTERS, "answer": "1"}]
    for marked in ("utf-8-sig", "utf-16", "utf-32"):
        assert read(written(folder, table(rows).encode(marked)), encoding=encoding) == rows


@pytest.mark.parametrize(
    ("content", "encoding", "said"),
    [
        ("question,answer\né,1\n".encode(), "cp1252", r"rows.csv: is UTF-8, not cp1252, in 1 of 1 lines .* leave data"),
        ("question,answer\né,1\n".encode("utf-16-be"), "utf-16", "order mark of utf-16: .* data.encoding=utf-16-le"),
        (b"question,answer\n\x81,1\n", "cp1252", "rows.csv:2: byte 0x81 at column 1 is not cp1252: what is the file's"),
        (b"question,answer\n\x81,1\n", "utf-8", "byte 0x81 at column 1 is not UTF-8: what is the file's encoding"),
        (b"question,answer\n\xe9,1\n", "utf-8", "is not UTF-8: set data.encoding=cp1252, if the file is of Windows"),
        (
            "question,answer\né,1\né,1\n".encode() + b"\xe9,2\n",
            "utf-8",
            r"rows.csv:4: .*, as most of the file is: correct the line, or .*\(data.on_bad_row=skip\)",
        ),
        (codecs.BOM_UTF16_LE + "question,answer\n".encode("utf-16-le") + b"\x00\xd8\x00", "utf-8", "is no utf-16"),
        (b"PK\x03\x04\x14", "utf-8", "is a zip archive or an Excel workbook: unpack it, or save the sheet as csv"),
        (gzip.compress(b"question\n", mtime=0), "utf-8", "is gzipped: let its name end in .gz"),
    ],
)
def test_wrong_bytes(folder, content, encoding, said):
    with pytest.raises(UserError, match=said) as caught:
        read(written(folder, content), encoding=encoding)
    assert "\n" not in str(caught.value)


def test_who_cannot_set_an_encoding_is_told_to_convert(folder):
    path = written(folder, b"question,answer\n\xe9,1\n")
    with pytest.raises(UserError, match=r"convert the file \(iconv -f cp1252 -t utf-8\)"):
        read(path, settable=False)


# --- packed --------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@few
@given(tables, st.sampled_from([(".gz", gzip.compress), (".zst", zstd), (".ZST", zstd)]))
def test_packed(folder, rows, packed):
    """In one frame, or in several, as parallel programs write them."""
    ending, pack = packed
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    for content in (pack(b"".join(lines)), b"".join(map(pack, lines))):
        assert read(written(folder, content, f"rows.jsonl{ending}")) == rows
    text = table(rows).encode("utf-16")
    assert read(written(folder, pack(text), f"rows.csv{ending}")) == rows
    assert read(written(folder, pack(json.dumps(rows).encode()), f"rows.json{ending}")) == rows


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_packed_files(folder, ending):
    pack = gzip.compress if ending == ".gz" else zstd
    content = pack(b"".join(json.dumps({"a": str(number)}).encode() + b"\n" for number in range(5000)))
    for damaged in (content[:-20], b"plain text", content[: len(content) // 2]):
        path = written(folder, damaged, f"rows.jsonl{ending}")
        with pytest.raises(UserError, match=rf"jsonl{ending}:\d+: no valid (gzip|zstd) file: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_formats_by_name():
    names = ["a.csv.zst", "A.CSV", "a.JSONL.GZ", "part-0-c000.snappy.parquet", "a.parquet.zst", "_SUCCESS", "a.zst"]
    assert [format_of(name) for name in names] == ["csv", "csv", "jsonl", "parquet", None, None, None]


def test_a_packed_tsv_has_tabs(folder):
    assert read(written(folder, zstd(b"a\tb\n1\t2\n"), "rows.tsv.zst")) == [{"a": "1", "b": "2"}]


# --- json ----------------------------------------------------------------------------------------


def test_missing_and_infinite_numbers_are_read(folder):
    [row] = read(written(folder, '{"a": NaN, "b": Infinity, "c": null}\n', "rows.jsonl"))
    assert row["a"] != row["a"]
    assert (row["b"], row["c"]) == (float("inf"), None)


SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {"context": "C", "qas": [{"question": "Q1", "id": "1"}, {"question": "Q2", "id": "2", "title": "own"}]},
                {"context": "D", "qas": []},
                {"context": "E", "qas": [{"question": "Q3", "id": "3"}]},
            ],
        }
    ],
}


def test_nested_fields(folder):
    path = written(folder, json.dumps(SQUAD), "squad.json")
    expected = [
        {"title": "T", "context": "C", "question": "Q1", "id": "1"},
        {"title": "own", "context": "C", "question": "Q2", "id": "2"},
        {"title": "T", "context": "E", "question": "Q3", "id": "3"},
    ]
    assert read(path, field="data.paragraphs.qas") == expected
    assert read(path, field="data") == SQUAD["data"]
    inner = written(folder, json.dumps(SQUAD["data"]), "list.json")
    assert read(inner, field="paragraphs.qas") == expected
    dotted = written(folder, json.dumps({"a.b": [{"c": 1}], "n": {"rows": [{"c": 2}]}}), "dotted.json")
    assert [read(dotted, field=field) for field in ("a.b", "n.rows")] == [[{"c": 1}], [{"c": 2}]]


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("rows", "has no list 'rows', which data.field names"),
        ("data.qas", r"has no list 'data.qas', which data.field names \(there is no list 'qas' in some object\)"),
        ("version", "has no list 'version', which data.field names"),
    ],
)
def test_missing_fields(folder, field, said):
    with pytest.raises(UserError, match=f"squad.json: {said}$"):
        read(written(folder, json.dumps(SQUAD), "squad.json"), field=field)


def test_the_fields_that_there_are_are_named(folder):
    said = "one object; if its rows are in 'data': data.field='data'; or deeper, in 'data.paragraphs', 'data.paragraphs"
    with pytest.raises(UserError, match=said):
        read(written(folder, json.dumps(SQUAD), "squad.json"))


# --- parquet -------------------------------------------------------------------------------------

MAP_IN_STRUCT = pyarrow.struct([("m", pyarrow.map_("string", "int64"))])


def test_values_of_parquet(folder):
    """Each kind of column comes back as what JSON would have in its place."""
    day, time = datetime.date(2026, 5, 1), datetime.datetime(2026, 5, 1, 12, 30)
    columns = {
        "list": (pyarrow.array([["a", "b"]]), ["a", "b"]),
        "struct": (pyarrow.array([{"x": 1, "y": ["z"]}]), {"x": 1, "y": ["z"]}),
        "map": (pyarrow.array([[("k", "v")]], pyarrow.map_("string", "string")), {"k": "v"}),
        "maps": (pyarrow.array([[{"m": [("k", 1)]}]], pyarrow.list_(MAP_IN_STRUCT)), [{"m": {"k": 1}}]),
        "category": (pyarrow.array(["red"]).dictionary_encode(), "red"),
        "day": (pyarrow.array([day]), day),
        "time": (pyarrow.array([time]), time),
        "decimal": (pyarrow.array([decimal.Decimal("1.50")]), decimal.Decimal("1.50")),
        "large": (pyarrow.array(["long"], pyarrow.large_string()), "long"),
        "view": (pyarrow.array(["v"], pyarrow.string_view()), "v"),
        "bool": (pyarrow.array([True]), True),
        "bytes": (pyarrow.array([b"x"]), b"x"),
        "float32": (pyarrow.array([0.1], pyarrow.float32()), 0.1),
        "float16": (pyarrow.array([0.5], pyarrow.float16()), 0.5),
        "int8": (pyarrow.array([7], pyarrow.int8()), 7),
    }
    parquet.write_table(pyarrow.table({name: made for name, (made, _) in columns.items()}), folder / "kinds.parquet")
    [row] = read(folder / "kinds.parquet")
    assert row == {name: value for name, (_, value) in columns.items()}
    assert type(row["day"]) is datetime.date


@few
@given(st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=1, max_size=5))
def test_pandas_whole_numbers_and_days(folder, values):
    """With a missing one, pandas has floats; of days, timestamps. Both come back as they were."""
    start = datetime.date(2026, 1, 1)
    days = [None if value is None else start + datetime.timedelta(value % 999) for value in values]
    frame = pandas.DataFrame({"label": values, "day": pandas.to_datetime(pandas.Series(days))})
    frame.to_parquet(folder / "frame.parquet")
    rows = read(folder / "frame.parquet")
    assert [row["label"] for row in rows] == values
    assert [str(row["label"]) for row in rows] == [str(value) for value in values]
    assert [row["day"] and str(row["day"]) for row in rows] == [day and str(day) for day in days]


@few
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.none(), min_size=1, max_size=5))
def test_float32_in_few_digits(folder, values):
    parquet.write_table(pyarrow.table({"x": pyarrow.array([*values, 0.5], pyarrow.float32())}), folder / "f.parquet")
    back = [row["x"] for row in read(folder / "f.parquet")]
    assert (
        pyarrow.array(back, pyarrow.float32()).to_pylist()
        == pyarrow.array([*values, 0.5], pyarrow.float32()).to_pylist()
    )
    assert all(len(str(x)) <= 24 for x in back)


def test_files_of_one_table_are_written_alike(folder):
    """A part that happens to hold whole numbers only is not written otherwise than the others."""
    parts = {"a": [1.0, None], "b": [1.5, 2.0], "c": [3.0, 4.0]}
    for name, values in parts.items():
        parquet.write_table(pyarrow.table({"x": values}), folder / f"{name}.parquet")

    def together(*names) -> list:
        paths = [folder / f"{name}.parquet" for name in names]
        plain = plain_types(paths, {})
        return [row["x"] for path in paths for row in read(path, plain=plain)]

    assert [type(x) for x in together("a", "c")] == [int, type(None), int, int]
    assert [type(x) for x in together("a", "b")] == [float, type(None), float, float]
    assert [type(x) for x in together("c")] == [float, float]


def test_a_map_with_a_key_twice_is_refused(folder):
    column = pyarrow.array([[("k", "v"), ("k", "w")]], pyarrow.map_("string", "string"))
    parquet.write_table(pyarrow.table({"map": column}), folder / "twice.parquet")
    with pytest.raises(UserError, match="twice.parquet: cannot be read .*k"):
        read(folder / "twice.parquet")
