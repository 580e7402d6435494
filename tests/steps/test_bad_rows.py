"""Bad rows by policy, values as people write them, and what is said of rows that may not say what was meant."""

import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from steps import format_prompts
from temper.commands.explain import changed_rows
from temper.data import splitting
from temper.data.places import Place, places
from temper.data.rows import BadRow, RawFile

OUTPUT = Path("prompts")
ROWS = [{"question": f"What is {n} + {n}?", "answer": f"{2 * n}"} for n in range(40)]
FREE = {"layout": "template", "prompt": "{{ question }}", "completion": "{{ answer }}"}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def jsonl(*lines, path: str = "rows.jsonl") -> None:
    texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    Path(path).write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts))


def run(raw: str = "rows.jsonl", **data) -> tuple[dict, dict]:
    """The rows by their ids, and the counts."""
    shares = {"validation": 0, "test": 0.3}
    config = {"data": {"layout": "question_answer", "splits": shares, **data}, "prompt": {"system": None}}
    format_prompts.main(["--raw", raw, "--output", str(OUTPUT), "--config", json.dumps(config)])
    texts = [(OUTPUT / f"{split}.jsonl").read_text(encoding="utf-8") for split in splitting.SPLITS]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    return {row["id"]: row["messages"] for row in rows}, json.loads((OUTPUT / "stats.json").read_text())


def complaint(capsys, **arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        run(**arguments)
    assert caught.value.code == 2
    assert not OUTPUT.exists()
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")


def rejected() -> list[dict]:
    return [json.loads(line) for line in (OUTPUT / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def answers(rows: dict) -> list[str]:
    return [rows[number][-1]["content"] for number in sorted(rows)]


# --- policy --------------------------------------------------------------------------------------

BAD = [
    ('{"question": "Why', "json", "no valid JSON: unterminated string starting at (column 14)"),
    ("[1]", "object", "expected an object with columns, found a list"),
    ({"question": "Why?"}, "layout", "no column 'answer'; there are question: choose another data.layout"),
    ('{"question": "\\ud83d", "answer": "half"}', "layout", "the user's text holds half a character"),
    (b'{"question": "\xe9", "answer": "No."}', "encoding", "byte 0xe9 at column 15 is not UTF-8"),
    ('{"question": "a", "question": "b", "answer": "c"}', "json", "has 'question' twice"),
]


def mixed() -> list:
    """Good and bad rows in turn."""
    made: list = list(ROWS)
    for index, (line, _, _) in enumerate(BAD):
        made.insert(3 * index + 2, line)
    return made


def test_bad_rows_are_left_out_and_listed(caplog):
    lines = mixed()
    jsonl(*lines)
    rows, stats = run(on_bad_row="skip", max_bad_share=0.2)
    good = {number: line for number, line in enumerate(lines, 1) if line in ROWS}
    assert {number: row[0]["content"] for number, row in rows.items()} == {
        number: line["question"] for number, line in good.items()
    }
    listed = rejected()
    assert [row["line"] for row in listed] == [row["id"] for row in listed] == [3, 6, 9, 12, 15, 18]
    for row, (_, kind, reason) in zip(listed, BAD, strict=True):
        assert row["file"] == "rows.jsonl"
        assert row["kind"] == kind
        assert row["reason"].startswith(reason)
    assert stats["rows"] == 46
    assert stats["rejected"] == {"rows": 6, "by_reason": {"encoding": 1, "json": 2, "layout": 2, "object": 1}}
    [said] = [record.getMessage() for record in caplog.records if "rejected.jsonl" in record.getMessage()]
    assert said.startswith("6 of 46 rows are bad and left out (encoding 1, json 2, layout 2, object 1), listed in ")
    assert said.endswith("the first: rows.jsonl:3: no valid JSON: unterminated string starting at (column 14)")


@pytest.mark.parametrize("bad", BAD, ids=[kind for _, kind, _ in BAD])
def test_by_default_the_first_is_an_error(capsys, bad):
    line, _, reason = bad
    jsonl(*ROWS[:5], line, *ROWS[5:], "oops")
    assert complaint(capsys).startswith(f"rows.jsonl:6: {reason}")


def test_without_bad_rows_the_policies_agree():
    jsonl(*ROWS)
    rows, stats = run()
    OUTPUT.rename("error")
    assert run(on_bad_row="skip")[0] == rows
    for name in ("train.jsonl", "test.jsonl"):
        assert (OUTPUT / name).read_bytes() == (Path("error") / name).read_bytes()
    assert rejected() == []
    assert json.loads((OUTPUT / "stats.json").read_text()) == {**stats, "rejected": {"rows": 0, "by_reason": {}}}


def test_more_than_the_share_is_an_error(capsys):
    jsonl(*mixed())
    said = complaint(capsys, on_bad_row="skip")
    assert said.startswith("rows.jsonl: 6 of 46 rows are bad, 13.04%, more than data.max_bad_share=0.01: rows.jsonl:3")
    assert "rows.jsonl:6: expected an object with columns, found a list; rows.jsonl:9: no column 'answer'" in said
    assert "; and 3 more: correct them, leave them out by data.where, or raise the share" in said
    assert run(on_bad_row="skip", max_bad_share=0.131)[1]["rejected"]["rows"] == 6


def test_a_share_without_skip_is_refused(capsys):
    jsonl(*ROWS)
    assert "'max_bad_share' is for bad rows that are left out: set on_bad_row=skip" in complaint(
        capsys, max_bad_share=0.5
    )


def test_csv(capsys):
    lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in ROWS)]
    lines[3], lines[7] = "too,many,fields", 'a,"quote" in between'
    lines[10], lines[12] = "question,answer", 'three\ncells,"over\ntwo lines",more'
    Path("rows.csv").write_bytes("\n".join(lines).encode() + b"\nbad \xff byte,1\n")
    rows, stats = run(raw="rows.csv", on_bad_row="skip", max_bad_share=0.3)
    assert stats["rejected"]["by_reason"] == {"encoding": 1, "fields": 3, "header": 1, "quotes": 1}
    listed = rejected()
    assert [(row["id"], row["line"], row.get("lines", 1)) for row in listed] == [
        (3, 4, 1), (7, 8, 1), (10, 11, 1), (12, 13, 1), (13, 14, 2), (42, 44, 1)
    ]  # fmt: skip
    assert listed[4]["reason"].startswith("3 fields over 2 lines (is a quote not closed?), expected 2")
    assert len(rows) == 36
    assert complaint_of(capsys, "skipped", raw="rows.csv").startswith("rows.csv:4: 3 fields")


def test_rows_hidden_by_a_quote_count_by_their_lines(capsys):
    lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in ROWS)]
    lines[10] = '"What is it?,20'
    lines[30] = 'And "this"?,7",more'
    Path("rows.csv").write_text("\n".join(lines) + "\n")
    assert ": 1 of 20 rows (in 21 lines) are bad, 52.50%, more than" in complaint(
        capsys, raw="rows.csv", on_bad_row="skip", max_bad_share=0.3
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.json", '[{"question": "a", "answer": "b"}, {"question"', "rows.json:1: no valid JSON"),
        ("rows.csv", 'question,answer\na,b\nc,"d\n', "rows.csv:3: no valid csv: unexpected end of data"),
        ("rows.jsonl.gz", "plain", "rows.jsonl.gz:1: no valid gzip file"),
        ("rows.parquet", "plain text", "rows.parquet: cannot be read (Parquet magic bytes"),
    ],
)
def test_damage_behind_which_nothing_can_be_read_is_an_error(capsys, name, content, said):
    Path(name).write_text(content)
    assert complaint(capsys, raw=name, on_bad_row="skip", max_bad_share=0.9).startswith(said)


def test_places_of_rows_count_the_bad_ones():
    """What a later stage says of a row's line is true whatever was left out, in all files."""
    Path("raw").mkdir()
    lines = mixed()
    jsonl(*lines, path="raw/a.jsonl")
    jsonl("oops", *ROWS[:3], path="raw/b.jsonl")
    parquet.write_table(pyarrow.Table.from_pylist([*ROWS[:2], {"question": None, "answer": "a"}]), "raw/c.parquet")
    data = {"layout": "question_answer", "on_bad_row": "skip", "max_bad_share": 0.5}
    rows, _ = run(raw="raw", on_bad_row="skip", max_bad_share=0.5)
    found = places(Path("raw"), data, set(rows))
    assert set(found) == set(rows)
    for number, place in found.items():
        assert isinstance(place, Place)
        content = dict(RawFile(Path(place.file)).entries())[place.number]
        assert content["question"] == rows[number][0]["content"]
    bad = places(Path("raw"), data, {row["id"] for row in rejected()})
    assert [(bad[row["id"]].file, bad[row["id"]].number) for row in rejected()] == [
        (row["file"], row.get("line", row.get("row"))) for row in rejected()
    ]
    assert [row for row in rejected() if "row" in row] == [
        {
            "id": 53,
            "file": "raw/c.parquet",
            "row": 3,
            "kind": "layout",
            "reason": 'column "question" is empty; to leave such rows out, set data.where to '
            "\"question | default('', true) | trim != ''\"",
        }
    ]


def test_explain_counts_rows_that_are_left_out():
    """An edited row is named by its number, though rows before it were left out."""
    lines = mixed()
    jsonl(*lines)
    given = {"on_bad_row": "skip", "max_bad_share": 0.2}
    run(**given)
    data = {"layout": "question_answer", "splits": {"validation": 0, "test": 0.3}, **given}
    job = SimpleNamespace(inputs={"raw": "rows.jsonl"}, config={"data": data, "prompt": {"system": None}})
    assert changed_rows(job, OUTPUT).endswith("a row that no split uses changed")
    lines[3] = {**lines[3], "answer": "another"}
    jsonl(*lines)
    assert changed_rows(job, OUTPUT).endswith(": row 4 changed")
    jsonl(*lines, "oops")
    assert changed_rows(job, OUTPUT).endswith(": 46 -> 47 rows")


def test_a_folder_of_spark():
    """Its marks and checksums are no data."""
    Path("raw").mkdir()
    for part in range(2):
        lines = [f'{row["question"]},"{row["answer"]} \\"x\\""' for row in ROWS[part * 20 : part * 20 + 20]]
        Path(f"raw/part-0000{part}-3f.csv").write_text("\n".join(["question,answer", *lines]) + "\n")
        Path(f"raw/.part-0000{part}-3f.csv.crc").write_bytes(b"crc\x00")
    Path("raw/_SUCCESS").touch()
    rows, _ = run(raw="raw", csv={"escapechar": "\\"})
    assert answers(rows) == [f'{row["answer"]} "x"' for row in ROWS]


def test_entries_and_rows_agree():
    jsonl(*mixed())
    entries = list(RawFile(Path("rows.jsonl")).entries())
    assert [number for number, _ in entries] == list(range(1, 47))
    assert sum(isinstance(row, BadRow) for _, row in entries) == 4  # the others are the layout's


# --- values as people write them -----------------------------------------------------------------


def test_labels_come_out_as_people_write_them():
    """A whole number with missing ones beside it, true and false, days, times, decimals."""
    columns = {
        "whole": ([1.0, None, 3.0], ["1", "3"]),
        "truth": ([True, None, False], ["true", "false"]),
        "day": (pyarrow.array([datetime.date(2026, 5, n) for n in (1, 2, 3)]), ["2026-05-01", "2026-05-03"]),
        "stamp": (pyarrow.array([datetime.datetime(2026, 5, n) for n in (1, 2, 3)]), ["2026-05-01", "2026-05-03"]),
        "time": (
            pyarrow.array([datetime.datetime(2026, 5, n, 12) for n in (1, 2, 3)]),
            ["2026-05-01T12:00:00", "2026-05-03T12:00:00"],
        ),
        "single": (pyarrow.array([0.1, 0.2, 0.3], pyarrow.float32()), ["0.1", "0.3"]),
        "kind": (pyarrow.array(["a", "b", "c"]).dictionary_encode(), ["a", "c"]),
    }
    table = {"question": ["What is it?", "Who?", "Where?"], **{name: made for name, (made, _) in columns.items()}}
    parquet.write_table(pyarrow.table(table), "rows.parquet")
    for name, (_, expected) in columns.items():
        OUTPUT.exists() and OUTPUT.rename(f"before-{name}")
        free = {**FREE, "completion": f"{{{{ {name} }}}}", "where": "whole is not none"}
        rows, _ = run(raw="rows.parquet", **free, splits={"validation": 0, "test": 0.45})
        assert answers(rows) == expected


def test_words_for_missing_are_said(caplog, capsys):
    """A csv of pandas' astype(str): the text nan is in the file, so it is learned, but not silently."""
    lines = [f"{row['question']},{'nan' if n % 4 == 0 else row['answer']}" for n, row in enumerate(ROWS)]
    Path("rows.csv").write_text("question,answer\n" + "\n".join(lines) + "\n")
    rows, _ = run(raw="rows.csv")
    assert answers(rows).count("nan") == 10
    [said] = [record.getMessage() for record in caplog.records if "learned as a word" in record.getMessage()]
    assert said.startswith("10 rows have 'nan' in column 'answer' (the first: rows.csv:2), which is learned as a word")
    OUTPUT.rename("before")
    caplog.clear()
    assert said.endswith("set data.where to \"answer != 'nan'\"")
    assert len(run(raw="rows.csv", where="answer != 'nan'")[0]) == 30
    assert not [record for record in caplog.records if "learned as a word" in record.getMessage()]
    Path("rows.csv").write_text("question,answer\n" + "\n".join(lines).replace("nan", "\\N") + "\n")
    assert complaint_of(capsys, "again", raw="rows.csv").startswith('rows.csv:2: column "answer" is empty; to leave')


def complaint_of(capsys, name: str, **arguments) -> str:
    OUTPUT.rename(name)
    return complaint(capsys, **arguments)


def test_whole_numbers_with_point_zero_are_said(caplog):
    """pandas writes 1.0 to csv where a whole number is missing in another row; the filter that is proposed works."""
    lines = [f"{row['question']},{float(row['answer'])}" for row in ROWS]
    Path("rows.csv").write_text("question,answer\n" + "\n".join(lines) + "\n")
    rows, _ = run(raw="rows.csv")
    assert answers(rows)[:2] == ["0.0", "2.0"]
    [said] = [record.getMessage() for record in caplog.records if "whole numbers" in record.getMessage()]
    assert "data.completion='{{ COLUMN | int }}'" in said
    OUTPUT.rename("before")
    rows, _ = run(raw="rows.csv", **{**FREE, "completion": "{{ answer | int }}"})
    assert answers(rows) == [row["answer"] for row in ROWS]


def test_latin1_of_a_windows_file_is_said(caplog):
    rows = [{**row, "question": f"“{row['question']}”"} for row in ROWS]
    Path("rows.jsonl").write_bytes("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode("cp1252"))
    run(encoding="latin-1")
    [said] = [record.getMessage() for record in caplog.records if "control characters" in record.getMessage()]
    assert said.endswith("read as Latin-1: set data.encoding=cp1252")
    OUTPUT.rename("before")
    assert run(encoding="cp1252")[0][1][0]["content"] == rows[0]["question"]


def test_encodings_are_checked(capsys):
    jsonl(*ROWS)
    assert "'windows' is no encoding that Python knows; allowed: cp1250" in complaint(capsys, encoding="windows")
    assert "did you mean 'cp1252'?" in complaint(capsys, encoding="cp125")
    assert "'cp037' is not for files of lines: convert them to UTF-8" in complaint(capsys, encoding="cp037")
