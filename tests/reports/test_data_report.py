"""The data report: its figures by an independent count, and its page with the rows of an attacker."""

import collections
import json
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steps import format_prompts, tokenize_splits
from temper.data import in_train, overlap
from temper.data.columns import SPLITS
from temper.data.languages import count_languages
from temper.data.report import FILE, PAGE, _chance
from temper.data.survey import Survey
from tests.reports.test_pages import TEXTS, Form
from tests.steps.test_own_splits import similarity
from tests.steps.test_own_splits import text as some_text

OUTPUT = Path("results/prompts/rows-key")
WORDS = st.text("ab", min_size=1, max_size=2)
TABLES = st.lists(st.tuples(st.sampled_from(SPLITS), WORDS, WORDS), min_size=1, max_size=40)


def line(number: int, prompt: str, answer: str, **more) -> dict:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": number, "messages": messages, **more}


def written(folder: Path, table: list[tuple[str, dict]]) -> Survey:
    for split in SPLITS:
        lines = [json.dumps(row) + "\n" for name, row in table if name == split]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return Survey(folder, len(table), {(split, row["id"]) for split, row in table})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@settings(deadline=None, max_examples=100)
@given(TABLES)
def test_repeated_and_contradicting_rows_are_those_of_a_count_by_hand(folder, table):
    rows = [(split, line(number, *texts)) for number, (split, *texts) in enumerate(table, start=1)]
    survey = written(folder, rows)
    in_order = [(split, *texts) for name in SPLITS for split, *texts in table if split == name]
    repeats = survey.repeats(1000)
    for split in SPLITS:
        pairs = [entry[1:] for entry in in_order if entry[0] == split]
        assert repeats.rows[split] == len(pairs) - len(set(pairs))
    for first, again in repeats.first:
        assert table[first.id - 1] == table[again.id - 1] and first.id < again.id
        assert json.loads((folder / f"{again.split}.jsonl").read_text().splitlines()[again.line - 1])["id"] == again.id

    answers, places = collections.defaultdict(set), collections.defaultdict(set)
    for split, prompt, answer in table:
        answers[prompt].add(answer)
        places[prompt].add(split)
    several = {prompt for prompt, found in answers.items() if len(found) > 1}
    in_train = {prompt for prompt in several if len({a for s, p, a in table if (s, p) == ("train", prompt)}) > 1}
    found = survey.several(1000, 1000)
    assert (found.prompts, found.in_train) == (len(several), len(in_train))
    assert found.rows == sum(prompt in several for _, prompt, _ in table)
    assert found.across == sum(len(places[prompt]) > 1 for prompt in several)
    assert [table[some[0].id - 1][1] for some in found.first] == [
        prompt for prompt in dict.fromkeys(prompt for _, prompt, _ in in_order) if prompt in several
    ]
    for some in found.first:
        assert {table[row.id - 1][2] for row in some} == answers[table[some[0].id - 1][1]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=40))
def test_lengths_are_those_of_the_texts(folder, lengths):
    survey = written(folder, [("train", line(number, "é" * size, "x")) for number, size in enumerate(lengths)])
    found = survey.lengths_of()["prompt"]
    in_order = sorted(lengths)
    quantiles = found["quantiles"]["train"]
    assert (quantiles[0], quantiles[-1]) == (in_order[0], in_order[-1])
    assert quantiles[3] == in_order[(len(lengths) + 1) // 2 - 1]  # median: as many are below as above
    for span, rows in found["histogram"].items():
        low, _, high = span.partition(" to ")
        assert rows == sum(int(low) <= size <= int(high or low) for size in lengths)
    assert sum(found["histogram"].values()) == len(lengths)


def test_pairs_and_judged_answers_contradict_each_other_in_their_own_way(tmp_path):
    pairs = [line(1, "q", "a", rejected="b"), line(2, "q", "c", rejected="a"), line(3, "q", "b", rejected="a")]
    assert [row.id for row in written(tmp_path, [("train", row) for row in pairs]).several(5, 3).first[0]] == [1, 3]
    judged = [line(1, "q", "a", label=True), line(2, "q", "b", label=False), line(3, "q", "a", label=False)]
    survey = written(tmp_path, [("train", row) for row in judged])
    assert [row.id for row in survey.several(5, 3).first[0]] == [1, 3]
    assert survey.labels.counts["train"] == {"desirable": 1, "undesirable": 2}


def test_documents_repeat_each_other_and_contradict_nothing(tmp_path):
    rows = [{"id": at, "messages": [{"role": "assistant", "content": text}]} for at, text in enumerate("abca", start=1)]
    survey = written(tmp_path, [("train", row) for row in rows])
    assert [row.id for row in survey.repeats(5).first[0]] == [1, 4]
    assert survey.several(5, 3).prompts == 0 and list(survey.lengths_of()) == ["document"]


def test_another_system_message_is_another_prompt(tmp_path):
    rows = [line(1, "q", "a"), line(2, "q", "b")]
    rows[1]["messages"].insert(0, {"role": "system", "content": "Be short."})
    assert written(tmp_path, [("train", row) for row in rows]).several(5, 3).prompts == 0


def test_rows_that_a_weight_repeats_count_once(tmp_path):
    rows = [line(number, f"q{number}", "a", source="one") for number in (1, 1, 1, 2)]
    survey = written(tmp_path, [("train", row) for row in rows])
    assert survey.repeated == 2 and survey.repeats(5).rows["train"] == 0
    assert survey.find("train", 2).line == 4


def test_long_or_many_different_answers_are_no_labels(tmp_path):
    def table(answers):
        rows = [line(number, f"q{number}", answer) for number, answer in enumerate(answers)]
        return written(tmp_path, [("train", row) for row in rows]).labels.table()

    assert table(["yes", "no"] * 4) == {name: {"train": 4, "validation": 0, "test": 0} for name in ("no", "yes")}
    assert table(["yes", "no", "maybe", "so"]) is None
    assert table(["x" * 101] * 50) is None
    assert table([str(number) for number in range(51)] * 4) is None


def test_the_shares_of_labels_are_held_against_chance_as_scipy_does():
    from scipy.stats import chi2_contingency

    counts = {"a": {"train": 60, "validation": 0, "test": 5}, "b": {"train": 30, "validation": 0, "test": 15}}
    table = [[60, 5], [30, 15]]
    assert _chance(counts) == pytest.approx(chi2_contingency(table, correction=False).pvalue)
    assert _chance({"a": counts["a"]}) is None


def test_near_prompts_of_train_are_those_of_a_comparison_of_all_with_all(tmp_path):
    draw = random.Random(0)
    prompts = [" ".join("".join(draw.choices("abcdefghij", k=6)) for _ in range(12)) for _ in range(40)]
    prompts += [prompt.replace(prompt.split()[number % 5], "x", number % 3) for number, prompt in enumerate(prompts)]
    written(tmp_path, [("train", line(number, prompt, "a")) for number, prompt in enumerate(prompts)])
    near = overlap.find(tmp_path, len(prompts), drop=False)[2]
    different = list(dict.fromkeys(prompts))
    wanted = {
        prompts.index(one)
        for one in different
        if any(one != other and similarity(one, other) >= overlap.NEAR for other in different)
    }
    assert {one.id for one in near.found} == wanted and 20 < len(wanted) < len(different)
    assert (near.prompts, near.whole) == (len(different), True)
    for one in near.found:
        assert one.similarity == pytest.approx(similarity(prompts[one.id], prompts[one.other_id]))


def test_of_many_rows_a_sample_tells_about_the_share_of_near_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "HELD_OF_TRAIN", 200)
    prompts = [some_text(number) for number in range(1000)]
    prompts += [f"{prompt} and" for prompt in prompts[:500]]
    written(tmp_path, [("train", line(number, prompt, "a")) for number, prompt in enumerate(prompts)])
    near = overlap.find(tmp_path, len(prompts), drop=False)[2]
    assert not near.whole and 150 < near.prompts < 250
    assert len(near.found) / near.prompts == pytest.approx(2 / 3, abs=0.12)


def test_languages():
    texts = ["Das ist ein Haus und es regnet heute.", "Il fait très beau aujourd'hui.", "ok", ""]
    assert count_languages(texts) == {"und": 2, "de": 1, "fr": 1}


# --- the step ------------------------------------------------------------------------------------


def reported(rows: list[dict], **data) -> dict:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"data": {"layout": "question_answer", **data}, "prompt": {"system": None}}
    format_prompts.main(["--raw", "rows.jsonl", "--output", str(OUTPUT), "--config", json.dumps(config)])
    return json.loads((OUTPUT / FILE).read_text())


def test_the_page_and_the_log_name_the_first_rows(workspace, caplog):
    rows = [{"question": some_text(number), "answer": "yes" if number % 2 else "no"} for number in range(100)]
    rows += [{"question": some_text(7), "answer": "no"}, {"question": some_text(8), "answer": "no"}]
    rows += [{"question": "left out", "answer": "no"}, {"question": ["a list"], "answer": "no"}]
    data = {"where": "question != 'left out'", "on_bad_row": "skip", "max_bad_share": 0.1, "limit": {"train": 90}}
    report = reported(rows, **data)
    assert report["rows"]["read"] == 104 and report["rows"]["left_out_by_where"] == 1
    assert [(one["rows"], one["place"]) for one in report["rows"]["rejected"].values()] == [(1, "rows.jsonl:104")]
    kept = sum(report["rows"]["kept"].values())
    assert kept + sum(report["rows"]["left_out_by_limit"].values()) + 2 == 104
    assert sum(sum(counts.values()) for counts in report["labels"].values()) == kept
    assert [row["place"] for row in report["several"]["first"][0]] == ["rows.jsonl:8", "rows.jsonl:101"]
    assert [row["place"] for row in report["duplicates"]["first"][0]] == ["rows.jsonl:9", "rows.jsonl:102"]
    assert "1 prompts have more than one label (2 rows): the first is rows.jsonl:8, rows.jsonl:101" in caplog.text
    page = (OUTPUT / PAGE).read_text()
    assert "rows.jsonl:101" in page and "Contradicting labels" in page


@pytest.mark.parametrize("policy", ["warn", "drop"])
def test_rows_in_two_splits_stand_side_by_side(workspace, policy):
    rows = [{"question": some_text(number), "answer": str(number), "part": "train"} for number in range(60)]
    rows += [{"question": some_text(number), "answer": "other", "part": "validation"} for number in (100, 101, 7)]
    rows += [{"question": f"{some_text(3)} and", "answer": "3", "part": "test"}]
    report = reported(rows, splits={"column": "part"}, on_overlap=policy)
    told = {(one["split"], one["other"]): one for one in report["overlap"]}
    assert told["test", "train"]["rows"] == {"prompt": 0, "near": 1, "group": 0}
    assert told["validation", "train"]["rows"] == {"prompt": 1, "near": 0, "group": 0}
    pair = told["test", "train"]["first"][0]["rows"]
    assert [row["place"] for row in pair] == ["rows.jsonl:64", "rows.jsonl:4"]
    assert (pair[1]["line"] is None) == (policy == "drop")
    assert report["several"]["across"] == (policy == "warn")
    assert report["rows"]["kept"]["train"] == (58 if policy == "drop" else 60)
    page = (OUTPUT / PAGE).read_text()
    assert ("taken out by data.on_overlap" in page) == (policy == "drop")
    assert ("and</mark>" in page) == (policy == "warn")


def test_the_page_of_an_attackers_rows_has_the_elements_of_a_harmless_one(workspace):
    def page(text: str) -> Form:
        rows = [{"question": f"{text} {some_text(number)}", "answer": f"{text} {number % 3}"} for number in range(60)]
        rows += [{**rows[0], "answer": f"{text} 1"}, rows[1], {**rows[2], "question": f"{rows[2]['question']} and"}]
        rows = [{**row, "part": "train", text: text} for row in rows]
        rows += [{"question": f"{text} {some_text(5)} and", "answer": f"{text} 1", "part": "test", text: text}]
        report = reported(rows, splits={"column": "part", "validation": 0})
        assert report["several"]["prompts"] and report["duplicates"]["first"] and report["near_duplicates"]["prompts"]
        assert report["overlap"] and report["labels"]
        return Form(OUTPUT / PAGE)

    harmless = page("t" * 52)
    for text in TEXTS:
        assert text not in (OUTPUT / PAGE).read_text()
        assert page(text).found == harmless.found


def test_what_stands_in_train_goes_from_the_prompts_to_the_splits(workspace, tiny_model):
    rows = [{"question": some_text(number), "answer": "yes", "part": "train"} for number in range(40)]
    rows += [{"question": some_text(number), "answer": "yes", "part": "test"} for number in (3, 100)]
    reported(rows, splits={"column": "part", "validation": 0})
    prompts, splits = str(OUTPUT), "results/splits/rows-key"
    tokenize_splits.main(["--prompts", prompts, "--model", str(tiny_model), "--output", splits, "sweep=none"])
    assert in_train.read(Path(splits)).rows == {"validation": {}, "test": {"prompt": [41]}}
