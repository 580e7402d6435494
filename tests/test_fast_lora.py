"""LoRA's product in few passes equals PEFT's, and bfloat16 costs no more than automatic mixed precision does."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from steps.lib.fast_lora import use_fast_products


def network(folder, dtype=torch.float32, **fields):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **fields))


def logits_and_gradients(model, ids):
    model.zero_grad()
    logits = model(input_ids=ids).logits.float()
    logits.square().mean().backward()
    return logits.detach(), {name: part.grad.clone() for name, part in model.named_parameters() if part.requires_grad}


@pytest.fixture
def ids():
    return torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_alpha": 3}])
def test_logits_and_gradients_equal_pefts(tiny_model, ids, fields):
    theirs = network(tiny_model, **fields)
    ours = copy.deepcopy(theirs)
    layers = len(ours.get_base_model().model.layers)
    assert use_fast_products(ours) == 3 * layers
    (logits, found), (expected_logits, expected) = logits_and_gradients(ours, ids), logits_and_gradients(theirs, ids)
    torch.testing.assert_close(logits, expected_logits)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


def test_in_bfloat16_they_are_as_near_as_mixed_precision_is(tiny_model, ids):
    exact = logits_and_gradients(network(tiny_model), ids)[1]
    ours = network(tiny_model, torch.bfloat16)
    use_fast_products(ours)
    found = logits_and_gradients(ours, ids)[1]
    mixed = network(tiny_model)
    with torch.autocast("cpu", torch.bfloat16):
        usual = logits_and_gradients(mixed, ids)[1]
    error = {
        kind: sum(((part[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact) / len(exact)
        for kind, part in (("ours", found), ("usual", usual))
    }
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert error["ours"] < 2 * error["usual"] < 0.2


def test_dropout_falls_on_the_adapters_input(tiny_model, ids):
    theirs = network(tiny_model, lora_dropout=0.5)
    ours = copy.deepcopy(theirs)
    use_fast_products(ours)
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        outputs.append(logits_and_gradients(model.train(), ids)[0])
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_that_do_more_keep_pefts_own_way(tiny_model, fields):
    assert use_fast_products(network(tiny_model, **fields)) == 0


def test_a_disabled_and_a_merged_adapter_are_what_they_are(tiny_model, ids):
    model = network(tiny_model)
    use_fast_products(model)
    with_adapter = model(input_ids=ids).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert (with_adapter - base).abs().max() > 0.01
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=ids).logits, base)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, with_adapter)
