"""From a conversation to token ids and labels: what the model reads, and what it learns.

The text is tokenized as a whole, and a token is learned when it lies in an assistant's turn. The
tokens before the last answer are exactly those that generation starts from: where a tokenizer
would merge the end of the prompt with the start of the answer, the two are tokenized apart.

An encoder-decoder model reads the prompt in its encoder, with the special tokens that its tokenizer puts around a text,
and learns the answer and its end in its decoder: two sequences.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from steps.lib.errors import UserError
from steps.lib.reading import reading

IGNORED = -100  # the label that torch's cross_entropy leaves out

Pieces = list[tuple[str, bool]]  # a conversation's text in order, and whether each piece is an assistant's turn


@dataclasses.dataclass
class Encoded:
    """One row. `labels` are not shifted: ``labels[i]`` is ``input_ids[i]`` or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int  # tokens before the last answer
    retokenized: bool  # the turns were tokenized apart: a token would have crossed the border between them

    def cut(self, length: int) -> "Encoded":
        """The first `length` tokens."""
        return Encoded(self.input_ids[:length], self.labels[:length], min(self.prompt_length, length), self.retokenized)

    @property
    def length(self) -> int:
        """What `tokenize.max_length` limits: tokens of the longer of what is read and what is learned."""
        return max(len(self.input_ids), len(self.labels))

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.input_ids)

    @property
    def answer(self) -> list[int]:
        """Labels of the last answer."""
        return self.labels[self.prompt_length :]


class EncodedApart(Encoded):
    """One row of an encoder-decoder model: `input_ids` is the prompt, `labels` the answer and its end, all learned."""

    def cut(self, length: int) -> "EncodedApart":
        """The first `length` tokens of each. What the tokenizer closes a prompt with stays."""
        ids = self.input_ids
        if len(ids) > length:
            ids = [*ids[: length - 1], ids[-1]]
        return EncodedApart(ids, self.labels[:length], len(ids), self.retokenized)

    @property
    def tokens(self) -> int:
        """Tokens that go through encoder and decoder."""
        return len(self.input_ids) + len(self.labels)

    @property
    def answer(self) -> list[int]:
        """All labels."""
        return self.labels


class Encoder:
    """Encodes conversations for one tokenizer and one `prompt` config section.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        stop_ids: token ids that end an answer; the first one found in a turn ends what is learned of it.
        prompt: config section `prompt`.
        apart: for an encoder-decoder model.
    """

    def __init__(self, tokenizer, stop_ids: list[int], prompt: dict, apart: bool = False):
        self.tokenizer, self.stop_ids, self.apart = tokenizer, frozenset(stop_ids), apart
        self.learn_all = prompt["loss_on"] == "all"
        self.template = None
        if not prompt["apply_chat_template"]:
            self.template = _compiled(prompt["template"])
        elif not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: this model has no chat template; choose prompt=plain, "
                "or set prompt.apply_chat_template=false and a prompt.template"
            )
        if apart and self.learn_all:
            raise UserError(
                f"{tokenizer.name_or_path}: prompt.loss_on=all is for causal models, and this one reads the prompt in "
                "an encoder, which predicts nothing; set prompt.loss_on=assistant"
            )

    def _tokens(self, *texts, **options):
        """What the tokenizer makes of texts. Some make its Rust code panic: a regular expression that finds no end."""
        with reading(self.tokenizer.name_or_path):
            return self.tokenizer(*texts, **options)

    def encode(self, messages: list[dict]) -> Encoded:
        """Token ids and labels of one conversation that ends with the assistant's answer."""
        return self.encode_pieces(self.pieces([messages]))[0]

    def pieces(self, conversations: list[list[dict]]) -> list[Pieces]:
        """The text of each conversation, in pieces. With `encode_pieces` much faster than `encode` for each of many.

        Raises:
            UserError: the template refuses a conversation. Of several, it may be the error of a later one.
        """
        if self.template is not None:
            return [self._template_pieces(messages) for messages in conversations]
        turns = [
            [(messages[:index], messages[: index + 1]) for index, turn in enumerate(messages) if _is_answer(turn)]
            for messages in conversations
        ]
        rendered = self._rendered_turns([turn for of_one in turns for turn in of_one])
        return [self._located(itertools.islice(rendered, len(of_one))) for of_one in turns]

    def encode_pieces(self, rows: list[Pieces]) -> list[Encoded]:
        """Token ids and labels of conversations, as `pieces` gives them. The tokenizer uses all cores it may."""
        if self.apart:
            return self._encoded_apart(rows)
        texts = ["".join(piece for piece, _ in pieces) for pieces in rows]
        made = self._tokens(
            texts,
            add_special_tokens=self.template is not None,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return list(map(self._labelled, rows, made["input_ids"], made["offset_mapping"]))

    def encode_pairs(self, rows: list[Pieces]) -> list[tuple[Encoded, Encoded]]:
        """(chosen, rejected), where every two of `rows` are a pair: the same prompt with two answers.

        Both begin with exactly the same prompt tokens: where one of the answers merges with the end of the prompt, both
        are tokenized apart from it.
        """
        encoded = self.encode_pieces(rows)
        pairs = []
        for at in range(0, len(rows), 2):
            pair = encoded[at], encoded[at + 1]
            prompts = [one.input_ids[: one.prompt_length] for one in pair]
            if prompts[0] != prompts[1]:
                pair = self._piecewise(rows[at]), self._piecewise(rows[at + 1])
            pairs.append(pair)
        return pairs

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """What generation starts from, for a conversation that ends with the user's message."""
        if self.apart:
            return self._encoded_apart(self.pieces([[*messages, {"role": "assistant", "content": ""}]]))[0].input_ids
        if self.template is not None:
            return self._first_piece_ids(self._template_pieces([*messages, {"role": "assistant", "content": ""}])[0][0])
        return self._plain_ids(self._render(messages, add_generation_prompt=True))

    def _encoded_apart(self, rows: list[Pieces]) -> list[Encoded]:
        """The last answer in the decoder, everything before it in the encoder."""
        prompts = ["".join(piece for piece, _ in pieces[:-1]) for pieces in rows]
        made = self._tokens(prompts, add_special_tokens=self.template is not None)["input_ids"]
        answers = [pieces[-1][0] for pieces in rows]
        learned = self._tokens(text_target=answers, add_special_tokens=False)["input_ids"]
        return [
            EncodedApart(ids, self._ended(labels), len(ids), False) for ids, labels in zip(made, learned, strict=True)
        ]

    def _ended(self, ids: list[int]) -> list[int]:
        """An answer up to and with its stop token, or one that is added."""
        stop = next((at for at, token in enumerate(ids) if token in self.stop_ids), None)
        return [*ids, self.tokenizer.eos_token_id] if stop is None else ids[: stop + 1]

    def _rendered_turns(self, turns: list[tuple[list[dict], list[dict]]]) -> Iterator[tuple[str, str]]:
        """Of each of the assistant's turns the text before it, and the text with it."""
        if not all(before for before, _ in turns):
            raise UserError(
                f"{self.tokenizer.name_or_path}: a row begins with the assistant's turn, and a chat template answers a "
                "message; set prompt.system, or leave such rows out with data.where"
            )
        try:  # much faster than one by one
            before = self._chat([before for before, _ in turns], add_generation_prompt=True)
            after = self._chat([after for _, after in turns], add_generation_prompt=False)
        except _template_errors():  # one by one, to name the first that is refused
            return ((self._render(before, True), self._render(after, False)) for before, after in turns)
        return zip(before, after, strict=True)

    def _located(self, turns: Iterable[tuple[str, str]]) -> Pieces:
        """The pieces of one conversation."""
        pieces, done = [], ""
        for before, after in turns:
            if not (before.startswith(done) and after.startswith(before)):
                raise UserError(
                    f"{self.tokenizer.name_or_path}: its chat template rewrites earlier turns, so the assistant's "
                    "turns cannot be located; use prompt.apply_chat_template=false with a prompt.template"
                )
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return pieces

    def _chat(self, messages: list, add_generation_prompt: bool):
        """The text of a conversation, or of each of several."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        try:
            return self._chat(messages, add_generation_prompt)
        except _template_errors() as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{self.tokenizer.name_or_path}: its chat template refuses messages of the roles {roles}: "
                f"{' '.join(str(error).split())[:200]}; try prompt.system=null, or prompt=plain"
            ) from None

    def _template_pieces(self, messages: list[dict]) -> Pieces:
        *before, answer = messages
        system = next((message["content"] for message in before if message["role"] == "system"), None)
        turns = [message for message in before if message["role"] != "system"]
        if len(turns) != 1:
            raise UserError(
                f"prompt.template is for one prompt and one answer, but a row has {len(turns) + 1} turns; "
                "use prompt.apply_chat_template=true"
            )
        from jinja2 import TemplateError

        try:
            prompt = self.template.render(system=system, prompt=turns[0]["content"])
        except (TemplateError, ArithmeticError, TypeError) as error:
            raise UserError(f"config: 'prompt.template': {error}; it may use 'prompt' and 'system'") from None
        return [(prompt, False), (answer["content"], True)]

    def _labelled(self, pieces: Pieces, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        """One row, from the tokens of its whole text."""
        turns = _tokens_of_turns(pieces, offsets)
        return self._piecewise(pieces) if turns is None else self._finish(ids, turns, False)

    def _piecewise(self, pieces: Pieces) -> Encoded:
        """One row, each of its pieces tokenized alone, so that no token crosses a border."""
        ids, turns = [], []
        for number, (piece, is_assistant) in enumerate(pieces):
            first = self.template is not None and number == 0
            part = self._first_piece_ids(piece) if first else self._plain_ids(piece)
            if is_assistant:
                turns.append(range(len(ids), len(ids) + len(part)))
            ids += part
        return self._finish(ids, turns, True)

    def _first_piece_ids(self, prompt: str) -> list[int]:
        """A free template's prompt, with what the tokenizer puts before a text but not what it closes one with."""
        ids = self._tokens(prompt)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _plain_ids(self, piece: str) -> list[int]:
        return self._tokens(piece, add_special_tokens=False)["input_ids"]

    def _finish(self, ids: list[int], turns: list[Sequence[int]], retokenized: bool) -> Encoded:
        """Cut behind the last answer's stop token (or add one), and label the assistant's turns up to theirs."""
        last = turns[-1]
        start = last[0] if last else len(ids)
        stop = next((index for index in last if ids[index] in self.stop_ids), None)
        end = stop if stop is not None else last[-1] if last else len(ids) - 1
        ids = ids[: end + 1]
        labels = list(ids) if self.learn_all else self._labels(ids, turns)
        if stop is None:
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        return Encoded(ids, labels, start, retokenized)

    def _labels(self, ids: list[int], turns: list[Sequence[int]]) -> list[int]:
        """Labels for the assistant's turns, each up to and with its first stop token."""
        labels = [IGNORED] * len(ids)
        for turn in turns:
            for index in turn:
                labels[index] = ids[index]
                if ids[index] in self.stop_ids:
                    break
        return labels


def _is_answer(message: dict) -> bool:
    return message["role"] == "assistant"


def _template_errors() -> tuple[type[Exception], ...]:
    """What a chat template that refuses a conversation raises."""
    from jinja2 import TemplateError

    return TemplateError, LookupError, TypeError


def _compiled(template: str):
    """The free template, checked: a misspelt variable would train on rows without their prompt."""
    from jinja2 import StrictUndefined, TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True, undefined=StrictUndefined)
    try:
        used = meta.find_undeclared_variables(environment.parse(template))
    except TemplateSyntaxError as error:
        raise UserError(f"config: 'prompt.template': {error}") from None
    if "prompt" not in used or used - {"prompt", "system"}:
        found = ", ".join(sorted(used)) or "no variable"
        raise UserError(f"config: 'prompt.template' must use 'prompt', and may use 'system' (found {found})")
    return environment.from_string(template)


def _tokens_of_turns(pieces: Pieces, offsets: list[tuple[int, int]]) -> list[list[int]] | None:
    """Which tokens lie in each of the assistant's turns; None when a token crosses the start of one.

    A token lies where it starts. One without characters (added by the tokenizer) lies in none.
    """
    count = len(offsets)
    while count and offsets[count - 1][0] == offsets[count - 1][1]:
        count -= 1  # what closes a text stands at 0; all others are in the order of the text
    turns, position, begin = [], 0, 0
    for piece, is_assistant in pieces:
        border, position = position, position + len(piece)
        if not is_assistant:
            continue
        before, begin = begin, bisect.bisect_left(offsets, (border,), begin, count)
        if any(end > border for _, end in offsets[before:begin]):
            return None
        end = bisect.bisect_left(offsets, (position,), begin, count)
        turns.append([index for index in range(begin, end) if offsets[index][0] != offsets[index][1]])
    return turns
