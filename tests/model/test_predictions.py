"""Loss and gradients equal the model's own, whatever way they are computed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from temper.data.batches import Batch
from temper.model.predictions import SupervisedLoss, flat_way, plain_way, short_way, unshared_way
from tests.support.tiny import gradients


@pytest.fixture
def batch(tiny_splits):
    from datasets import load_from_disk

    rows = load_from_disk(tiny_splits)["train"]
    return Batch([rows[index] for index in range(6)], pad_token_id=0)


@pytest.fixture
def model(tiny_model):
    network = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    torch.manual_seed(0)
    return get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def test_loss_and_gradients_equal_transformers_own(model, batch):
    padded = batch.padded()
    learned = int((padded["labels"][:, 1:] != -100).sum())
    reference = model(**padded).loss * learned
    expected = gradients(model, reference)
    for way in (flat_way, unshared_way, short_way, plain_way):
        total, count = way(model, batch).sum_and_count()
        assert count == learned
        torch.testing.assert_close(total, reference)
        found = gradients(model, total)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale)


def test_the_fastest_way_is_taken_for_a_plain_decoder(model, batch):
    loss = SupervisedLoss()
    loss(model, batch)
    assert loss.way is flat_way
    alone = SupervisedLoss(share=False)
    alone(model, batch)
    assert alone.way is unshared_way


def test_a_head_that_does_more_falls_back_to_the_plain_way(model, batch):
    """A model that scales its logits (as Cohere and Granite do) is found out on the first batch."""
    odd = copy.deepcopy(model).eval()  # in training its loss, which is not scaled, would be refused
    base = odd.get_base_model()
    original = base.forward

    def scaled(*arguments, **keywords):
        output = original(*arguments, **keywords)
        output.logits = output.logits * 0.5
        return output

    base.forward = scaled
    loss = SupervisedLoss()
    total, count = loss(odd, batch)
    assert loss.way is plain_way
    torch.testing.assert_close(total, plain_way(odd, batch).sum_and_count()[0])
    torch.testing.assert_close(total / count, _cross_entropy(odd, batch.padded()))


def _cross_entropy(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
