"""A run is evaluated in memory as its merged folder would be: the same bits, whatever was trained on whatever base."""

import json
from pathlib import Path

import pytest
import torch

from steps import evaluate_model, merge_adapter, train_adapter
from temper.config.stages import load_stage_config, typed
from temper.model import loading, merging
from tests.conftest import rarely
from tests.support import tiny
from tests.support.asking import complaint

SMALL = [
    "experiment=smoke",
    "train.per_device_train_batch_size=4",
    "train.learning_rate=3e-2",
    "train.max_steps=2",
    "train.warmup_steps=0",
    "train.eval_strategy=no",
]
FLOAT32 = "model.load.dtype=float32"
# What is trained, and how it is merged.
RUNS = {
    "LoRA": [FLOAT32],
    "LoRA, evaluated in bfloat16": ["model.load.dtype=bfloat16"],
    "LoRA, merged in float32, evaluated in bfloat16": ["model.load.dtype=bfloat16", "merge.dtype=float32"],
    "LoRA, merged in bfloat16, evaluated in float32": [FLOAT32, "merge.dtype=bfloat16"],
    "LoRA on all layers": ["adapter=lora_all_linear", FLOAT32],
    "all parameters": ["adapter=full", "model.load.dtype=fastest"],
    "all parameters, merged in bfloat16": ["adapter=full", "model.load.dtype=fastest", "merge.dtype=bfloat16"],
    "QLoRA": ["adapter=qlora", FLOAT32],
    "QLoRA, merged into the base": ["adapter=qlora", FLOAT32, "merge.dequantized_base=false"],
    "QLoRA in 8 bits": ["adapter=qlora_8bit", "model.load.dtype=bfloat16"],
    "whole layers": ["adapter.modules_to_save=[norm]", FLOAT32],
    "virtual tokens": ["adapter=prompt_tuning", "model.load.dtype=bfloat16"],
    "a prefix": ["adapter=prefix_tuning", FLOAT32],
}
RARE = [
    "LoRA on all layers",
    "LoRA, evaluated in bfloat16",
    "LoRA, merged in float32, evaluated in bfloat16",
    "all parameters, merged in bfloat16",
    "a prefix",
    "whole layers",
    "QLoRA, merged into the base",
    "QLoRA in 8 bits",
]
VOLATILE = ("seconds", "_per_second", "memory_bytes")


def merged(model, splits, options) -> None:
    """The folders `adapter` and `merged`."""
    train_adapter.main(["--splits", str(splits), "--model", str(model), "--output", "adapter", *SMALL, *options])
    inputs = ["--model", str(model), "--adapter", "adapter", "--splits", str(splits)]
    merge_adapter.main([*inputs, "--output", "merged", *SMALL, *options])


def evaluated(model, splits, output, options) -> tuple[dict, str]:
    """(metrics.json without times and memory, predictions.jsonl)."""
    inputs = ["--model", str(model), "--adapter", "adapter", "--splits", str(splits)]
    evaluate_model.main([*inputs, "--output", output, *SMALL, *options])
    return stable(json.loads(Path(output, "metrics.json").read_text())), Path(output, "predictions.jsonl").read_text()


def stable(value):
    if isinstance(value, dict):
        return {name: stable(item) for name, item in value.items() if not name.endswith(VOLATILE)}
    return [stable(item) for item in value] if isinstance(value, list) else value


def stored_in_4_bits(model: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def assert_same_network(found, expected) -> None:
    """To the last bit of what is in files and of what is not."""
    assert type(found) is type(expected)
    for kind in ("named_parameters", "named_buffers"):
        one, other = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", rarely(RUNS, RARE))
def test_in_memory_a_run_is_what_its_merged_folder_is(workspace, tiny_model, tiny_splits, name):
    options = RUNS[name]
    merged(tiny_model, tiny_splits, options)
    expected = evaluated("merged", tiny_splits, "report", options)
    assert evaluated(tiny_model, tiny_splits, "in-memory", options) == expected

    config = typed("evaluate_model", load_stage_config("evaluate_model", None, [*SMALL, *options]))
    source = merging.source_of(config, tiny_model, Path("adapter"), tiny_splits)
    found = source.network(config.model.load.model_dump())
    assert_same_network(found, loading.load_model(Path("merged"), config.model.load.model_dump()))
    weights, untouched = found.state_dict(), loading.load_model(tiny_model, config.model.load.model_dump()).state_dict()
    assert any(not torch.equal(weight, untouched.get(name, weight)) for name, weight in weights.items()) or (
        weights.keys() - untouched.keys()
    ), "the training has an effect"
    facts = json.loads(Path("merged/provenance.json").read_text())
    assert {name: facts[name] for name in source.facts} == source.facts
    assert merging.source_of(config, Path("merged"), Path("adapter"), tiny_splits).merging is None
    uncompared = merging.source_of(config, tiny_model, Path("adapter"), tiny_splits, compares=False)
    assert_same_network(uncompared.network(config.model.load.model_dump()), found)


@pytest.mark.parametrize("options", [[FLOAT32], ["adapter=prompt_tuning", FLOAT32]], ids=["LoRA", "virtual tokens"])
def test_a_base_stored_in_4_bits_is_merged_in_memory_as_in_its_folder(workspace, tiny_model, tiny_splits, options):
    stored_in_4_bits(tiny_model, Path("base"))
    merged("base", tiny_splits, options)
    expected = evaluated("merged", tiny_splits, "report", options)
    assert evaluated("base", tiny_splits, "in-memory", options) == expected
    untouched = ["--model", "base", "--splits", str(tiny_splits), "--output", "untouched"]
    evaluate_model.main([*untouched, *SMALL, FLOAT32])
    assert json.loads(Path("untouched/metrics.json").read_text())["values"] != expected[0]["values"]


def test_untied_and_tied_embeddings_that_were_trained_are_those_of_the_folder(workspace, tmp_path, tiny_splits):
    untied = tiny.make_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    options = ["adapter.modules_to_save=[embed_tokens,lm_head]", FLOAT32]
    merged(untied, tiny_splits, options)
    assert evaluated(untied, tiny_splits, "in-memory", options) == evaluated("merged", tiny_splits, "report", options)


def test_a_run_that_diverged_has_its_report_without_a_merged_folder(workspace, tiny_model, tiny_splits, capsys):
    options = ["train.learning_rate=1e30", FLOAT32]
    merged(tiny_model, tiny_splits, options)
    expected = evaluated("merged", tiny_splits, "report", options)
    assert evaluated(tiny_model, tiny_splits, "in-memory", options) == expected
    assert expected[0]["diverged_at_step"]


def test_an_adapter_of_another_model_is_refused(workspace, tmp_path, tiny_model, tiny_splits, capsys):
    other = tiny.make_tiny_model(tmp_path / "other", seed=7)
    train_adapter.main(["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", "adapter", *SMALL])
    inputs = ["--model", other, "--adapter", "adapter", "--splits", tiny_splits, "--output", "report", *SMALL]
    said = complaint(capsys, evaluate_model.main, *inputs)
    assert said.startswith(f"{other}: its weights are not those with which adapter was trained; use the model")
