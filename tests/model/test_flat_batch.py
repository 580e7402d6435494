"""Rows that lie one after the other, and share what they have in common, compute what padded rows do."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from temper.data.batches import Batch
from temper.data.columns import IGNORED
from temper.model.flat_batch import LONGEST_PRODUCTS, SHORTEST_PREFIX, flatten
from temper.model.predictions import SupervisedLoss, flat_way, plain_way, short_way, unshared_way
from tests.support.networks import rows_of

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
WINDOW = 6


@functools.cache
def network(window: bool = False):
    """In float64, so that what differs is no rounding; with `window` its last layer looks 6 tokens back.

    That one is in float32: in float64 transformers' own mask makes nan of padding beyond the window.
    """
    torch.manual_seed(0)
    if not window:
        return LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager").double()
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    return Qwen2ForCausalLM._from_config(config, attn_implementation="eager")


def losses_and_gradients(way, model, batch, answers=1):
    model.zero_grad()
    losses = way(model, batch, answers).losses()
    (losses * torch.linspace(1, 2, len(losses)).to(losses)).sum().backward()
    return losses.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same(model, batch, answers=1, tolerance=1e-5):
    """`losses` are float32 by design, so gradients are equal to its precision."""
    losses, found = losses_and_gradients(flat_way, model, batch, answers)
    expected_losses, expected = losses_and_gradients(plain_way, model, batch, answers)
    torch.testing.assert_close(losses, expected_losses, rtol=tolerance, atol=tolerance)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in found.items():
        # One that is zero but for rounding (attention over equal tokens) has no scale of its own.
        scale = max(expected[name].abs().max().item(), 1e-4 * largest)
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance * scale, msg=name)


tokens = st.lists(st.integers(1, 39), max_size=12)


@st.composite
def batches(draw, answers=1):
    """Rows that begin alike, of any lengths, any of their tokens learned; or several answers to each prompt."""
    start = draw(st.lists(st.integers(1, 39), max_size=14))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = start + draw(tokens)
        rows.append([prompt + draw(tokens) + [0] for _ in range(answers)])
    texts = [row[side] for side in range(answers) for row in rows]
    texts = [text if len(text) > 1 else [1, *text] for text in texts]
    some = [[draw(st.booleans()) for _ in text] for text in texts]
    some[0][-1] = True  # a batch without anything learned has no loss
    labels = [
        [token if learned else IGNORED for token, learned in zip(text, row, strict=True)]
        for text, row in zip(texts, some, strict=True)
    ]
    return Batch([{"input_ids": i, "labels": o} for i, o in zip(texts, labels, strict=True)], 0)


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_losses_and_gradients_of_any_rows(batch):
    assert_same(network(), batch)


@settings(max_examples=40, deadline=None)
@given(batch=batches(answers=2))
def test_losses_and_gradients_of_any_pairs(batch):
    assert_same(network(), batch, answers=2)


@settings(max_examples=30, deadline=None)
@given(batch=batches(answers=4))
def test_losses_and_gradients_of_any_four_answers(batch):
    assert_same(network(), batch, answers=4)


@settings(max_examples=20, deadline=None)
@given(batch=batches(answers=2))
def test_layers_that_look_a_few_tokens_back(batch):
    assert_same(network(window=True), batch, answers=2, tolerance=2e-4)


@pytest.mark.parametrize("length", [5, LONGEST_PRODUCTS + 50])
def test_short_and_long_rows(length):
    assert_same(network(), Batch(rows_of([length, length - 2, 3]), 0))


def test_what_is_common_is_computed_once():
    batch = Batch(rows_of([5, 4, 9]), 0)
    flat = flatten(batch, batch.learned(ahead=1))
    assert flat.prefix == 30
    assert flat.input_ids.shape == (1, 30 + 5 + 4 + 9)
    assert flat.position_ids[0].tolist() == [*range(30), *range(30, 35), *range(30, 34), *range(30, 39)]
    alone = flatten(batch, batch.learned(ahead=1), share=False)
    assert alone.prefix == 0
    assert alone.input_ids.shape == (1, int(batch.padded()["attention_mask"].sum()))
    pair = Batch([*rows_of([5]), *rows_of([5])], 0)
    pairs = flatten(pair, pair.learned(ahead=1), answers=2)
    assert pairs.input_ids.shape == (1, 35 + 1), (
        "two equal answers: their last token is not shared, as one may be longer"
    )


def test_an_odd_number_of_tokens_gets_one_more_that_nobody_sees():
    batch = Batch(rows_of([5, 4, 8]), 0)
    flat = flatten(batch, batch.learned(ahead=1))
    assert flat.input_ids.shape == (1, 30 + 5 + 4 + 8 + 1)
    assert_same(network(), batch)


def test_a_short_beginning_is_not_worth_an_attention_of_its_own():
    batch = Batch(rows_of([20, 20], prefix=SHORTEST_PREFIX - 1), 0)
    assert flatten(batch, batch.learned(ahead=1)).prefix == 0


def test_with_dropout_no_state_is_shared():
    """Rows that shared a state would share its random draws."""
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES, attention_dropout=0.5), attn_implementation="eager")
    batch, loss = Batch(rows_of([5, 5]), 0), SupervisedLoss()
    model.train()
    torch.manual_seed(0)
    one, two = loss(model, batch)[0].item(), loss(model, batch)[0].item()
    assert loss.way is unshared_way
    assert one != two, "dropout is at work"
    model.eval()
    loss(model, batch)
    assert loss.way is flat_way


def test_the_models_own_attention_is_back_afterwards():
    model, batch = network(), Batch(rows_of([5, 5]), 0)
    before = model(input_ids=batch.padded()["input_ids"]).logits
    flat_way(model, batch)
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(input_ids=batch.padded()["input_ids"]).logits, before, rtol=0, atol=0)


def test_layers_that_run_again_keep_the_padded_way(caplog):
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager")
    model.gradient_checkpointing_enable()
    loss = SupervisedLoss()
    with caplog.at_level("INFO", logger="temper"):
        loss(model.train(), Batch(rows_of([5, 5]), 0))
    assert loss.way is short_way
    assert "gradient checkpointing" in caplog.text
