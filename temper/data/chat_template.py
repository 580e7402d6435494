"""From a conversation to text by a model's own chat template.

What is learned must be what the model is to say after the very prompt that it gets later. So each answer is located in
the text that the template makes of the conversation up to it, behind the prompt that the template makes of the messages
before it. Templates that show an earlier answer otherwise than it was given (most drop its reasoning) give one text for
each such answer. A row is refused if the template leaves out a message, changes an answer, or drops some of it: its
reasoning, or a tool call.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from temper.data import templates
from temper.data.conversations import (
    PLAIN,
    Conversation,
    Message,
    split_thoughts,
    with_thoughts_in_content,
    without_system,
)
from temper.data.rendering import LEAVE_OUT, Turn
from temper.errors import UserError, suggest

PROBE = "TemperAsksWhereAnAnswerStands"
ASK = {"role": "user", "content": "TemperAsksWhatATemplateShows"}
GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})  # not for chat_template_kwargs
SWITCHES = frozenset({"enable_thinking", "thinking", "reasoning_effort", "preserve_thinking", "add_thoughts"})
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the field in templates, the most usual first
THOUGHT = "\n</think>\n\n"  # between reasoning and answer, where a prompt ends with <think>


class ChatTemplate:
    """A model's own template.

    Args:
        tokenizer: its tokenizer.
        prompt: config section `prompt`; for a finished run with the template's `opening`: what the template writes
            between a prompt and an answer. Generation starts behind it.
        end_of: finds the first token that ends answers in a text.

    Attributes:
        rich: whether the rows have reasoning or tool calls, which a template writes before or instead of an answer.
            Otherwise an answer must follow its prompt immediately.
    """

    keeps_history = True

    def __init__(self, tokenizer, prompt: dict, end_of: Callable[[str], re.Match | None]):
        self.name, self.end_of = tokenizer.name_or_path, end_of
        self.opening, self.loss_on = prompt.get("opening", ""), prompt["loss_on"]
        self.rich, self.system = prompt.get("rich", False), prompt.get("system") is not None
        source = tokenizer.get_chat_template()
        with templates.bounded(f"{self.name}: its chat template"):
            environment = templates.chat_environment(source, prompt.get("date") or templates.DATE)
            self.template = environment.from_string(source)
            self.template.globals = dict(self.template.globals)  # each render copies it: of Jinja's ChainMap, slowly
            self.reads_clock = templates.reads_clock(source, environment)
            self.reads = templates.variables(source, environment)
            fields = templates.fields(source, environment)
        self.variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None}
        self.variables |= self._known(prompt.get("chat_template_kwargs") or {}, "config: 'prompt.chat_template_kwargs'")
        self.forms = _Forms(fields, self._try)

    def _known(self, given: dict[str, Any], what: str) -> dict[str, Any]:
        """`given`, after checking that the template uses these variables."""
        for name in given:
            if name not in self.reads or name in GIVEN:
                switches = sorted(self.reads & SWITCHES)
                hint = suggest(name, switches) if switches else "it has no switch for reasoning"
                raise UserError(f"{what}: the chat template of {self.name} does not use '{name}'; {hint}")
        return given

    # --- conversations to texts -----------------------------------------------------------------------

    def texts(self, conversations: list[Conversation]) -> list[list[list[Turn]]]:
        """The texts of each conversation, which ends with the assistant's answer.

        Each learned answer is in one of them, behind its prompt.

        Raises:
            UserError: the template refuses a conversation, leaves out a message or changes an answer. It may concern a
                conversation after the first faulty one.
        """
        answers = [_answers(conversation.messages) for conversation in conversations]
        if not all(all(places) for places in answers):
            raise UserError(
                f"{self.name}: a row begins with the assistant's turn, and a chat template answers a "
                f"message; set prompt.system, or {LEAVE_OUT}"
            )
        both = list(zip(conversations, answers, strict=True))
        with self._proposing(conversations):
            prompts = iter(self._texts([conv.upto(place) for conv, places in both for place in places], True))
            texts = iter(self._texts([conv.upto(place + 1) for conv, places in both for place in places], False))
        return [self._learned(conv, [(place, next(prompts), next(texts)) for place in places]) for conv, places in both]

    def prompt(self, conversation: Conversation) -> list[Turn]:
        """The prompt for an answer to a conversation, as a last turn without an answer."""
        messages, places = conversation.messages, _answers(conversation.messages)
        places = places if all(places) else []  # nothing was asked before the first answer
        *prompts, asked = self._texts([*map(conversation.upto, places), conversation], True)
        texts = self._texts([conversation.upto(place + 1) for place in places], False)
        self._refuse_left_out(messages, asked)
        turns = [self._turn(*given) for given in zip(prompts, texts, [messages[at] for at in places], strict=True)]
        return self._chained([*zip(prompts, turns, strict=True), (asked, Turn("", ""))])[-1]

    def _learned(self, conversation: Conversation, rendered: list[tuple[int, str, str]]) -> list[list[Turn]]:
        """The texts of one conversation, from the place of each answer, the text before it, and the text with it."""
        messages, turns = conversation.messages, []
        last, asked, _ = rendered[-1]
        for place, prompt, text in rendered:
            learned = place == last or (self.loss_on == "assistant" and messages[place].get("train", True))
            turn = self._turn(prompt, text, messages[place])
            if learned and isinstance(turn, str):
                plain = "use prompt=plain, or " if _is_exchange(messages) else ""
                raise UserError(f"{self.name}: its chat template {turn}; {plain}{LEAVE_OUT}")
            turns.append(turn if isinstance(turn, str) else turn._replace(learned=learned, place=place))
        with self._proposing([conversation]):
            self._refuse_left_out(messages[:last], asked)
        texts = map(_upto_learned, self._chained(list(zip([prompt for _, prompt, _ in rendered], turns, strict=True))))
        return [text for text in texts if text]

    def _chained(self, found: list[tuple[str, Turn | str]]) -> list[list[Turn]]:
        """Turns in as few texts as possible, from each answer's prompt and its turn (a str: it cannot be located).

        A text goes on with the next answer if that answer's prompt begins with the text so far, and the last answer in
        it has an end that can be learned.
        """
        texts: list[list[Turn]] = []
        done = None  # the text so far; None: the next turn begins one
        for prompt, turn in found:
            before = None
            if done is not None and prompt.startswith(done):
                before = self._behind_end(texts[-1], prompt[len(done) :])
            if before is None:
                before = prompt
                texts.append([])
            done = None
            if not isinstance(turn, str):
                texts[-1].append(turn._replace(before=before + self.opening))
                done = prompt + self.opening + turn.answer + turn.closing
        return [text for text in texts if text]

    def _behind_end(self, text: list[Turn], before: str) -> str | None:
        """`before`, which comes after the last turn of `text`, without the token that ends that turn. None: there is no
        such token.

        GLM's template, for one, ends an answer with what begins the user's next message.
        """
        if text[-1].closing:
            return before
        end = self.end_of(before)
        if end is None or end.start():
            return None
        text[-1] = text[-1]._replace(closing=end[0])
        return before[end.end() :]

    # --- what the template writes before each answer ------------------------------------------------------

    def find_opening(self, conversation: Conversation) -> None:
        """Set `opening` to what the template writes between prompt and answer.

        Some templates write the assistant's header only if there is an answer, others an empty block of reasoning.

        Args:
            conversation: the first of the rows, which all have the same opening.
        """
        *asked, answer = conversation.messages
        with self._proposing([conversation]):
            prompt = self._texts([conversation.upto(-1)], True)[0]
            ask = conversation._replace(messages=[*asked, {"role": "assistant", "content": PROBE}])
            probed, text = self._texts([ask, conversation], False)
        if not probed.startswith(prompt):
            self.opening = self._opening_of_thoughts(conversation, prompt, probed)
        elif self.rich:
            header = self._try([ASK], True) == self._try([ASK], False)  # add_generation_prompt adds nothing
            self.opening = os.path.commonprefix([probed, text])[len(prompt) :].partition(PROBE)[0] if header else ""
        else:
            opening = probed[len(prompt) :].partition(PROBE)[0].rstrip(" ")
            self.opening = opening if PROBE in probed and text.startswith(prompt + opening) else ""
        self.opening = self.opening if self.opening.strip() else ""

    def _opening_of_thoughts(self, conversation: Conversation, prompt: str, probed: str) -> str:
        """The end of an empty block of reasoning that a prompt begins, for rows without reasoning."""
        if self.rich or not _begins_thoughts(prompt):
            return ""
        switched = {**(conversation.chat_template_kwargs or {}), "enable_thinking": False}
        off = conversation.upto(-1)._replace(chat_template_kwargs=switched)
        if (switch := self._switch(False)) and probed.startswith(self._text(off, True)):
            raise UserError(f"{self.name}: its prompts end with {prompt[-20:]!r}, and rows have no reasoning{switch}")
        return THOUGHT

    def _switch(self, on: bool) -> str:
        """What to set for a prompt that fits rows with or without reasoning, if the template has a switch."""
        if "enable_thinking" not in self.reads or "enable_thinking" in self.variables:
            return ""
        return f": set prompt.chat_template_kwargs.enable_thinking={str(on).lower()}"

    def reasoning_marks(self, conversation: Conversation) -> tuple[str, str]:
        """What the template writes before reasoning (empty if that is in the prompt), and between it and an answer."""
        asked = conversation.upto(-1)
        prompt = self._texts([asked], True)[0]
        said: Message = {"role": "assistant", "content": PROBE, "reasoning_content": ASK["content"]}
        turn = self._turn(prompt, self._text(asked._replace(messages=[*asked.messages, said]), False), said)
        if isinstance(turn, str):
            return "", ""
        before, _, behind = turn.answer.partition(ASK["content"])
        return before.strip(), behind.partition(PROBE)[0].strip()

    # --- one answer ------------------------------------------------------------------------------------

    def _turn(self, prompt: str, text: str, message: Message) -> Turn | str:
        """The turn without what is before it, or what is wrong with it."""
        trace, content = self.forms.thoughts(message)
        if not text.startswith(prompt):
            if _begins_thoughts(prompt):
                return self._written(prompt, text, trace, content)
            switch = "" if trace is None else self._switch(True)
            return f"ends a prompt with {prompt[-40:]!r}, which it does not write before an answer{switch}"
        rest = text.removeprefix(prompt)
        if not rest.startswith(self.opening):
            return f"writes {self.opening!r} before the first row's answer, but not before this one ({rest[:60]!r})"
        said = rest.removeprefix(self.opening)
        end = _end_of_answer(said, content) if trace is None and not message.get("tool_calls") else None
        if end is None:
            found = self._end_of_all(said, trace, content, message)
            if isinstance(found, str):
                return found
            end = found
        closing = self._closing(said[end:])
        if not closing and message.get("tool_calls"):
            end = len(said.rstrip())  # with what closes the calls
        return Turn("", said[:end], closing)

    def _end_of_all(self, said: str, trace: str | None, content: str, message: Message) -> int | str:
        """Where the last of a message's texts ends in `said`, or which is missing."""
        calls = message.get("tool_calls") or []
        end = 0
        for what, part in (("the reasoning of", trace or ""), ("", content)):
            at = max(said.find(part.strip(), end), said.find(part.strip()))
            if at < 0:
                drop = "; to drop it from all rows, set data.ignore_fields=[reasoning_content]"
                return f"leaves out {what} an answer: {part[:60]!r}{drop}" if what else self._changed(said, part)
            end = max(end, at + len(part.strip()))
        if trace is None and not calls and not self.rich:
            at = said.find(content.strip())
            return f"writes {said[:at]!r} between the prompt and an answer, which generation would have to write"
        for call in calls:
            for part in (call["function"]["name"], *_leaves(call["function"]["arguments"])):
                place = _find(part, said)
                if place is None:
                    return f"leaves out or changes {part!r} of the call of '{call['function']['name']}' ({said[:60]!r})"
                end = max(end, place)
        return end

    @staticmethod
    def _changed(said: str, content: str) -> str:
        return f"changes an answer: {content[:60]!r} becomes {said[:60]!r}"

    def _written(self, prompt: str, text: str, trace: str | None, content: str) -> Turn | str:
        """The answer as the row says it, where the prompt begins a block of reasoning that the template leaves out."""
        if trace is None and THOUGHT not in self.opening:
            return f"ends a prompt with {prompt[-20:]!r}, and an answer has no reasoning{self._switch(False)}"
        at = text.rfind(content.strip())
        if at < 0:
            return self._changed(text[-60:], content)
        answer = content.strip() if trace is None else trace.strip() + THOUGHT + content.strip()
        return Turn("", answer, self._closing(text[at + len(content.strip()) :]), written=trace is not None)

    def _closing(self, text: str) -> str:
        """What ends a turn, up to the token that ends answers; empty if there is none."""
        end = self.end_of(text)
        return text[: end.end()] if end else ""

    # --- rendering ---------------------------------------------------------------------------------------

    def _texts(self, conversations: list[Conversation], add_generation_prompt: bool) -> list[str]:
        """The text of each, or the error of the first that fails."""
        if len(conversations) == 1:
            return [self._text(conversations[0], add_generation_prompt)]
        try:
            with templates.bounded(""):  # all at once is faster
                texts = [self._render(conversation, add_generation_prompt) for conversation in conversations]
        except UserError:
            return [self._text(conversation, add_generation_prompt) for conversation in conversations]
        return [
            templates.checked(text, conversation, self._fails(conversation))
            for text, conversation in zip(texts, conversations, strict=True)
        ]

    def _text(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        with templates.bounded(self._fails(conversation)):
            text = self._render(conversation, add_generation_prompt)
        return templates.checked(text, conversation, self._fails(conversation))

    def _render(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        messages, tools, more = conversation
        if tools and "tools" not in self.reads:
            raise UserError(
                f"{self.name}: its chat template does not show tools: leave out the column 'tools' (for training by "
                "data.ignore_fields=[tools])"
            )
        given = self._known(more, "column 'chat_template_kwargs'") if more else {}
        shown = list(map(self.forms.shown, messages))
        return self._rendered(shown, add_generation_prompt, **given, tools=tools)

    def _try(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """The text of messages as they are, or an empty one if the template refuses them."""
        try:
            with templates.bounded(""):
                return self._rendered(messages, add_generation_prompt)
        except UserError:
            return ""

    def _rendered(self, messages: list[Message], add_generation_prompt: bool, **variables) -> str:
        """The text of messages in the template's forms."""
        asked = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self.template.render({**self.variables, **variables, **asked})

    def _fails(self, conversation: Conversation) -> str:
        roles = ", ".join(message["role"] for message in conversation.messages)
        return f"{self.name}: its chat template refuses messages of the roles {roles}"

    def _refuse_left_out(self, messages: list[Message], prompt: str) -> None:
        """Refuse a prompt without a message that is not the assistant's."""
        for message in messages:
            if message["role"] != "assistant" and _find(message["content"].strip(), prompt) is None:
                raise UserError(
                    f"{self.name}: its chat template leaves out or changes the {message['role']}'s message "
                    f"{message['content'][:60]!r}"
                )

    @contextlib.contextmanager
    def _proposing(self, conversations: list[Conversation]) -> Iterator[None]:
        """Add to an error what can be done about rows that the template refuses."""
        try:
            yield
        except UserError as error:
            roles = [message["role"] for conversation in conversations for message in conversation.messages]
            ways = ["set prompt.system=null"] if self.system and "system" in roles else []
            single = all(_is_exchange(conversation.messages) for conversation in conversations)
            ways += ["use prompt=plain"] if single else []
            raise UserError(f"{error}; {', or '.join([*ways, LEAVE_OUT])}") from None


class _Forms:
    """In which of their usual forms a template takes messages: found by showing it some.

    Args:
        fields: those of messages that the template reads, and its texts.
        render: messages -> text, empty if the template refuses them.
    """

    def __init__(self, fields: frozenset[str], render: Callable[[list[Message], bool], str]):
        self.render = render
        self.knows_developers = "developer" in fields
        self.reasoning = next((name for name in REASONING if name in fields), None)
        self.parses_thoughts = "</think>" in fields
        self.in_parts = PROBE not in render([{**ASK, "content": PROBE}], True) and PROBE in render(
            [{**ASK, "content": [{"type": "text", "text": PROBE}]}], True
        )
        self.arguments_as_text, self.no_content = self._form_of_calls() if "tool_calls" in fields else (False, "")

    def _form_of_calls(self) -> tuple[bool, str | None]:
        """(whether arguments are JSON text, what the content of a message without text is)."""
        for no_content in ("", None):
            for as_text in (False, True):
                arguments: Any = {"place": PROBE}
                function = {"name": "look", "arguments": json.dumps(arguments) if as_text else arguments}
                call = {"id": "call00001", "type": "function", "function": function}
                text = self.render([ASK, {"role": "assistant", "content": no_content, "tool_calls": [call]}], False)
                if PROBE in text and "None" not in text and str(arguments) not in text and '\\"' not in text:
                    return as_text, no_content
        return False, ""

    def thoughts(self, message: Message) -> tuple[str | None, str]:
        """(reasoning, the rest of the answer) of the assistant's message, as the template tells them apart."""
        if self.reasoning is None and not self.parses_thoughts:
            return None, with_thoughts_in_content(message)["content"]
        if trace := message.get("reasoning_content"):
            return trace, message["content"]
        return split_thoughts(message["content"]) or (None, message["content"])

    def shown(self, message: Message) -> Message:
        """The message in the template's forms."""
        if len(message) == PLAIN and not self.in_parts and message["role"] in ("system", "user"):
            return message  # as most are
        made = {name: value for name, value in message.items() if name not in ("train", "reasoning_content")}
        if message["role"] == "assistant":
            trace, content = self.thoughts(message)
            if trace is not None and self.reasoning is not None:
                made |= {self.reasoning: trace, "content": content}
            else:
                made["content"] = with_thoughts_in_content(message)["content"]
            if calls := message.get("tool_calls"):
                made["tool_calls"] = list(map(self._call, calls))
                made["content"] = made["content"] or self.no_content
        elif message["role"] == "developer" and not self.knows_developers:
            made["role"] = "system"
        if self.in_parts and isinstance(made["content"], str):
            made["content"] = [{"type": "text", "text": made["content"]}]
        return made

    def _call(self, call: dict) -> dict:
        if not self.arguments_as_text:
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _is_exchange(messages: list[Message]) -> bool:
    """Whether there is one prompt and one answer, as a free template needs."""
    return len(without_system(messages)) == 2


def _answers(messages: list[Message]) -> list[int]:
    """Where the assistant's turns are."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _upto_learned(turns: list[Turn]) -> list[Turn]:
    """The turns up to the last one that is learned."""
    last = max((at for at, turn in enumerate(turns) if turn.learned), default=-1)
    return turns[: last + 1]


def _begins_thoughts(prompt: str) -> bool:
    """Whether a prompt ends within a block of reasoning."""
    return prompt.rstrip().endswith("<think>")


def _end_of_answer(said: str, content: str) -> int | None:
    """The answer's length at the start of a text, where it may have lost the blanks around it."""
    if said.startswith(content):
        return len(content)
    blanks = len(said) - len(said.lstrip())
    trimmed = content.strip()
    return blanks + len(trimmed) if said.startswith(trimmed, blanks) else None


def _leaves(value) -> Iterator[str]:
    """The texts, numbers and truth values in the arguments of a call, as JSON writes them."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif value is not None:
        yield json.dumps(value)


def _find(part: str, text: str) -> int | None:
    """Where a text ends in another, as it is or in JSON's spelling; None if it is not there."""
    at = text.find(part)
    if at >= 0:  # nearly always
        return at + len(part)
    spellings = [json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]]
    spellings += [part.capitalize()] if part in ("true", "false") else []
    return next((text.find(spelling) + len(spelling) for spelling in spellings if spelling in text), None)
