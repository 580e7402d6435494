"""Conversations as other programs write them."""

import json
import re

import pytest

from temper.commands.predict import conversation
from temper.data.conversations import asked_text
from temper.data.layouts import converter
from temper.errors import UserError

ASK, ANSWER = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Fine."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Graz"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def converted(row: dict, layout: str = "messages", **data):
    return converter({"layout": layout, **data}, None)(row)


def messages(*given, **data) -> list[dict]:
    return converted({"messages": list(given)}, **data).messages


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        CALL,
        json.dumps([CALL]),
        [{"name": "weather", "arguments": {"town": "Graz"}}],
        [{"type": "function", "function": {"name": "weather", "arguments": '{"town": "Graz"}'}}],
        [{"name": "weather", "parameters": {"town": "Graz"}}],
    ],
)
def test_calls_are_read_in_all_their_forms(calls):
    (_, asked, _, _) = messages(
        ASK, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "7"}, ANSWER
    )
    assert asked == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_sharegpt_with_calls():
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Graz"}}'},
            {"from": "observation", "value": "7 degrees"},
            {"from": "gpt", "value": "Fine."},
        ],
        "tools": json.dumps([TOOL]),
    }
    example = converted(row, "sharegpt")
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [CALL]
    assert example.tools == [TOOL]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_by_its_names(field):
    said = {**ANSWER, field: "The sun shines."}
    assert messages(ASK, said)[1] == {**ANSWER, "reasoning_content": "The sun shines."}
    assert messages(ASK, said, ignore_fields=[field])[1] == ANSWER
    with pytest.raises(UserError, match=rf"messages\[0\]: '{field}' in the user's message"):
        messages({**ASK, field: "Hm."}, ANSWER)


@pytest.mark.parametrize("given", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}])
def test_turns_that_are_not_learned(given):
    kept = messages(ASK, {**ANSWER, **given}, ASK, {**ANSWER, "weight": 1})
    assert kept == [ASK, {**ANSWER, "train": False}, ASK, ANSWER]
    assert messages(ASK, ANSWER, ASK, {**ANSWER, **given}) == [ASK, ANSWER]  # what nothing is learned from is left out
    with pytest.raises(UserError, match="no turn of the assistant's is to be learned"):
        messages(ASK, {**ANSWER, **given})
    with pytest.raises(UserError, match="a turn is learned \\(1\\) or not \\(0\\)"):
        messages(ASK, {**ANSWER, "weight": 0.5})


def test_parts_of_text_are_joined_and_others_refused():
    parts = [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?", "image": None}]
    assert messages({"role": "user", "content": parts}, ANSWER) == [ASK, ANSWER]
    with pytest.raises(UserError, match="the content has a part of type 'image'; only text"):
        messages({"role": "user", "content": [*parts, {"type": "image", "url": "a.png"}]}, ANSWER)


@pytest.mark.parametrize("role", ["model", "gpt"])
def test_other_names_of_roles(role):
    assert messages(ASK, {**ANSWER, "role": role}) == [ASK, ANSWER]


def test_a_developer_is_replaced_as_a_system_message_is():
    told = {"messages": [{"role": "developer", "content": "Be brief."}, ASK, ANSWER]}
    example = converter({"layout": "messages"}, "Be kind.")(told)
    assert [message["content"] for message in example.messages] == ["Be kind.", "Weather?", "Fine."]


def test_the_result_of_a_tool_may_be_an_object():
    call = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "content": {"degrees": 7}, "name": "weather", "tool_call_id": "c1"}
    made = messages(ASK, call, result, ANSWER)[2]
    assert made == {"role": "tool", "content": '{"degrees": 7}', "name": "weather", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"tool_calls": [{"id": 1}]}, "a tool call is {'id': 1}; it needs a function with name and arguments"),
        (
            {"tool_calls": [{"name": "f", "arguments": "{town"}]},
            "the arguments of the call of 'f': '{town' is not JSON",
        ),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "the arguments of the call of 'f' are [1], not an object"),
        ({"tool_calls": [{"name": "f", "strict": True}]}, "a tool call has 'strict', which is not read"),
        ({"reasoning_content": 3}, "the reasoning is 3, not text"),
        ({"reasoning": "a", "thinking": "b"}, "has 'reasoning' and 'thinking', which differ"),
    ],
)
def test_what_is_not_understood_is_refused(message, what):
    with pytest.raises(UserError, match=r"messages\[1\].*" + re.escape(what)):
        messages(ASK, {**ANSWER, **message})


@pytest.mark.parametrize("tools", ["[{", '"weather"', [1], {"name": "weather"}])
def test_tools_that_are_no_list_of_schemas_are_refused(tools):
    with pytest.raises(UserError, match="column 'tools'"):
        converted({"messages": [ASK, ANSWER], "tools": tools})


def test_what_a_pair_cannot_compare_is_refused():
    row = {
        "prompt": [ASK],
        "chosen": [{**ANSWER, "reasoning_content": "Hm."}],
        "rejected": [{**ANSWER, "content": "No."}],
    }
    with pytest.raises(UserError, match="'reasoning_content' in an answer of a pair is not compared"):
        converted(row, "preference")
    assert converted(row, "preference", ignore_fields=["reasoning_content"]).rejected == "No."


def test_predict_asks_with_tools_and_their_results():
    call = {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}
    asked = conversation({"messages": [ASK, call, {"role": "tool", "content": "7"}], "tools": json.dumps([TOOL])})
    assert asked.tools == [TOOL]
    assert [message["role"] for message in asked.messages] == ["user", "assistant", "tool"]
    assert asked.messages[1]["tool_calls"] == [CALL]


def test_what_an_answer_answers_is_shown_with_all_that_was_said():
    system, call = (
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    )
    assert asked_text([system, ASK]) == "Weather?"
    said = 'user: Weather?\nassistant: weather({"town": "Graz"})\ntool: 7'
    assert asked_text([system, ASK, call, {"role": "tool", "content": "7"}]) == said
    assert asked_text([ASK, {**call, "content": "I ask."}, ASK]).splitlines()[1:3] == [
        "assistant: I ask.",
        'weather({"town": "Graz"})',
    ]
