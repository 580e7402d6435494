"""What is learned of a conversation, token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steps.lib.conversation import IGNORED, Encoder
from steps.lib.errors import UserError
from tests.tiny import tiny_tokenizer

CHAT = {"apply_chat_template": True, "system": None, "template": None, "loss_on": "assistant"}
PLAIN = {"apply_chat_template": False, "system": None, "template": "{{ prompt }}\n", "loss_on": "assistant"}
TOKENIZER = tiny_tokenizer()

text = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), min_size=1, max_size=30)


def encoder(prompt=CHAT):
    return Encoder(TOKENIZER, [TOKENIZER.eos_token_id], prompt)


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
    pair = encoder(settings).encode_pair([user(prompt), assistant(chosen)], rejected)
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
    chosen, other = merging.encode_pair(messages, rejected)
    assert chosen.input_ids[: chosen.prompt_length] == other.input_ids[: other.prompt_length]
