"""Each option of the installed transformers and PEFT has its decision; each method that is let in is right."""

import copy
import dataclasses
import typing
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel

from temper.config import options
from temper.config.libraries import check_library_sections
from temper.data.batches import Batch
from temper.errors import UserError
from temper.model.adapters import add_adapter, save_adapter
from temper.model.fast_layers import use_fast_layers
from temper.model.predictions import SupervisedLoss
from tests.conftest import ROOT
from tests.support.networks import network, rows_of
from tests.support.tiny import gradients

PAGE = ROOT / "docs" / "options.md"
LORA = {"peft_type": "LORA", "r": 2, "target_modules": "attention"}


def fields_of(cls) -> set[str]:
    return {field.name for field in dataclasses.fields(cls) if field.init}


def test_each_field_of_training_arguments_is_decided_once():
    assert fields_of(transformers.TrainingArguments) == options.TRAIN_USED.keys() | options.TRAIN_REFUSED.keys()
    assert not options.TRAIN_USED.keys() & options.TRAIN_REFUSED.keys()
    assert not fields_of(transformers.TrainingArguments) & options.TRAIN_RENAMED.keys()


def test_each_method_of_peft_is_decided_once():
    assert {
        kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING
    } == options.PEFT_USED.keys() | options.PEFT_REFUSED.keys()
    assert not options.PEFT_USED.keys() & options.PEFT_REFUSED.keys()
    known = set().union(*(fields_of(cls) for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values()))
    assert not options.ADAPTER_REFUSED.keys() - known


def test_each_start_of_lora_is_decided_once():
    """PEFT's own list, in which pissa_niter_ stands with a remark, and lora_ga is missing."""
    annotation = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    named = {name for kind in typing.get_args(annotation) for name in typing.get_args(kind)}
    named = {name.partition("[")[0] for name in named} | {"lora_ga"}
    assert named == options.LORA_INIT_USED.keys() | options.LORA_INIT_REFUSED.keys()


def test_each_variant_of_lora_is_decided_once():
    """PEFT marks the fields that make another method of LoRA: each is refused or tested below."""
    variants = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants, "PEFT marks them otherwise now"
    assert not variants - options.ADAPTER_REFUSED.keys() - {name for fields in LORA_FIELDS for name in fields}


def test_the_page_is_what_the_code_decides():
    assert PAGE.read_text() == options.page(), "run: python -m temper.config.options > docs/options.md"
    for name in (*options.TRAIN_USED, *options.TRAIN_REFUSED, *options.PEFT_USED, *options.PEFT_REFUSED):
        assert PAGE.read_text().count(f"\n| `{name}` |") == 1, name


@pytest.mark.parametrize("field", options.TRAIN_REFUSED)
def test_a_field_that_cannot_be_set_is_refused(field):
    with pytest.raises(UserError, match=f"'train.{field}' cannot be set: "):
        options.refuse({field: True}, {"peft_type": None})


@pytest.mark.parametrize("kind", options.PEFT_REFUSED)
def test_a_method_that_cannot_be_used_is_refused(kind):
    with pytest.raises(UserError, match=f"{kind} cannot be used here: "):
        options.refuse({}, {"peft_type": kind})


USED = {
    **{name: 2 for name in options.TRAIN_USED if name.endswith(("_steps", "_batch_size", "_epochs", "_workers"))},
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), 0.5),
    **dict.fromkeys(("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "eval_delay"), 1.0),
    **dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "steps"),
    **dict.fromkeys(("use_cpu", "eval_on_start", "logging_first_step", "average_tokens_across_devices"), True),
    **dict.fromkeys(("dataloader_drop_last", "dataloader_pin_memory", "greater_is_better"), True),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "bf16", "fp16", "tf32", "full_determinism", "load_best_model_at_end"), False
    ),
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing", "dataloader_persistent_workers"), False),
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "optim_target_modules": None,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "log_level": "error",
    "save_total_limit": 3,
    "metric_for_best_model": "eval_loss",
    "dataloader_prefetch_factor": 4,
    "dataloader_multiprocessing_context": "spawn",
}
WITH = {  # what a field needs beside it
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_restarts"},
    "optim_args": {"optim": "sgd"},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "dataloader_pin_memory": {"use_cpu": False},
}


# `fsdp` is read when the model is loaded.
@pytest.mark.parametrize("field", sorted(options.TRAIN_USED.keys() - {"fsdp"}))
def test_a_field_that_is_used_reaches_the_trainer(field, tmp_path, monkeypatch):
    from temper.training.arguments import training_arguments

    monkeypatch.chdir(tmp_path)
    train = {field: USED[field], **WITH.get(field, {})}
    check_library_sections(train, {"peft_type": None}, "sft")
    assert getattr(training_arguments(train, 0, tmp_path), field) == USED[field]


# --- methods of PEFT -----------------------------------------------------------------------------

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
METHODS = {
    **dict.fromkeys(options.PEFT_USED, TARGETS),
    "C3A": {**TARGETS, "block_size": 8},
    "FOURIERFT": {**TARGETS, "n_frequency": 20},
    "WAVEFT": {**TARGETS, "n_frequency": 20},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {**TARGETS, "r": 2},
    "SHIRA": {**TARGETS, "r": 2},
    "ROAD": {**TARGETS, "group_size": 8},
    "VBLORA": {**TARGETS, "num_vectors": 20, "vector_length": 8},
    "TRAINABLE_TOKENS": {"token_indices": list(range(5, 40))},
    **{kind: {"num_virtual_tokens": 4} for kind in ("PROMPT_TUNING", "PREFIX_TUNING")},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
}
LORA_FIELDS = [
    *({"init_lora_weights": start} for start in (False, *options.LORA_INIT_USED)),
    {"use_dora": True},
    {"use_rslora": True},
    {"velora_config": {}},
    {"use_qalora": True, "qalora_group_size": 8},
    {"bias": "all"},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [5, 6, 7]},
    {"layers_to_transform": [1]},
    {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 2}},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head", "down_proj"]},
    {"target_parameters": ["mlp.down_proj.weight"]},
]


@pytest.fixture
def batch():
    return Batch(rows_of([5, 9, 3, 7], prefix=12), 0)


@pytest.mark.parametrize("kind", options.PEFT_USED)
def test_each_method_trains_loads_and_merges(tmp_path, batch, kind):
    assert_right(tmp_path, batch, {"peft_type": kind, **METHODS[kind]})


@pytest.mark.parametrize("fields", LORA_FIELDS, ids=str)
def test_each_kind_of_lora_trains_loads_and_merges(tmp_path, batch, fields):
    assert_right(tmp_path, batch, {**LORA, **fields})


def assert_right(folder: Path, batch, adapter: dict) -> None:
    """Trained as by PEFT's own forward pass and loss; the same network again when loaded, and when merged."""
    check_library_sections({}, adapter, "sft")
    base = network(hidden_size=32, num_key_value_heads=4)
    ours, theirs = (add_adapter(copy.deepcopy(base), adapter, seed=3) for _ in range(2))
    use_fast_layers(ours)
    loss = SupervisedLoss()
    steps(ours, lambda: torch.div(*loss(ours, batch)))
    steps(theirs, lambda: theirs(**batch.padded(), use_cache=False).loss)
    trained = {name: weight for name, weight in theirs.named_parameters() if weight.requires_grad}
    assert trained
    for name, weight in ours.named_parameters():
        if name in trained:
            torch.testing.assert_close(weight, trained[name], rtol=1e-3, atol=1e-4, msg=name)
    save_adapter(ours, folder)
    inputs = {name: batch.padded()[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(99)
    with torch.no_grad():
        expected, untouched = ours.eval()(**inputs).logits, base.eval()(**inputs).logits
        length = untouched.shape[1]
        assert (expected[:, -length:] - untouched).abs().max() > 1e-3, "it has learned something"
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        if not loaded.active_peft_config.is_prompt_learning:
            merged = loaded.merge_and_unload()
            torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def steps(model, loss, count: int = 3) -> None:
    """A few steps of SGD, which lets a difference in gradients show."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    model.train()
    for step in range(count):
        torch.manual_seed(step)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_layers_with_turned_weights_need_no_word_of_it():
    """GPT-2's weights are turned; PEFT sees that by itself, and says so, which is no fault of the config."""
    model = network("GPT2", n_embd=16, n_layer=2, n_head=4)
    adapted = add_adapter(model, LORA, seed=0)
    assert adapted.base_model.model.transformer.h[0].attn.c_attn.fan_in_fan_out


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_that_run_again_give_the_adapter_its_gradients(batch, use_reentrant):
    """Reentrant checkpointing sees no gradient where its input needs none, as behind a frozen embedding."""
    adapted = add_adapter(network(), LORA, seed=0)
    expected = gradients_of(adapted, batch)
    adapted.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients_of(adapted, batch)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def gradients_of(model, batch) -> dict:
    return gradients(model.train(), SupervisedLoss()(model, batch)[0])


def test_schedules_that_take_no_notice_of_the_warmup(tmp_path):
    from transformers.trainer_utils import SchedulerType

    from temper.config.libraries import ignores_warmup
    from temper.training.arguments import training_arguments

    needs = {"warmup_stable_decay": {"num_decay_steps": 9}, "cosine_warmup_with_min_lr": {"min_lr": 1e-6}}
    needs["cosine_with_min_lr"] = {"min_lr": 1e-6}
    ignoring = set()
    for kind in SchedulerType:
        train = {
            "lr_scheduler_type": kind.value,
            "lr_scheduler_kwargs": needs.get(kind.value),
            "eval_strategy": "epoch",
        }
        if ignores_warmup(training_arguments(train, 0, tmp_path)):
            ignoring.add(kind.value)
    assert ignoring == {"constant", "reduce_lr_on_plateau", "greedy"}
