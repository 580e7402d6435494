"""A run's prompts as pieces of text around messages, for programs that have other template languages than Jinja.

Most chat templates do no more than that. Whether one does is found out, not read from its text: it is asked to show
marked messages, the text around these is taken, and what is put together from it must be what the template makes of
`SAMPLES`, to the last blank.
"""

import dataclasses
from collections.abc import Callable

from temper.data.conversations import SYSTEM, Conversation
from temper.data.rendering import FreeTemplate
from temper.errors import UserError

TOLD, ASKED, ANSWERED, ASKED_AGAIN = ("TemperTells", "TemperAsks", "TemperAnswers", "TemperWonders")


def _said(*texts: str) -> list[dict]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def _told(system: str, *texts: str) -> list[dict]:
    return [{"role": "system", "content": system}, *_said(*texts)]


SAMPLES = (
    _said("Hello?"),
    _said('A line.\n\nAnd another: {{ x }} {% y %} "quoted" <b>&amp;</b> où 🦙\\n', "Yes.", "Why?"),
    _said("1", "2", "3", "4", "5"),
    _told("Be brief.", "Hello?"),
    _told("Be brief.\n- and kind", "1", "2", "3", "4", "5"),
)
# What a template may do to messages that no text around them does -> samples that show it.
MORE = {
    "strips blanks around messages": (_said(" Hello \n", " Yes. ", "\nWhy? "),),
    "leaves the reasoning of earlier answers out": (_said("1", "<think>\nHm.\n</think>\n\n2", "3"),),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """The text around messages. None: there is no place for such a message."""

    start: str  # before the user's first message, where no system message stands before it
    end: str  # after the user's last one: the answer follows
    system: tuple[str, str] | None = None  # before a system message, and between it and the user's first
    answer: str | None = None  # between a user's message and an answer that is followed by others
    user: str | None = None  # between an answer and the user's next message
    more: tuple[str, ...] = ()  # what the template does beside that, of `MORE`

    def text(self, messages: list[dict]) -> str:
        """The prompt for the answer to a conversation."""
        parts = [self.start]
        if messages[0]["role"] in SYSTEM:
            assert self.system is not None, "the form has no place for a system message"
            parts = [self.system[0], messages[0]["content"], self.system[1]]
            messages = messages[1:]
        for message in messages[:-1]:
            parts += [message["content"], (self.answer if message["role"] == "user" else self.user) or ""]
        return "".join([*parts, messages[-1]["content"], self.end])

    def without(self, opening: str) -> "Form":
        """The same without a text at its start, which another program writes by itself."""
        system = self.system and (self.system[0].removeprefix(opening), self.system[1])
        return dataclasses.replace(self, start=self.start.removeprefix(opening), system=system)


def of_run(tokenizer, prompt: dict) -> Form | None:
    """The form of a run's prompts; None: they are more than text around messages.

    Args:
        tokenizer: with the chat template that goes along (`prompting.tokenizer_to_ship`).
        prompt: config section `prompt`.
    """
    return of_chat(tokenizer) if prompt["apply_chat_template"] else of_free(prompt["template"], prompt["system"])


def of_chat(tokenizer) -> Form | None:
    """The form of a tokenizer's chat template; None: it is more than text around messages."""

    def render(messages: list[dict]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    form = _found(render)
    if form is None or not all(_same(form, render, messages) for messages in SAMPLES):
        return None
    more = [what for what, samples in MORE.items() if not all(_same(form, render, sample) for sample in samples)]
    return dataclasses.replace(form, more=tuple(more))


def of_free(source: str, system: str | None) -> Form | None:
    """The form of a run's `prompt.template` with its system message; None: it does more to a prompt."""
    template = FreeTemplate(source, False)
    before = [] if system is None else [{"role": "system", "content": system}]

    def render(messages: list[dict]) -> str:
        return template.prompt(Conversation([*before, *messages]))[0].before

    split = _split(render(_said(ASKED)), ASKED)
    if split is None:
        return None
    form = Form(start=split[0], end=split[1])
    samples = [*SAMPLES, *(sample for samples in MORE.values() for sample in samples)]
    prompts = [_said(message["content"]) for sample in samples for message in sample]
    return form if all(_same(form, render, prompt) for prompt in prompts) else None


def _found(render: Callable) -> Form | None:
    once = _split(_asked(render, _said(ASKED)), ASKED)
    chat = _split(_asked(render, _said(ASKED, ANSWERED, ASKED_AGAIN)), ASKED, ANSWERED, ASKED_AGAIN)
    if once is None or chat is None:
        return None
    told = _split(_asked(render, _told(TOLD, ASKED)), TOLD, ASKED)
    system = (told[0], told[1]) if told else None
    return Form(start=once[0], end=once[1], system=system, answer=chat[1], user=chat[2])


def _asked(render: Callable, messages: list[dict]) -> str | None:
    """The text of a conversation; None if the template refuses it (some have no system message)."""
    from jinja2 import TemplateError

    try:
        return render(messages)
    except (TemplateError, UserError):
        return None


def _split(text: str | None, *marks: str) -> list[str] | None:
    """The texts before, between and after marks, which must each be in it once and in order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _same(form: Form, render: Callable, messages: list[dict]) -> bool:
    """Whether the form's text is the template's. A system message that has no place in a form is never asked for."""
    if messages[0]["role"] in SYSTEM and form.system is None:
        return True
    return form.text(messages) == _asked(render, messages)
