"""Texts that spell control tokens: ``<|im_end|>`` typed by a user, or named in an answer, is text and no control token.

A tokenizer cannot tell a control token that the template writes from one that a message spells. So before a template
sees a message, each spelling in it is replaced by two characters that occur in no text (`HIDDEN` and the spelling's
number); then the text is tokenized as if they were control tokens, which splits it at the same places, and last their
tokens are replaced by those of the mere text.
"""

import collections
import functools
import json
import re
from collections.abc import Callable
from typing import Any

from temper.data.conversations import Conversation
from temper.errors import UserError

HIDDEN = "\ufdd0"  # a character for internal use, which no text has (Unicode: noncharacter)
FIRST = 0xF0000  # the character for the first spelling, in an area for private use
TAG = re.compile(r"</?[^<>\s]+>")


class SpecialText:
    """Hides spellings of control tokens in messages, and tokenizes them as text.

    Control tokens are the special tokens and those that end answers. In messages of others than the assistant, other
    added tokens that look like tags (``<tool_call>``) are text as well.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        stop_ids: token ids that end an answer.
    """

    def __init__(self, tokenizer, stop_ids):
        self.tokenizer = tokenizer
        added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.content}
        added.pop(tokenizer.unk_token_id, None)  # stands for unknown words wherever they are, and controls nothing
        special = {token.content: index for index, token in added.items() if token.special or index in stop_ids}
        tags = {token.content: index for index, token in added.items() if TAG.fullmatch(token.content)}
        self.ids = {**tags, **special}
        # Tokenizers take the longest of several added tokens that begin at one place.
        self.spellings = [HIDDEN, *sorted(self.ids, key=len, reverse=True)]
        self.of_assistant = any_of([HIDDEN, *special])
        self.of_others = any_of(self.spellings)
        self.control = frozenset(self.ids.values())

    # --- before the template ----------------------------------------------------------------------------

    def hidden(self, conversation: Conversation) -> Conversation:
        """The conversation with all spellings replaced; the same object if there are none."""
        if not self.spelt(conversation):
            return conversation
        messages = [
            {
                name: value if name == "role" else self._replaced(value, self._pattern(message, name))
                for name, value in message.items()
            }
            for message in conversation.messages
        ]
        return conversation._replace(messages=messages, tools=self._replaced(conversation.tools, self.of_others))

    def spelt(self, conversation: Conversation) -> bool:
        """Whether a message spells a control token."""
        for message in conversation.messages:
            if self._pattern(message, "content").search(message["content"]):
                return True
            for name, value in message.items():
                if name not in ("role", "content", "train") and self._found(value, self._pattern(message, name)):
                    return True
        return bool(conversation.tools) and self._found(conversation.tools, self.of_others)

    def _pattern(self, message: dict, name: str) -> re.Pattern:
        own = message["role"] == "assistant" and name in ("content", "reasoning_content")
        return self.of_assistant if own else self.of_others

    @staticmethod
    def _found(value, pattern: re.Pattern) -> bool:
        return bool(pattern.search(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))

    def _replaced(self, value: Any, pattern: re.Pattern) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: HIDDEN + chr(FIRST + self.spellings.index(found[0])), value)
        if isinstance(value, list):
            return [self._replaced(item, pattern) for item in value]
        if isinstance(value, dict):
            return {self._replaced(name, pattern): self._replaced(item, pattern) for name, item in value.items()}
        return value

    # --- behind it ----------------------------------------------------------------------------------------

    def shown(self, text: str) -> str:
        """The text with all spellings back."""
        return _HIDING.sub(lambda found: self.spellings[ord(found[1]) - FIRST], text) if HIDDEN in text else text

    def as_text(self, text: str, ids: list[int], first: int = 0) -> tuple[list[int], Callable[[int], int]]:
        """The tokens of a text, in which those of all spellings are replaced.

        Args:
            text: with hidden spellings, whose shown text has been tokenized to `ids`.
            first: tokens of `ids` before those of the text.

        Returns:
            (tokens, where a token is now, from its place before; also for the place behind the last one)

        Raises:
            UserError: the tokenizer does not make a token of each spelling.
        """
        if HIDDEN not in text:
            return ids, int
        order = [(found[1] is not None, found[0]) for found in self._control_or_hidden.finditer(text)]
        spelt = [(hidden, self.spellings[ord(found[1]) - FIRST] if hidden else found) for hidden, found in order]
        wanted = collections.deque((hidden, spelling) for hidden, spelling in spelt if spelling != HIDDEN)
        made = ids[:first]
        places = list(range(first))
        for token in ids[first:]:
            places.append(len(made))
            if wanted and token == self.ids[wanted[0][1]]:
                hidden, spelling = wanted.popleft()
                made += self._ids_as_text(spelling) if hidden else [token]
            else:  # no control token; or one that the tokenizer adds behind a text, or the one for unknown words
                made.append(token)
        if wanted:
            raise UserError(
                f"a text spells {wanted[0][1]!r}, which this tokenizer takes apart in another way: leave such rows out "
                "with data.where, or set prompt.allow_special_text=true"
            )
        places.append(len(made))
        return made, places.__getitem__

    @functools.cached_property
    def _control_or_hidden(self) -> re.Pattern:
        return re.compile(f"{HIDDEN}(.)|{self.of_others.pattern}", re.DOTALL)

    @functools.cache  # noqa: B019 - lives as long as its encoder
    def _ids_as_text(self, spelling: str) -> list[int]:
        """The tokens of a spelling as text, none of which is a control token."""
        ids = self._plain(spelling)
        if not self.control.isdisjoint(ids):
            ids = [token for character in spelling for token in self._plain(character)]
        return ids

    def _plain(self, text: str) -> list[int]:
        """The tokens of a text within a line, without added tokens."""
        before = self._without_added.encode("a", add_special_tokens=False).ids
        both = self._without_added.encode("a" + text, add_special_tokens=False).ids
        if both[: len(before)] == before:
            return both[len(before) :]
        return self._without_added.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _without_added(self):
        from tokenizers import Tokenizer

        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(content))


_HIDING = re.compile(f"{HIDDEN}(.)", re.DOTALL)


def any_of(spellings: list[str]) -> re.Pattern:
    """Finds any of some texts, of several that begin at one place the longest."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or "(?!)")
