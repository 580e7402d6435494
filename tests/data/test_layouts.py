"""Layouts: from a row to a conversation."""

import datetime
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.config.schema import Data
from temper.data.layouts import LAYOUTS, Example, Tie, converter, expander
from temper.errors import UserError

SOURCE = {"kind": "files", "path": "rows.jsonl"}


def convert(row, layout, system=None, **data):
    example = converter({"layout": layout, **data}, system)(row)
    return example and example.messages


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


HELLO = turns(("user", "Hello"), ("assistant", "Hi"))


def test_there_is_a_layout_for_each_the_config_knows():
    known = Data.model_fields["layout"].annotation.__args__
    assert {*LAYOUTS, "template"} == set(known)


@pytest.mark.parametrize(
    ("layout", "row", "expected"),
    [
        ("question_answer", {"question": "Hello", "answer": "Hi", "other": 3}, HELLO),
        ("instruction", {"instruction": "Hello", "output": "Hi"}, HELLO),
        ("instruction", {"instruction": "Hello", "input": "", "output": "Hi"}, HELLO),
        ("instruction", {"instruction": "Hello", "input": None, "output": "Hi"}, HELLO),
        (
            "instruction",
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            turns(("user", "Add.\n\n1, 2"), ("assistant", "3")),
        ),
        ("prompt_completion", {"prompt": "Hello", "completion": "Hi"}, HELLO),
        ("prompt_completion", {"prompt": HELLO[:1], "completion": HELLO[1:]}, HELLO),
        ("messages", {"messages": [{**message, "name": None, "weight": 1} for message in HELLO]}, HELLO),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, HELLO),
        ("sharegpt", {"conversations": HELLO}, HELLO),
    ],
)
def test_layouts(layout, row, expected):
    assert convert(row, layout) == expected


def test_columns_rename():
    row = {"q": "Hello", "response": "Hi"}
    assert convert(row, "question_answer", columns={"question": "q", "answer": "response"}) == HELLO


@settings(deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_template_takes_text_as_it_is(quote, tag):
    """No escaping, no trimming, and nothing in the data is run as a template."""
    row = {"quote": quote, "tags": [tag, "{{ 1 + 1 }}"]}
    messages = convert(row, "template", prompt="{{ quote }}", completion="{{ tags | join(', ') }}")
    assert messages == turns(("user", quote), ("assistant", f"{tag}, {{{{ 1 + 1 }}}}"))


def test_where_leaves_rows_out():
    data = {"layout": "question_answer", "where": "answer and stars | int > 2"}
    keep = converter(data, None)
    assert keep({"question": "a", "answer": "", "stars": "5"}) is None
    assert keep({"question": "a", "answer": "b", "stars": "2"}) is None
    assert keep({"question": "a", "answer": "b", "stars": "3"}) is not None


def test_the_system_message_of_the_config_replaces_that_of_the_data():
    own = turns(("system", "Old."), *[tuple(message.values()) for message in HELLO])
    assert convert({"messages": own}, "messages") == own
    assert convert({"messages": own}, "messages", "New.") == turns(("system", "New.")) + HELLO
    assert convert({"messages": HELLO}, "messages", "New.") == turns(("system", "New.")) + HELLO


# --- rows that make no conversation --------------------------------------------------------------

ASK, ANSWER, SYSTEM = HELLO[0], HELLO[1], {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        (
            "question_answer",
            {"question": "a", "text": "b"},
            "no column 'answer'; there are question, text: choose another",
        ),
        ("question_answer", {"question": "a", "answer": None}, 'column "answer" is empty; to leave such rows out, set'),
        (
            "question_answer",
            {"question": " \n", "answer": "b"},
            'column "question" is blank; to leave such rows out, set',
        ),
        (
            "question_answer",
            {"question": "a", "answer": 5},
            "column 'answer' holds 5, a number, not text; data.layout=template makes",
        ),
        (
            "question_answer",
            {"question": "a", "answer": "\ud83d"},
            r"the assistant's text holds half a character (\ud83d)",
        ),
        ("instruction", {"instruction": "a", "input": 3, "output": "b"}, "column 'input' holds 3, a number, not text"),
        (
            "prompt_completion",
            {"prompt": [ASK], "completion": "b"},
            "column 'prompt' holds [{'role': 'user', 'content': 'H",
        ),
        ("messages", {"messages": []}, "column 'messages' holds [], not a list of messages"),
        ("messages", {"messages": ["a"]}, "messages[0] is 'a', not a message with role and content"),
        (
            "messages",
            {"messages": [{"role": "usr", "content": "a"}]},
            "messages[0]: role 'usr' is not known; did you mean",
        ),
        ("messages", {"messages": [ASK, {**ANSWER, "content": None}]}, "messages[1]: the content is null, not text"),
        ("messages", {"messages": [ASK, {**ANSWER, "content": ""}]}, "messages[1]: the assistant's message is empty"),
        (
            "messages",
            {"messages": [ASK, SYSTEM, ANSWER]},
            "column 'messages': a system message after the first message",
        ),
        (
            "messages",
            {"messages": [ASK]},
            "column 'messages' ends with the user's message, so there is no answer to learn",
        ),
        ("messages", {"messages": [SYSTEM, ANSWER]}, "column 'messages' has an answer but no user's message before it"),
    ],
)
def test_rows_that_make_no_conversation(layout, row, message):
    with pytest.raises(UserError, match="^" + re.escape(message)) as caught:
        convert(row, layout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("messages", {"messages": [ASK]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hello"}]}),
        ("question_answer", {"question": "a", "answer": ""}),
        ("question_answer", {"question": "a", "answer": " "}),
    ],
)
def test_the_condition_that_an_error_proposes_leaves_the_row_out(layout, row):
    with pytest.raises(UserError) as caught:
        convert(row, layout)
    proposed = re.search(r'set data\.where to "(.*?)"', str(caught.value))[1]
    assert convert(row, layout, where=proposed) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": "{{ txt }}"}, "data.prompt: 'txt' is undefined (columns: text, label)"),
        ({"completion": "{{ label | float }}"}, "data.completion: 'good' is not a number (columns: text, label)"),
        ({"completion": "{{ '' }}"}, "data.completion gives an empty text; to leave such rows out, use data.where"),
        ({"where": "labl == 'good'"}, "data.where: 'labl' is undefined (columns: text, label)"),
        ({"where": "labl"}, "data.where: 'labl' is undefined (columns: text, label)"),
        (
            {"prompt": "{{ text.__class__.__mro__ }}"},
            "data.prompt: access to attribute '__class__' of 'str' object is unsafe",
        ),
        (
            {"prompt": "{{ text"},
            "config: 'data.prompt': unexpected end of template, expected 'end of print statement'. (line 1)",
        ),
        ({"where": "label =="}, "config: 'data.where': "),
        ({"completion": "{{ label | uper }}"}, "config: 'data.completion': No filter named 'uper'"),
    ],
)
def test_faults_in_templates(data, message):
    template = {"prompt": "{{ text }}", "completion": "{{ label }}", **data}
    with pytest.raises(UserError, match="^" + re.escape(message)):
        convert({"text": "fine", "label": "good"}, "template", **template)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ word | trim | upper }}", "YES"),
        ("{{ word ~ 3 ~ '!' }}", "yes3!"),
        ("{{ [word, 2] | join('-') }}", "yes-2"),
        ("{{ none_ | default('', true) }}x", "x"),
        ("{{ turns | tojson }}", '[{"who": "a", "said": "b"}]'),
        ("{{ number | float + 1 }}", "2.5"),
        ("{% for turn in turns if turn.who %}{{ turn.who }}: {{ turn.said }}{% endfor %}", "a: b"),
        ("{{ turns | map(attribute='said') | join }}{{ turns | join(attribute='who') }}", "ba"),
        ("{{ raw.decode() }}", "é"),
        ("{{ 'yes' if flag else 'no' }}{% if not flag %}!{% endif %}", "yes"),
        ("{{ day }} {{ day ~ '' }} {{ day | trim }}", "2024-02-03 2024-02-03 2024-02-03"),
        ("{{ '%s of %d' | format(word, 3) }}", "yes of 3"),
        ("{{ flag }} {{ flag ~ '' }} {{ [flag] | join }} {{ '%s' | format(not flag) }}", "true true true false"),
        ("{{ {'day': day, 'flag': flag} | tojson }}", '{"day": "2024-02-03", "flag": true}'),
    ],
)
def test_templates_make_of_a_row_what_they_say(source, expected):
    row = {"word": " yes " if "trim" in source else "yes", "none_": None, "turns": [{"who": "a", "said": "b"}]}
    row |= {"number": "1.5", "raw": "é".encode(), "flag": True, "day": datetime.date(2024, 2, 3)}
    made = convert(row, "template", prompt=source, completion="x")
    assert made[0]["content"] == expected


@pytest.mark.parametrize("value", [None, math.nan, math.inf, b"a", ["a"], {"a": 1}, [None]])
@pytest.mark.parametrize(
    "source",
    ["{{ x }}", "{{ x | string }}", "{{ x | trim }}", "{{ x ~ 'a' }}", "{{ [x] | join }}", "{{ '%s' | format(x) }}"],
)
def test_what_is_no_text_becomes_none(source, value):
    with pytest.raises(UserError, match="^data.prompt: .* is .*, not text: "):
        convert({"x": value}, "template", prompt=source, completion="a")


@pytest.mark.parametrize("text", ["False", "no", "0", "None", "nan"])
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' if x else 'b' }}",
        "{% if x %}a{% endif %}",
        "{{ (x and 'a') }}",
        "{{ (x or 'a') }}",
        "{{ not x or 'a' }}",
    ],
)
def test_a_text_that_means_no_decides_nothing(source, text):
    """In csv a false is a text, which counts as true."""
    with pytest.raises(UserError, match="^data.prompt: asks whether the text"):
        convert({"x": text}, "template", prompt=source, completion="a")
    with pytest.raises(UserError, match="^data.where: asks whether the text"):
        convert({"x": text}, "template", prompt="a", completion="a", where="not x")
    assert convert({"x": text}, "template", prompt="a", completion="a", where=f"x == '{text}'")
    assert convert({"x": text}, "template", prompt="a", completion="a", where="x != ''")


@pytest.mark.parametrize(
    ("field", "value", "used"),
    [
        ("audio", {"id": "audio_1"}, False),
        ("refusal", "I cannot say.", False),
        *(("weight", value, True) for value in (1, 1.0, None)),
        *(("x", value, True) for value in (True, None, "", [], {})),
    ],
)
@pytest.mark.parametrize("layout", ["messages", "sharegpt", "prompt_completion", "preference"])
def test_what_stands_in_messages_and_is_not_read_is_refused(layout, field, value, used):
    answer = [{**ANSWER, field: value}]
    row = {
        "messages": {"messages": [ASK, *answer]},
        "sharegpt": {"conversations": [ASK, *answer]},
        "prompt_completion": {"prompt": [ASK], "completion": answer},
        "preference": {"prompt": "Hello", "chosen": answer, "rejected": "Go."},
    }[layout]
    if not used:
        with pytest.raises(UserError, match=rf"^'{field}' .*data.ignore_fields=\[{field}\]"):
            convert(row, layout)
        assert convert(row, layout, ignore_fields=[field]) == HELLO
    else:
        assert convert(row, layout) == HELLO


def test_faults_in_columns():
    with pytest.raises(UserError, match="^config: 'data.columns.prompt': layout 'question_answer' has no such column"):
        convert({}, "question_answer", columns={"prompt": "q"})
    with pytest.raises(
        UserError, match="^no column 'q', which data.columns.question names; there are question, answer"
    ):
        convert({"question": "a", "answer": "b"}, "question_answer", columns={"question": "q"})


# --- preference pairs ----------------------------------------------------------------------------

HOW = [{"role": "user", "content": "How?"}]
WELL, BADLY = {"role": "assistant", "content": "Well."}, {"role": "assistant", "content": "Badly."}


def pair(row, layout="preference", **data):
    return converter({"layout": layout, **data}, None)(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How?", "chosen": "Well.", "rejected": "Badly."},
        {"prompt": HOW, "chosen": [WELL], "rejected": [BADLY]},
        {"prompt": HOW, "chosen": WELL, "rejected": "Badly."},
        {"chosen": [*HOW, WELL], "rejected": [*HOW, BADLY]},
        {
            "prompt": [{"from": "human", "value": "How?"}],
            "chosen": {"from": "gpt", "value": "Well."},
            "rejected": {"from": "gpt", "value": "Badly."},
        },
        {
            "conversations": [{"from": "human", "value": "How?"}],
            "chosen": {"from": "gpt", "value": "Well."},
            "rejected": {"from": "gpt", "value": "Badly."},
        },
        {"prompt": "How?", "chosen": [*HOW, WELL], "rejected": [*HOW, BADLY], "score_chosen": 8.0},
        {"prompt": HOW, "chosen": [*HOW, WELL], "rejected": [*HOW, BADLY]},
    ],
)
def test_all_forms_of_a_preference_pair(row):
    assert pair(row)[:2] == ([*HOW, WELL], "Badly.")


def test_the_prompt_of_a_pair_may_have_another_name():
    row = {"conversations": HOW, "chosen": WELL, "rejected": BADLY}
    assert pair(row, columns={"prompt": "conversations"})[:2] == ([*HOW, WELL], "Badly.")


def test_a_template_says_what_is_rejected():
    template = {
        "prompt": "{{ text }}",
        "completion": "{{ label }}",
        "rejected": "{{ 'no' if label == 'yes' else 'yes' }}",
    }
    assert pair({"text": "Is it?", "label": "yes"}, "template", **template).rejected == "no"


def test_another_label_is_picked_by_the_row_alone():
    labels = ["happy", "angry", "neutral"]
    rows = [{"question": f"Row {number}", "answer": labels[number % 3]} for number in range(300)]
    picked = [pair(row, "question_answer", rejected_from=labels).rejected for row in rows]
    assert all(label != row["answer"] for label, row in zip(picked, rows, strict=True))
    assert picked[::-1] == [pair(row, "question_answer", rejected_from=labels[:]).rejected for row in rows[::-1]]
    happy = [label for label, row in zip(picked, rows, strict=True) if row["answer"] == "happy"]
    assert 30 < happy.count("angry") < 70, "both others are picked"


@pytest.mark.parametrize(
    ("row", "data", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, {}, "the chosen and the rejected answer are the same ('b')"),
        ({"prompt": "a", "chosen": "b"}, {}, "no column 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, {}, "no column 'prompt'"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, {}, 'column "chosen" is empty'),
        ({"prompt": "a", "chosen": "b", "rejected": 7}, {}, "column 'rejected' holds 7, a number, not text"),
        ({"prompt": "a", "chosen": "b", "rejected": "\ud83d"}, {}, "the rejected answer's text holds half a character"),
        (
            {"chosen": [*HOW, WELL], "rejected": [{"role": "user", "content": "Who?"}, BADLY]},
            {},
            "'chosen' and 'rejected' differ before their last message",
        ),
        (
            {"prompt": "Who?", "chosen": [*HOW, WELL], "rejected": [*HOW, BADLY]},
            {},
            "column 'chosen' begins with a user's message that is not that of the column prompt ('How?')",
        ),
        (
            {"question": "a", "answer": "b"},
            {"rejected_from": ["c", "d"]},
            "the answer 'b' is none of data.rejected_from",
        ),
    ],
)
def test_pairs_that_are_none_are_named(row, data, message):
    with pytest.raises(UserError) as error:
        pair(row, "question_answer" if data else "preference", **data)
    assert message in str(error.value)


# --- scored responses, and single answers ----------------------------------------------------------


def pairs_of(row, score_pairs="best_worst", **data):
    found = expander({"layout": "scored_responses", "score_pairs": score_pairs, **data}, None)(row)
    ties = sum(isinstance(one, Tie) for one in found)
    assert ties == len([one for one in found if not isinstance(one, Example)])
    return [(one.messages[-1]["content"], one.rejected) for one in found if isinstance(one, Example)], ties


def test_responses_with_scores_make_pairs():
    row = {"prompt": "How?", "responses": ["b", "c", "a", "c"], "scores": [2, 1, 3.5, 1]}
    assert pairs_of(row) == ([("a", "c")], 0)
    every = [("a", "b"), ("a", "c"), ("a", "c"), ("b", "c"), ("b", "c")]
    assert pairs_of(row, "all") == (every, 1), "the last two have one score"
    assert pairs_of({**row, "scores": [1, 1, 1, 1]}) == ([], 1)
    assert pairs_of({"prompt": "How?", "responses": ["a", "a", "b"], "scores": [2, 1, 1]}, "all") == ([("a", "b")], 2)


def test_the_completions_of_ultrafeedback_are_scored_responses():
    completions = [
        {"response": "Badly.", "overall_score": 3, "model": "x", "annotations": {}},
        {"response": "Well.", "overall_score": 8.5, "model": "y", "annotations": {}},
    ]
    row = {"instruction": "How?", "completions": completions}
    columns = {"prompt": "instruction", "responses": "completions"}
    assert pairs_of(row, columns=columns) == ([("Well.", "Badly.")], 0)
    where = expander({"layout": "scored_responses", "columns": columns, "where": "completions | length > 2"}, None)
    assert where(row) == [None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"responses": ["a", "b"], "scores": [1]}, "'responses' and 'scores' do not match: 2 responses, 1 scores"),
        ({"responses": ["a"], "scores": [1]}, "column 'responses' holds ['a'], not a list of at least two responses"),
        ({"responses": ["a", "b"], "scores": [1, "2"]}, "scores[1] is '2', not a number"),
        ({"responses": ["a", "b"], "scores": [1, math.nan]}, "scores[1] is nan, not a number"),
        ({"responses": ["a", "b"]}, "no column 'scores', and responses[0] has no 'overall_score' or 'score'"),
        ({"responses": ["a", ""], "scores": [2, 1]}, "responses[1] is empty, and not a text; correct"),
        ({"responses": ["a", 3], "scores": [2, 1]}, "responses[1] is 3, and not a text; correct the row, or leave it"),
    ],
)
def test_scored_responses_that_are_none_are_named(row, message):
    with pytest.raises(UserError) as error:
        pairs_of({"prompt": "How?", **row})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("label", "desirable"), [(True, True), (False, False), (1, True), (0, False), ("True", True), ("false", False)]
)
def test_a_single_answer_is_desirable_or_not(label, desirable):
    for prompt, completion in (("How?", "Well."), (HOW, [WELL])):
        row = {"prompt": prompt, "completion": completion, "label": label}
        found = pair(row, "unpaired_preference")
        assert (found.messages, found.rejected, found.label) == ([*HOW, WELL], None, desirable)


@pytest.mark.parametrize("label", [None, "good", 2, [True], math.nan])
def test_a_label_that_is_neither_is_named(label):
    with pytest.raises(UserError, match="column 'label' holds .*, neither true nor false; data.layout=template can"):
        pair({"prompt": "How?", "completion": "Well.", "label": label}, "unpaired_preference")


def test_a_template_says_what_is_desirable():
    template = {"prompt": "{{ text }}", "completion": "{{ answer }}", "label": "stars > 3"}
    for stars in (3, 4):
        assert pair({"text": "How?", "answer": "Well.", "stars": stars}, "template", **template).label == (stars > 3)
    with pytest.raises(UserError, match="data.label: asks whether the text 'no' is true"):
        pair({"text": "How?", "answer": "Well.", "good": "no"}, "template", **{**template, "label": "good"})


def test_the_proposed_where_leaves_out_pairs_of_two_prompts():
    row = {"chosen": [*HOW, WELL], "rejected": [{"role": "user", "content": "Who?"}, BADLY]}
    assert pair(row, where="chosen[:-1] == rejected[:-1]") is None


@pytest.mark.parametrize("value", [None, math.nan, b"a", ["a"], {"a": 1}])
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'it is %s' % x }}",
        "{{ '%s %s' % ('a', x) }}",
        "{{ '%(k)s' % {'k': x} }}",
        "{{ 'it is {}'.format(x) }}",
        "{{ '{0[k]}'.format({'k': x}) }}",
        "{{ '{k}'.format_map({'k': x}) }}",
        "{{ 'a b' | replace('b', x) }}",
        "{{ ['a', 'b'] | join(x) }}",
        "{{ x | safe }}",
        "{{ x | urlize }}",
        "{{ x | pprint }}",
    ],
)
def test_no_way_of_jinja_makes_text_of_what_is_none(source, value):
    with pytest.raises(UserError, match="^data.prompt: .*(not text|use tojson)"):
        convert({"x": value}, "template", prompt=source, completion="a")


def test_the_same_ways_take_text_and_numbers():
    sources = ["{{ '%s %d' % (x, 3) }}", "{{ '{} {n}'.format(x, n=3) }}", "{{ 'x 3' | replace('x', x) }}"]
    sources += ["{{ '%(k)s 3' % {'k': x} }}", "{{ '{k} 3'.format_map({'k': x}) }}", "{{ [x, 3] | join(' ') }}"]
    made = [convert({"x": "a"}, "template", prompt=source, completion="b")[0]["content"] for source in sources]
    assert made == ["a 3"] * len(sources)
    assert convert({"n": 7}, "template", prompt="{{ n % 4 }}", completion="b")[0]["content"] == "3"


def test_what_is_proposed_in_place_of_a_truth_works_for_all_kinds_of_values():
    free = {"layout": "template", "prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match=r"as in x == 'True', or .* by x \| default\('', true\) != ''") as refused:
        converter({**free, "where": "y and x"}, None)({"x": "no", "y": "yes"})
    same, present = re.search(r"as in (.*), or .* by (.*) \(columns", str(refused.value)).groups()
    values = ["no", "0", "True", "", None, True, False, 7, 0, ["a"], []]
    kept = {where: converter({**free, "where": where}, None) for where in (same, present, "x")}
    assert [value for value in values if kept[present]({"x": value})] == ["no", "0", "True", True, 7, ["a"]]
    assert [value for value in values if kept[same]({"x": value})] == ["True"]
    assert [value for value in values[2:] if kept["x"]({"x": value})] == ["True", True, 7, ["a"]]
    with pytest.raises(UserError, match="compare it with a number, as in x > 0"):
        kept["x"]({"x": math.nan})
    assert converter({**free, "where": "x > 0"}, None)({"x": math.nan}) is None


@pytest.mark.parametrize("text", ["0.0", "-0", "N/A", "<NA>"])
@pytest.mark.parametrize("source", ["x", "[x] | select | list", "[{'k': x}] | rejectattr('k') | list"])
def test_zeros_and_missing_values_in_csv_decide_nothing(source, text):
    with pytest.raises(UserError, match="^data.where: asks whether the text"):
        convert({"x": text}, "template", prompt="a", completion="a", where=source)


@pytest.mark.parametrize("name", ["tools", "system", "history", "chat_template_kwargs"])
@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("messages", {"messages": HELLO}),
        ("sharegpt", {"conversations": HELLO}),
        ("prompt_completion", {"prompt": [ASK], "completion": [ANSWER]}),
        ("instruction", {"instruction": "a", "input": "", "output": "b"}),
    ],
)
def test_columns_that_belong_to_a_conversation_are_not_dropped(layout, row, name):
    plain = convert(row, layout)
    read = name in ("tools", "chat_template_kwargs") and layout != "instruction"
    what = f"^column '{name}'" if read else rf"^'{name}' .*data.ignore_fields=\[{name}\]"
    with pytest.raises(UserError, match=what):
        convert({**row, name: "Be kind."}, layout)
    assert convert({**row, name: "Be kind."}, layout, ignore_fields=[name]) == plain
    assert convert({**row, name: None}, layout) == plain


def test_an_input_of_zero_is_not_left_out():
    with pytest.raises(UserError, match="column 'input' holds 0, a number"):
        convert({"instruction": "Double it.", "input": 0, "output": "0"}, "instruction")


def test_a_message_says_a_thing_once():
    with pytest.raises(UserError, match=r"messages\[0\] has 'content' and 'value', which differ"):
        convert({"messages": [{**ASK, "value": "other"}, ANSWER]}, "messages")
    with pytest.raises(UserError, match=r"messages\[0\]: role \['user'\] is not known"):
        convert({"messages": [{**ASK, "role": ["user"]}, ANSWER]}, "messages")
    assert convert({"messages": [{**ASK, "from": "human"}, ANSWER]}, "messages") == HELLO


def test_what_is_proposed_for_transcripts_cuts_them():
    """As hh-rlhf has them."""
    row = {
        "chosen": "\n\nHuman: Is 2 even?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant: I am.",
        "rejected": "\n\nHuman: Is 2 even?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant: No.",
    }
    with pytest.raises(UserError, match="is a transcript") as caught:
        converter({"layout": "preference"}, None)(row)
    proposed = dict(re.findall(r'data\.(\w+)="(.*?)"', str(caught.value)))
    made = converter({"layout": "template", **proposed}, None)(row)
    assert made.messages[0]["content"] == "Is 2 even?\n\nAssistant: Yes.\n\nHuman: Sure?"
    assert (made.messages[1]["content"], made.rejected) == ("I am.", "No.")
