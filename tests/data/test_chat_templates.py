"""What is learned of conversations by the real templates of many model families, which TRL keeps copies of."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pytest

from temper.data import templates
from temper.data.audit import doubled
from temper.data.columns import IGNORED, final_answer
from temper.data.conversations import Conversation
from temper.data.encoder import Encoder
from temper.errors import UserError
from tests.support.tiny import tiny_tokenizer

trl = pytest.importorskip("trl")
FOLDER = Path(trl.__file__).parent / "chat_templates"
CONTROL = re.compile(
    r"<[|｜][^<>\s'\"]+?[|｜]>|<[|][a-z_]+>|<[a-z_]+[|]>|<(?:start|end)_of_\w+>|\[/?[A-Z_]+\]|</?(?:think|tool_call)>"
)
THINK = ("<think>\n", "\n</think>\n\n")  # where a template knows no reasoning, and in many that do
IM_END = "<|im_end|>"


class Family(NamedTuple):
    """What a family's template writes.

    `opening`: between a prompt and an answer without reasoning, if the rows have none; a str beginning with "set": what
    is proposed instead. `texts`: how many a conversation of two answers becomes, without and with reasoning. `thinks`:
    before and behind reasoning; None: refused. `call`: a tool call; None: refused.
    """

    ends: tuple[str, ...] = (IM_END,)
    opening: str = ""
    texts: tuple[int, int] = (1, 1)
    thinks: tuple[str, str] | None = THINK
    call: str | None = None
    system: bool = True
    before: str = ""  # a blank before an answer, which is not in the prompt


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"town": "Graz"}}\n</tool_call>'
QWEN_CODER = "<tool_call>\n<function=weather>\n<parameter=town>\nGraz\n</parameter>\n</function>\n</tool_call>"
GEMMA_CALL = '<|tool_call>call:weather{town:<|"|>Graz<|"|>}<tool_call|><|tool_response>'
PYTHONIC = "<|tool_call_start|>[weather(town='Graz')]<|tool_call_end|>"
NO_THOUGHTS = "\n</think>\n\n"
THINKING_OFF = "set prompt.chat_template_kwargs.enable_thinking=false"
FAMILIES = {
    "cohere": Family(("<|END_OF_TURN_TOKEN|>",)),
    "cohere2": Family(("<|END_OF_TURN_TOKEN|>",)),
    "deepseek_r1_distill": Family(("<｜end▁of▁sentence｜>",), NO_THOUGHTS, (2, 2), ("", NO_THOUGHTS)),
    "deepseekv3": Family(("<｜end▁of▁sentence｜>",), NO_THOUGHTS, (2, 2), ("", NO_THOUGHTS)),
    "gemma": Family(("<end_of_turn>",), system=False),
    "gemma3": Family(("<end_of_turn>",)),
    "gemma4": Family(("<turn|>", "<|tool_response>"), thinks=None, call=GEMMA_CALL),
    "gemma4_v5": Family(
        ("<turn|>", "<|tool_response>"), "", (1, 2), ("<|channel>thought\n", "\n<channel|>"), GEMMA_CALL
    ),
    "glm4moe": Family(
        ("<|user|>", "<|observation|>"),
        "\n<think></think>\n",
        (1, 2),
        ("\n<think>", "</think>\n"),
        "\n<think></think>\n<tool_call>weather\n<arg_key>town</arg_key>\n<arg_value>Graz</arg_value>\n</tool_call>",
    ),
    "gptoss": Family(
        ("<|return|>", "<|call|>"),
        "<|channel|>final<|message|>",
        (2, 2),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ' to=functions.weather<|channel|>commentary json<|message|>{"town": "Graz"}',
    ),
    "idefics3": Family(("<end_of_utterance>",), before=" "),
    "lfm2": Family(),
    "lfm2_v2": Family(call=PYTHONIC),
    "lfm2_2_5": Family((IM_END,), "", (1, 2), ("<think>", "</think>"), PYTHONIC),
    "llama3": Family(("<|eot_id|>",)),
    "llama3_1": Family(("<|eot_id|>",), call='{"name": "weather", "parameters": {"town": "Graz"}}'),
    "llama3_2": Family(("<|eot_id|>",), call='{"name": "weather", "parameters": {"town": "Graz"}}'),
    "llava_next": Family(("</s>",), before=" "),
    "muse_glimmer": Family(
        ("<|eot|>",),
        " to=user<|message|>",
        (1, 1),
        (" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
        ' to=weather<|message|><atem:function_calls>\n<atem:invoke name="weather">\n'
        '<atem:parameter name="town">Graz</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
    ),
    "nemotron_3_nano": Family((IM_END,), THINKING_OFF, (1, 2), ("", "\n</think>\n")),
    "nemotron_3_super": Family((IM_END,), THINKING_OFF, (1, 2), ("", "\n</think>\n")),
    "nemotron_3_ultra": Family((IM_END,), THINKING_OFF, (1, 2), ("", "</think>")),
    "phi3": Family(("<|end|>",)),
    "phi3_5": Family(("<|end|>",)),
    "qwen2_5": Family(call=HERMES),
    "qwen2_5_vl": Family(),
    "qwen3": Family((IM_END,), "<think>\n\n</think>\n\n", (2, 2), THINK, f"<think>\n\n</think>\n\n{HERMES}"),
    "qwen3_5_nothink": Family(texts=(2, 0), thinks=None, call=QWEN_CODER),
    "qwen3_5_think": Family((IM_END,), NO_THOUGHTS, (2, 2), ("", NO_THOUGHTS), NO_THOUGHTS + QWEN_CODER),
    "qwen3_8": Family((IM_END,), NO_THOUGHTS, (1, 1), ("", NO_THOUGHTS), NO_THOUGHTS + QWEN_CODER),
    "qwen3_instruct_2507": Family(call=HERMES),
    "qwen3_vl": Family(call=HERMES),
    "smolvlm": Family(("<end_of_utterance>",), before=" "),
}
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


@functools.cache
def tokenizer_of(name: str):
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer()
    found = sorted({*CONTROL.findall(source), *ends_of(name)})
    plain = [text for text in found if re.fullmatch(r"</?\w+>", text) and "_of_" not in text]
    tokenizer.add_special_tokens({"additional_special_tokens": [text for text in found if text not in plain]})
    tokenizer.add_tokens(plain)
    tokenizer.eos_token = ends_of(name)[0]
    tokenizer.chat_template = source
    return tokenizer


def ends_of(name: str) -> tuple[str, ...]:
    return FAMILIES[name.removesuffix("_training")].ends


def encoder_of(name: str, conversation: Conversation, **prompt) -> Encoder:
    tokenizer = tokenizer_of(name)
    stops = tokenizer.convert_tokens_to_ids(list(ends_of(name)))
    rich = any("tool_calls" in message or "reasoning_content" in message for message in conversation.messages)
    settings = {"apply_chat_template": True, "loss_on": "assistant", "rich": rich, **prompt}
    encoder = Encoder(tokenizer, stops, settings)
    encoder.renderer.find_opening(conversation)
    return encoder


def learned(name: str, conversation: Conversation, **prompt) -> list[str]:
    """What is learned of each text of a conversation, after comparing its prompt with what the template asks."""
    encoder = encoder_of(name, conversation, **prompt)
    tokenizer, renderer = encoder.tokenizer, encoder.renderer
    said = []
    for text, row in zip(texts := encoder.pieces([conversation])[0], encoder.encode_pieces(texts), strict=True):
        asked = conversation.upto(text[-1].place)
        source = templates.to_ship(tokenizer.chat_template, templates.DATE, "") if renderer.reads_clock else None
        theirs = tokenizer.apply_chat_template(
            list(map(renderer.forms.shown, asked.messages)),
            tools=conversation.tools,
            add_generation_prompt=True,
            chat_template=source,
            tokenize=False,
            **prompt.get("chat_template_kwargs", {}),
        )
        ids = tokenizer(theirs + renderer.opening, add_special_tokens=False)["input_ids"]
        assert row.input_ids[: row.prompt_length] == ids
        assert encoder.prompt_ids(asked) == ids
        assert tokenizer.decode(row.input_ids[row.prompt_length :]) == tokenizer.decode(row.labels[row.prompt_length :])
        said.append(tokenizer.decode([label for label in row.labels if label != IGNORED]))
    return said


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


ONE = Conversation([user("Two and two?"), assistant("It is four.")])
TWO = Conversation([*ONE.messages, user("And one?"), assistant("That makes five.")])
THOUGHT = Conversation([user("Two and two?"), assistant("It is four.", reasoning_content="Half of eight.")])
THOUGHTS = Conversation(
    [*THOUGHT.messages, user("And one?"), assistant("That makes five.", reasoning_content="One more.")]
)
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Graz"}}}]
PARAMETERS = {"type": "object", "properties": {"town": {"type": "string", "description": "Town"}}, "required": ["town"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a town", "parameters": PARAMETERS},
}
TOOLS = Conversation(
    [
        user("Weather in Graz?"),
        assistant("", tool_calls=CALLS),
        {"role": "tool", "name": "weather", "content": "7 degrees"},
        assistant("It is 7 degrees."),
    ],
    [TOOL],
)


def ended(family: Family, *answers: str) -> list[str]:
    """The answers, each with its end; glm4moe's last one, which it leaves open, with the token that ends texts."""
    end = "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" if family is FAMILIES["cohere2"] else family.ends[0]
    return [family.before + answer + end for answer in answers]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_their_ends_are_learned_behind_the_prompts_of_inference(name):
    family = FAMILIES[name]
    settings = {}
    if family.opening.startswith("set"):
        with pytest.raises(UserError, match=family.opening):
            learned(name, ONE)
        settings = {"chat_template_kwargs": OFF}
    else:
        assert encoder_of(name, ONE).renderer.opening == family.opening
    assert learned(name, ONE, **settings) == ended(family, "It is four.")
    both = ended(family, "It is four.", "That makes five.")
    assert learned(name, TWO, **settings) == (both if family.texts[0] == 2 else ["".join(both)])
    assert learned(name, TWO, loss_on="last_assistant", **settings) == both[1:]
    untrained = Conversation([TWO.messages[0], {**TWO.messages[1], "train": False}, *TWO.messages[2:]])
    assert learned(name, untrained, **settings) == both[1:]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_ends_an_answer_twice(name):
    """So `tokenize.max_share.doubled_end` may be 0."""
    settings = {"chat_template_kwargs": OFF} if FAMILIES[name].opening.startswith("set") else {}
    encoder = encoder_of(name, ONE, **settings)
    ids = pyarrow.array([encoder.encode(conversation.messages).input_ids for conversation in (ONE, TWO)])
    assert doubled(ids, encoder.stop_ids & encoder.added) == ([], [])


@pytest.mark.parametrize("name", FAMILIES)
def test_reasoning_is_learned_with_the_answer_or_refused(name):
    family = FAMILIES[name]
    settings = {}
    if family.thinks is None:
        with pytest.raises(UserError, match="leaves out the reasoning|set prompt.chat_template_kwargs.enable_thinking"):
            learned(name, THOUGHT)
        return
    before, behind = family.thinks
    answers = [f"{before}{trace}{behind}{said}" for trace, said in (("Half of eight.", "It is four."),)]
    answers += [f"{before}One more.{behind}That makes five."]
    assert learned(name, THOUGHT, **settings) == ended(family, answers[0])
    both = ended(family, *answers)
    assert learned(name, THOUGHTS, **settings) == (both if family.texts[1] == 2 else ["".join(both)])
    spelt = Conversation([user("Two and two?"), assistant("<think>\nHalf of eight.\n</think>\n\nIt is four.")])
    assert learned(name, spelt, rich=True) == ended(family, answers[0])
    start, end = encoder_of(name, THOUGHT).renderer.reasoning_marks(THOUGHT)
    marks = {"reasoning_start": start, "reasoning_end": end}
    said = answers[0].strip()
    assert final_answer(said, marks) == "It is four."
    assert final_answer(said.split(end)[0], marks) == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_tool_calls_are_learned_or_refused(name):
    family = FAMILIES[name]
    if family.call is None:
        with pytest.raises(UserError, match="does not show tools|of the call of 'weather'|enable_thinking=false"):
            learned(name, TOOLS)
        return
    said = "".join(learned(name, TOOLS))
    assert said.startswith(family.call)
    assert said.removeprefix(family.call).startswith(tuple(ends_of(name))) or family.call.endswith(ends_of(name)[1])
    assert "It is 7 degrees." in said
    assert "7 degrees<" not in said.replace("It is 7 degrees.", "")  # the tool's own words are not learned


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_message_is_read_or_refused(name):
    told = Conversation([{"role": "developer", "content": "Be very brief."}, *ONE.messages])
    settings = {"chat_template_kwargs": OFF} if FAMILIES[name].opening.startswith("set") else {}
    if not FAMILIES[name].system:
        with pytest.raises(UserError, match="System role not supported"):
            learned(name, told)
        return
    encoder = encoder_of(name, told, **settings)
    assert "Be very brief." in encoder.tokenizer.decode(encoder.prompt_ids(told.upto(-1)))


# Where TRL's marks include no more than an answer, its end and the line end behind that.
AGREE = ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "qwen2_5_vl", "qwen3")
AGREE += ("qwen3_instruct_2507", "qwen3_vl")


@pytest.mark.parametrize("name", [name for name in FAMILIES if (FOLDER / f"{name}_training.jinja").is_file()])
def test_the_marks_of_a_template_agree(name):
    """`{% generation %}` marks what is to be learned, in TRL's versions of the templates."""
    marked = f"{name}_training"
    tokenizer = tokenizer_of(marked)
    settings = {"chat_template_kwargs": OFF} if FAMILIES[name].opening.startswith("set") else {}
    encoder = encoder_of(marked, TWO, **settings)
    texts = encoder.pieces([TWO])[0]
    messages = list(map(encoder.renderer.forms.shown, TWO.messages))
    made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    theirs = [token for token, mark in zip(made["input_ids"], made["assistant_masks"], strict=True) if mark]
    ours = [label for row in encoder.encode_pieces(texts) for label in row.labels if label != IGNORED]
    # They also learn the line end behind the token that ends an answer, and the empty block before one.
    marked_text = re.sub(rf"({'|'.join(map(re.escape, ends_of(name)))})\s+", r"\1", tokenizer.decode(theirs))
    if name in AGREE:
        assert tokenizer.decode(ours) == marked_text.replace(encoder.renderer.opening, "")
    for text in (tokenizer.decode(ours), marked_text):
        assert re.findall(r"[A-Z][a-z ]+[.?]", text) == ["It is four.", "That makes five."]


def test_a_variable_of_a_templates_own_is_no_field_of_a_message():
    """DeepSeek-V3.1's `thinking` is a switch: the reasoning is part of the content."""
    tokenizer = tokenizer_of("llama3")
    written = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% if thinking is not defined %}{% set thinking = false %}{% endif %}" + written
        said = learned("llama3", THOUGHT)
        assert said == ended(FAMILIES["llama3"], "<think>\nHalf of eight.\n</think>\n\nIt is four.")
        with pytest.raises(UserError, match="does not use 'role'"):  # a field of messages
            encoder_of("llama3", ONE, chat_template_kwargs={"role": "x"})
    finally:
        tokenizer.chat_template = written


def test_a_switch_that_a_template_does_not_know_is_refused():
    with pytest.raises(UserError, match="does not use 'enable_thinkng'; did you mean 'enable_thinking'"):
        encoder_of("qwen3", ONE, chat_template_kwargs={"enable_thinkng": False})
    with pytest.raises(UserError, match="does not use 'enable_thinking'; it has no switch for reasoning"):
        encoder_of("llama3", ONE, chat_template_kwargs=OFF)
