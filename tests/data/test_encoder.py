"""What is learned of a conversation, token by token."""

import copy
import dataclasses
import functools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from temper.data import templates
from temper.data.columns import IGNORED
from temper.data.conversations import Conversation
from temper.data.encoder import Encoded, Encoder
from temper.errors import UserError
from tests.support.chat_templates import CLOCK, OPENINGS, THINKS, TURNS
from tests.support.tiny import tiny_rows, tiny_tokenizer

SPECIAL = {"allow_special_text": True}
CHAT = {"apply_chat_template": True, "system": None, "template": None, "loss_on": "assistant"}
PLAIN = {"apply_chat_template": False, "system": None, "template": "{{ prompt }}\n", "loss_on": "assistant"}
TOKENIZER = tiny_tokenizer()
text = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), min_size=1, max_size=30)


def encoder(prompt=CHAT):
    return Encoder(TOKENIZER, [TOKENIZER.eos_token_id], prompt)


def pair_of(encoder, messages, rejected):
    both = [Conversation(messages), Conversation([*messages[:-1], assistant(rejected)])]
    return encoder.encode_pairs([texts[-1] for texts in encoder.pieces(both)])[0]


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
    tokenizer = copy.deepcopy(make())
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
    """What `Encoder` does, slowly and by definition: each turn is asked as if nothing came behind it."""
    turns, tokens = turns_of(encoder, messages), tokens_by(encoder.tokenizer)
    first = encoder.tokenizer("x")["input_ids"][: len(encoder.first_ids)]
    chunks, starts = [""], []
    for number, (before, answer) in enumerate(turns):
        chunks[-1] += before
        asked = tokens(chunks[-1])
        starts.append(len(first) + sum(len(tokens(chunk)) for chunk in chunks))
        behind = turns[number + 1][0] if number + 1 < len(turns) else ""
        if tokens(chunks[-1] + answer + behind)[: len(asked)] != asked:
            chunks.append("")
        chunks[-1] += answer
    ids = first + [token for chunk in chunks for token in tokens(chunk)]
    ends = [len(first) + end for end in ends_of(encoder.tokenizer, chunks, turns)]
    ranges = [range(start, max(start, end)) for start, end in zip(starts, [*ends[:-1], len(ids)], strict=True)]
    stops = [index for index in ranges[-1] if ids[index] in encoder.stop_ids]
    ids = ids[: stops[0] + 1] if stops else ids
    learned = set()
    for turn in ranges:
        ends = [index for index in turn if index < len(ids) and ids[index] in encoder.stop_ids]
        learned |= set(turn[: turn.index(ends[0]) + 1] if ends else turn)
    labels = [token if encoder.learn_all or at in learned else IGNORED for at, token in enumerate(ids)]
    if not stops:
        ids, labels = [*ids, encoder.tokenizer.eos_token_id], [*labels, encoder.tokenizer.eos_token_id]
    return Encoded(ids, labels, ranges[-1].start, len(chunks) > 1)


def ends_of(tokenizer, chunks, turns) -> list[int]:
    """How many tokens start before the end of each turn."""
    starts, place, ends = [], 0, []
    for chunk in chunks:
        starts += [
            place + start
            for start, _ in tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        ]
        place += len(chunk)
    for number in range(len(turns)):
        end = sum(len(before) + len(answer) for before, answer in turns[: number + 1])
        ends.append(next((at for at, start in enumerate(starts) if start >= end), len(starts)))
    return ends


def tokens_by(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def turns_of(encoder, messages) -> list[tuple[str, str]]:
    """(text before, answer with what ends it) of each of the assistant's turns, rendered anew by transformers."""
    if encoder.free:
        return [(messages[0]["content"], messages[1]["content"])]  # by the template {{ prompt }}
    render, turns, done = encoder.tokenizer.apply_chat_template, [], ""
    for index in range(1, len(messages), 2):
        before = render(messages[:index], tokenize=False, add_generation_prompt=True)
        answer = render(messages[: index + 1], tokenize=False)[len(before) :]
        closing = answer[len(messages[index]["content"]) :]
        if not encoder.stop_ids & set(tokens_by(encoder.tokenizer)(closing)):
            answer = messages[index]["content"]  # nothing in the closing ends an answer: it is no part of it
            more = render(messages[: index + 2], tokenize=False, add_generation_prompt=True)[len(before + answer) :]
            if index + 1 < len(messages) and more.startswith(encoder.tokenizer.eos_token):
                answer += encoder.tokenizer.eos_token
        turns.append((before[len(done) :], answer))
        done = before + answer
        if index + 1 < len(messages) and answer == messages[index]["content"]:
            turns, done = [], ""  # no end of this answer could be learned here: it has a text of its own
    return turns


def gpt2_like():
    """GPT-2's way to split, which looks ahead: two line ends are one token, but two before a word."""
    return _trained("ByteLevel")


def llama3_like():
    """Llama 3's: a line end sticks to the blanks before it, numbers come in threes."""
    return _trained("Split")


def with_prefix_space():
    """As RoBERTa's: a blank before each text."""
    return _trained("ByteLevel", add_prefix_space=True)


def metaspace():
    """As Llama 2's, with bytes for what it does not know."""
    return _trained("Metaspace")


def unigram():
    """As T5's and XLM-R's."""
    return _trained("Unigram")


def words_only():
    """Keeps no blanks at all."""
    return _trained("Whitespace")


@functools.cache
def _trained(kind: str, add_prefix_space: bool = False):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from temper.commands.export import LLAMA3

    model = models.Unigram() if kind == "Unigram" else models.BPE(unk_token="<unk>", byte_fallback=kind == "Metaspace")
    tokenizer = Tokenizer(model)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=kind != "Split")
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    blank = kind in ("Metaspace", "Unigram")
    tokenizer.pre_tokenizer = {
        "ByteLevel": byte_level,
        "Split": pre_tokenizers.Sequence([split, byte_level]),
        "Whitespace": pre_tokenizers.Whitespace(),
    }.get(kind, pre_tokenizers.Metaspace(prepend_scheme="first"))
    fallback = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()])
    tokenizer.decoder = fallback if blank else decoders.ByteLevel()
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "Metaspace" else []
    common = {"vocab_size": 700, "special_tokens": ["<unk>", "<s>", "</s>", *bytes_of], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind in ("ByteLevel", "Split") else []
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **common)
    if kind == "Unigram":
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **common)
    rows = [f"{prompt}\n\n{answer}\n\n\n {answer}  {prompt}" for prompt, answer in tiny_rows(90)]
    tokenizer.train_from_iterator(rows, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", name_or_path=kind
    )


KINDS = [gpt2_like, llama3_like, with_prefix_space, metaspace, unigram, words_only]
LOSSLESS = [gpt2_like, llama3_like, with_prefix_space, metaspace]


@settings(max_examples=100, deadline=None)
@given(
    make=st.sampled_from([tiny_tokenizer, trimming, sentencepiece_like, *KINDS]),
    template=st.sampled_from([MARKED, BARE, CLOSED, None]),
    loss_on=st.sampled_from(["assistant", "all"]),
    rows=st.lists(chats, min_size=1, max_size=5),
)
@example(make=tiny_tokenizer, template=BARE, loss_on="assistant", rows=[[("?", " act"), ("", "ing")]])
@example(make=gpt2_like, template=BARE, loss_on="assistant", rows=[[("a\n\n", "b"), ("\n\n", "c")]])
@example(make=trimming, template=BARE, loss_on="assistant", rows=[[("a", "b  ")], [("", "  ")]])
def test_many_at_once_are_what_each_is_alone(make, template, loss_on, rows):
    tokenizer = tokenizer_with(make, template)
    glued = {"apply_chat_template": template is not None, "template": "{{ prompt }}", "loss_on": loss_on, **SPECIAL}
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id], glued)
    conversations = [
        [turn for asked, said in (row if template else row[:1]) for turn in (user(asked), assistant(said))]
        for row in rows
    ]
    expected = [one_by_one(encoder, messages) for messages in conversations]
    texts = encoder.pieces(list(map(Conversation, conversations)))
    found = encoder.encode_pieces([found[-1] for found in texts])
    assert [dataclasses.replace(one, ended_early=False) for one in found] == expected
    assert [encoder.encode(messages) for messages in conversations] == found
    for messages, row in zip(conversations, found, strict=True):
        assert row.input_ids[: row.prompt_length] == encoder.prompt_ids(messages[:-1])
    for messages, parts in zip(conversations, texts, strict=True):
        rows = encoder.encode_pieces(parts)
        for turns, row in zip(parts, rows, strict=True):
            for turn in turns:  # each turn is asked as a conversation would ask it
                asked = encoder.prompt_ids(messages[: turn.place])
                assert row.input_ids[: len(asked)] == asked


ENDS = ["\n\n", "\n", " ", "  ", "\n \n", "", "x", ":", ": ", "<|end|>", "<|end|>\n\n", "\t", "12"]


@settings(max_examples=200, deadline=None)
@given(
    make=st.sampled_from(KINDS),
    end=st.sampled_from(ENDS),
    prompt=words | text,
    answer=st.one_of(st.sampled_from(["positive", "\npositive", " positive", "34", "\n\n\na"]), text),
    chat=st.booleans(),
)
@example(make=gpt2_like, end="\n\n", prompt="The plot is a joy.", answer="positive", chat=False)
@example(make=gpt2_like, end="\n\n", prompt="The plot is a joy.", answer="positive", chat=True)
def test_training_asks_what_everybody_asks(make, end, prompt, answer, chat):
    """The tokens before an answer are those of the prompt's text alone: Temper's, and any other program's."""
    marks = "{{ m['content'] }}{% if m['role'] == 'user' and (not loop.last or add_generation_prompt) %}" + end
    source = "{% for m in messages %}" + marks + "{% else %}{{ eos_token }}{% endif %}{% endfor %}"
    tokenizer = tokenizer_with(make, source)
    free = {"apply_chat_template": chat, "template": None if chat else "{{ prompt }}" + end, "loss_on": "assistant"}
    free |= SPECIAL  # theirs are control tokens wherever a text spells them
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id], free)
    row = encoder.encode([user(prompt), assistant(answer)])
    assert row.input_ids[: row.prompt_length] == encoder.prompt_ids([user(prompt)])
    if chat:
        theirs = tokenizer.apply_chat_template([user(prompt)], add_generation_prompt=True, tokenize=False)
        assert row.input_ids[: row.prompt_length] == tokenizer(theirs, add_special_tokens=False)["input_ids"]
    else:
        assert row.input_ids[: row.prompt_length] == tokenizer(prompt + end)["input_ids"]
    assert row.labels == [IGNORED] * row.prompt_length + row.input_ids[row.prompt_length :]
    assert row.labels[-1] == tokenizer.eos_token_id
    if make in LOSSLESS and "</s>" not in answer and "\r" not in answer:
        said = encoder.text(row.answer)
        assert said.replace("\u2581", " ").strip() == answer.replace("\u2581", " ").strip()


def test_the_plain_prompt_of_a_gpt2_tokenizer():
    """The tokens that the plain prompt's two line ends make: one, as when nothing follows them."""
    plain = {**PLAIN, "template": "{{ prompt }}\n\n"}
    tokenizer = gpt2_like()
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id], plain)
    row = encoder.encode([user("The plot is a joy."), assistant("positive")])
    assert tokenizer.convert_ids_to_tokens(row.input_ids[row.prompt_length - 1 : row.prompt_length]) == ["ĊĊ"]
    assert tokenizer.decode(row.answer) == "positive</s>"
    assert row.retokenized


def test_of_many_refused_the_first_is_named():
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('no') if messages[0]['role'] == 'system' }}x"
    system = [{"role": "system", "content": "s"}, user("a"), assistant("b")]
    with pytest.raises(UserError, match="refuses messages of the roles system, user: no"):
        rows = [[user("a"), assistant("b")], system, [*system, user("c"), assistant("d")]]
        Encoder(strict, [2], CHAT).pieces(list(map(Conversation, rows)))


def test_a_row_that_begins_with_an_answer_is_refused():
    with pytest.raises(UserError, match="begins with the assistant's turn.*set prompt.system"):
        rows = [[user("a"), assistant("b")], [assistant("a"), user("b"), assistant("c")]]
        encoder().pieces(list(map(Conversation, rows)))


# --- templates with habits ----------------------------------------------------------------------------


def with_template(template: str, **fields):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer, [tokenizer.eos_token_id], {**CHAT, **fields})


def opening_of(template: str, messages) -> str:
    renderer = with_template(template).renderer
    renderer.find_opening(Conversation(messages))
    return renderer.opening


@pytest.mark.parametrize("name", OPENINGS)
def test_what_the_template_writes_before_an_answer_is_no_answer(name):
    template, opening = OPENINGS[name]
    messages = [user("Is it good?"), assistant("positive")]
    assert opening_of(template, messages) == opening
    encoder = with_template(template, opening=opening)
    row = encoder.encode(messages)
    assert learned_text(row) == "positive<|im_end|>"
    assert row.input_ids[: row.prompt_length] == encoder.prompt_ids(messages[:-1])
    assert TOKENIZER.decode(encoder.prompt_ids(messages[:-1])).endswith(opening)


def test_a_row_without_the_opening_is_refused():
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% if add_generation_prompt %}A:{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="ends a prompt with '.*A:', which it does not write before an answer"):
        with_template(template).encode([user("a"), assistant("b")])
    with pytest.raises(UserError, match="writes '<think>.*before the first row's answer, but not before this one"):
        with_template(TOKENIZER.chat_template, opening="<think>").encode([user("a"), assistant("b")])
    with pytest.raises(UserError, match="writes '<think>.*between the prompt and an answer"):
        with_template(THINKS).encode([user("a"), assistant("b")])


@pytest.mark.parametrize(
    ("said", "what"),
    [("", "becomes '<|im_end|>"), ("{{ m.content | upper }}", "becomes 'ABC"), ("{{ m.content[1:] }}", "'bc")],
)
def test_an_answer_that_the_template_changes_is_refused(said, what):
    template = TURNS.replace(
        "{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% else %}" + said + "{% endif %}"
    )
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    with pytest.raises(UserError, match="changes an answer: 'abc' ") as raised:
        with_template(template).encode([user("a"), assistant("abc")])
    assert what in str(raised.value)
    assert "use prompt=plain, or leave such rows out with data.where" in str(raised.value)


def test_blanks_that_the_template_trims_are_none_of_the_answer():
    template = TOKENIZER.chat_template.replace("message['content']", "message['content'] | trim")
    assert learned_text(with_template(template).encode([user("a"), assistant(" b \n")])) == "b<|im_end|>"


def test_of_a_conversation_that_the_template_rewrites_the_last_answer_is_learned():
    encoder = with_template(THINKS, opening=OPENINGS["thoughts"][1])
    messages = [user("one"), assistant("first"), user("two"), assistant("second")]
    row = encoder.encode(messages)
    assert learned_text(row) == "second<|im_end|>"
    assert row.input_ids[: row.prompt_length] == encoder.prompt_ids(messages[:-1])
    assert "first<|im_end|>" in TOKENIZER.decode(row.input_ids[: row.prompt_length])


def test_the_day_of_a_template_is_that_of_the_config(monkeypatch):
    def text(**fields):
        encoder = with_template(CLOCK + TOKENIZER.chat_template, **fields)
        return TOKENIZER.decode(encoder.prompt_ids([user("a")]))

    assert text().startswith("26 Jul 2024, Friday\n<|im_start|>user")
    assert text(date="2031-01-02").startswith("02 Jan 2031, Thursday\n<|im_start|>user")


@pytest.mark.parametrize(
    "template", [CLOCK + TURNS + "\n", "\n" + CLOCK + TOKENIZER.chat_template, TURNS, "  " + CLOCK + THINKS, MARKED]
)
def test_other_programs_ask_the_same_by_the_template_that_is_shipped(template):
    messages = [user("Is it good?"), assistant("positive")]
    opening = opening_of(template, messages)
    encoder = with_template(template, opening=opening, date="2031-01-02")
    shipped = templates.to_ship(template, "2031-01-02", opening)
    theirs = encoder.tokenizer.apply_chat_template(
        messages[:-1], chat_template=shipped, add_generation_prompt=True, return_dict=False
    )
    assert theirs == encoder.prompt_ids(messages[:-1])
    assert (shipped == template) == (template == MARKED)


def test_a_clock_that_is_asked_in_made_up_words_cannot_be_shipped():
    with pytest.raises(UserError, match="write the day into it"):
        templates.to_ship("{{ strftime_now('%' ~ 'd') }}" + MARKED, "2024-07-26", "")


# --- tokens that end answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{**CHAT, **SPECIAL}, {**PLAIN, **SPECIAL}])
@pytest.mark.parametrize(
    ("answer", "early"),
    [
        ("It is <|im_end|> or not", True),
        ("<|im_end|>a", True),
        ("answer<|im_end|>", False),
        ("answer<|im_end|>\n", False),
        ("answer<|im_end|> <|im_end|>", False),
        ("answer", False),
    ],
)
def test_an_answer_that_holds_its_own_end_is_told(settings, answer, early):
    row = encoder(settings).encode([user("a"), assistant(answer)])
    assert row.ended_early == early
    if not early:
        assert learned_text(row) == "answer<|im_end|>"
        assert encoder(settings).text(row.answer) == "answer"


def test_an_earlier_answer_that_holds_its_end_is_told():
    messages = [user("a"), assistant("x <|im_end|> y"), user("b"), assistant("c")]
    assert encoder({**CHAT, **SPECIAL}).encode(messages).ended_early


def test_special_tokens_that_a_model_says_are_shown():
    """Labels may be such tokens."""
    ids = TOKENIZER("<|endoftext|>good<|im_end|>", add_special_tokens=False)["input_ids"]
    assert encoder().text(ids) == "<|endoftext|>good"
