"""Conversations as files of this field have them, read into one form.

A message is ``{"role": ..., "content": text}`` and, where the file says more: ``reasoning_content`` (text),
``tool_calls`` (``[{"type": "function", "id"?: ..., "function": {"name": ..., "arguments": {...}}}]``), for the role
tool ``name`` and ``tool_call_id``, and ``train: False`` for a turn of the assistant's that is not to be learned. Files
say the same in several ways (OpenAI, ShareGPT, LLaMA-Factory, Axolotl, TRL); what is not understood is refused.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from temper.data import texts
from temper.errors import UserError, suggest

Message = dict[str, Any]
Messages = list[Message]
PLAIN = 2  # fields of a message that only has role and content
SYSTEM = ("system", "developer")  # two names of one role
ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
CALLS = "function_call"  # LLaMA-Factory's role: the assistant's message, whose text is a call as JSON
REASONING = ("reasoning_content", "reasoning", "thinking")
THOUGHTS = re.compile(r"\s*(?:<think>)?(?P<trace>.*?)</think>(?P<answer>.*)", re.DOTALL)
FIELDS = frozenset(
    {"role", "content", "from", "value", "train", "weight", "tool_calls", "name", "tool_call_id", *REASONING}
)


class Conversation(NamedTuple):
    """Messages, and what the chat template shows besides: tools (JSON schemas), and further variables of its own."""

    messages: Messages
    tools: list[dict] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def upto(self, end: int) -> "Conversation":
        """The first messages."""
        return Conversation(self.messages[:end], self.tools, self.chat_template_kwargs)


def as_conversation(given: Conversation | Messages) -> Conversation:
    """A conversation, of which only the messages may be given."""
    return given if isinstance(given, Conversation) else Conversation(given)


def without_system(messages: Messages) -> Messages:
    """The messages without the system's."""
    return [message for message in messages if message["role"] not in SYSTEM]


def is_document(messages: Messages) -> bool:
    """Whether the one message is a text to continue the pretraining on, which answers nothing."""
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def of_record(record: dict) -> Conversation:
    """The conversation of a line of train.jsonl, validation.jsonl or test.jsonl."""
    return Conversation(record["messages"], record.get("tools"), record.get("chat_template_kwargs"))


def read(turns, column: str) -> Messages:
    """The messages of a column's list.

    Raises:
        UserError: it is no list of messages, or a message is not understood or empty.
    """
    if not isinstance(turns, list) or not turns:
        raise UserError(f"column '{column}' holds {texts.shown(turns)}, not a list of messages")
    return [message(turn, f"{column}[{index}]") for index, turn in enumerate(turns)]


def message(turn, name: str) -> Message:
    """One message; `name` says in errors where it is."""
    if not isinstance(turn, dict):
        raise UserError(f"{name} is {texts.shown(turn)}, not a message with role and content")
    role = _one_of(turn, name, ("role", "from"), _role)
    content = _one_of(turn, name, ("content", "value"))
    if role == CALLS:
        role, content, turn = "assistant", None, {**turn, "tool_calls": from_json(content, name)}
    if role not in ROLES:
        raise UserError(f"{name}: role {texts.shown(role)} is not known; {suggest(str(role), (*ROLES, *OTHER_ROLES))}")
    made = {"role": role, "content": _content(content, role, name)}
    for field in ("name", "tool_call_id"):
        if turn.get(field) is not None:
            made[field] = turn[field]
    if role == "assistant":
        made |= _of_assistant(turn, name)
    else:
        _refuse_assistants_fields(turn, role, name)
    if not (made["content"].strip() or "tool_calls" in made or role == "tool"):
        if content is None:
            raise UserError(f"{name}: the content is null, not text")
        raise UserError(f"{name}: the {role}'s message is empty; leave such rows out with data.where")
    return made


def checked(messages: Messages, column: str) -> Messages:
    """The conversation up to the last turn that is learned, after checking that a prompt comes before an answer."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise UserError(f"column '{column}': a system message after the first message; only the first may be one")
    if roles[-1] != "assistant":
        key = "from == 'gpt'" if column == "conversations" else "role == 'assistant'"
        raise UserError(
            f"column '{column}' ends with the {roles[-1]}'s message, so there is no answer to learn; "
            f'to leave such rows out, set data.where to "{column}[-1].{key}"'
        )
    if "user" not in roles:
        raise UserError(f"column '{column}' has an answer but no user's message before it")
    learned = [
        at for at, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)
    ]
    if not learned:
        raise UserError(
            f"column '{column}': no turn of the assistant's is to be learned (all have train: false or weight: 0); "
            "leave such rows out with data.where"
        )
    return messages[: learned[-1] + 1]


def tools_of(row: dict, column: str = "tools") -> list[dict] | None:
    """The tools that a row offers, a list of JSON schemas that may be given as JSON text; None if there are none."""
    given = row.get(column)
    if isinstance(given, str):
        given = from_json(given, f"column '{column}'") if given.strip() else None
    if given in (None, "", [], {}):
        return None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise UserError(f"column '{column}' holds {texts.shown(given)}, not a list of tools as JSON schemas")
    return given


def split_thoughts(content: str) -> tuple[str, str] | None:
    """(the trace, the answer) of a text with a ``<think>`` block, whose first tag the prompt may have said."""
    found = THOUGHTS.fullmatch(content) if "</think>" in content else None
    return (found["trace"].strip("\n"), found["answer"].lstrip("\n")) if found else None


def with_thoughts_in_content(message: Message) -> Message:
    """The message with its reasoning, if it has any, as a ``<think>`` block of its content."""
    if not message.get("reasoning_content"):
        return message
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    return {**rest, "content": f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{message['content']}"}


def has_reasoning(message: Message) -> bool:
    """Whether an assistant's message says how it came to its answer."""
    return message["role"] == "assistant" and ("reasoning_content" in message or "</think>" in message["content"])


def is_rich(messages: Messages) -> bool:
    """Whether a conversation has reasoning or tool calls."""
    return any("tool_calls" in message or has_reasoning(message) for message in messages)


def asked_text(messages: Messages) -> str:
    """What an answer answers, for people: the user's message; of several turns all, each with its role in front."""
    turns = without_system(messages)
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {_said_text(turn)}" for turn in turns)


def _said_text(message: Message) -> str:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [f"{of['name']}({json.dumps(of['arguments'], ensure_ascii=False)})" for of in functions]
    return "\n".join([*([message["content"]] if message["content"] or not calls else []), *calls])


# --- fields ------------------------------------------------------------------------------------------


def _role(given):
    """Our name of a role, if there is one."""
    return OTHER_ROLES.get(given, given) if isinstance(given, str) else given


def _one_of(turn: dict, name: str, fields: tuple[str, ...], read: Callable = lambda value: value):
    """The value of a field that has several names, converted by `read`; None if there is none of them."""
    given = {field: read(turn[field]) for field in fields if turn.get(field) is not None}
    values = list(given.values())
    if any(value != values[0] for value in values[1:]):
        raise UserError(f"{name} has {' and '.join(map(repr, given))}, which differ: remove one")
    return values[0] if values else None


def _content(content, role: str, name: str) -> str:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, list) and all(map(_is_text_part, content)) and content:
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    if role == "tool" and isinstance(content, dict | list):
        return json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        other = next((part for part in content if not _is_text_part(part)), content)
        kind = repr(other.get("type")) if isinstance(other, dict) else texts.shown(other)
        raise UserError(f"{name}: the content has a part of type {kind}; only text can be learned from")
    if not isinstance(content, str):
        raise UserError(f"{name}: the content is {texts.shown(content)}, not text")
    return content


def _is_text_part(part) -> bool:
    """Whether a part of a content is text (nulls are the fields of other parts, which parquet and `datasets` add)."""
    if isinstance(part, str):
        return True
    if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
        return False
    return all(value is None for field, value in part.items() if field not in ("type", "text"))


def _refuse_assistants_fields(turn: dict, role: str, name: str) -> None:
    for field in ("tool_calls", *REASONING):
        if turn.get(field) not in (None, "", []):
            raise UserError(f"{name}: '{field}' in the {role}'s message; only the assistant's may have it")


def _of_assistant(turn: dict, name: str) -> Message:
    """What an assistant's message says besides its content."""
    made: Message = {}
    reasoning = _one_of(turn, name, REASONING)
    if reasoning is not None and not isinstance(reasoning, str):
        raise UserError(f"{name}: the reasoning is {texts.shown(reasoning)}, not text")
    if reasoning and reasoning.strip():
        made["reasoning_content"] = reasoning
    if calls := _tool_calls(turn.get("tool_calls"), name):
        made["tool_calls"] = calls
    if not _is_learned(turn, name):
        made["train"] = False
    return made


def _is_learned(turn: dict, name: str) -> bool:
    """Whether a turn is learned: by Axolotl's `train` and OpenAI's `weight`."""
    for field in ("train", "weight"):
        if turn.get(field) is not None and turn[field] not in (0, 1):
            raise UserError(f"{name}: '{field}' is {texts.shown(turn[field])}; a turn is learned (1) or not (0)")
    return all(turn.get(field) is None or bool(turn[field]) for field in ("train", "weight"))


def _tool_calls(given, name: str) -> list[dict]:
    """Tool calls in OpenAI's form, with the arguments as an object."""
    if isinstance(given, str) and given.strip():
        given = from_json(given, f"{name}: 'tool_calls'")
    if not given:
        return []
    return [_tool_call(call, name) for call in (given if isinstance(given, list) else [given])]


def _tool_call(call, name: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{name}: a tool call is {texts.shown(call)}; it needs a function with name and arguments")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = (
            from_json(arguments, f"{name}: the arguments of the call of '{function['name']}'") if arguments else {}
        )
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(
            f"{name}: the arguments of the call of '{function['name']}' are {texts.shown(arguments)}, not an object"
        )
    unknown = set(function) - {"name", "arguments", "parameters", "id", "type"}
    if unknown and any(function[field] is not None for field in unknown):
        raise UserError(f"{name}: a tool call has '{sorted(unknown)[0]}', which is not read")
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return made if call.get("id") is None else {"id": call["id"], **made}


def from_json(text, name: str):
    """The value of a JSON text; `name` says in errors where it is."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {texts.shown(text)} is not JSON ({error})") from None
