"""From a conversation to text: by the model's own chat template, or by the config's `prompt.template`.

A prompt is always the text before an answer, and rendered only here, for training, evaluation, chat, predict and
Python. A row whose answer the template changes is refused, because what the template writes around an answer must not
be learned or judged as part of it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from temper.data import templates
from temper.errors import UserError

PROBE = "TemperAsksWhereAnAnswerStands"
LEAVE_OUT = "leave such rows out with data.where"


class Turn(NamedTuple):
    """One of the assistant's turns. A conversation's text is that of its turns in order."""

    before: str  # all text between the assistant's last turn and this one
    answer: str
    closing: str = ""  # what the template ends a turn with


def text_of(turns: list[Turn]) -> str:
    """The whole text."""
    return "".join(part for turn in turns for part in turn)


class FreeTemplate:
    """`prompt.template`: one prompt, one answer.

    Args:
        chat_template: whether the model has one, which is what to use for several turns.
    """

    keeps_history = reads_clock = False
    opening = ""

    def __init__(self, source: str, chat_template: bool):
        self.template, self.variables = _compiled(source)
        self.chat_template = chat_template

    def turns(self, conversations: list[list[dict]]) -> list[list[Turn]]:
        """The turns of each conversation, which ends with the assistant's answer."""
        prompts = self._prompts([messages[:-1] for messages in conversations])
        return [
            [Turn(prompt, messages[-1]["content"])] for prompt, messages in zip(prompts, conversations, strict=True)
        ]

    def prompt(self, messages: list[dict]) -> list[Turn]:
        """The prompt for an answer to `messages`, as a last turn without an answer."""
        return [Turn(self._prompts([messages])[0], "")]

    def _prompts(self, conversations: list[list[dict]]) -> list[str]:
        variables = list(map(self._variables, conversations))
        what = "config: 'prompt.template'"
        with templates.bounded(what):
            texts = [self.template.render(values) for values in variables]
        return [templates.checked(text, values, what) for text, values in zip(texts, variables, strict=True)]

    def _variables(self, messages: list[dict]) -> dict:
        system = next((message["content"] for message in messages if message["role"] == "system"), None)
        turns = [message for message in messages if message["role"] != "system"]
        if len(turns) != 1:
            instead = "use prompt.apply_chat_template=true, or " if self.chat_template else ""
            raise UserError(
                f"prompt.template is for one prompt and one answer, but a row has {len(turns) + 1} turns; "
                f"{instead}{LEAVE_OUT}"
            )
        if system is not None and "system" not in self.variables:
            raise UserError(
                "prompt.template does not say the system message: write {{ system }} into it, or set "
                f"prompt.system=null (of rows with one of their own: {LEAVE_OUT})"
            )
        return {"system": system, "prompt": turns[0]["content"]}


def _compiled(source: str) -> tuple:
    """(the free template, its variables). A misspelt variable is refused, or rows would lack their prompt."""
    from jinja2 import meta

    environment = templates.environment()
    with templates.bounded("config: 'prompt.template'"):
        used = meta.find_undeclared_variables(environment.parse(source))
        template = environment.from_string(source)
    if "prompt" not in used or used - {"prompt", "system"}:
        found = ", ".join(sorted(used)) or "no variable"
        raise UserError(f"config: 'prompt.template' must use 'prompt', and may use 'system' (found {found})")
    return template, used


class ChatTemplate:
    """A model's own template.

    Args:
        tokenizer: its tokenizer.
        date: the template's date (ISO).
        opening: what the template writes between a prompt and an answer; generation starts behind it.
        ends: whether a text that closes a turn has a token that ends answers.
        system: whether the config puts a system message first.
    """

    keeps_history = True

    def __init__(self, tokenizer, date: str, opening: str, ends: Callable[[str], bool], system: bool):
        self.name, self.opening, self.ends, self.system = tokenizer.name_or_path, opening, ends, system
        source = tokenizer.get_chat_template()
        with templates.bounded(f"{self.name}: its chat template"):
            environment = templates.chat_environment(source, date)
            self.template = environment.from_string(source)
            self.reads_clock = templates.reads_clock(source, environment)
        self.variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None}

    def turns(self, conversations: list[list[dict]]) -> list[list[Turn]]:
        """The assistant's turns of each conversation, which ends with the assistant's answer.

        Raises:
            UserError: the template refuses a conversation or changes its answers. It may concern a conversation after
                the first faulty one.
        """
        answers = [_answers(messages) for messages in conversations]
        if not all(all(places) for places in answers):
            raise UserError(
                f"{self.name}: a row begins with the assistant's turn, and a chat template answers a "
                f"message; set prompt.system, or {LEAVE_OUT}"
            )
        asked = [messages[:place] for messages, places in zip(conversations, answers, strict=True) for place in places]
        said = [messages[: at + 1] for messages, places in zip(conversations, answers, strict=True) for at in places]
        with self._proposing(conversations):
            prompts, texts = iter(self._texts(asked, True)), iter(self._texts(said, False))
        return [
            self._located([(next(prompts), next(texts), messages[place]["content"]) for place in places], messages)
            for messages, places in zip(conversations, answers, strict=True)
        ]

    def prompt(self, messages: list[dict]) -> list[Turn]:
        """The prompt for an answer to `messages`, as a last turn without an answer."""
        places = _answers(messages)
        places = places if all(places) else []  # nothing was asked before the first answer
        prompts = self._texts([*(messages[:place] for place in places), messages], True)
        texts = self._texts([messages[: place + 1] for place in places], False)
        turns, done = [], ""
        for prompt, text, place in zip(prompts[:-1], texts, places, strict=True):
            turn = self._turn(done, prompt, text, messages[place]["content"]) if prompt.startswith(done) else None
            if not isinstance(turn, Turn):  # as in `_located`: the text as it is now
                break
            turns.append(turn)
            done += "".join(turn)
        if len(turns) < len(places) or not prompts[-1].startswith(done):
            turns, done = [], ""
        return [*turns, Turn(prompts[-1][len(done) :] + self.opening, "")]

    def opening_of(self, messages: list[dict]) -> str:
        """What the template writes between prompt and answer in this conversation.

        Some templates write the assistant's header only if there is an answer, others an empty thinking block.
        """
        *asked, answer = messages
        with self._proposing([messages]):
            prompt = self._texts([asked], True)[0]
            probed, text = self._texts([[*asked, {**answer, "content": PROBE}], messages], False)
        opening = probed[len(prompt) :].partition(PROBE)[0].rstrip(" ")
        found = PROBE in probed and probed.startswith(prompt) and text.startswith(prompt + opening)
        return opening if found and opening.strip() else ""

    def _texts(self, conversations: list[list[dict]], add_generation_prompt: bool) -> list[str]:
        """The text of each, or the error of the first that fails."""
        if len(conversations) == 1:
            return [self._text(conversations[0], add_generation_prompt)]
        try:
            with templates.bounded(""):  # all at once is faster
                texts = [self._render(messages, add_generation_prompt) for messages in conversations]
        except UserError:
            return [self._text(messages, add_generation_prompt) for messages in conversations]
        return [
            templates.checked(text, messages, self._fails(messages))
            for text, messages in zip(texts, conversations, strict=True)
        ]

    def _text(self, messages: list[dict], add_generation_prompt: bool) -> str:
        with templates.bounded(self._fails(messages)):
            text = self._render(messages, add_generation_prompt)
        return templates.checked(text, messages, self._fails(messages))

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return self.template.render(
            {**self.variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        )

    def _fails(self, messages: list[dict]) -> str:
        roles = ", ".join(message["role"] for message in messages)
        return f"{self.name}: its chat template refuses messages of the roles {roles}"

    def _located(self, turns: list[tuple[str, str, str]], messages: list[dict]) -> list[Turn]:
        """One conversation, from the text before each answer, the text with it, and the answer.

        If the template renders earlier turns differently than when they were answered, only the last one is learned,
        and everything before it is its prompt.
        """
        found, done = [], ""
        for prompt, text, content in turns:
            if not prompt.startswith(done):
                return self._located(turns[-1:], messages)
            turn = self._turn(done, prompt, text, content)
            if isinstance(turn, str):
                plain = "use prompt=plain, or " if _is_exchange(messages) else ""
                raise UserError(f"{self.name}: its chat template {turn}; {plain}{LEAVE_OUT}")
            found.append(turn)
            done += "".join(turn)
        return found

    def _turn(self, done: str, prompt: str, text: str, content: str) -> Turn | str:
        """The turn, or what is wrong with it."""
        if not text.startswith(prompt):
            return f"ends a prompt with {prompt[-40:]!r}, which it does not write before an answer"
        rest = text.removeprefix(prompt)
        if not rest.startswith(self.opening):
            return f"writes {self.opening!r} before the first row's answer, but not before this one ({rest[:60]!r})"
        said = rest.removeprefix(self.opening)
        end = _end_of_answer(said, content)
        if end is None:
            at = said.find(content.strip())
            if at < 0:
                return f"changes an answer: {content[:60]!r} becomes {said[:60]!r}"
            return f"writes {said[:at]!r} between the prompt and an answer, which generation would have to write"
        before = prompt[len(done) :] + self.opening
        closing = said[end:]
        return Turn(before, said[:end], closing if self.ends(closing) else "")

    @contextlib.contextmanager
    def _proposing(self, conversations: list[list[dict]]) -> Iterator[None]:
        """Add to an error what can be done about rows that the template refuses."""
        try:
            yield
        except UserError as error:
            roles = [message["role"] for messages in conversations for message in messages]
            ways = ["set prompt.system=null"] if self.system and "system" in roles else []
            single = all(map(_is_exchange, conversations))
            ways += ["use prompt=plain"] if single else []
            raise UserError(f"{error}; {', or '.join([*ways, LEAVE_OUT])}") from None


def _is_exchange(messages: list[dict]) -> bool:
    """Whether there is one prompt and one answer, as a free template needs."""
    return sum(message["role"] != "system" for message in messages) == 2


def _answers(messages: list[dict]) -> list[int]:
    """Where the assistant's turns are."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _end_of_answer(said: str, content: str) -> int | None:
    """The answer's length in the rendered text, where it may have lost the blanks around it."""
    if said.startswith(content):
        return len(content)
    blanks = len(said) - len(said.lstrip())
    trimmed = content.strip()
    return blanks + len(trimmed) if said.startswith(trimmed, blanks) else None
