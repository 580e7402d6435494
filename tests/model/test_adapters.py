"""Every adapter through training, merge and evaluation, on a tiny model; quantized bases against bitsandbytes."""

import json
from pathlib import Path

import pytest
import torch

from steps import merge_adapter, train_adapter
from temper.config.stages import load_stage_config
from temper.evaluation import generation, likelihoods
from temper.model import loading

LOAD = {"dtype": "float32", "attn_implementation": "eager"}
LORA = ["lora", "lora_all_linear", "rslora", "dora"]
QUANTIZED = ["qlora", "qlora_8bit"]
VIRTUAL = ["prompt_tuning", "prefix_tuning", "p_tuning"]
GREEDY = {"batch_size": 8, "max_new_tokens": 6, "do_sample": False}


def train_and_merge(tiny_splits, tiny_model, *overrides, merge=()) -> tuple[Path, Path]:
    small = ["experiment=smoke", "model.load.dtype=float32", "train.per_device_train_batch_size=4", *overrides]
    arguments = ["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", "adapter"]
    train_adapter.main([*arguments, *small])
    arguments = ["--model", str(tiny_model), "--adapter", "adapter", "--output", "merged"]
    merge_adapter.main([*arguments, *small, *merge])
    return Path("adapter"), Path("merged")


def facts(folder: Path, name: str = "training.json") -> dict:
    return json.loads((folder / name).read_text())


def rows_of(tiny_splits) -> list[dict]:
    from datasets import load_from_disk

    return list(load_from_disk(str(tiny_splits))["test"])


@pytest.mark.parametrize("adapter", [*LORA, *QUANTIZED, *VIRTUAL, "full"])
def test_every_adapter_trains_merges_and_answers(workspace, tiny_splits, tiny_model, adapter):
    trained, merged = train_and_merge(
        tiny_splits, tiny_model, f"adapter={adapter}", "train.learning_rate=1e-2", "train.num_train_epochs=3"
    )
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0], "it learns"
    counts = facts(trained)
    assert 0 < counts["trainable_parameters"] <= counts["total_parameters"]
    assert (merged / "adapter").is_dir() == (adapter in VIRTUAL)
    rows, tokenizer = rows_of(tiny_splits), loading.load_tokenizer(merged)
    model = loading.load_model(merged, LOAD).eval()
    scores = likelihoods.row_losses(model, rows, 8, tokenizer.pad_token_id)
    alone = [likelihoods.row_losses(model, [row], 1, tokenizer.pad_token_id).sums[0] for row in rows]
    assert scores.sums == pytest.approx(alone, rel=1e-4), "a batch changes nothing"
    stop = loading.stop_token_ids(merged, tokenizer)
    together = generation.generate_answers(model, tokenizer, rows, GREEDY, stop).texts
    single = [generation.generate_answers(model, tokenizer, [row], GREEDY, stop).texts[0] for row in rows]
    assert together == single, "padding changes no answer"


@pytest.mark.parametrize("adapter", [*LORA, *QUANTIZED, *VIRTUAL])
def test_the_merged_model_is_what_peft_makes_of_base_and_adapter(workspace, tiny_splits, tiny_model, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merge = ["merge.dequantized_base=false"] if adapter in QUANTIZED else []
    settings = [f"adapter={adapter}", "train.learning_rate=1e-2"]
    trained, merged = train_and_merge(tiny_splits, tiny_model, *settings, merge=merge)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    expected = PeftModel.from_pretrained(base, trained).eval()
    found = loading.load_model(merged, LOAD).eval()
    ids = torch.randint(0, base.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, expected(ids).logits, atol=1e-4)


def test_qlora_can_be_merged_into_the_dequantized_base(workspace, tiny_splits, tiny_model):
    """That is the network that was trained: its logits are the quantized model's, where the original base's are not."""
    from peft import PeftModel

    quantization = {"load_in_4bit": True, "load_in_8bit": False}
    quantization |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    trained, merged = train_and_merge(
        tiny_splits, tiny_model, "adapter=qlora", "train.learning_rate=1e-2", merge=["merge.dequantized_base=true"]
    )
    assert facts(merged, "provenance.json")["base"] == "dequantized"
    quantized = PeftModel.from_pretrained(loading.load_model(tiny_model, LOAD, quantization), trained).eval()
    plain = loading.load_model(tiny_model, LOAD)
    original = PeftModel.from_pretrained(plain, trained).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        trained_logits = quantized(ids).logits
        dequantized = (loading.load_model(merged, LOAD)(ids).logits - trained_logits).abs().max()
        kept = (original(ids).logits - trained_logits).abs().max()
    assert dequantized < 1e-3
    assert kept > 10 * dequantized


def test_a_quantized_base_holds_what_bitsandbytes_gives(tiny_model):
    """The 4-bit weights are those of bitsandbytes' own function with the same options; 8-bit ones are int8."""
    import bitsandbytes

    settings = {"load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four = loading.load_model(tiny_model, LOAD, {"load_in_4bit": True, **settings})
    plain = loading.load_model(tiny_model, LOAD)
    name = "model.layers.0.self_attn.q_proj"
    weight, found = plain.get_submodule(name).weight.data, four.get_submodule(name).weight
    expected, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(found.data.flatten(), expected.flatten())
    assert found.quant_state.nested, "double quantization"
    assert isinstance(four.get_submodule(name), bitsandbytes.nn.Linear4bit)
    eight = loading.load_model(tiny_model, LOAD, {"load_in_4bit": False, **settings, "load_in_8bit": True})
    assert eight.get_submodule(name).weight.dtype == torch.int8


def test_an_evaluation_leaves_quantized_weights_as_they_are(tiny_model):
    settings = {"load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = loading.load_model(tiny_model, {**LOAD, "dtype": "bfloat16"}, {"load_in_4bit": True, **settings}).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(torch.arange(20)[None])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("adapter", ["qlora", "prompt_tuning"])
def test_epochs_of_a_shared_trunk_equal_separate_runs_to_the_bit(workspace, tiny_splits, tiny_model, adapter):
    """With an evaluation after each epoch, which must leave no trace in the weights."""
    from safetensors.torch import load_file

    def train(output: str, epochs: int, trunk: str) -> dict:
        overrides = ["experiment=smoke", f"adapter={adapter}", "train.per_device_train_batch_size=4"]
        config = load_stage_config("train_adapter", None, [*overrides, f"train.num_train_epochs={epochs}"])
        arguments = ["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", output]
        train_adapter.main([*arguments, "--config", json.dumps(config | {"trunk": trunk})])
        return load_file(f"{output}/adapter_model.safetensors")

    train("one", 1, "shared")
    continued, alone = train("two", 2, "shared"), train("alone", 2, "alone")
    assert json.loads(Path("two/provenance.json").read_text())["trained_steps"] == 6
    assert all(torch.equal(weight, alone[name]) for name, weight in continued.items())


def test_full_parameters_over_a_quantized_base_are_refused(capsys):
    from temper.errors import UserError
    from temper.planning import planner

    with pytest.raises(UserError, match="a quantized base cannot be trained itself: set adapter=qlora"):
        planner.build("smoke", "none", ["adapter=full", "quantization=4bit"])
    with pytest.raises(UserError, match="load_in_4bit and load_in_8bit exclude each other"):
        planner.build("smoke", "none", ["adapter=qlora", "quantization.load_in_8bit=true"])
