"""From a conversation to token ids and labels: what the model reads, and what it learns.

Generation, here and in other programs, starts from the text before an answer, tokenized alone. Training must read the
same tokens there. So a conversation is tokenized as a whole only if that leaves the tokens before each answer as they
are without it. Otherwise (a token crosses the border, or the tokenizer looks ahead: GPT-2 makes one token of two line
ends, but two of them before a word), prompt and answer are tokenized apart. Training, evaluation, chat, predict and
Python share this code, so the tokens before an answer never depend on what follows.

An encoder-decoder model reads the prompt in its encoder, with the special tokens that its tokenizer puts around a text,
and learns the answer and its end in its decoder: two sequences.
"""

import bisect
import dataclasses

from temper.data.chat_template import ChatTemplate
from temper.data.columns import IGNORED, answer_text
from temper.data.conversations import Conversation, as_conversation
from temper.data.rendering import FreeTemplate, Turn, text_of
from temper.data.special_text import HIDDEN, SpecialText, any_of
from temper.errors import UserError
from temper.model.reading import reading

Pieces = list[Turn]  # a text: the assistant's turns, each with the text before it


@dataclasses.dataclass
class Encoded:
    """One row. `labels` are not shifted: ``labels[i]`` is ``input_ids[i]`` or IGNORED."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int  # tokens before the last answer
    retokenized: bool  # prompt and answer were tokenized apart
    ended_early: bool = False  # an answer's own text holds a token that ends answers, so the rest cannot be learned

    def cut(self, length: int) -> "Encoded":
        """The first `length` tokens."""
        start = min(self.prompt_length, length)
        return dataclasses.replace(
            self, input_ids=self.input_ids[:length], labels=self.labels[:length], prompt_length=start
        )

    @property
    def length(self) -> int:
        """The length that `tokenize.max_length` limits: that of input or labels, whichever is longer."""
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
        """The first `length` tokens of each. Keeps the token with which the tokenizer closes a prompt."""
        ids = self.input_ids
        if len(ids) > length:
            ids = [*ids[: length - 1], ids[-1]]
        return dataclasses.replace(self, input_ids=ids, labels=self.labels[:length], prompt_length=len(ids))

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
        prompt: config section `prompt`; for a finished run with the template's `opening` (see `FinishedRun.prompt`).
        apart: whether the model is an encoder-decoder.
    """

    def __init__(self, tokenizer, stop_ids: list[int], prompt: dict, apart: bool = False):
        self.tokenizer, self.stop_ids, self.apart = tokenizer, frozenset(stop_ids), apart
        self.learn_all = prompt["loss_on"] == "all"
        self.special = SpecialText(tokenizer, self.stop_ids)
        self.allow_special_text = bool(prompt.get("allow_special_text"))
        self.free = not prompt["apply_chat_template"]
        if self.free:
            self.renderer: FreeTemplate | ChatTemplate = FreeTemplate(prompt["template"], bool(tokenizer.chat_template))
        elif not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: this model has no chat template; choose prompt=plain, "
                "or set prompt.apply_chat_template=false and a prompt.template"
            )
        else:
            self.renderer = ChatTemplate(tokenizer, prompt, any_of(self._ends_of_answers()).search)
        if apart and self.learn_all:
            raise UserError(
                f"{tokenizer.name_or_path}: prompt.loss_on=all is for causal models, and this one reads the prompt in "
                "an encoder, which predicts nothing; set prompt.loss_on=assistant"
            )
        self.first_ids = _ids_before(tokenizer) if self.free else []
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self.stops_of: dict[str, int] = {}

    def _tokens(self, *texts, **options):
        """Call the tokenizer. Some texts make its Rust code panic (a regular expression that backtracks too much)."""
        with reading(self.tokenizer.name_or_path):
            return self.tokenizer(*texts, **options)

    def encode(self, messages: list[dict]) -> Encoded:
        """Token ids and labels of the last answer of a conversation, and of earlier ones in the same text."""
        return self.encode_pieces([self.pieces([Conversation(messages)])[0][-1]])[0]

    def pieces(self, conversations: list[Conversation]) -> list[list[Pieces]]:
        """The texts of each conversation, in pieces; its last answer is in the last text.

        For many rows, with `encode_pieces`, much faster than `encode`.

        Raises:
            UserError: the template refuses a conversation; not necessarily the first faulty one.
        """
        texts = self.renderer.texts([self._hidden(conversation) for conversation in conversations])
        return [found[-1:] for found in texts] if self.learn_all or self.apart else texts

    def spelling(self, conversations: list[Conversation], texts: list[list[Pieces]]) -> list[int]:
        """Which conversations (their places in the list) spell a control token, given the texts of each."""
        if self.allow_special_text:
            return [at for at, conversation in enumerate(conversations) if self.special.spelt(conversation)]
        return [
            at
            for at, found in enumerate(texts)
            if any(HIDDEN in turn.before or HIDDEN in turn.answer for turn in found[-1])
        ]

    def _hidden(self, conversation: Conversation) -> Conversation:
        return conversation if self.allow_special_text else self.special.hidden(conversation)

    def encode_pieces(self, rows: list[Pieces]) -> list[Encoded]:
        """Token ids and labels of conversations, given as by `pieces`. The tokenizer may use several cores."""
        if self.apart:
            return self._encoded_apart(rows)
        return [self._labelled(turns, *made) for turns, made in zip(rows, self._tokenized(rows), strict=True)]

    def encode_pairs(self, rows: list[Pieces]) -> list[tuple[Encoded, Encoded]]:
        """(chosen, rejected) for each two consecutive `rows`, which have the same prompt."""
        encoded = self.encode_pieces(rows)
        return list(zip(encoded[::2], encoded[1::2], strict=True))

    def prompt_ids(self, conversation: Conversation | list[dict]) -> list[int]:
        """What generation starts from, for a conversation (or its messages) that ends before the assistant's turn.

        Equal to the beginning of a training row: ``input_ids[:prompt_length]``.
        """
        turns = self.renderer.prompt(self._hidden(as_conversation(conversation)))
        if self.apart:
            return self._encoder_ids([text_of(turns)])[0]
        ids, answers, _ = self._tokenized([turns])[0]
        return ids[: answers[-1].start]

    def text(self, ids: list[int]) -> str:
        """The text of an answer's tokens, up to the one that ends it, as it is shown and evaluated."""
        return answer_text(self.tokenizer, ids, self.stop_ids)

    def _ends_of_answers(self) -> list[str]:
        """The texts of the tokens that end answers."""
        return [text for text in self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)) if text]

    # --- encoder-decoder --------------------------------------------------------------------------

    def _encoded_apart(self, rows: list[Pieces]) -> list[Encoded]:
        """The last answer in the decoder, everything before it in the encoder."""
        prompts = self._encoder_ids([text_of(turns[:-1]) + turns[-1].before for turns in rows])
        answers = [turns[-1].answer + turns[-1].closing for turns in rows]
        shown = list(map(self.special.shown, answers))
        made = self._tokens(text_target=shown, add_special_tokens=False)["input_ids"]
        learned = [self.special.as_text(text, ids)[0] for text, ids in zip(answers, made, strict=True)]
        return [
            EncodedApart(ids, self._ended(labels), len(ids), False, self._ends_early(turns[-1], labels))
            for turns, ids, labels in zip(rows, prompts, learned, strict=True)
        ]

    def _encoder_ids(self, prompts: list[str]) -> list[list[int]]:
        made = self._tokens(list(map(self.special.shown, prompts)), add_special_tokens=self.free)["input_ids"]
        first = len(self.first_ids)
        return [self.special.as_text(text, ids, first)[0] for text, ids in zip(prompts, made, strict=True)]

    def _ended(self, ids: list[int]) -> list[int]:
        """An answer up to and including its stop token, which is added if there is none."""
        stop = next((at for at, token in enumerate(ids) if token in self.stop_ids), None)
        return [*ids, self.tokenizer.eos_token_id] if stop is None else ids[: stop + 1]

    # --- causal models: one sequence --------------------------------------------------------------

    def _tokenized(self, rows: list[Pieces]) -> list[tuple[list[int], list[range], bool]]:
        """For each row: its tokens, the range of tokens of each turn, and whether it was tokenized apart.

        Tokenizing each prompt once more, to compare, would double the work. Instead all texts are tokenized in one
        batch, and of each prompt only the part behind its last added token is tokenized again (see `_parted`). That
        part is short and mostly the same in all rows, and each distinct text is tokenized once.
        """
        hidden = list(map(text_of, rows))
        rows = [self._shown(turns) if HIDDEN in text else turns for turns, text in zip(rows, hidden, strict=True)]
        texts = list(map(text_of, rows))
        made = self._tokens(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        parted = list(map(self._parted, rows, texts, made["input_ids"], made["offset_mapping"]))

        known = _Known(self._tokens, dict(zip(texts, made["input_ids"], strict=True)))
        known.learn(tail for parts in parted for _, tail, _ in parts)
        found = [_fitting(ids, parts, known) for ids, parts in zip(made["input_ids"], parted, strict=True)]

        # Rows that do not fit are tokenized apart; their answers first, in one batch.
        known.learn(turns[-1].answer for turns, answers in zip(rows, found, strict=True) if answers is None)

        encoded = []
        for turns, text, ids, answers in zip(rows, hidden, made["input_ids"], found, strict=True):
            row = (ids, answers, False) if answers is not None else self._cut_apart(turns, known)
            encoded.append(self._behind_first(*self._spelt_as_text(text, *row)))
        return encoded

    def _shown(self, turns: Pieces) -> Pieces:
        """The turns with all hidden spellings of control tokens back."""
        show = self.special.shown
        return [
            turn._replace(before=show(turn.before), answer=show(turn.answer), closing=show(turn.closing))
            for turn in turns
        ]

    def _spelt_as_text(self, text: str, ids: list[int], answers: list[range], cut: bool) -> tuple:
        """The row with the tokens of text where `text` hides spellings of control tokens."""
        ids, now = self.special.as_text(text, ids)
        return ids, [range(now(turn.start), now(turn.stop)) for turn in answers], cut

    def _behind_first(self, ids: list[int], answers: list[range], cut: bool) -> tuple[list[int], list[range], bool]:
        """The row behind the tokens that the tokenizer puts before each text."""
        shift = len(self.first_ids)
        if shift:
            ids, answers = self.first_ids + ids, [range(turn.start + shift, turn.stop + shift) for turn in answers]
        return ids, answers, cut

    def _parted(self, turns: Pieces, text: str, ids: list[int], offsets: list[tuple[int, int]]):
        """What `_fitting` compares, for each turn of a row tokenized as a whole: (token, text, token).

        The tokens before an answer must equal those of the text before it alone. An added token (most special tokens
        are) splits a text: the text before it does not affect the tokens behind it. So it is enough to compare what
        follows the last added token. In most chats that is a few words, and the same in all rows. The three are the
        first token of that text, the text, and the first token behind the turn.
        """
        parts = []
        for start, end in _places(turns):
            first = bisect.bisect_left(offsets, (start,))
            added = (at for at in reversed(range(first)) if ids[at] in self.added and offsets[at][1] <= start)
            token = next(added, 0)
            parts.append((token, text[offsets[token][0] if token else 0 : start], bisect.bisect_left(offsets, (end,))))
        # The last turn extends to the end. Offsets may leave out blanks there, which would then be cut off.
        return [*parts[:-1], (*parts[-1][:2], len(ids))]

    def _cut_apart(self, turns: Pieces, known: "_Known") -> tuple[list[int], list[range], bool]:
        """A row that is cut before each answer that would change the tokens before it, as `_tokenized` has rows.

        Only these get a cut, because it gives tokens that the model has rarely seen. Whether one is needed depends on
        the cuts before it, so the turns are tried in order, each with the text that follows it.
        """
        chunks, starts = [""], []
        settled = 0  # tokens in all chunks but the last
        followers = [*(turn.before for turn in turns[1:]), ""]
        for turn, after in zip(turns, followers, strict=True):
            chunks[-1] += turn.before
            prompt = known[chunks[-1]]
            starts.append(settled + len(prompt))

            if known[chunks[-1] + turn.answer + turn.closing + after][: len(prompt)] != prompt:
                settled += len(prompt)
                chunks.append("")
            chunks[-1] += turn.answer + turn.closing

        ids = [token for chunk in chunks for token in known[chunk]]
        ends = [len(ids)] if len(turns) == 1 else self._ends(turns, chunks)
        answers = [range(start, max(start, end)) for start, end in zip(starts, ends, strict=True)]
        return ids, answers, len(chunks) > 1

    def _ends(self, turns: Pieces, chunks: list[str]) -> list[int]:
        """The first token behind each turn, in a text tokenized in chunks."""
        made, position, starts = self._tokens(chunks, add_special_tokens=False, return_offsets_mapping=True), 0, []
        for chunk, offsets in zip(chunks, made["offset_mapping"], strict=True):
            starts += [position + start for start, _ in offsets]
            position += len(chunk)
        return [*(bisect.bisect_left(starts, end) for _, end in _places(turns)[:-1]), len(starts)]

    def _labelled(self, turns: Pieces, ids: list[int], answers: list[range], apart: bool) -> Encoded:
        """Cut behind the last answer's stop token (or add one), and label each assistant's turn up to its own."""
        early = any(
            self._ends_early(turn, [ids[at] for at in answer]) for turn, answer in zip(turns, answers, strict=True)
        )
        last = answers[-1]
        stop = next((index for index in last if ids[index] in self.stop_ids), None)
        ids = ids[: last.stop if stop is None else stop + 1]
        learned = [answer for turn, answer in zip(turns, answers, strict=True) if turn.learned]
        labels = list(ids) if self.learn_all else self._labels(ids, learned)
        if stop is None:
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        return Encoded(ids, labels, last.start, apart, early)

    def _labels(self, ids: list[int], answers: list[range]) -> list[int]:
        """Labels for the assistant's turns, each up to and including its first stop token."""
        labels = [IGNORED] * len(ids)
        for answer in answers:
            for index in answer:
                if index == len(ids):
                    break
                labels[index] = ids[index]
                if ids[index] in self.stop_ids:
                    break
        return labels

    # --- tokens that end answers --------------------------------------------------------------------

    def _ends_early(self, turn: Turn, ids: list[int]) -> bool:
        """Whether an answer's own text has a token that ends answers anywhere but at its end."""
        count = sum(token in self.stop_ids for token in ids)
        if not count or (count == 1 and turn.closing):
            return False
        return count > self._stops(turn.closing) + self._stops_at_the_end(turn.answer)

    def _stops(self, text: str) -> int:
        """Number of tokens that end answers in a text that closes a turn."""
        if text not in self.stops_of:
            ids = self._tokens(text, add_special_tokens=False)["input_ids"] if text else []
            self.stops_of[text] = sum(token in self.stop_ids for token in ids)
        return self.stops_of[text]

    def _stops_at_the_end(self, answer: str) -> int:
        """Number of such tokens at the end of an answer."""
        texts, count, rest = self._ends_of_answers(), 0, answer.rstrip()
        while stop := next((text for text in texts if rest.endswith(text)), None):
            count, rest = count + 1, rest.removesuffix(stop).rstrip()
        return count


class _Known(dict):
    """Texts and their tokens."""

    def __init__(self, tokens, known: dict[str, list[int]]):
        super().__init__(known)
        self.tokens = tokens

    def learn(self, texts) -> None:
        """Tokenize all new texts, in one batch."""
        new = [text for text in dict.fromkeys(texts) if text not in self]
        if new:
            arguments = {"return_attention_mask": False, "return_token_type_ids": False}
            self.update(zip(new, self.tokens(new, add_special_tokens=False, **arguments)["input_ids"], strict=True))

    def __missing__(self, text: str) -> list[int]:
        self.learn([text])
        return self[text]


def _fitting(ids: list[int], parts: list[tuple[int, str, int]], known: _Known) -> list[range] | None:
    """The range of tokens of each turn (`parts` as by `_parted`). None: some answer changes the tokens before it."""
    answers = []
    for token, text, end in parts:
        start = token + len(known[text])
        if ids[token:start] != known[text]:
            return None
        answers.append(range(start, max(start, end)))
    return answers


def _places(turns: Pieces) -> list[tuple[int, int]]:
    """(start, end) of each turn in the text."""
    places, position = [], 0
    for before, answer, closing, *_ in turns:
        start = position + len(before)
        position = start + len(answer) + len(closing)
        places.append((start, position))
    return places


def _ids_before(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text. Those it puts behind one do not belong before an answer."""
    made, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(at for at in range(len(made)) if made[at : at + len(plain)] == plain)
    return made[:start]
