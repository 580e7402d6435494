"""format_prompts: which rows land in which split, and that nothing is lost without a word."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steps import format_prompts
from steps.format_prompts import main
from temper import hashing
from temper.config.stages import typed
from temper.data import layouts, splitting
from temper.data.layouts import Example
from temper.data.splitting import Splits, prompt_hash, split_of
from temper.errors import UserError
from temper.hashing import file_sha256
from temper.planning.plan import STATE

SHARES = {"validation": 0.2, "test": 0.3}
NO_LIMIT = {"train": None, "validation": None, "test": None}
OUTPUT = Path("results/prompts/rows-key")
words = st.text("abc", max_size=3)
tables = st.lists(st.tuples(words, words), min_size=1, max_size=60)  # (prompt, answer), with many twins


def conversation(prompt: str, answer: str, system: str | None = None):
    own = [{"role": "system", "content": system}] if system else []
    return [*own, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("splits")


def written(folder, table, limits=NO_LIMIT, system=None) -> dict[str, list[tuple[str, str]]]:
    """split -> its (prompt, answer) pairs, after writing a table."""
    with Splits(folder, SHARES, {**NO_LIMIT, **limits}) as splits:
        splits.add(splits.place(enumerate((Example(conversation(*pair, system)) for pair in table), start=1)))
    return {name: [pair_of(row) for row in read(folder / f"{name}.jsonl")] for name in splitting.SPLITS}


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pair_of(row: dict) -> tuple[str, str]:
    return row["messages"][-2]["content"], row["messages"][-1]["content"]


# --- splits --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(tables)
def test_every_row_is_in_one_split_in_its_order(folder, table):
    splits = written(folder, table)
    assert sorted(sum(splits.values(), [])) == sorted(table)
    for rows in splits.values():
        remaining = iter(table)
        assert all(row in remaining for row in rows)  # a subsequence of the table


@settings(deadline=None, max_examples=50)
@given(tables, st.tuples(words, words), st.integers(0, 60))
def test_adding_a_row_moves_no_other(folder, table, new, position):
    before, after = written(folder, table), written(folder, [*table[:position], new, *table[position:]])
    for name, rows in after.items():
        if new in rows and len(rows) > len(before[name]):
            rows.remove(new)
        assert sorted(rows) == sorted(before[name])


@settings(deadline=None, max_examples=50)
@given(tables)
def test_no_prompt_is_on_two_sides(folder, table):
    sides = [{prompt for prompt, _ in rows} for rows in written(folder, table).values()]
    assert sum(len(side) for side in sides) == len({prompt for prompt, _ in table})


@settings(deadline=None, max_examples=50)
@given(tables, words.filter(bool))
def test_a_system_message_reshuffles_nothing(folder, table, system):
    assert written(folder, table, system=system) == written(folder, table)


def test_shares_are_met():
    counts = dict.fromkeys(splitting.SPLITS, 0)
    for number in range(10_000):
        counts[split_of(prompt_hash(conversation(f"row {number}", "x")).split, SHARES)] += 1
    assert counts == pytest.approx({"train": 5000, "validation": 2000, "test": 3000}, rel=0.05)


def test_earlier_turns_are_part_of_the_prompt():
    opening = conversation("Hello", "Hi")
    longer = [*opening, *conversation("How are you?", "Fine.")]
    assert prompt_hash(opening) != prompt_hash(longer)
    assert prompt_hash(longer) == prompt_hash([*longer[:-1], {"role": "assistant", "content": "Other."}])


def test_the_hash_never_changes():
    """Another hash would reshuffle everybody's splits."""
    assert prompt_hash(conversation("Hello", "Hi")).split == 0x1D9F4FEAA9DB000B


# --- limits --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(tables, st.integers(1, 20))
def test_a_limit_keeps_that_many_rows_in_their_order(folder, table, limit):
    everything = written(folder, table)
    limited = written(folder, table, dict.fromkeys(splitting.SPLITS, limit))
    for name, rows in limited.items():
        assert len(rows) == min(limit, len(everything[name]))
        remaining = iter(everything[name])
        assert all(row in remaining for row in rows)


@settings(deadline=None, max_examples=50)
@given(tables, st.tuples(words, words), st.integers(0, 60), st.integers(1, 20))
def test_under_a_limit_a_new_row_changes_at_most_one_other(folder, table, new, position, limit):
    limits = dict.fromkeys(splitting.SPLITS, limit)
    before = written(folder, table, limits)
    after = written(folder, [*table[:position], new, *table[position:]], limits)
    for name in splitting.SPLITS:
        gone, come = list(before[name]), []
        for row in after[name]:
            gone.remove(row) if row in gone else come.append(row)
        assert len(gone) <= 1
        assert come in ([], [new])


@settings(deadline=None, max_examples=50)
@given(tables, st.integers(1, 10), st.integers(1, 10))
def test_a_lower_limit_keeps_a_subset(folder, table, one, other):
    low, high = sorted((one, other))
    few, more = written(folder, table, {"train": low}), written(folder, table, {"train": high})
    remaining = iter(more["train"])
    assert all(row in remaining for row in few["train"])


# --- the step ------------------------------------------------------------------------------------


@pytest.fixture
def project(workspace):  # noqa: ARG001 - the current folder
    """A folder with a file of 40 rows."""
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{2 * n}"} for n in range(40)]
    write_rows(rows)
    return rows


def write_rows(rows, path="rows.jsonl"):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(raw="rows.jsonl", identity=None, system=None, **data):
    data = {"layout": "question_answer", "splits": SHARES, "limit": NO_LIMIT, **data}
    config = {"data": data, "prompt": {"system": system}}
    if identity:
        config["raw"] = identity
    main(["--raw", raw, "--output", str(OUTPUT), "--config", json.dumps(config)])


def complaint(capsys, **arguments) -> str:
    """The one line that the step fails with."""
    with pytest.raises(SystemExit) as caught:
        run(**arguments)
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert not OUTPUT.exists()
    return line.removeprefix("error: ")


def test_step_writes_splits_and_counts(project):
    write_rows([*project, project[0], {"question": "Why?", "answer": ""}])
    run(system="Add.", where="answer != ''", limit={"train": 5})
    rows = {name: read(OUTPUT / f"{name}.jsonl") for name in splitting.SPLITS}
    stats = json.loads((OUTPUT / "stats.json").read_text())
    assert [len(rows["train"]), stats["splits"]["train"]["rows"]] == [5, 5]
    assert {key: stats[key] for key in ("rows", "left_out_by_where", "prompts", "duplicates")} == {
        "rows": 42,
        "left_out_by_where": 1,
        "prompts": 40,
        "duplicates": 1,
    }
    assert sum(split["rows"] + split["left_out_by_limit"] for split in stats["splits"].values()) == 41
    for row in sum(rows.values(), []):
        source = [*project, project[0]][row["id"] - 1]
        assert row["messages"] == conversation(source["question"], source["answer"], "Add.")
    provenance = json.loads((OUTPUT / "provenance.json").read_text())
    assert provenance["raw"] == {"files": [file_sha256("rows.jsonl")]}
    assert sorted(path.name for path in OUTPUT.iterdir()) == sorted(
        [
            "train.jsonl",
            "validation.jsonl",
            "test.jsonl",
            "overlap.jsonl",
            "report.html",
            "report.json",
            "stats.json",
            "config.yaml",
            "provenance.json",
        ]
    )


def test_rows_are_numbered_through_all_files(project):
    Path("raw").mkdir()
    write_rows(project[:25], "raw/a.jsonl")
    Path("raw/b.json").write_text(json.dumps(project[25:]))
    run(raw="raw")
    rows = sum((read(OUTPUT / f"{name}.jsonl") for name in splitting.SPLITS), [])
    assert {row["id"]: row["messages"][0]["content"] for row in rows} == {
        number: row["question"] for number, row in enumerate(project, start=1)
    }


def test_a_bad_row_is_named_by_file_and_line(project, capsys):
    write_rows([*project[:6], {"question": "Why?"}, *project])
    assert complaint(capsys).startswith(
        "rows.jsonl:7: no column 'answer'; there are question: choose another data.layout"
    )
    Path("rows.jsonl").write_text('{"question": "Why?", "answer": "No."}\n{"question"\n')
    assert complaint(capsys) == "rows.jsonl:2: no valid JSON: expecting ':' delimiter (column 12)"


def test_control_characters_of_a_wrong_conversion_are_said_once(project, caplog):
    """What iconv -f latin-1 makes of Windows' quotes; U+0085 is a line's end in old texts."""
    rows = [{"prompt": f"Is it {n}?", "completion": "It is."} for n in range(20)]
    rows[4]["prompt"] = "Is it \x93good\x94?"
    rows[6]["completion"] = "It\x92s."
    rows[8]["completion"] = "It\x85is. “So”"
    write_rows(rows)
    with caplog.at_level("WARNING", logger="temper"):
        run(layout="prompt_completion")
    [said] = [record.getMessage() for record in caplog.records if "control" in record.getMessage()]
    assert said.startswith("2 rows hold control characters (the first: rows.jsonl:5)")
    assert "read the original with data.encoding=cp1252" in said


def test_empty_splits_are_refused(project, capsys):
    write_rows([])
    assert complaint(capsys) == "rows.jsonl: no rows in the raw files"
    write_rows(project)
    assert complaint(capsys, where="answer == 'x'") == "rows.jsonl: data.where (answer == 'x') leaves out all 40 rows"
    write_rows(project[:1])
    train_only = complaint(capsys, splits={"validation": 0.0, "test": 0.999999})
    assert train_only == (
        "rows.jsonl: no row fell into the train split (its share is 1e-06; 1 rows with 1 different prompts): "
        "lower data.splits.validation and data.splits.test, or use more rows"
    )
    write_rows(project)
    assert complaint(capsys, splits={"validation": 0.00001, "test": 0.3}) == (
        "rows.jsonl: no row fell into the validation split (its share is 1e-05; 40 rows with 40 different prompts): "
        "raise data.splits.validation (0: do without), or use more rows"
    )


@pytest.mark.usefixtures("project")
def test_a_share_of_zero_asks_for_an_empty_split():
    run(splits={"validation": 0.0, "test": 0.3})
    assert (OUTPUT / "validation.jsonl").read_text() == ""


def test_raw_files_that_changed_since_the_plan_are_refused(project, capsys):
    planned = {"files": [file_sha256("rows.jsonl")]}
    write_rows(project[1:])
    changed = "rows.jsonl: the raw files changed since the plan was made: run again, to plan with the new content"
    assert complaint(capsys, identity=planned) == changed
    write_rows(project)
    run(identity=planned)
    assert OUTPUT.is_dir()


def test_a_raw_file_that_planning_has_read_is_not_hashed_anew(project, monkeypatch):
    monkeypatch.setattr(hashing, "SETTLED", -1.0)
    hashes = hashing.HashCache(STATE / "hashes.json")
    identity = {"files": [hashes.sha256("rows.jsonl")]}
    hashes.save()
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    run(identity=identity)
    assert read == []
    shutil.rmtree(OUTPUT)
    write_rows(project[1:])
    with pytest.raises(SystemExit):
        run(identity=identity)
    assert len(read) == 1


@pytest.mark.usefixtures("project")
def test_raw_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    def convert_and_edit(data, system, converter=layouts.converter):
        with Path("rows.jsonl").open("a") as file:
            file.write("\n")
        return converter(data, system)

    monkeypatch.setattr(layouts, "converter", convert_and_edit)
    config = {"data": {"layout": "question_answer", "splits": SHARES, "limit": NO_LIMIT}, "prompt": {"system": None}}
    with pytest.raises(UserError, match="rows.jsonl: the raw files changed"):
        format_prompts.run(typed("format_prompts", config), raw=Path("rows.jsonl"), output=tmp_path)


# --- preference pairs ----------------------------------------------------------------------------


def test_the_rejected_answer_is_kept_beside_the_conversation_and_moves_no_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{number}?", "answer": ("yes", "no")[number % 2]} for number in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(rejected_from=["yes", "no"])
    for split in splitting.SPLITS:
        for record in read(OUTPUT / f"{split}.jsonl"):
            assert {record["messages"][-1]["content"], record["rejected"]} == {"yes", "no"}
    ids = {split: [record["id"] for record in read(OUTPUT / f"{split}.jsonl")] for split in splitting.SPLITS}
    shutil.rmtree(OUTPUT)
    run()
    assert ids == {split: [row["id"] for row in read(OUTPUT / f"{split}.jsonl")] for split in splitting.SPLITS}


def test_scored_responses_make_pairs_of_one_split_and_ties_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{number}?", "responses": ["yes", "no", "maybe"], "scores": [3, 1, 2 if number % 2 else 1]}
        for number in range(40)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(layout="scored_responses", score_pairs="all")
    stats = json.loads((OUTPUT / "stats.json").read_text())
    assert (stats["rows"], stats["ties"], stats["duplicates"], stats["prompts"]) == (3 * 20 + 2 * 20, 20, 0, 40)
    assert "no pair because scores or texts are the same 20" in capsys.readouterr().err
    for split in splitting.SPLITS:
        for record in read(OUTPUT / f"{split}.jsonl"):
            scores = dict(zip(["yes", "no", "maybe"], rows[record["id"] - 1]["scores"], strict=True))
            assert scores[record["messages"][-1]["content"]] > scores[record["rejected"]]
            assert record["messages"][0]["content"] == f"{record['id'] - 1}?"
    shutil.rmtree(OUTPUT)
    run(layout="scored_responses")
    assert json.loads((OUTPUT / "stats.json").read_text())["rows"] == 40
    shutil.rmtree(OUTPUT)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "?", "responses": ["a", "b"], "scores": [1, 1]}) + "\n")
    message = "no pair is left: the scores, or the texts, of all 1 are the same"
    assert message in complaint(capsys, layout="scored_responses")


def test_single_answers_keep_their_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n // 2}?", "completion": "yes", "label": n % 2 == 0} for n in range(80)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(layout="unpaired_preference")
    records = [record for split in splitting.SPLITS for record in read(OUTPUT / f"{split}.jsonl")]
    assert {record["id"]: record["label"] for record in records} == {n + 1: n % 2 == 0 for n in range(80)}
    assert json.loads((OUTPUT / "stats.json").read_text())["duplicates"] == 0, "they differ in their label"


def test_rows_that_differ_in_what_they_reject_are_no_duplicates(folder):
    table = [("yes", "no"), ("yes", "maybe"), ("yes", "no")]
    with Splits(folder, SHARES, NO_LIMIT) as splits:
        some = [Example(conversation("?", chosen), rejected) for chosen, rejected in table]
        splits.add(splits.place(enumerate(some, start=1)))
        assert splits.stats()["duplicates"] == 1


DATA = Path(__file__).resolve().parents[2] / "shared/data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets beside the project are not here")
@pytest.mark.parametrize(
    ("name", "rows", "data"),
    [
        ("lamini_docs.jsonl", 1400, {"where": "answer"}),
        ("alpaca_demo.json", 999, {"layout": "instruction"}),
        ("preference_demo.json", 300, {"layout": "preference"}),
        (
            "english_quotes.jsonl",
            3002,
            {
                "layout": "template",
                "prompt": "{{ quote }}",
                "completion": "{{ tags | join(', ') }}",
                "where": "quote and tags",
            },
        ),
    ],
)
def test_real_data(tmp_path, monkeypatch, name, rows, data):
    monkeypatch.chdir(tmp_path)
    run(raw=str(DATA / name), **data)
    stats = json.loads((OUTPUT / "stats.json").read_text())
    assert stats["rows"] == rows
    assert stats["left_out_by_where"] < 600
