"""Many rows: several processes make what one makes, to the byte, and memory does not grow with the rows."""

import csv
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steps import format_prompts, mix_prompts
from temper.data import buckets, reading, splitting, survey, workers
from temper.data.buckets import Buckets
from temper.data.workers import THREADS
from tests.benchmarks import big_data

ROWS = 900
WORDS = [begin + end for begin in ("ka", "lom", "mi", "nur") for end in ("pe", "rt", "so", "tu", "vil")]
DATA = {"layout": "question_answer", "splits": {"validation": 0.2, "test": 0.2}, "on_bad_row": "skip"}


@pytest.fixture
def small(monkeypatch):
    """Pieces so small that a few hundred rows are many."""
    for module in (workers, splitting, survey):
        monkeypatch.setattr(module, "WORTH_READING", 1000)
    for module in (workers, survey):
        monkeypatch.setattr(module, "LINES", 5000)
    monkeypatch.setattr(reading, "ROWS", 50)
    monkeypatch.setattr(buckets, "MOST", 100)


def table(number: int = ROWS) -> list[dict]:
    """Rows with repetitions, near ones, several answers, and one in fifty that is bad."""
    draw = random.Random(0)
    rows = []
    for at in range(number):
        words = draw.choices(WORDS, k=12)
        if at % 7 == 0 and rows:
            words = draw.choice(rows)["question"].split()[:12]
            words[at % 12] = draw.choice(WORDS) if at % 2 else words[at % 12]
        answer = "" if at % 50 == 9 else draw.choice(["yes", "no", "nan"])
        rows.append({"question": " ".join([*words, "…"][: 12 + at % 2]), "answer": answer, "user": f"u{at % 40}"})
    return rows


def write(form: str) -> Path:
    rows = table()
    path = Path(f"rows.{form}")
    if form == "jsonl":
        lines = [json.dumps(row) for row in rows]
        lines[300], lines[301], lines[302:302] = "{broken", "[1]", ["", ""]
        path.write_text("\n".join(lines))
    elif form == "csv":
        with path.open("w", newline="") as file:
            written = csv.writer(file)
            written.writerows([rows[0].keys(), *(row.values() for row in rows), ["only one"]])
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def formatted(raw: Path, output: str, processes: int, monkeypatch, caplog, **data) -> tuple[dict[str, bytes], list]:
    """(the files that the step writes, what it says)."""
    monkeypatch.setenv(THREADS, str(processes))
    config = {"data": {**DATA, "max_bad_share": 0.1, **data}, "prompt": {"system": None}}
    caplog.clear()
    with caplog.at_level(logging.INFO):
        format_prompts.main(["--raw", str(raw), "--output", output, "--config", json.dumps(config)])
    return contents(output), said(caplog)


def contents(output: str) -> dict[str, bytes]:
    files = sorted(Path(output).iterdir())
    return {file.name: file.read_bytes() for file in files if file.name not in ("provenance.json", "config.yaml")}


def said(caplog) -> list[str]:
    lines = [re.sub(r"wrote .*", "", record.getMessage()) for record in caplog.records]
    return [line for line in lines if not re.search(r"rows in |rows/s", line)]


@pytest.mark.usefixtures("workspace", "small")
@pytest.mark.parametrize(
    ("form", "data"),
    [
        ("jsonl", {}),
        ("csv", {"limit": {"train": 200, "validation": 50, "test": 60}}),
        ("json", {"where": "answer != 'no'", "on_overlap": "drop"}),
        ("parquet", {"splits": {"validation": 0.2, "test": 0.2, "group_by": "user"}}),
    ],
)
def test_several_processes_format_as_one(monkeypatch, caplog, form, data):
    raw = write(form)
    pools = []
    pool = workers.ProcessPoolExecutor
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *args: pools.append(args[0]) or pool(*args))
    alone = formatted(raw, "alone", 1, monkeypatch, caplog, **data)
    assert not pools
    together = formatted(raw, "together", 3, monkeypatch, caplog, **data)
    assert len(pools) > 3
    assert alone == together
    stats = json.loads(alone[0]["stats.json"])
    assert stats["rejected"]["rows"] >= ROWS // 50 and stats["duplicates"] and stats["overlap"]


@pytest.mark.usefixtures("workspace")
def test_few_rows_in_one_process_make_the_same(monkeypatch, caplog):
    """Neither the size of chunks nor files for buckets change anything."""
    raw = write("jsonl")
    whole = formatted(raw, "whole", 1, monkeypatch, caplog)[0]
    monkeypatch.setattr(reading, "ROWS", 7)
    monkeypatch.setattr(workers, "LINES", 999)
    monkeypatch.setattr(survey, "LINES", 999)
    monkeypatch.setattr(buckets, "MOST", 10)
    assert formatted(raw, "pieces", 1, monkeypatch, caplog)[0] == whole


@pytest.mark.usefixtures("workspace", "small")
@pytest.mark.parametrize("processes", [1, 3])
def test_the_first_fault_in_the_file_is_told(monkeypatch, capsys, processes):
    """Also if another process, or the one that reads ahead, meets a later one first."""
    lines = [json.dumps(row) for row in table() if row["answer"]]
    lines[100], lines[160] = "{broken", "x" * 10
    Path("rows.jsonl").write_text("\n".join(lines))
    with Path("rows.jsonl").open("ab") as file:
        file.write(b"\n" + b"\xff\n" * 3)
    monkeypatch.setenv(THREADS, str(processes))
    config = json.dumps({"data": {**DATA, "on_bad_row": "error"}, "prompt": {"system": None}})
    with pytest.raises(SystemExit):
        format_prompts.main(["--raw", "rows.jsonl", "--output", "out", "--config", config])
    assert "rows.jsonl:101: no valid JSON" in capsys.readouterr().err


@pytest.mark.usefixtures("workspace", "small")
def test_several_processes_mix_as_one(monkeypatch, caplog):
    formatted(write("jsonl"), "prompts", 1, monkeypatch, caplog)
    config = json.dumps({"data": {"mix": [{"source": "one", "weight": 1.5}, {"source": "two", "weight": 0.5}]}})
    made = []
    for processes in (1, 3):
        monkeypatch.setenv(THREADS, str(processes))
        output = f"mixed-{processes}"
        mix_prompts.main(["--prompts", "prompts", "prompts", "--output", output, "--config", config])
        made.append(contents(output))
    assert made[0] == made[1]


@pytest.mark.usefixtures("workspace", "small")
def test_a_file_that_is_added_moves_no_row(monkeypatch, caplog):
    def split_of(folder: str) -> dict[str, str]:
        rows = {}
        for split in splitting.SPLITS:
            for line in Path(folder, f"{split}.jsonl").read_text().splitlines():
                rows[json.loads(line)["messages"][0]["content"]] = split
        return rows

    some = [json.dumps(row) + "\n" for row in table() if row["answer"]]
    Path("raw").mkdir()
    Path("raw/b.jsonl").write_text("".join(some[:400]))
    formatted(Path("raw"), "before", 3, monkeypatch, caplog)
    Path("raw/a.jsonl").write_text("".join(some[400:]))
    formatted(Path("raw"), "after", 2, monkeypatch, caplog)
    before, after = split_of("before"), split_of("after")
    assert len(after) > len(before) > 300
    assert before.items() <= after.items()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=9), max_size=9), st.integers(1, 20))
def test_equal_hashes_are_in_one_bucket_in_their_order(tmp_path_factory, arrays, most):
    made = Buckets(tmp_path_factory.getbasetemp(), [("hash", "u8"), ("number", "i8")])
    rows = [(value, number) for number, value in enumerate(value for array in arrays for value in array)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(buckets, "MOST", most)
        start = 0
        for array in arrays:
            some = np.array(rows[start : start + len(array)], dtype=made.dtype)
            made.add(some["hash"], some)
            start += len(array)
        for _ in range(2):
            found = [bucket.tolist() for bucket in made]
            assert sorted(sum(found, [])) == sorted(rows)
            hashes = [value for bucket in found for value in {value for value, _ in bucket}]
            assert len(hashes) == len(set(hashes))
            for bucket in found:
                assert [number for _, number in bucket] == sorted(number for _, number in bucket)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "numbers"),
    [
        ("format_prompts", (300_000, 900_000)),  # hashes are on the disk from 262,144 rows on
        ("mix_prompts", (300_000, 900_000)),
        ("tokenize_splits", (20_000, 60_000)),
    ],
)
def test_memory_does_not_grow_with_the_rows(workspace, tiny_model, step, numbers, monkeypatch):
    """Of three times as many rows, hardly any of them in validation or test, whose rows are held."""
    monkeypatch.setattr(big_data, "SHARE", 1e-3)
    monkeypatch.setenv("PYTHONPATH", str(Path(big_data.__file__).parents[2]))
    costs = []
    for rows in numbers:
        folder = workspace / str(rows)
        folder.mkdir()
        monkeypatch.chdir(folder)
        big_data.write_rows(Path("rows.jsonl"), rows)
        for name, command in big_data.commands(rows, tiny_model).items():
            if name in ("fetch_data", "format_prompts", step):
                cost = big_data.measured(command, 2)
        costs.append(cost)
    assert costs[1].memory < costs[0].memory + 64 * 2**20
