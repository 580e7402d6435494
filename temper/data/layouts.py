"""From a row of raw data to a conversation: ``[{"role": ..., "content": ...}, ...]``, the last one the answer.

A layout is a function ``(row) -> messages``. For a preference pair, the messages end with the chosen answer, and a
second function, ``(row, messages) -> text``, gives the rejected one. A row of scored responses makes several pairs, or
none. Errors name columns; the caller adds file and line.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from temper.data import conversations, templates, texts
from temper.data.conversations import PLAIN, Messages, checked, read, without_system
from temper.data.placing import group_in, split_in
from temper.errors import UserError, suggest

TEXT = "text"  # the layout of documents
TRANSCRIPT = re.compile(r"\s*Human:.*Assistant:", re.DOTALL)  # as of hh-rlhf
CUT = ", ".join(
    f'data.{key}="{{{{ {of} }}}}"'
    for key, of in {
        "prompt": "chosen.rpartition('Assistant:')[0].partition('Human:')[2] | trim",
        "completion": "chosen.rpartition('Assistant:')[2] | trim",
        "rejected": "rejected.rpartition('Assistant:')[2] | trim",
    }.items()
)


class NoColumnError(UserError):
    """A row has not the column that a layout or template names."""


class Example(NamedTuple):
    """One row: a conversation that ends with the (chosen) answer and, for a preference pair, the rejected answer.

    `split` and `group`: what its columns say, where `data.splits` names them. `tools`, `chat_template_kwargs`: see
    `temper.data.conversations.Conversation`. `label`: of a single answer, whether it is desirable; None where no row
    says so.
    """

    messages: Messages
    rejected: str | None = None
    tools: list[dict] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    label: bool | None = None
    split: str | None = None
    group: str | None = None


class Tie(NamedTuple):
    """Two responses of a row that make no pair, because their scores or their texts are the same."""


def expander(data: dict, system: str | None) -> Callable[[dict], list[Example | Tie | None]]:
    """A function that turns a row into its examples: one, as `converter` makes it, or a pair for each two responses.

    Args and errors as of `converter`; of `data` also score_pairs.
    """
    if data["layout"] != "scored_responses":
        convert = converter(data, system)
        return lambda row: [convert(row)]
    prepare = _preparer(data, ("prompt",))
    of_pair = {**data, "layout": "preference", "columns": {}, "where": None}
    convert, every = converter(of_pair, system), data.get("score_pairs") == "all"
    kept = (*READ_BESIDE, *filter(None, _columns_of_splits(data)))

    def expand(row: dict) -> list[Example | Tie | None]:
        prepared = prepare(row)
        if prepared is None:
            return [None]
        row, prompt = prepared[0], _column(prepared[0], "prompt")
        pairs, ties = _pairs_by_score(_scored(row), every)
        more = {name: row[name] for name in kept if name in row}
        made = [convert({"prompt": prompt, "chosen": better, "rejected": worse, **more}) for better, worse in pairs]
        return [*made, *[Tie()] * ties]

    return expand


def _columns_of_splits(data: dict) -> tuple[str | None, str | None]:
    """(the column that names a row's split, that of its group)."""
    splits = data.get("splits") or {}
    return splits.get("column"), splits.get("group_by")


def converter(data: dict, system: str | None) -> Callable[[dict], Example | None]:
    """A function that turns a row into an example, or None when `data.where` leaves it out.

    Args:
        data: the config section; layout, columns, prompt, completion, rejected, rejected_from, label, where and splits
            are used.
        system: a system message, replacing one in the data; None keeps the data's own.

    Raises:
        UserError: now, for a template that does not compile; when called, for a row without a usable conversation.
    """
    free = data["layout"] == "template"
    no_messages = data["layout"] in ("template", "question_answer", TEXT)
    columns = () if no_messages else LAYOUTS[data["layout"]][1]  # of messages
    if data["layout"] == TEXT and system is not None:
        raise UserError("config: 'prompt.system': layout 'text' is documents, which have no messages: set it to null")
    prepare = _preparer(data, columns)
    column, group_by = _columns_of_splits(data)

    def convert(row: dict) -> Example | None:
        prepared = prepare(row)
        if prepared is None:
            return None
        row, made = prepared
        messages = _exchange(made["prompt"], made["completion"]) if free else LAYOUTS[data["layout"]][0](row)
        rejected = _rejected(data, row, messages, made)
        if system is not None:
            messages = [_said("system", system), *without_system(messages)]
        more = beside(row) if columns and columns[0] in CONVERSATIONS else (None, None)
        example = Example(messages, rejected, *more, _label(data, row, made))
        _refuse_broken_text(example)
        split = None if column is None else split_in(row, column)
        return example._replace(split=split, group=None if group_by is None else group_in(row, group_by))

    return convert


def _preparer(data: dict, columns: Iterable[str]) -> Callable[[dict], tuple[dict, dict] | None]:
    """A function that gives a row with its columns renamed and what its templates make; None if `where` leaves it out.

    Args:
        columns: those that may hold messages, of which nothing may remain unread.
    """
    renamed = _renamed_columns(data)
    ignored = frozenset(data.get("ignore_fields") or ()) | frozenset(renamed.values())
    evaluate = _templates(data)

    def prepare(row: dict) -> tuple[dict, dict] | None:
        if renamed:
            row = {**row, **{name: _renamed(row, name, theirs) for name, theirs in renamed.items()}}
        made = evaluate(row)
        if not made.get("where", True):
            return None
        if ignored:
            row = _without(ignored, row, columns)
        refuse_unused(row, columns)
        return row, made

    return prepare


# First columns of the layouts that may hold conversations, with columns beside them.
CONVERSATIONS = ("messages", "conversations", "prompt")
# Columns with more of a conversation: those that are read, and those of other programs that are not.
READ_BESIDE = ("tools", "chat_template_kwargs")
BESIDE = ("functions", "system", "system_prompt", "history")
TO_DROP = "to drop it from all rows, set data.ignore_fields=[{name}]; to leave such rows out, use data.where"


def _harmless(value) -> bool:
    """Whether a field has no effect: null, nan, empty, a weight of 1, ``train: true`` (but not 0 or false)."""
    missing = value is None or value != value
    return missing or value is True or value in ("", [], {}) or (value == 1 and value is not False)


def _without(ignored: frozenset[str], row: dict, columns: Iterable[str]) -> dict:
    """The row without fields to drop on purpose (data.ignore_fields), neither in its messages nor beside them."""

    def kept(value):
        if isinstance(value, list):
            return list(map(kept, value))
        return (
            {name: field for name, field in value.items() if name not in ignored} if isinstance(value, dict) else value
        )

    return {name: kept(value) if name in columns else value for name, value in row.items() if name not in ignored}


def beside(row: dict) -> tuple[list[dict] | None, dict | None]:
    """(tools, chat_template_kwargs) of a row."""
    given = row.get("chat_template_kwargs")
    if isinstance(given, str):
        given = conversations.from_json(given, "column 'chat_template_kwargs'") if given.strip() else None
    if given is not None and not isinstance(given, dict):
        raise UserError(f"column 'chat_template_kwargs' holds {texts.shown(given)}, not an object")
    return conversations.tools_of(row), given or None


def refuse_unused(row: dict, columns: Iterable[str], way_on: str = TO_DROP) -> None:
    """Refuse fields in or beside messages that are not read, since they would be dropped silently.

    Args:
        columns: those that may hold messages.
        way_on: what the message says to do about a field `{name}`.
    """
    turns = [row.get(column) for column in columns]
    turns = [turn for given in turns for turn in (given if isinstance(given, list) else [given])]
    found = [item for turn in turns if isinstance(turn, dict) for item in turn.items()]
    if found or "instruction" in columns:
        more = BESIDE if found else (*BESIDE, *READ_BESIDE)
        found += [(name, row.get(name)) for name in more if name not in columns]
    for name, value in found:
        if name not in conversations.FIELDS and not _harmless(value):
            raise UserError(
                f"'{name}' ({texts.shown(value)}) in or beside messages is not used: {way_on.format(name=name)}"
            )


def _renamed(row: dict, name: str, theirs: str):
    if theirs not in row:
        raise NoColumnError(f"no column '{theirs}', which data.columns.{name} names; there are {_names(row)}")
    return row[theirs]


def _refuse_broken_text(example: Example) -> None:
    r"""Refuse half a character (a lone \ud83d), which JSON can spell but no UTF-8 file can hold."""
    said = [(message["role"], message["content"]) for message in example.messages]
    said += [("rejected answer", example.rejected)] if example.rejected else []
    rich = [message for message in example.messages if len(message) > PLAIN]
    if rich or example.tools or example.chat_template_kwargs:
        more = json.dumps([rich, example.tools, example.chat_template_kwargs], ensure_ascii=False, default=str)
        said.append(("conversation", more))
    for role, text in said:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            raise UserError(f"the {role}'s text holds half a character ({half}): correct the file") from None


def _renamed_columns(data: dict) -> dict[str, str]:
    """`data.columns`, after checking that the layout has the columns it renames."""
    renamed = data.get("columns") or {}
    free = data["layout"] == "template"
    known = sorted(_used(data)) if free and renamed else () if free else LAYOUTS[data["layout"]][1]
    if known and known[0] in CONVERSATIONS:
        known = (*known, *READ_BESIDE)
    for name in renamed:
        if name not in known:
            without = "no template uses it" if free else f"layout '{data['layout']}' has no such column"
            raise UserError(f"config: 'data.columns.{name}': {without}; {suggest(name, known)}")
    return renamed


def _used(data: dict) -> set[str]:
    """The columns that the free layout's templates name."""
    from jinja2 import meta

    used = set()
    for key in [key for key in TEMPLATES if data.get(key)]:
        with templates.bounded(f"config: 'data.{key}'"):
            source = f"{{{{ {data[key]} }}}}" if key in EXPRESSIONS else data[key]
            used |= meta.find_undeclared_variables(texts.environment().parse(source))
    return used


def text_columns(data: dict) -> dict[str, str]:
    """The file's columns that may become text -> their names in templates."""
    free = data["layout"] == "template"
    names = _used({**data, "where": None}) if free else LAYOUTS[data["layout"]][1]
    renamed = data.get("columns") or {}
    return {renamed.get(name, name): name for name in sorted(names)}


# --- documents -----------------------------------------------------------------------------------


def document(row: dict) -> Messages:
    """Column text: a document, which is an answer to nothing."""
    return [_said("assistant", _text(row, "text"))]


# --- layouts of two texts ------------------------------------------------------------------------


def question_answer(row: dict) -> Messages:
    """Columns question, answer."""
    return _exchange(_text(row, "question"), _text(row, "answer"))


def instruction(row: dict) -> Messages:
    """Alpaca's columns: instruction, output, and optionally input, which is added after a blank line."""
    prompt = _text(row, "instruction")
    if row.get("input") not in (None, ""):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    return _exchange(prompt, _text(row, "output"))


def prompt_completion(row: dict) -> Messages:
    """TRL's columns: prompt, completion; both are texts, or both are lists of messages."""
    prompt, completion = _column(row, "prompt"), _column(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return checked([*read(prompt, "prompt"), *read(completion, "completion")], "completion")
    return _exchange(_text(row, "prompt"), _text(row, "completion"))


def _exchange(prompt: str, answer: str) -> Messages:
    return [_said("user", prompt), _said("assistant", answer)]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _column(row: dict, name: str):
    try:
        return row[name]
    except KeyError:
        raise NoColumnError(
            f"no column '{name}'; there are {_names(row)}: choose another data.layout, "
            f"or say which column it is: data.columns.{name}=..."
        ) from None


def _text(row: dict, name: str) -> str:
    value = _column(row, name)
    if isinstance(value, str) and value.strip():
        return value
    if value is None or isinstance(value, str):
        what = "blank" if value and value.strip() == "" else "empty"
        raise UserError(f'column "{name}" is {what}; to leave such rows out, set data.where to "{_filled(name)}"')
    if value != value:
        raise UserError(f'column "{name}" is nan; {texts.way_on(value, name)}')
    try:
        texts.checked(value)
        way_on = f"data.layout=template makes text of it: {{{{ {name} }}}}"
    except texts.NotTextError:
        way_on = f"data.layout=template can make text of it: {texts.way_on(value, name)}"
    raise UserError(f"column '{name}' holds {texts.shown(value)}, {texts.kind(value)}, not text; {way_on}")


# --- layouts of whole conversations --------------------------------------------------------------


def messages(row: dict) -> Messages:
    """Column messages: a list of role and content, and whatever `temper.data.conversations` reads besides."""
    return checked(read(_column(row, "messages"), "messages"), "messages")


def sharegpt(row: dict) -> Messages:
    """Column conversations: a list of from (human, gpt, system, function_call, observation) and value."""
    return checked(read(_column(row, "conversations"), "conversations"), "conversations")


# --- preference pairs: what is rejected -------------------------------------------------------------


def preference(row: dict) -> Messages:
    """TRL's columns: prompt, chosen, rejected. Returns the conversation with the chosen answer.

    The prompt is a text or a list of messages, in the column prompt or in ShareGPT's conversations; the answers are
    texts, messages or lists of messages. Without a prompt, chosen and rejected are whole conversations that differ in
    the last message; beside one they may be, too, if they begin with it (UltraFeedback).
    """
    return _with_answer(row, "chosen")


def _with_answer(row: dict, column: str) -> Messages:
    prompt = row.get("prompt") if row.get("prompt") is not None else row.get("conversations")
    if prompt is None:
        answer = _column(row, column)
        if isinstance(answer, str) and TRANSCRIPT.search(answer):
            raise UserError(
                f"column '{column}' is a transcript (Human: ... Assistant: ...), and there is no column 'prompt': cut "
                f"it with data.layout=template, {CUT}"
            )
        if not isinstance(answer, list):
            _text(row, "prompt")  # raises: it is missing, and an answer alone is not a conversation
        return checked(read(row[column], column), column)
    before = read(prompt, "prompt") if isinstance(prompt, list) else [_said("user", _text(row, "prompt"))]
    answer = _column(row, column)
    if isinstance(answer, dict):
        return checked([*before, conversations.message(answer, column)], column)
    if not isinstance(answer, list):
        return checked([*before, _said("assistant", _text(row, column))], column)
    after = read(answer, column)
    return checked(after if _is_whole(after, before, column) else [*before, *after], column)


def _is_whole(after: Messages, before: Messages, column: str) -> bool:
    """Whether the messages of an answer are the whole conversation, with the prompt once more."""
    asked, again = without_system(before), without_system(after)
    begins = bool(asked) and again[: len(asked)] == asked
    if not begins and before[-1]["role"] == "user" and after[0]["role"] in ("system", "user"):
        raise UserError(
            f"column '{column}' begins with a {after[0]['role']}'s message that is not that of the column prompt "
            f"({texts.shown(after[0]['content'])}); correct the row, or leave such rows out with data.where"
        )
    return begins


def _label(data: dict, row: dict, made: dict) -> bool | None:
    """Whether a single answer is desirable, given what the row's templates `made`; None where nothing says so."""
    if data["layout"] != "unpaired_preference":
        return made.get("label")
    value = _column(row, "label")
    known = {"true": True, "1": True, "false": False, "0": False, "1.0": True, "0.0": False}
    desirable = known.get(str(value).strip().lower()) if isinstance(value, str | bool | int | float) else None
    if desirable is None:
        raise UserError(
            f"column 'label' holds {texts.shown(value)}, neither true nor false; data.layout=template can make that of "
            "it: data.label=... (a condition, such as stars > 3)"
        )
    return desirable


# --- preference pairs of scored responses -----------------------------------------------------------


def _scored(row: dict) -> list[tuple[object, float]]:
    """(response, score) of each response of a row.

    From columns responses and scores, lists of the same length; or from responses alone, objects with `response` and
    `overall_score` (UltraFeedback's completions) or `score`.
    """
    responses = _column(row, "responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"column 'responses' holds {texts.shown(responses)}, not a list of at least two responses")
    scores = row.get("scores")
    if scores is None:
        scores = [_score_of(response, index) for index, response in enumerate(responses)]
    if not isinstance(scores, list) or len(scores) != len(responses):
        count = len(scores) if isinstance(scores, list) else "no"
        raise UserError(f"columns 'responses' and 'scores' do not match: {len(responses)} responses, {count} scores")
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise UserError(f"scores[{index}] is {texts.shown(score)}, not a number")
    texts_of = [_response_of(response, index) for index, response in enumerate(responses)]
    return list(zip(texts_of, scores, strict=True))


def _score_of(response, index: int):
    named = [name for name in ("overall_score", "score") if isinstance(response, dict) and name in response]
    if not named:
        raise UserError(
            f"no column 'scores', and responses[{index}] has no 'overall_score' or 'score': say which column it is: "
            "data.columns.scores=..."
        )
    return response[named[0]]


def _response_of(response, index: int):
    """A response's text, or its message."""
    found = response["response"] if isinstance(response, dict) and "response" in response else response
    if isinstance(found, dict) or (isinstance(found, str) and found.strip()):
        return found
    what = texts.shown(found) if found else "empty"
    raise UserError(f"responses[{index}] is {what}, and not a text; correct the row, or leave it out with data.where")


def _pairs_by_score(scored: list[tuple[object, float]], every: bool) -> tuple[list[tuple], int]:
    """((better, worse) of a row's responses, how many make no pair): the best and the worst, or `every` two."""
    ranked = sorted(scored, key=lambda one: -one[1])  # of equal ones the earlier first
    both = list(itertools.combinations(ranked, 2)) if every else [(ranked[0], ranked[-1])]
    pairs = [(better, worse) for (better, high), (worse, low) in both if high > low and better != worse]
    return pairs, len(both) - len(pairs)


def _rejected(data: dict, row: dict, messages: Messages, made: dict) -> str | None:
    """The rejected answer of a row, given what its templates `made`; None without pairs."""
    if data["layout"] in ("preference", "scored_responses"):
        return _rejected_column(row, messages)
    if "rejected" in made:
        return _other_than_chosen(made["rejected"], messages)
    if data.get("rejected_from") is not None:
        return another_label(data["rejected_from"], messages)
    return None


def _rejected_column(row: dict, messages: Messages) -> str:
    with_rejected = _with_answer(row, "rejected")
    if with_rejected[:-1] != messages[:-1]:
        raise UserError(
            "columns 'chosen' and 'rejected' differ before their last message, so they answer different prompts; "
            'to leave such rows out, set data.where to "chosen[:-1] == rejected[:-1]"'
        )
    for answer in (messages[-1], with_rejected[-1]):
        if len(answer) > PLAIN:
            field = next(name for name in answer if name not in ("role", "content"))
            raise UserError(f"'{field}' in an answer of a pair is not compared: {TO_DROP.format(name=field)}")
    return _other_than_chosen(with_rejected[-1]["content"], messages)


def _other_than_chosen(rejected: str, messages: Messages) -> str:
    if rejected == messages[-1]["content"]:
        raise UserError(
            f"the chosen and the rejected answer are the same ({texts.shown(rejected)}), which prefers nothing; "
            "correct the row, or leave such rows out with data.where"
        )
    return rejected


def another_label(labels: list[str], messages: Messages) -> str:
    """A label other than the answer; if there are several, picked by a hash of the conversation."""
    answer = messages[-1]["content"]
    if answer not in labels:
        raise UserError(f"the answer {texts.shown(answer)} is none of data.rejected_from ({', '.join(labels)})")
    others = [label for label in labels if label != answer]
    asked = repr([[message["role"], message["content"]] for message in without_system(messages)])
    return others[int.from_bytes(hashlib.sha256(asked.encode(errors="replace")).digest()[:8]) % len(others)]


# layout -> (function, its columns)
LAYOUTS: dict[str, tuple[Callable[[dict], Messages], tuple[str, ...]]] = {
    "messages": (messages, ("messages",)),
    "prompt_completion": (prompt_completion, ("prompt", "completion")),
    "instruction": (instruction, ("instruction", "input", "output")),
    "question_answer": (question_answer, ("question", "answer")),
    "sharegpt": (sharegpt, ("conversations",)),
    "preference": (preference, ("prompt", "chosen", "rejected", "conversations")),
    "scored_responses": (preference, ("prompt", "responses", "scores")),  # of the pairs that `expander` makes
    "unpaired_preference": (prompt_completion, ("prompt", "completion", "label")),
    TEXT: (document, ("text",)),
}


# --- Jinja over the columns: where, and the free layout's texts ----------------------------------------

TEMPLATES = ("where", "prompt", "completion", "rejected", "label")
EXPRESSIONS = ("where", "label")  # true or false; the others are texts


def _templates(data: dict) -> Callable[[dict], dict]:
    """The function that evaluates a row's templates: {"where": bool, "prompt": text, ...}; no text if `where` fails.

    All templates of a row share one `bounded` block, because that costs more than they do.
    """
    keys = [key for key in TEMPLATES if data.get(key) is not None]
    if not data.get("where"):
        keys = [key for key in keys if key != "where"]
    evaluate = {key: _compiled(key, data[key]) for key in keys}
    what = " or ".join(f"data.{key}" for key in keys)

    def evaluated(row: dict) -> dict:
        made = {}
        with templates.bounded(f"{what} (columns: {_names(row)})"):
            for key, function in evaluate.items():
                made[key] = function(row)
                if key == "where" and not made[key]:
                    break
        return made

    return evaluated if keys else lambda _row: {}


def _compiled(key: str, source: str) -> Callable[[dict], object]:
    """`data.<key>` as a function of the row: a template's text, or whether `where` holds."""
    from jinja2 import UndefinedError, meta

    environment = texts.environment()
    with templates.bounded(f"config: 'data.{key}'"):
        if key in EXPRESSIONS:
            expression = environment.compile_expression(source, undefined_to_none=False)
        else:
            template = environment.from_string(source)
        used = meta.find_undeclared_variables(
            environment.parse(f"{{{{ {source} }}}}" if key in EXPRESSIONS else source)
        )

    def evaluated(row: dict):
        try:
            # A misspelt column raises in bool(); by default it would count as false.
            return bool(texts.condition(expression(row))) if key in EXPRESSIONS else template.render(row)
        except texts.NotTextError as error:
            column = _column_of(error.value, row, used)
            reason = f"{_holder(column)}{error}: {texts.way_on(error.value, column)}"
        except texts.NoTruthError as error:
            reason = error.said(_column_of(error.value, row, used))
        except UndefinedError as error:
            raise NoColumnError(f"data.{key}: {templates.reason(error)} (columns: {_names(row)})") from None
        except Exception as error:  # a template is a program and may raise anything
            reason = templates.reason(error)
        raise UserError(f"data.{key}: {reason} (columns: {_names(row)})")

    def text(row: dict) -> str:
        made = templates.checked(evaluated(row), row, f"data.{key}")
        if not made.strip():
            raise UserError(f"data.{key} gives an empty text; to leave such rows out, {_emptiness(row, used)}")
        return made

    return evaluated if key in EXPRESSIONS else text


def _column_of(value, row: dict, used: set[str]) -> str | None:
    """The template's column that holds a value, if any does."""
    return next((name for name, found in row.items() if name in used and found is value), None)


def _holder(column: str | None) -> str:
    return f"column '{column}': " if column else ""


def _emptiness(row: dict, used: set[str]) -> str:
    """The advice that leaves out rows like this one, which has an empty column."""
    empty = next((name for name in row if name in used and not str(row[name] or "").strip()), None)
    hint = f'set data.where to "{_filled(empty)}"' if empty else "use data.where"
    return f"{hint} (columns: {_names(row)})"


def _filled(column: str) -> str:
    """The condition that a column holds a text: not null, not empty, not blank."""
    return f"{column} | default('', true) | trim != ''"


def _names(row: dict) -> str:
    return ", ".join(map(str, row))
