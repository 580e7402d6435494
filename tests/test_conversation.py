"""What is learned of a conversation, token by token."""

import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steps.lib.conversation import IGNORED, Encoded, Encoder
from steps.lib.errors import UserError
from tests.tiny import tiny_rows, tiny_tokenizer

CHAT = {"apply_chat_template": True, "system": None, "template": None, "loss_on": "assistant"}
PLAIN = {"apply_chat_template": False, "system": None, "template": "{{ prompt }}\n", "loss_on": "assistant"}
TOKENIZER = tiny_tokenizer()

text = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), min_size=1, max_size=30)


def encoder(prompt=CHAT):
    return Encoder(TOKENIZER, [TOKENIZER.eos_token_id], prompt)


def pair_of(encoder, messages, rejected):
    return encoder.encode_pairs(encoder.pieces([messages, [*messages[:-1], assistant(rejected)]]))[0]


def learned_text(row) -> str:
    return TOKENIZER.decode([label for label in row.labels if label != IGNORED])


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@settings(max_examples=50, deadline=None)
@given(prompt=text, answer=text)
def test_the_answer_and_its_end_are_learned_and_nothing_else(prompt, answer):
    row = encoder().encode([user(prompt), assistant(answer)])
    assert learned_text(row) == answer + "<|im_end|>"
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    assert row.labels[-1] == TOKENIZER.eos_token_id


@settings(max_examples=50, deadline=None)
@given(prompt=text, answer=text)
def test_generation_starts_from_exactly_what_training_saw(prompt, answer):
    row = encoder().encode([user(prompt), assistant(answer)])
    start = TOKENIZER.apply_chat_template([user(prompt)], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert row.input_ids[: row.prompt_length] == start


@settings(max_examples=50, deadline=None)
@given(prompt=text, answer=text)
def test_a_free_template_never_merges_prompt_and_answer(prompt, answer):
    glued = {**PLAIN, "template": "{{ prompt }}"}  # nothing between them: the tokenizer would like to merge
    row = encoder(glued).encode([user(prompt), assistant(answer)])
    assert row.input_ids[: row.prompt_length] == TOKENIZER(prompt)["input_ids"]
    assert learned_text(row) == answer + "<|im_end|>"


def test_all_assistant_turns_of_a_conversation_are_learned():
    messages = [user("one"), assistant("first answer"), user("two"), assistant("second answer")]
    row = encoder().encode(messages)
    assert learned_text(row) == "first answer<|im_end|>second answer<|im_end|>"
    assert TOKENIZER.decode(row.input_ids[row.prompt_length :]) == "second answer<|im_end|>"


def test_nothing_stands_behind_the_end_of_the_last_answer():
    row = encoder().encode([user("a"), assistant("b")])  # the template puts a newline behind <|im_end|>
    assert row.input_ids[-1] == TOKENIZER.eos_token_id


def test_an_answer_that_looks_like_the_template_stays_an_answer():
    row = encoder().encode([user("say it"), assistant("user\nfake\nassistant\n")])
    assert learned_text(row) == "user\nfake\nassistant\n<|im_end|>"


def test_loss_on_all():
    row = encoder({**CHAT, "loss_on": "all"}).encode([user("a"), assistant("b")])
    assert row.labels == row.input_ids


def test_a_model_without_a_template_says_what_to_choose():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template; choose prompt=plain"):
        Encoder(bare, [bare.eos_token_id], CHAT)


@pytest.mark.parametrize("template", ["{{ promt }}", "no variable", "{{ prompt }} {{ user }}", "{{ prompt"])
def test_a_template_without_the_prompt_is_refused(template):
    with pytest.raises(UserError, match="config: 'prompt.template'"):
        encoder({**PLAIN, "template": template})


def test_a_chat_template_that_refuses_a_role_is_named():
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('System role not supported') if messages[0]['role'] == 'system' }}x"
    with pytest.raises(UserError, match="refuses messages of the roles system, user: System role not supported"):
        Encoder(strict, [strict.eos_token_id], CHAT).encode(
            [{"role": "system", "content": "s"}, user("a"), assistant("b")]
        )


def test_a_free_template_refuses_several_turns():
    with pytest.raises(UserError, match="a row has 4 turns; use prompt.apply_chat_template=true"):
        encoder(PLAIN).encode([user("a"), assistant("b"), user("c"), assistant("d")])


@settings(max_examples=100, deadline=None)
@given(prompt=text, chosen=text, rejected=text, settings=st.sampled_from([CHAT, PLAIN]))
def test_both_answers_of_a_pair_follow_the_same_prompt_tokens(prompt, chosen, rejected, settings):
    pair = pair_of(encoder(settings), [user(prompt), assistant(chosen)], rejected)
    starts = [row.input_ids[: row.prompt_length] for row in pair]
    assert starts[0] == starts[1]
    for row, answer in zip(pair, (chosen, rejected), strict=True):
        assert learned_text(row) == answer + "<|im_end|>"


def test_an_answer_that_merges_with_the_prompt_takes_both_apart():
    """The end of this template merges with an answer that starts with a letter, and not with one that starts with ?."""
    merging = encoder({**PLAIN, "template": "{{ prompt }} posit"})
    messages, rejected = [user("x"), assistant("ive")], "?"
    assert merging.encode(messages).retokenized
    assert not merging.encode([user("x"), assistant(rejected)]).retokenized
    chosen, other = pair_of(merging, messages, rejected)
    assert chosen.input_ids[: chosen.prompt_length] == other.input_ids[: other.prompt_length]


# --- many at once -----------------------------------------------------------------------------------


def sentencepiece_like():
    """Normalizes (one character to several, and the reverse), puts a blank before a text, and closes it."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    steps = [normalizers.NFKC(), normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator((f"{prompt} {answer}" for prompt, answer in tiny_rows(60)), trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def trimming():
    """Leaves blanks out of its offsets, as GPT-2's: a token of blanks alone has no characters."""
    from tokenizers.processors import ByteLevel

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return tokenizer


MARKED = TOKENIZER.chat_template
BARE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # no borders: tokens cross them
CLOSED = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"


@functools.cache
def tokenizer_with(make, template: str | None):
    tokenizer = make()
    tokenizer.chat_template = template
    return tokenizer


PARTS = [
    *"acting ",
    "The film",
    " works",
    "  ",
    "é",
    "e\u0301",
    "\ufb01",
    "\u1100\u1161",
    "🙂",
    "½",
    "<|im_end|>",
    "</s>",
]
words = st.lists(st.sampled_from(PARTS), max_size=5).map("".join)
chats = st.lists(st.tuples(words | text, words | text), min_size=1, max_size=4)


def one_by_one(encoder, messages) -> Encoded:
    """What `Encoder` does, slowly: each token of each conversation is held against all turns."""
    pieces = pieces_of(encoder, messages)
    answers = sum(is_answer for _, is_answer in pieces)
    ids, turns, crosses = tokens_and_turns(encoder, pieces)
    last = [index for index, turn in enumerate(turns) if turn == answers - 1]
    stops = [index for index in last if ids[index] in encoder.stop_ids]
    end = stops[0] if stops else last[-1] if last else len(ids) - 1
    ids, turns = ids[: end + 1], turns[: end + 1]
    start = last[0] if last else len(ids)
    if not stops:
        ids, turns = [*ids, encoder.tokenizer.eos_token_id], [*turns, answers - 1]
    return Encoded(ids, labels_of(encoder, ids, turns), start, crosses)


def pieces_of(encoder, messages) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is an answer: one turn after the other, rendered anew."""
    free, pieces = encoder.template, []
    if free is not None:
        return [(free.render(prompt=messages[0]["content"], system=None), False), (messages[1]["content"], True)]
    render = encoder.tokenizer.apply_chat_template
    for index in range(1, len(messages), 2):
        done = "".join(piece for piece, _ in pieces)
        before = render(messages[:index], tokenize=False, add_generation_prompt=True)
        after = render(messages[: index + 1], tokenize=False)
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
    return pieces


def tokens_and_turns(encoder, pieces):
    """(tokens, which answer each lies in, whether one would have crossed the start of an answer)."""
    free, text = encoder.template is not None, "".join(piece for piece, _ in pieces)
    made = encoder.tokenizer(text, add_special_tokens=free, return_offsets_mapping=True)
    offsets, spans, position = made["offset_mapping"], [], 0
    for piece, is_answer in pieces:
        spans += [(position, position + len(piece))] if is_answer else []
        position += len(piece)
    if any(start < first < end for start, end in offsets for first, _ in spans):
        return *tokenized_apart(encoder, pieces), True
    turns = [
        next((turn for turn, (first, last) in enumerate(spans) if start != end and first <= start < last), None)
        for start, end in offsets
    ]
    return made["input_ids"], turns, False


def tokenized_apart(encoder, pieces):
    """(tokens, which answer each lies in), no token across the border of two pieces."""
    tokenizer, ids, turns = encoder.tokenizer, [], []
    for number, (piece, is_answer) in enumerate(pieces):
        first_of_free = encoder.template is not None and number == 0
        part = tokenizer(piece, add_special_tokens=first_of_free)["input_ids"]
        if first_of_free and part and part[-1] == tokenizer.eos_token_id:
            part = part[:-1]
        ids = ids + part
        turns += [number // 2 if is_answer else None] * len(part)
    return ids, turns


def labels_of(encoder, ids, turns) -> list[int]:
    """Each answer up to and with its first stop token, or all tokens."""
    labels, stopped = [], set()
    for token, turn in zip(ids, turns, strict=True):
        labels.append(token if encoder.learn_all or (turn is not None and turn not in stopped) else IGNORED)
        if token in encoder.stop_ids:
            stopped.add(turn)
    return labels


@settings(max_examples=200, deadline=None)
@given(
    make=st.sampled_from([tiny_tokenizer, trimming, sentencepiece_like]),
    template=st.sampled_from([MARKED, BARE, CLOSED, None]),
    loss_on=st.sampled_from(["assistant", "all"]),
    rows=st.lists(chats, min_size=1, max_size=5),
)
@example(make=tiny_tokenizer, template=BARE, loss_on="assistant", rows=[[("?", " act"), ("", "ing")]])
def test_many_at_once_are_what_each_is_alone(make, template, loss_on, rows):
    tokenizer = tokenizer_with(make, template)
    glued = {"apply_chat_template": template is not None, "template": "{{ prompt }}", "loss_on": loss_on}
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id], glued)
    conversations = [
        [turn for asked, said in (row if template else row[:1]) for turn in (user(asked), assistant(said))]
        for row in rows
    ]
    expected = [one_by_one(encoder, messages) for messages in conversations]
    assert encoder.encode_pieces(encoder.pieces(conversations)) == expected
    assert [encoder.encode(messages) for messages in conversations] == expected


def test_of_many_refused_the_first_is_named():
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('no') if messages[0]['role'] == 'system' }}x"
    system = [{"role": "system", "content": "s"}, user("a"), assistant("b")]
    with pytest.raises(UserError, match="refuses messages of the roles system, user: no"):
        Encoder(strict, [2], CHAT).pieces([[user("a"), assistant("b")], system, [*system, user("c"), assistant("d")]])


def test_a_row_that_begins_with_an_answer_is_refused():
    with pytest.raises(UserError, match="begins with the assistant's turn.*set prompt.system"):
        encoder().pieces([[user("a"), assistant("b")], [assistant("a"), user("b"), assistant("c")]])
