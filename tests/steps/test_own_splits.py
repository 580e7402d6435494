"""Splits that the data has itself, groups that stay on one side, and rows that stand in two splits."""

import collections
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from steps import fetch_data, format_prompts
from temper.config.schema import Data
from temper.data import overlap
from temper.data.splitting import SPLITS, group_hash, split_of
from temper.hashing import HashCache
from temper.keys import PACKAGE_ROOT
from temper.sources import pins
from tests.support.hub import COMMIT, environment, serve

OUTPUT = Path("results/prompts/rows-key")
FOLDER = Path("data/raw/set")
SHARES = {"validation": 0.2, "test": 0.2}
WORDS = ["".join(random.Random(number).choices("abcdefghijklmnop", k=7)) for number in range(500)]


def text(number: int, words: int = 12) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=words))


def rows(numbers, **columns) -> list[dict]:
    return [{"question": text(number), "answer": str(number), **columns} for number in numbers]


def write(path: str, some: list[dict]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def fetched(source: dict) -> Path:
    data = Data(name="set", source=source, layout="question_answer").model_dump()  # in the form that the workflow uses
    config = {"data": {"source": data["source"]}}
    fetch_data.main(["--output", str(FOLDER), "--config", json.dumps(config)])
    return pins.pin_path("set", data["source"])


def formatted(raw, **data) -> dict[str, list[dict]]:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    config = {"data": {"layout": "question_answer", **data}, "prompt": {"system": None}}
    format_prompts.main(["--raw", str(raw), "--output", str(OUTPUT), "--config", json.dumps(config)])
    lines = {split: (OUTPUT / f"{split}.jsonl").read_text().splitlines() for split in SPLITS}
    return {split: list(map(json.loads, found)) for split, found in lines.items()}


def answers(some: list[dict]) -> set[str]:
    return {row["messages"][-1]["content"] for row in some}


def stats() -> dict:
    return json.loads((OUTPUT / "stats.json").read_text())


def complaint(capsys, call, *arguments, **named) -> str:
    with pytest.raises(SystemExit) as caught:
        call(*arguments, **named)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")


def files(**paths: str) -> dict:
    return {split: {"kind": "files", "path": path} for split, path in paths.items()}


# --- a source for each split ---------------------------------------------------------------------


def test_each_split_is_its_source_and_what_is_not_given_is_taken_from_train(workspace):
    source = files(train=write("mine.jsonl", rows(range(100))), test=write("theirs.jsonl", rows(range(200, 220))))
    found = formatted(fetched(source), splits=SHARES)
    assert answers(found["test"]) == set(map(str, range(200, 220)))
    assert answers(found["train"]) | answers(found["validation"]) == set(map(str, range(100)))
    assert 10 < len(found["validation"]) < 30
    assert {row["id"] for some in found.values() for row in some} == set(range(1, 121))
    assert stats()["overlap"] == []
    source |= files(validation=write("dev.jsonl", rows(range(300, 310))))
    found = formatted(fetched(source))
    assert [len(found[split]) for split in SPLITS] == [100, 10, 20]


def test_a_number_is_written_alike_in_all_splits(workspace):
    """Whole numbers lose their .0 in all files of a data set or in none, as where the files are not split."""
    for split, found in {"train": [1.0, None, 2.0] * 4, "test": [1.5, 2.0, 3.0]}.items():
        some = [{"question": f"{split} {text(number)}", "answer": value} for number, value in enumerate(found)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), f"{split}.parquet")
    raw = fetched(files(train="train.parquet", test="test.parquet"))
    template = {"layout": "template", "prompt": "{{ question }}", "completion": "{{ answer }}"}
    found = formatted(raw, **template, where="answer is not none", splits={"validation": 0.0})
    assert answers(found["test"]) == {"1.5", "2.0", "3.0"}
    assert answers(found["train"]) == {"1.0", "2.0"}


def test_the_identity_knows_which_file_is_of_which_split(workspace):
    one, other = write("one.jsonl", rows(range(40))), write("other.jsonl", rows(range(50, 90)))
    hashes = HashCache(Path("cache"))
    identities = []
    for source in (files(train=one, test=other), files(train=other, test=one)):
        pin = fetched(source)
        identities.append(pins.planned_identity("set", {**source, "validation": None}, hashes))
        assert identities[-1] == pins.identity_on_disk(pin)
    assert identities[0] != identities[1]
    write("one.jsonl", rows(range(41)))
    assert pins.identity_on_disk(pin)["splits"]["train"] == identities[1]["splits"]["train"]
    assert pins.identity_on_disk(pin)["splits"]["test"] != identities[1]["splits"]["test"]


def test_the_official_splits_of_a_hub_set_are_taken(workspace):
    (workspace / "hub/thing").mkdir(parents=True)
    write("hub/thing/train.jsonl", rows(range(50)))
    write("hub/thing/test.jsonl", rows(range(100, 130)))
    source = {"kind": "hub", "repository": "acme/thing", "split": {"train": "train", "test": "test"}}
    config = json.dumps({"data": {"source": Data(name="set", source=source, layout="messages").model_dump()["source"]}})
    with serve(workspace / "hub") as (url, _):
        command = [sys.executable, "-m", "steps.fetch_data", "--output", str(FOLDER), "--config", config]
        variables = {**os.environ, **environment(url, workspace / "cache"), "PYTHONPATH": str(PACKAGE_ROOT)}
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [pin] = FOLDER.glob("pin-*.json")
    assert sorted(path.name for path in FOLDER.iterdir()) == [pin.name, "test-test.jsonl", "train-train.jsonl"]
    assert {split: part["revision"] for split, part in json.loads(pin.read_text())["source"].items() if part} == {
        "train": COMMIT,
        "test": COMMIT,
    }
    assert answers(formatted(pin, splits=SHARES)["test"]) == set(map(str, range(100, 130)))
    before = pins.identity_on_disk(pin)["splits"]
    assert all("pin" in part for part in before.values())
    with (FOLDER / "test-test.jsonl").open("a") as file:
        file.write("\n")
    after = pins.identity_on_disk(pin)["splits"]
    assert "files" in after["test"] and after["train"] == before["train"]


def test_a_file_of_no_split_is_refused(workspace, capsys):
    pin = fetched(files(train=write("mine.jsonl", rows(range(50)))))
    write(FOLDER / "more.jsonl", rows([7]))
    assert complaint(capsys, formatted, pin).startswith("data/raw/set/more.jsonl: is of no split; move it away")


def test_data_for_each_split_needs_the_fetched_folder(workspace, capsys):
    source = files(train=write("mine.jsonl", rows(range(50))))
    said = complaint(capsys, formatted, "mine.jsonl", name="set", source=source)
    assert said.startswith("--raw mine.jsonl: is of no split, and data.source has one for each")


def test_a_fault_names_the_source_of_its_split(workspace, capsys):
    source = files(train=write("mine.jsonl", rows(range(50))), test="gone.jsonl")
    config = {"data": {"source": source}}
    said = complaint(capsys, fetch_data.main, ["--output", str(FOLDER), "--config", json.dumps(config)])
    assert said.startswith("data.source.test.path: gone.jsonl: no such file")


# --- a column that names the split ---------------------------------------------------------------


def test_a_column_names_the_split(workspace):
    named = {"train": range(60), "Valid": range(100, 110), "test": range(200, 210)}
    write("rows.jsonl", [row for split, numbers in named.items() for row in rows(numbers, part=split)])
    found = formatted("rows.jsonl", splits={**SHARES, "column": "part"})
    assert [answers(found[split]) for split in SPLITS] == [set(map(str, numbers)) for numbers in named.values()]


def test_a_split_that_the_column_never_names_is_taken_from_train(workspace):
    write("rows.jsonl", rows(range(100), part="train") + rows(range(200, 210), part="test"))
    found = formatted("rows.jsonl", splits={**SHARES, "column": "part"})
    assert answers(found["test"]) == set(map(str, range(200, 210)))
    assert 10 < len(found["validation"]) < 30


def test_doubtful_values_are_said_once_though_the_rows_are_read_twice(workspace, caplog):
    write("rows.jsonl", rows(range(100), part="train") + [{"question": "Who?", "answer": "nan", "part": "test"}])
    formatted("rows.jsonl", splits={**SHARES, "column": "part"})
    said = [record.getMessage() for record in caplog.records if "'nan' in column 'answer'" in record.getMessage()]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "unsupervised",
            "rows.jsonl:11: column 'part', which data.splits.column names, holds 'unsupervised', which is",
        ),
        (None, "rows.jsonl:11: column 'part', which data.splits.column names, holds null, which is no split"),
    ],
)
def test_other_values_are_refused(workspace, capsys, value, said):
    write("rows.jsonl", rows(range(10), part="train") + rows([11], part=value))
    assert complaint(capsys, formatted, "rows.jsonl", splits={**SHARES, "column": "part"}).startswith(said)


def test_a_column_that_is_not_there_is_refused(workspace, capsys):
    write("rows.jsonl", rows(range(10)))
    said = complaint(capsys, formatted, "rows.jsonl", splits={**SHARES, "column": "part"})
    assert said == "rows.jsonl:1: no column 'part', which data.splits.column names; there are question, answer"


# --- groups --------------------------------------------------------------------------------------


def test_a_group_is_on_one_side_and_stays_with_the_rows(workspace):
    write("rows.jsonl", [{**row, "user": number // 5} for number, row in enumerate(rows(range(300)))])
    found = formatted("rows.jsonl", splits={**SHARES, "group_by": "user"})
    sides = collections.defaultdict(set)
    for split, some in found.items():
        for row in some:
            assert row["group"] == str(int(row["messages"][-1]["content"]) // 5)
            sides[row["group"]].add(split)
    assert len(sides) == 60 and {len(side) for side in sides.values()} == {1}
    assert all({split_of(group_hash(group), SHARES)} == side for group, side in sides.items())


def test_a_group_of_a_given_split_that_is_in_train_too_is_told(workspace, caplog):
    source = files(
        train=write("mine.jsonl", rows(range(50), user="ann") + rows(range(50, 99), user="bob")),
        test=write("theirs.jsonl", rows(range(200, 210), user="ann") + rows(range(210, 220), user="eve")),
    )
    formatted(fetched(source), splits={"validation": 0.0, "group_by": "user"})
    [found] = stats()["overlap"]
    assert {key: found[key] for key in ("other", "rows", "group", "prompt")} == {
        "other": "train",
        "rows": 10,
        "group": 10,
        "prompt": 0,
    }
    assert "10 rows of test stand in train, too (10 of the same group)" in caplog.text


@pytest.mark.parametrize("value", [None, "", [1]])
def test_a_row_without_a_group_is_refused(workspace, capsys, value):
    write("rows.jsonl", [*rows(range(9), user=1), *rows([9], user=value)])
    said = complaint(capsys, formatted, "rows.jsonl", splits={**SHARES, "group_by": "user"})
    assert said.startswith("rows.jsonl:10: column 'user', which data.splits.group_by names, holds")


# --- rows of one split in another ----------------------------------------------------------------


def edited(row: dict) -> dict:
    """The same question with another word at its end."""
    return {**row, "question": row["question"] + " indeed"}


@pytest.fixture
def leaking(workspace) -> Path:
    """100 rows to learn from; a test split of 20, of which 4 are among them and 3 nearly are."""
    mine, theirs = rows(range(100)), rows(range(200, 213))
    theirs += [*mine[:4], *map(edited, mine[10:13])]
    return fetched(files(train=write("mine.jsonl", mine), test=write("theirs.jsonl", theirs)))


def test_rows_of_test_that_were_trained_on_are_named_and_counted(leaking, caplog):
    formatted(leaking, splits={"validation": 0.0})
    [found] = stats()["overlap"]
    assert found == {
        "split": "test",
        "other": "train",
        "rows": 7,
        "prompt": 4,
        "near": 3,
        "group": 0,
        "first": "data/raw/set/test-theirs.jsonl:14",
        "first_in_other": "data/raw/set/train-mine.jsonl:1",
    }
    assert (
        "7 rows of test stand in train, too (4 with the same prompt, 3 with nearly the same): the first is "
        "data/raw/set/test-theirs.jsonl:14, as data/raw/set/train-mine.jsonl:1"
    ) in caplog.text
    listed = [json.loads(line) for line in (OUTPUT / "overlap.jsonl").read_text().splitlines()]
    pairs = {(one["id"], one["other_id"] - 20, one["kind"]) for one in listed}  # the files of test come first
    same = {(14 + index, 1 + index, "prompt") for index in range(4)}
    assert pairs == same | {(18 + index, 11 + index, "near") for index in range(3)}


def test_overlap_can_be_an_error_or_left_out_of_train(leaking, capsys):
    said = complaint(capsys, formatted, leaking, splits={"validation": 0.0}, on_overlap="error")
    assert said.startswith("7 rows of test stand in train, too") and "data.on_overlap=drop" in said
    found = formatted(leaking, splits={"validation": 0.0}, on_overlap="drop")
    assert answers(found["train"]) == set(map(str, range(100))) - {"0", "1", "2", "3", "10", "11", "12"}
    assert len(found["test"]) == 20
    assert stats()["splits"]["train"] == {"rows": 93, "left_out_by_limit": 0, "left_out_by_overlap": 7}


def test_a_hash_split_is_compared_as_well(workspace):
    some = rows(range(200))
    write("rows.jsonl", [*some, *map(edited, some)])
    found = formatted("rows.jsonl", splits=SHARES)
    side = {answer: split for split, rows_ in found.items() for answer in answers(rows_)}
    test, train = answers(found["test"]), answers(found["train"])
    told = {(one["split"], one["other"]): one for one in stats()["overlap"]}
    assert told["test", "train"]["near"] == len(test & train) > 10
    assert told["test", "train"]["prompt"] == 0 and side


# --- nearly the same, by a reference that computes it pair by pair -------------------------------


def similarity(one: str, other: str) -> float:
    runs = [{text[at : at + 5] for at in range(len(text) - 4)} for text in (one, other)]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def write_splits(folder: Path, train: list[str], test: list[str]) -> None:
    for split, questions in {"train": train, "validation": [], "test": test}.items():
        lines = [
            {"id": at, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]}
            for at, question in enumerate(questions)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("drop", [False, True])
def test_rows_that_are_all_near_each_other_are_not_all_compared(tmp_path, monkeypatch, drop):
    """Of 10 x 80 train rows and 10 x 40 test rows around 10 texts, each finds one without 32,000 comparisons."""
    compared = []
    jaccard = overlap._jaccard

    def counted(texts, common):
        compared.append(len(texts) // 2)
        return jaccard(texts, common)

    monkeypatch.setattr(overlap, "_jaccard", counted)
    monkeypatch.setattr(overlap, "COMMON", 1.0)
    train = [f"{text(number % 10, words=30)} {number}" for number in range(800)]
    test = [f"{text(number % 10, words=30)} {1000 + number}" for number in range(400)]
    write_splits(tmp_path, train, test)
    found, shared, _ = overlap.find(tmp_path, len(train), drop)
    assert {one.id for one in found} == {*range(400)}
    assert all(one.other_id % 10 == one.id % 10 for one in found)
    if drop:
        assert shared["train"] == {*range(800)}
    assert sum(compared) < 16_000


def test_near_is_the_jaccard_similarity_of_runs_of_five_characters(tmp_path):
    draw = random.Random(0)
    base = [text(number) for number in range(60)]

    def changed(question: str) -> str:
        words = question.split()
        for _ in range(draw.randrange(4)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        return " ".join(words)

    train, test = base, [changed(draw.choice(base)) for _ in range(300)]
    write_splits(tmp_path, train, test)
    found, shared, near_train = overlap.find(tmp_path, len(train), drop=True)
    assert overlap.find(tmp_path, len(train), drop=False)[0] == found
    expected = {
        at: max(similarity(question, other) for other in train)
        for at, question in enumerate(test)
        if question not in train
    }
    near = {one.id: one for one in found if one.kind == "near"}
    assert set(near) == {at for at, value in expected.items() if value >= overlap.NEAR}
    assert 20 < len(near) < 280
    for one in near.values():
        assert one.similarity == pytest.approx(similarity(test[one.id], train[one.other_id]), abs=1e-12)
    assert shared["train"] == {at for at, q in enumerate(train) if any(similarity(q, t) >= overlap.NEAR for t in test)}


def test_the_words_of_an_instruction_around_each_text_make_no_rows_alike(workspace):
    around = "Read the following sentence and say in one word whether the one who wrote it liked the film: {}"
    some = [{"question": around.format(text(number, words=4)), "answer": "x"} for number in range(300)]
    write("rows.jsonl", some)
    formatted("rows.jsonl", splits=SHARES)
    assert similarity(some[0]["question"], some[1]["question"]) > 0.5
    assert stats()["overlap"] == []
