"""tokenize_splits: preference pairs, and what the length limit does to them."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow
import pytest
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from steps import format_prompts, tokenize_splits
from temper.data import tokenized, workers
from temper.data.audit import doubled
from temper.data.columns import with_right_answers
from tests.support.asking import complaint
from tests.support.tiny import CHAT_TEMPLATE, tiny_rows, tiny_tokenizer

NO_LIMITS = ["tokenize.max_share.dropped=null", "tokenize.max_share.truncated=null"]
LONG = "a film that goes on and on and on and on and on"


def tokenize(model, *overrides, pairs: bool = True):
    """The splits of 6 rows each; in every split the second chosen and the third rejected answer are long."""
    Path("prompts").mkdir(exist_ok=True)
    for start, split in enumerate(("train", "validation", "test")):
        lines = []
        for number, (prompt, label) in enumerate(tiny_rows(6, 6 * start), 1):
            other = {"positive": "negative", "negative": "positive"}[label]
            chosen, rejected = LONG if number == 2 else label, LONG if number == 3 else other
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": chosen}]
            lines.append({"id": number, "messages": turns, **({"rejected": rejected} if pairs else {})})
        Path(f"prompts/{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--prompts", "prompts", "--model", str(model), "--output", "splits", "sweep=none"]
    tokenize_splits.main([*arguments, *NO_LIMITS, *overrides])
    return load_from_disk("splits"), json.loads(Path("splits/audit.json").read_text())["splits"]


def test_both_answers_follow_the_prompt(workspace, tiny_model):
    splits, audit = tokenize(tiny_model)
    for row in splits["train"]:
        start = row["prompt_length"]
        assert row["input_ids"][:start] == row["rejected_input_ids"][:start]
        assert row["labels"] == [-100] * start + row["input_ids"][start:]
        assert row["rejected_labels"] == [-100] * start + row["rejected_input_ids"][start:]
        assert row["input_ids"][start:] != row["rejected_input_ids"][start:]
    assert splits["train"][0]["rejected"] == "negative"
    assert audit["train"]["learned_tokens"] > 0
    assert audit["train"]["rejected_tokens"] > 0
    text = Path("splits/audit.txt").read_text()
    assert ">>>positive<|im_end|><<<" in text.split("--- row 1, chosen")[1].split("---")[0]
    assert ">>>negative<|im_end|><<<" in text.split("--- row 1, rejected")[1].split("---")[0]


def test_rows_without_pairs_are_as_they_were(workspace, tiny_model):
    splits, audit = tokenize(tiny_model, pairs=False)
    assert splits["train"].column_names == ["id", "input_ids", "labels", "prompt_length", "prompt", "reference"]
    assert "rejected_tokens" not in audit["train"]
    assert "chosen" not in Path("splits/audit.txt").read_text()


def test_single_answers_have_a_label(workspace, tiny_model):
    tokenize(tiny_model, pairs=False)
    shutil.rmtree("splits")
    for split in ("train", "validation", "test"):
        path = Path(f"prompts/{split}.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**line, "label": line["id"] % 2 == 0}) + "\n" for line in lines))
    tokenize_splits.main(["--prompts", "prompts", "--model", str(tiny_model), "--output", "splits", "sweep=none"])
    splits = load_from_disk("splits")
    assert splits["train"]["label"][:] == [False, True, False, True, False, True]
    assert "--- row 1, undesirable\n" in Path("splits/audit.txt").read_text()
    right = with_right_answers(splits)
    assert right["test"]["id"][:] == [2, 4, 6]
    assert "label" not in right["test"].column_names


def limit(model) -> int:
    """A length that holds every row but those with a long answer."""
    rows = tokenize(model)[0]["train"]
    lengths = [max(len(row["input_ids"]), len(row["rejected_input_ids"])) for row in rows if row["id"] not in (2, 3)]
    Path("splits").rename("unlimited")
    return max(lengths)


def test_a_pair_is_dropped_when_one_of_its_answers_is_too_long(workspace, tiny_model):
    splits, audit = tokenize(tiny_model, f"tokenize.max_length={limit(tiny_model)}")
    assert splits["train"]["id"][:] == [1, 4, 5, 6]
    assert (audit["train"]["read"], audit["train"]["dropped"], audit["train"]["longer_than_max_length"]) == (6, 2, 2)


def test_truncating_cuts_each_answer_by_itself(workspace, tiny_model):
    length = limit(tiny_model)
    splits, _ = tokenize(tiny_model, f"tokenize.max_length={length}", "tokenize.max_length_policy=truncate")
    second, third = splits["train"][1], splits["train"][2]
    assert (len(second["input_ids"]), len(third["rejected_input_ids"])) == (length, length)
    assert len(second["rejected_input_ids"]) < length
    assert len(second["labels"]) == length


def test_a_prompt_that_fills_the_row_leaves_no_pair(workspace, tiny_model):
    prompts = [row["prompt_length"] for row in tokenize(tiny_model)[0]["train"]]
    Path("splits").rename("unlimited")
    options = [f"tokenize.max_length={max(prompts)}", "tokenize.max_length_policy=truncate", "prompt.loss_on=all"]
    splits, audit = tokenize(tiny_model, *options)
    kept = [length for length in prompts if length < max(prompts)]
    assert splits["train"]["prompt_length"][:] == kept
    assert audit["train"]["answer_cut_off_entirely"] == len(prompts) - len(kept) > 0


def test_an_error_names_the_longer_text(workspace, tiny_model, capsys):
    length = limit(tiny_model)
    longest = len(load_from_disk("unlimited")["train"][1]["input_ids"])
    with pytest.raises(SystemExit) as stopped:
        tokenize(tiny_model, f"tokenize.max_length={length}", "tokenize.max_length_policy=error")
    assert stopped.value.code == 2
    assert f"row 2 has {longest} tokens, tokenize.max_length is {length}" in capsys.readouterr().err


def several_processes(monkeypatch) -> None:
    """Tokenize in three processes, however short the file is."""
    monkeypatch.setattr(workers, "WORTH", 1)
    monkeypatch.setenv(workers.THREADS, "3")


def files(folder: str) -> dict[str, bytes]:
    """All that `tokenize_splits` writes, but for what says when."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "provenance.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_the_size_of_a_batch_changes_nothing(workspace, tiny_model, monkeypatch, pairs, policy):
    options = [f"tokenize.max_length={limit(tiny_model)}", f"tokenize.max_length_policy={policy}"]
    made = []
    for size in (2**18, 300, 1):  # bytes: all rows, two, one
        monkeypatch.setattr(tokenized, "BATCH", size)
        tokenize(tiny_model, *options, pairs=pairs)
        made.append(files("splits"))
        Path("splits").rename(f"splits-{size}")
    for found in made:
        for split in tokenize_splits.SPLITS:
            del found[f"{split}/state.json"]  # it has a sum of the batches
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_the_number_of_processes_changes_nothing(workspace, tiny_model, monkeypatch, pairs, policy):
    options = [f"tokenize.max_length={limit(tiny_model)}", f"tokenize.max_length_policy={policy}"]
    monkeypatch.setattr(tokenized, "BATCH", 300)
    tokenize(tiny_model, *options, pairs=pairs)
    alone = files("splits")
    Path("splits").rename("alone")
    several_processes(monkeypatch)
    forks = []
    monkeypatch.setattr(os, "fork", lambda fork=os.fork: forks.append(fork()) or forks[-1])
    tokenize(tiny_model, *options, pairs=pairs)
    assert len(forks) == 3 * len(tokenize_splits.SPLITS)
    assert files("splits") == alone


@pytest.mark.parametrize("size", [2**18, 300, 1])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("first", "message"), [("long", "row 1 has "), ("refused", "refuses messages of the roles")])
def test_the_first_row_at_fault_ends_it(workspace, tiny_model, monkeypatch, capsys, size, several, first, message):
    """A row that is too long and one that the template refuses, in one batch and in two, and both ways round."""
    monkeypatch.setattr(tokenized, "BATCH", size)
    if several:
        several_processes(monkeypatch)
    shutil.copytree(tiny_model, "model")
    template = "{{ raise_exception('no') if messages[0]['content'] == 'refused' }}" + CHAT_TEMPLATE
    Path("model/chat_template.jinja").write_text(template)
    contents = {"long": [LONG * 9, "refused"], "refused": ["refused", LONG * 9]}[first]
    Path("prompts").mkdir()
    lines = [
        json.dumps(
            {"id": number, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
        )
        for number, text in enumerate(contents, 1)
    ]
    for split in tokenize_splits.SPLITS:
        Path(f"prompts/{split}.jsonl").write_text("\n".join(lines) + "\n")
    options = ["tokenize.max_length=64", "tokenize.max_length_policy=error", "sweep=none"]
    with pytest.raises(SystemExit) as stopped:
        tokenize_splits.main(["--prompts", "prompts", "--model", "model", "--output", "splits", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("splits").exists()
    assert not Path(".tmp-splits").exists()


def made(workspace, model, records: list[dict], *overrides) -> tuple[dict, dict]:
    """(splits, audit) where all three splits have the same records."""
    Path("prompts").mkdir()
    lines = [json.dumps({"id": number, **record}) + "\n" for number, record in enumerate(records, 1)]
    for split in tokenize_splits.SPLITS:
        Path(f"prompts/{split}.jsonl").write_text("".join(lines))
    arguments = ["--prompts", "prompts", "--model", str(model), "--output", "splits", "sweep=none"]
    tokenize_splits.main([*arguments, *NO_LIMITS, *overrides])
    return load_from_disk("splits"), json.loads(Path("splits/audit.json").read_text())["splits"]


def chat(*texts: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


def test_answers_with_an_end_token_inside_are_left_out_and_counted(workspace, tiny_model, capsys):
    rows = [chat("a", "It is <|im_end|> or"), chat("b", "answer<|im_end|>"), chat("c", "answer")]
    splits, audit = made(workspace, tiny_model, rows, "prompt.allow_special_text=true")
    for split in tokenize_splits.SPLITS:
        assert splits[split]["id"][:] == [2, 3]
        assert splits[split]["reference"][:] == ["answer", "answer"]
        assert (audit[split]["answer_with_end_token"], audit[split]["dropped"]) == (1, 1)
    assert "1 of 3 rows of test are left out: an answer holds a token that ends answers" in capsys.readouterr().err


def test_pairs_of_the_same_tokens_are_left_out_and_counted(workspace, tiny_model, capsys):
    shutil.copytree(tiny_model, "model")
    Path("model/chat_template.jinja").write_text(
        CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    )
    rows = [{**chat("a", "yes"), "rejected": "yes\n"}, {**chat("b", "yes"), "rejected": "no "}]
    splits, audit = made(workspace, "model", rows)
    assert splits["test"]["id"][:] == [2]
    assert (splits["test"]["reference"][0], splits["test"]["rejected"][0]) == ("yes", "no")
    assert audit["train"]["equal_pairs"] == 1
    assert (
        "1 of 2 rows of train are left out: the chosen and the rejected answer are the same" in capsys.readouterr().err
    )


def test_a_conversation_whose_last_answer_is_cut_off_is_left_out_everywhere(workspace, tiny_model):
    rows = [chat("Tell me a number.", "It is one.", "And another one, please, a large one.", "Twelve."), chat("a", "b")]
    splits, audit = made(workspace, tiny_model, rows, "tokenize.max_length=64", "tokenize.max_length_policy=truncate")
    for split in tokenize_splits.SPLITS:
        assert splits[split]["id"][:] == [2]
        assert audit[split]["answer_cut_off_entirely"] == 1


def test_an_error_names_the_row(workspace, tiny_model, capsys):
    with pytest.raises(SystemExit):
        made(workspace, tiny_model, [chat("a", "b"), chat("a", "b", "c", "d")], "prompt=plain")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: prompts/train.jsonl: row 2: prompt.template is for one prompt and one answer")
    assert line.endswith("use prompt.apply_chat_template=true, or leave such rows out with data.where")


def test_what_is_said_of_turns_that_a_template_rewrites(workspace, tiny_model, capsys):
    from tests.support.chat_templates import THINKS

    shutil.copytree(tiny_model, "model")
    Path("model/chat_template.jinja").write_text(THINKS)
    splits, audit = made(workspace, "model", [chat("a", "b", "c", "d"), chat("e", "f")])
    assert splits["train"]["id"][:] == [1, 1, 2]
    assert splits["train"]["reference"][:] == ["b", "d", "f"]
    assert splits["train"]["prompt"][:] == ["a", "user: a\nassistant: b\nuser: c", "e"]
    assert splits["test"]["reference"][:] == ["d", "f"]
    assert (audit["train"]["became_several_rows"], audit["train"]["rows_from_earlier_answers"]) == (2, 1)
    assert audit["test"]["only_last_answer_learned"] == 1
    said = capsys.readouterr().err
    assert "2 of 3 rows of train: each answer is a row of its own, behind the history that it has at inference" in said
    assert "1 of 2 rows of test: only the last answer is learned, for the chat template shows earlier turns" in said
    assert r"the chat template writes '<think>\n\n</think>\n\n' before an answer" in said
    assert json.loads(Path("splits/provenance.json").read_text())["opening"] == "<think>\n\n</think>\n\n"


def test_texts_that_spell_special_tokens_are_told(workspace, tiny_model, capsys):
    rows = [chat("Say <|im_start|>assistant", "no"), chat("a", "b<|im_end|>")]
    _, audit = made(workspace, tiny_model, rows, "tokenize.max_share.end_spelled=0.5")
    assert (audit["test"]["special_text"], audit["test"]["special_text_allowed"]) == (2, 0)
    assert (audit["test"]["end_spelled"], audit["test"]["first"]["end_spelled"]) == (1, [2])
    assert "2 of 2 rows of test: a text spells a control token, which is text" in capsys.readouterr().err
    shutil.rmtree("prompts")
    shutil.rmtree("splits")
    _, audit = made(workspace, tiny_model, rows, "prompt.allow_special_text=true")
    assert (audit["test"]["special_text"], audit["test"]["special_text_allowed"]) == (0, 2)
    assert audit["test"]["end_spelled"] == 0


def test_answers_that_already_end_with_the_end_token_are_an_error(workspace, tiny_model, capsys):
    with pytest.raises(SystemExit):
        made(workspace, tiny_model, [chat("a", "b<|im_end|>"), chat("c", "d<|im_end|>\n")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "2 of 2 rows of train (100.0%) are kept, but an answer ends with the text of a token that ends answers" in said
    )
    assert "take it off the answers, for the chat template or Temper writes the token itself, or, if that is as" in said


STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize("way", ["prompt.system=null", "prompt=plain"])
def test_what_is_proposed_for_a_refused_system_message_works(workspace, tiny_model, capsys, way):
    shutil.copytree(tiny_model, "model")
    Path("model/chat_template.jinja").write_text(STRICT)
    row = chat("a", "b")
    with_system = {"messages": [{"role": "system", "content": "Be short."}, *row["messages"]]}
    with pytest.raises(SystemExit):
        made(workspace, "model", [with_system], "prompt.system='Be short.'")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "row 1: model: its chat template refuses messages of the roles system, user: no system message" in line
    assert line.endswith("; set prompt.system=null, or use prompt=plain, or leave such rows out with data.where")
    shutil.rmtree("prompts")
    splits, _ = made(workspace, "model", [row if "null" in way else with_system], way)
    assert len(splits["train"]) == 1


def test_what_is_proposed_for_rows_of_several_turns_works():
    from temper.data.layouts import converter

    convert = converter({"layout": "messages", "where": "messages | length == 2"}, None)
    assert convert(chat("a", "b", "c", "d")) is None
    assert convert(chat("a", "b")).messages == chat("a", "b")["messages"]


def test_what_other_programs_do_not_know_is_told(workspace, tiny_model, capsys):
    from tests.support.chat_templates import CLOCK

    shutil.copytree(tiny_model, "model")
    Path("model/chat_template.jinja").write_text(CLOCK + CHAT_TEMPLATE)
    splits, _ = made(workspace, "model", [chat("a", "b")], "prompt.date=2031-01-02")
    assert "here that is always prompt.date=2031-01-02, but other programs" in capsys.readouterr().err
    assert json.loads(Path("splits/provenance.json").read_text())["opening"] == ""
    assert "date: '2031-01-02'" in Path("splits/config.yaml").read_text()


def test_a_date_that_nothing_asks_for_is_told(workspace, tiny_model, capsys):
    made(workspace, tiny_model, [chat("a", "b")], "prompt.date=2031-01-02")
    assert "prompt.date=2031-01-02 changes nothing" in capsys.readouterr().err


# --- what is too much -----------------------------------------------------------------------------------

LONG_ROWS = {7, 20, 21, 33, 50, 64, 71, 72, 90}


def format_rows(longer: str = "question") -> None:
    """The prompts of 100 rows, of which those of `LONG_ROWS` have a long text in a column."""
    rows = [{"question": f"word {number}", "answer": f"it is {number}"} for number in range(1, 101)]
    for number in LONG_ROWS:
        rows[number - 1][longer] += " and more" * 30
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"layout": "question_answer", "splits": {"validation": 0.3, "test": 0.3}}
    config = json.dumps({"data": data, "prompt": {"system": None}})
    format_prompts.main(["--raw", "rows.jsonl", "--output", "prompts", "--config", config])


def tokenize_rows(model, *overrides: str) -> dict:
    shutil.rmtree("splits", ignore_errors=True)
    limits = ["tokenize.max_length=64", "tokenize.max_share.dropped=0.02"]
    inputs = ["--prompts", "prompts", "--model", str(model), "--output", "splits", "sweep=none"]
    tokenize_splits.main([*inputs, *limits, *overrides])
    return json.loads(Path("splits/audit.json").read_text())["splits"]


def ids_of_split(split: str) -> list[int]:
    return [json.loads(line)["id"] for line in Path(f"prompts/{split}.jsonl").read_text().splitlines()]


def test_too_many_rows_left_out_are_an_error_that_names_them(workspace, tiny_model, capsys):
    format_rows()
    said = complaint(capsys, lambda _: tokenize_rows(tiny_model))
    train = ids_of_split("train")
    long = [number for number in train if number in LONG_ROWS]
    assert said.startswith(
        f"prompts: {len(long)} of {len(train)} rows of train ({len(long) / len(train):.1%}) are left"
    )
    assert f" ({len(long)}: longer than tokenize.max_length), more than tokenize.max_share.dropped=0.02; " in said
    first = ", ".join(f"rows.jsonl:{number}" for number in long[:3])
    assert f"; the first: {first}{', ...' if len(long) > 3 else ''}: " in said
    assert not Path("splits").exists()

    # Both ways that it proposes work, for all splits at once.
    share = re.search(r"set (tokenize\.max_share\.dropped=[\d.]+)$", said)[1]
    audit = tokenize_rows(tiny_model, share)
    assert audit["train"]["first"]["dropped"] == long[:3]
    assert all(found["dropped"] == len(LONG_ROWS & {*ids_of_split(split)}) > 0 for split, found in audit.items())
    length = re.search(r"(tokenize\.max_length=\d+) would keep 99%", said)[1]
    assert all(found["dropped"] == 0 for found in tokenize_rows(tiny_model, length).values())


def test_too_many_rows_cut_are_an_error(workspace, tiny_model, capsys):
    format_rows(longer="answer")
    cut = ["tokenize.max_length_policy=truncate"]
    said = complaint(capsys, lambda _: tokenize_rows(tiny_model, *cut, "tokenize.max_share.truncated=0.05"))
    assert "are cut to tokenize.max_length, more than tokenize.max_share.truncated=0.05; the first: rows.jsonl:" in said
    assert tokenize_rows(tiny_model, *cut, "tokenize.max_share.truncated=null")["train"]["truncated"] > 0


def test_a_cut_answer_has_lost_its_end(workspace, tiny_model, capsys):
    rows = [chat("Say it.", LONG), chat("Say it.", "yes")]
    length = len(tiny_tokenizer()(LONG)["input_ids"])
    _, audit = made(workspace, tiny_model, rows, f"tokenize.max_length={length}", "tokenize.max_length_policy=truncate")
    assert (audit["train"]["truncated"], audit["train"]["end_not_learned"]) == (1, 1)
    assert audit["train"]["first"]["end_not_learned"] == [1]
    assert "1 of 2 rows of train have lost the end of an answer" in capsys.readouterr().err


def test_a_second_begin_token_is_an_error(workspace, tiny_model, capsys):
    """A tokenizer that puts one before each text, and a template that has another."""
    format_rows()
    shutil.copytree(tiny_model, "model")
    written = json.loads(Path("model/tokenizer.json").read_text())
    begin, number = tiny_tokenizer().bos_token, tiny_tokenizer().bos_token_id
    single = [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {begin: {"id": begin, "ids": [number], "tokens": [begin]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    written["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    Path("model/tokenizer.json").write_text(json.dumps(written))
    free = ["prompt=plain", "tokenize.max_length=1000"]
    assert tokenize_rows("model", *free)["train"]["doubled_begin"] == 0
    twice = [*free, f"prompt.template='{begin}{{{{ prompt }}}} '"]
    said = complaint(capsys, lambda _: tokenize_rows("model", *twice))
    assert "are kept, but a text begins with two begin tokens" in said
    assert re.search(r"take one of them out of the template, .* or, .* set tokenize\.max_share\.doubled_begin=1$", said)
    found = tokenize_rows("model", *twice, "tokenize.max_share.doubled_begin=1")["train"]
    assert found["doubled_begin"] == found["rows"] > 0


def test_a_token_that_ends_answers_twice_in_a_row(workspace, tiny_model):
    shutil.copytree(tiny_model, "model")
    template = Path("model/chat_template.jinja").read_text().replace("<|im_end|>", "<|im_end|><|im_end|>")
    Path("model/chat_template.jinja").write_text(template)
    _, audit = made(workspace, "model", [chat("a", "b", "c", "d")], "tokenize.max_share.doubled_end=1")
    assert (audit["train"]["doubled_end"], audit["train"]["doubled_begin"]) == (1, 0)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 5))
def test_doubled_tokens_are_found_within_texts(texts, skipped):
    """Texts may be a slice of a longer array, and one may begin with the token that another ends with."""
    array = pyarrow.array([[1, 1]] * skipped + texts).slice(skipped)
    pairs = [[at for at in range(len(text) - 1) if text[at] == text[at + 1] == 1] for text in texts]
    begins = [row for row, found in enumerate(pairs) if 0 in found]
    further = [row for row, found in enumerate(pairs) if {*found} - {0}]
    assert doubled(array, {1}) == (begins, further)
