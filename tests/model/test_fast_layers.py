"""Layers in few passes equal PEFT's and transformers', and bfloat16 costs no more than mixed precision does."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from temper.model.fast_layers import use_fast_layers


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
    assert use_fast_layers(ours) == (3 * layers, 2 * layers + 1)
    (logits, found), (expected_logits, expected) = logits_and_gradients(ours, ids), logits_and_gradients(theirs, ids)
    torch.testing.assert_close(logits, expected_logits)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


def test_in_bfloat16_they_are_as_near_as_mixed_precision_is(tiny_model, ids):
    exact = logits_and_gradients(network(tiny_model), ids)[1]
    ours = network(tiny_model, torch.bfloat16)
    use_fast_layers(ours)
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
    use_fast_layers(ours)
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        outputs.append(logits_and_gradients(model.train(), ids)[0])
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_that_do_more_keep_pefts_own_way(tiny_model, fields):
    assert use_fast_layers(network(tiny_model, **fields))[0] == 0


def test_a_disabled_and_a_merged_adapter_are_what_they_are(tiny_model, ids):
    model = network(tiny_model)
    use_fast_layers(model)
    with_adapter = model(input_ids=ids).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert (with_adapter - base).abs().max() > 0.01
    untouched = AutoModelForCausalLM.from_pretrained(tiny_model)(input_ids=ids).logits
    torch.testing.assert_close(untouched, base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=ids).logits, with_adapter, rtol=1e-4, atol=1e-4)


# --- norms ---------------------------------------------------------------------------------------


def norm_results(norm, inputs, gradient):
    inputs = inputs.clone().requires_grad_()
    output = norm(inputs)
    output.backward(gradient)
    return output.detach(), inputs.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_transformers_own(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    draw = torch.Generator().manual_seed(0)
    theirs = LlamaRMSNorm(48)
    theirs.weight.data = torch.randn(48, generator=draw)
    theirs = theirs.to(dtype).requires_grad_(False)
    ours = copy.deepcopy(theirs)
    assert use_fast_layers(ours) == (0, 1)
    inputs, gradient = (torch.randn(2, 5, 48, generator=draw).to(dtype) for _ in range(2))
    (output, found), (expected_output, expected) = (norm_results(norm, inputs, gradient) for norm in (ours, theirs))
    torch.testing.assert_close(output, expected_output, rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=0)
    weight = theirs.weight.double()
    exact = lambda x: weight * x * (x.square().mean(-1, keepdim=True) + theirs.variance_epsilon).rsqrt()  # noqa: E731
    truth = norm_results(exact, inputs.double(), gradient.double())[1]
    error, usual = ((part.double() - truth).norm() for part in (found, expected))
    assert error <= 1.2 * usual


def test_norms_that_are_trained_or_do_something_else_keep_their_own_way():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert use_fast_layers(LlamaRMSNorm(8)) == (0, 0), "its weight wants a gradient"
    other = GemmaRMSNorm(8).requires_grad_(False)
    assert use_fast_layers(other) == (0, 0)
