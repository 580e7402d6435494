"""From a conversation to text by the config's `prompt.template`; by the model's own: see `temper.data.chat_template`.

A prompt is always the text before an answer, and rendered only there, for training, evaluation, chat, predict and
Python.
"""

from typing import NamedTuple

from temper.data import templates
from temper.data.conversations import SYSTEM, Conversation, with_thoughts_in_content, without_system
from temper.errors import UserError

LEAVE_OUT = "leave such rows out with data.where"


class Turn(NamedTuple):
    """One of the assistant's turns. A text is that of its turns in order."""

    before: str  # all text between the assistant's last turn and this one
    answer: str
    closing: str = ""  # what the template ends a turn with, up to the token that ends answers
    learned: bool = True
    place: int = -1  # of the message in the conversation
    written: bool = False  # the answer is as the row says it, because the template would leave out its reasoning


def text_of(turns: list[Turn]) -> str:
    """The whole text."""
    return "".join(part for turn in turns for part in turn[:3])


class FreeTemplate:
    """`prompt.template`: one prompt, one answer.

    Args:
        chat_template: whether the model has one, which is what to use for several turns.
    """

    keeps_history = reads_clock = rich = False
    opening = ""

    def __init__(self, source: str, chat_template: bool):
        self.template, self.variables = _compiled(source)
        self.chat_template = chat_template

    def texts(self, conversations: list[Conversation]) -> list[list[list[Turn]]]:
        """The one text of each conversation, which ends with the assistant's answer."""
        prompts = self._prompts([conversation.upto(-1) for conversation in conversations])
        return [
            [[Turn(prompt, with_thoughts_in_content(messages[-1])["content"], place=len(messages) - 1)]]
            for prompt, (messages, *_) in zip(prompts, conversations, strict=True)
        ]

    def prompt(self, conversation: Conversation) -> list[Turn]:
        """The prompt for an answer to a conversation, as a last turn without an answer."""
        return [Turn(self._prompts([conversation])[0], "")]

    def _prompts(self, conversations: list[Conversation]) -> list[str]:
        variables = list(map(self._variables, conversations))
        what = "config: 'prompt.template'"
        with templates.bounded(what):
            texts = [self.template.render(values) for values in variables]
        return [templates.checked(text, values, what) for text, values in zip(texts, variables, strict=True)]

    def _variables(self, conversation: Conversation) -> dict:
        messages, tools, more = conversation
        if tools or more:
            name = "tools" if tools else "chat_template_kwargs"
            raise UserError(
                f"prompt.template does not show '{name}': use prompt.apply_chat_template=true with a model whose chat "
                f"template does, or drop them: data.ignore_fields=[{name}]"
            )
        system = next((message["content"] for message in messages if message["role"] in SYSTEM), None)
        turns = without_system(messages)
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
