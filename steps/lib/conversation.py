"""From a conversation to token ids and labels: what the model reads, and what it learns.

The text is tokenized as a whole, and a token is learned when it lies in an assistant's turn. The
tokens before the last answer are exactly those that generation starts from: where a tokenizer
would merge the end of the prompt with the start of the answer, the two are tokenized apart.

An encoder-decoder model reads the prompt in its encoder, with the special tokens that its tokenizer puts around a text,
and learns the answer and its end in its decoder: two sequences.
"""

import dataclasses

from steps.lib.errors import UserError

IGNORED = -100  # the label that torch's cross_entropy leaves out


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

    def encode(self, messages: list[dict], piecewise: bool = False) -> Encoded:
        """Token ids and labels of one conversation that ends with the assistant's answer.

        Args:
            piecewise: tokenize the turns apart even where no token would cross a border.
        """
        pieces = self._pieces(messages)
        if self.apart:
            return self._encoded_apart(pieces)
        text = "".join(piece for piece, _ in pieces)
        encoding = self.tokenizer(text, add_special_tokens=self.template is not None, return_offsets_mapping=True)
        spans = _learned_spans(pieces)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        retokenized = piecewise or _crosses_border(offsets, spans)
        if retokenized:
            ids, learned = self._piecewise(pieces)
        else:
            learned = [_span_of(offset, spans) for offset in offsets]
        return self._finish(ids, learned, len(spans), retokenized)

    def encode_pair(self, messages: list[dict], rejected: str) -> tuple[Encoded, Encoded]:
        """The conversation with its own (chosen) and with the rejected answer, after exactly the same prompt tokens.

        Where one of the answers merges with the end of the prompt, both are tokenized apart from it.
        """
        other = [*messages[:-1], {"role": "assistant", "content": rejected}]
        pair = self.encode(messages), self.encode(other)
        prompts = [encoded.input_ids[: encoded.prompt_length] for encoded in pair]
        if prompts[0] != prompts[1]:
            pair = self.encode(messages, piecewise=True), self.encode(other, piecewise=True)
        return pair

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """What generation starts from, for a conversation that ends with the user's message."""
        if self.apart:
            return self._encoded_apart(self._pieces([*messages, {"role": "assistant", "content": ""}])).input_ids
        if self.template is not None:
            return self._first_piece_ids(self._template_pieces([*messages, {"role": "assistant", "content": ""}])[0][0])
        return self._plain_ids(self._render(messages, add_generation_prompt=True))

    def _encoded_apart(self, pieces) -> EncodedApart:
        """The last answer in the decoder, everything before it in the encoder."""
        *before, (answer, _) = pieces
        prompt = "".join(piece for piece, _ in before)
        ids = self.tokenizer(prompt, add_special_tokens=self.template is not None)["input_ids"]
        labels = self.tokenizer(text_target=answer, add_special_tokens=False)["input_ids"]
        stop = next((at for at, token in enumerate(labels) if token in self.stop_ids), None)
        labels = [*labels, self.tokenizer.eos_token_id] if stop is None else labels[: stop + 1]
        return EncodedApart(ids, labels, len(ids), False)

    def _pieces(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """The text as (piece, is it the assistant's) in order."""
        if self.template is not None:
            return self._template_pieces(messages)
        pieces, done = [], ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            after = self._render(messages[: index + 1], add_generation_prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise UserError(
                    f"{self.tokenizer.name_or_path}: its chat template rewrites earlier turns, so the assistant's "
                    "turns cannot be located; use prompt.apply_chat_template=false with a prompt.template"
                )
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        return pieces

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, LookupError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{self.tokenizer.name_or_path}: its chat template refuses messages of the roles {roles}: "
                f"{' '.join(str(error).split())[:200]}; try prompt.system=null, or prompt=plain"
            ) from None

    def _template_pieces(self, messages: list[dict]) -> list[tuple[str, bool]]:
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

    def _piecewise(self, pieces) -> tuple[list[int], list[int | None]]:
        """Tokenize each piece alone, so that no token crosses a border."""
        ids, learned, turn = [], [], 0
        for number, (piece, is_assistant) in enumerate(pieces):
            first = self.template is not None and number == 0
            part = self._first_piece_ids(piece) if first else self._plain_ids(piece)
            ids += part
            learned += [turn if is_assistant else None] * len(part)
            turn += is_assistant
        return ids, learned

    def _first_piece_ids(self, prompt: str) -> list[int]:
        """A free template's prompt, with what the tokenizer puts before a text but not what it closes one with."""
        ids = self.tokenizer(prompt)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _plain_ids(self, piece: str) -> list[int]:
        return self.tokenizer(piece, add_special_tokens=False)["input_ids"]

    def _finish(self, ids, learned, turns: int, retokenized: bool) -> Encoded:
        """Cut behind the last answer's stop token (or add one), and turn `learned` into labels."""
        last = [index for index, turn in enumerate(learned) if turn == turns - 1]
        start = last[0] if last else len(ids)
        stop = next((index for index in last if ids[index] in self.stop_ids), None)
        if stop is None:
            end = last[-1] + 1 if last else len(ids)
            ids, learned = [*ids[:end], self.tokenizer.eos_token_id], [*learned[:end], turns - 1]
        else:
            ids, learned = ids[: stop + 1], learned[: stop + 1]
        labels = list(ids) if self.learn_all else _labels(ids, learned, self.stop_ids)
        return Encoded(ids, labels, start, retokenized)


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


def _learned_spans(pieces) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns."""
    spans, position = [], 0
    for piece, is_assistant in pieces:
        if is_assistant:
            spans.append((position, position + len(piece)))
        position += len(piece)
    return spans


def _span_of(offset: tuple[int, int], spans) -> int | None:
    """Which assistant turn a token lies in. A token without characters (added by the tokenizer) lies in none."""
    start, end = offset
    if start == end:
        return None
    return next((turn for turn, (first, last) in enumerate(spans) if first <= start < last), None)


def _crosses_border(offsets, spans) -> bool:
    starts = {first for first, _ in spans}
    return any(start < border < end for start, end in offsets for border in starts)


def _labels(ids, learned, stop_ids) -> list[int]:
    """Labels for the assistant's turns, each up to and with its first stop token."""
    labels, stopped = [], set()
    for token, turn in zip(ids, learned, strict=True):
        if turn is None or turn in stopped:
            labels.append(IGNORED)
            continue
        labels.append(token)
        if token in stop_ids:
            stopped.add(turn)
    return labels
