"""The flat way is taken where it is the model's own computation, in training too; elsewhere the model sees padded rows.

Each model here does something that a pass in evaluation may not show: it draws random numbers, hooks act in training
only, its rows would see each other, or its own loss has more in it.
"""

import random

import numpy
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import activate_neftune

from temper.data.batches import Batch, collate
from temper.data.columns import IGNORED
from temper.errors import UserError
from temper.model.fast_layers import use_fast_layers
from temper.model.predictions import SupervisedLoss, flat_way, plain_way, short_way, unshared_way
from tests.support.networks import network, rows_of
from tests.support.tiny import gradients

EXPERTS = {"num_local_experts": 4, "sliding_window": None}


@pytest.fixture
def batch():
    return Batch(rows_of([5, 9, 3, 7], prefix=12), 0)


def way_of(model, batch):
    loss = SupervisedLoss()
    loss(model, batch)
    return loss.way


def assert_the_models_own(model, batch):
    """Loss and gradients in training equal those of the model's own forward pass, from the same random numbers."""
    loss = SupervisedLoss()
    loss(model, batch)
    assert loss.way is short_way
    torch.manual_seed(1)
    total, count = loss(model, batch)
    found = gradients(model, total)
    torch.manual_seed(1)
    expected_total = model(**batch.padded(), use_cache=False).loss * count
    torch.testing.assert_close(total, expected_total)
    for name, gradient in gradients(model, expected_total).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def noisy(_module, _inputs, output):
    return output + torch.randn_like(output) * 0.1


def rarely_noisy(_module, _inputs, output):
    return output * 2 if torch.rand([]) < 1e-6 else output


def by_python(_module, _inputs, output):
    return output * 2 if random.random() < 1e-6 else output


def by_numpy(_module, _inputs, output):
    return output * 2 if numpy.random.uniform() < 1e-6 else output


def larger_in_training(module, _inputs, output):
    return output * 1.1 if module.training else output


HOOKS = [noisy, rarely_noisy, by_python, by_numpy, larger_in_training]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("place", ["model.embed_tokens", "model.layers.0"])
def test_a_hook_sees_padded_rows(batch, hook, place):
    model = network()
    assert way_of(model, batch) is flat_way
    model.get_submodule(place).register_forward_hook(hook)
    assert_the_models_own(model, batch)


def test_noise_of_neftune_is_transformers_own(batch):
    model = network()
    handle = activate_neftune(model, 5.0)
    assert_the_models_own(model, batch)
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0], output)))
    SupervisedLoss()(model, batch)
    handle.remove()
    ids, noisy_states = seen[-1]
    noise = noisy_states - torch.nn.functional.embedding(ids, model.model.embed_tokens.weight)
    rows, length = batch.padded()["input_ids"].shape
    limit = 5.0 / (length * 16) ** 0.5
    assert ids.shape == (rows, length), "each row by itself"
    assert 0.95 * limit < noise.abs().max().item() <= limit
    assert not torch.equal(noise[0, :12], noise[1, :12]), "what rows begin with has draws of its own in each"


def test_in_evaluation_noise_changes_nothing(batch):
    model, loss = network(), SupervisedLoss()
    quiet = loss(model.eval(), batch)[0]
    activate_neftune(model, 5.0)
    again = SupervisedLoss()
    again(model.train(), batch)
    torch.testing.assert_close(again(model.eval(), batch)[0], quiet, rtol=0, atol=0)
    assert again.way is flat_way


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("Llama", {"attention_dropout": 0.1}), ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.1})],
)
def test_dropout_only_unshares(batch, kind, fields):
    model = network(kind, **fields)
    assert way_of(model, batch) is unshared_way
    assert way_of(model.eval(), batch) is flat_way


def test_choosing_a_way_draws_nothing_from_training(batch):
    model = network(attention_dropout=0.1)
    torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
    first = SupervisedLoss()
    at_once = first(model, batch)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(first(model, batch)[0], at_once, rtol=0, atol=0)
    untouched = random.random(), numpy.random.uniform()
    random.seed(3), numpy.random.seed(3)
    assert untouched == (random.random(), numpy.random.uniform())


def test_parts_in_evaluation_stay_there(batch):
    model = network(attention_dropout=0.1)
    model.model.layers[0].eval()
    SupervisedLoss()(model, batch)
    assert [layer.training for layer in model.model.layers] == [False, True]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Mixtral", {**EXPERTS, "router_jitter_noise": 0.1}),
        ("GptOss", {"num_local_experts": 4, "head_dim": 4}),
        ("Mamba", {}),
    ],
    ids=["experts chosen with noise", "attention with sinks", "no attention at all"],
)
def test_models_that_do_more_than_plain_attention(batch, kind, fields):
    assert_the_models_own(network(kind, **fields), batch)


def leaky(_module, _inputs, output):
    """As a convolution does, each token sees a little of the one before it."""
    return output + 0.05 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


def test_rows_that_would_see_each_other(batch):
    model = network()
    model.model.embed_tokens.register_forward_hook(leaky)
    assert_the_models_own(model, batch)


class OfAllTokens(torch.nn.Module):
    """As an adapter that starts without effect, and mixes all tokens that it gets."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.share = layer, torch.nn.Parameter(torch.zeros(()))

    def forward(self, states):
        return self.layer(states) + self.share * states.mean(dim=1, keepdim=True)


def test_what_starts_without_effect_is_seen_too(batch):
    model = network()
    layer = model.model.layers[0]
    layer.mlp = OfAllTokens(layer.mlp)
    assert_the_models_own(model, batch)
    assert layer.mlp.share == 0


def test_a_window_that_only_the_mask_knows():
    fields = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    model, batch = network("Qwen2", **fields), Batch(rows_of([5, 9], prefix=12), 0)
    assert way_of(model, batch) is flat_way
    model.model.layers[1].self_attn.sliding_window = None
    assert way_of(model, batch) is short_way


def test_a_loss_with_more_in_it_is_refused_in_training(batch):
    model = network("Mixtral", **EXPERTS, output_router_logits=True)
    with pytest.raises(UserError, match="its own loss is .* cross entropy .*output_router_logits"):
        SupervisedLoss()(model, batch)
    assert way_of(model.eval(), batch) is flat_way
    model.config.output_router_logits = False  # as the message proposes
    assert way_of(model.train(), batch) is flat_way


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_hook_inside_a_lora_layer_is_called(part):
    model = get_peft_model(network(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    getattr(layer, part)["default"].register_forward_hook(noisy)
    assert use_fast_layers(model)[0] == 1, "that of the other layer"
    inputs = torch.randn(2, 16)
    assert not torch.equal(layer(inputs), layer(inputs))


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows(rows):
    batch = Batch(rows_of([5, 9][:rows]), 0)
    assert way_of(network(), batch) is flat_way
    assert (batch.padded()["labels"] != IGNORED).sum() == 3 * rows


class NothingComesBack(TorchDispatchMode):
    """Refuses what has to wait for a device: numbers for Python, and tensors whose size depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
        if name in {"index", "index_put", "index_put_", "_index_put_impl_"}:
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [flat_way, unshared_way, short_way, plain_way], ids=lambda way: way.__name__)
def test_once_the_way_is_chosen_nothing_waits_for_the_device(batch, way):
    model, loss = network(), SupervisedLoss()
    loss.ways[True] = way
    with NothingComesBack():
        total, count = loss(model, batch)
        (total / count).backward()
        loss.sequence_logps(model, batch, answers=2).sum().backward()


def test_training_with_neftune_equals_trainers_own(tmp_path):
    """Step by step, with the estimate before it, which must see the noise and leave no second one."""
    from datasets import Dataset

    from temper.training import arguments, callbacks, estimates, trainers

    rows = [{**row, "prompt": "", "reference": ""} for row in rows_of([5, 9, 3, 7, 6, 8, 4, 5])]
    data, fields = Dataset.from_list(rows).select_columns(["input_ids", "labels"]), {"use_cpu": True, "max_steps": 3}
    fields |= {"neftune_noise_alpha": 5.0, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    args = arguments.training_arguments(fields, 7, tmp_path)
    ours = trainers.trainer_for(
        {"name": "sft"}, model=network(), args=args, train_dataset=data, pad_token_id=0, schedule_steps=3
    )
    estimates.estimate(ours, ours.sampler.lengths, 0)
    assert ours.supervised_loss.way is short_way
    theirs = transformers.Trainer(
        model=network(), args=args, train_dataset=data, data_collator=lambda rows: collate(rows, 0)
    )
    theirs._get_train_sampler = lambda _=None: trainers.EpochSampler(ours.sampler.lengths, 4, 7)
    losses = []
    for trainer in (ours, theirs):
        trainer.add_callback(callbacks.ExactState(ours, 2))
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
