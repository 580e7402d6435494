"""A base in several shards is merged shard by shard: the bits of whole networks, with the memory of one shard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steps import merge_adapter, train_adapter
from temper.config.stages import load_stage_config, typed
from temper.model import shards
from temper.model.adapters import add_adapter, save_adapter
from temper.model.loading import load_model
from temper.model.merging import Merging
from tests.config.test_option_tables import LORA_FIELDS, METHODS
from tests.conftest import ROOT, rarely
from tests.support import tiny
from tests.support.asking import complaint
from tests.support.networks import network_of, tokenizer_of

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "attention"}
SHARD = "20KB"


def in_shards(folder: Path, dtype: str = "float32", size: str = SHARD, **fields) -> Path:
    """A tiny base, its weights in many files."""
    tiny.make_tiny_model(folder, num_key_value_heads=4, **fields)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    (folder / "model.safetensors").unlink()
    network.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def trained(base: Path, folder: Path, adapter: dict) -> Path:
    """An adapter as far from its start as a training takes it."""
    network = add_adapter(load_model(base, {"dtype": "float32", "attn_implementation": "eager"}), adapter, seed=3)
    torch.manual_seed(4)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.02
    save_adapter(network, folder)
    return folder


def merging_of(base: Path, adapter: Path, *options: str) -> Merging:
    return Merging(typed("merge_adapter", load_stage_config("merge_adapter", None, [*options])), base, adapter, None)


def tensors_of(folder: Path) -> dict:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def in_memory(merging: Merging, folder: Path) -> dict:
    """What merging whole networks writes."""
    network, _ = merging.merged()
    network.save_pretrained(folder, max_shard_size=SHARD)
    return tensors_of(folder)


def assert_same_folder(found: Path, expected: Path) -> None:
    """Each tensor to the bit, and the files beside them."""
    one, other = tensors_of(found), tensors_of(expected)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    for file in ("config.json", "generation_config.json"):
        assert (found / file).read_text() == (expected / file).read_text()
    index, wanted = (json.loads((folder / shards.INDEX).read_text()) for folder in (found, expected))
    assert index["metadata"] == wanted["metadata"]
    assert {name: file for file in index["weight_map"].values() for name in load_file(found / file)} | index[
        "weight_map"
    ] == index["weight_map"]


def assert_merged_by_shards(tmp_path: Path, base: Path, adapter: dict, *options: str) -> dict:
    merging = merging_of(base, trained(base, tmp_path / "adapter", adapter), *options)
    by_shards = shards.sharded(merging)
    assert by_shards
    (tmp_path / "found").mkdir()
    facts = by_shards.write(tmp_path / "found")
    merged = in_memory(merging, tmp_path / "expected")
    assert_same_folder(tmp_path / "found", tmp_path / "expected")
    untouched = tensors_of(base)
    assert any(not torch.equal(tensor, untouched[name].to(tensor.dtype)) for name, tensor in merged.items())
    return facts


MERGED = {kind: fields for kind, fields in METHODS.items() if "num_virtual_tokens" not in fields}
ADAPTERS = {kind: {"peft_type": kind, **fields} for kind, fields in MERGED.items()}
ADAPTERS |= {f"LORA {fields}": {**LORA, **fields} for fields in LORA_FIELDS}
WHOLE = [
    name for name in ADAPTERS if name in shards.NEEDING_ALL or any(one in name for one in ("olora", "pissa", "mica"))
]
OFTEN = ("LN_TUNING", "OSF", "VERA", "LORA {'use_dora': True}", "LORA {'trainable_token_indices': [5, 6, 7]}")


@pytest.mark.parametrize("name", rarely(ADAPTERS, [name for name in ADAPTERS if name not in OFTEN]))
def test_each_kind_of_adapter_gives_the_bits_of_whole_networks(tmp_path, name):
    base = in_shards(tmp_path / "base", tie_word_embeddings=False)
    if name in WHOLE:
        assert shards.sharded(merging_of(base, trained(base, tmp_path / "adapter", ADAPTERS[name]))) is None
    else:
        assert_merged_by_shards(tmp_path, base, ADAPTERS[name])


@pytest.mark.parametrize(
    ("stored", "saved"),
    [("bfloat16", "auto"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")],
)
def test_each_precision_gives_the_bits_of_whole_networks(tmp_path, stored, saved):
    """Over tied embeddings, which stay as they are, and with a layer as a whole."""
    base = in_shards(tmp_path / "base", stored, size="10KB")
    adapter = {**LORA, "target_modules": "all-linear", "exclude_modules": ["lm_head"], "modules_to_save": ["norm"]}
    facts = assert_merged_by_shards(tmp_path, base, adapter, f"merge.dtype={saved}")
    assert facts["dtype"] == (stored if saved == "auto" else saved)
    assert facts["layers_compared"] == 2 * 7
    assert facts["largest_layer_difference"] <= facts["layer_tolerance"] / 2


def of_family(family: str, folder: Path) -> Path:
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(folder)
    network_of(family, tokenizer).save_pretrained(folder, max_shard_size=SHARD)
    return folder


@pytest.mark.parametrize("family", rarely(["gemma3", "t5", "bart"], ["gemma3", "bart"]))
def test_other_families_give_the_bits_of_whole_networks(tmp_path, family):
    assert_merged_by_shards(tmp_path, of_family(family, tmp_path / "base"), LORA)


def test_a_base_whose_tensors_are_renamed_is_merged_with_whole_networks(tmp_path, caplog):
    base = of_family("gpt_neox", tmp_path / "base")
    with caplog.at_level("INFO", "temper"):
        assert shards.sharded(merging_of(base, trained(base, tmp_path / "adapter", LORA))) is None
    assert "transformers renames or converts the base's weights" in caplog.text


def twice(base: Path) -> None:
    """The tied embeddings under both of their names, as older files have them."""
    index = json.loads((base / shards.INDEX).read_text())
    file = base / index["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    index["weight_map"]["lm_head.weight"] = file.name
    (base / shards.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("fields", "adapter", "options", "reason"),
    [
        ({}, {"modules_to_save": ["lm_head"]}, [], "the adapter is on tied weights (lm_head)"),
        ({"attention_bias": True, "mlp_bias": True}, {"bias": "all"}, [], "weights outside of its layers (base_model"),
        ({}, {}, ["quantization=4bit"], "the dequantized base is in no file"),
        ({}, {"init_lora_weights": "pissa"}, [], "this kind of adapter begins with the base's weights"),
        ({}, "twice", [], "the base has tied weights twice"),
    ],
    ids=["tied weights", "biases of other layers", "dequantized", "pissa", "twice"],
)
def test_what_cannot_be_done_by_shards_is_done_with_whole_networks(tmp_path, caplog, fields, adapter, options, reason):
    base = in_shards(tmp_path / "base", **fields)
    if adapter == "twice":
        adapter = twice(base) or {}
    merging = merging_of(base, trained(base, tmp_path / "adapter", {**LORA, **adapter}), *options)
    with caplog.at_level("INFO", "temper"):
        assert shards.sharded(merging) is None
    assert reason in caplog.text


def test_a_base_in_one_file_is_merged_with_whole_networks(tmp_path, tiny_model):
    assert shards.sharded(merging_of(tiny_model, trained(tiny_model, tmp_path / "adapter", LORA))) is None


def test_the_step_merges_by_shards_or_leaves_nothing(workspace, tiny_splits, capsys):
    """QLoRA into the base as stored; a merged weight beyond float16's range ends it in the middle of the shards."""
    base = in_shards(Path("base"), "bfloat16", size="10KB")
    more = ["experiment=smoke", "sweep=none", "adapter=qlora", "merge.dequantized_base=false", "train.max_steps=2"]
    more += ["model.load.dtype=float32", "train.eval_strategy=no", "train.warmup_steps=0"]
    train_adapter.main(["--splits", str(tiny_splits), "--model", str(base), "--output", "adapter", *more])
    inputs = ["--model", "base", "--adapter", "adapter", "--splits", str(tiny_splits)]
    merge_adapter.main([*inputs, "--output", "merged", *more])
    facts = json.loads(Path("merged/provenance.json").read_text())
    assert facts["shards"] == len(list(Path("merged").glob("model-*.safetensors"))) > 2
    assert "logit_difference" not in facts
    assert facts["base"] == "as stored"
    in_memory(merging_of(base, Path("adapter"), *more), Path("expected"))
    assert_same_folder(Path("merged"), Path("expected"))
    assert Path("merged/serving.json").is_file()
    assert AutoTokenizer.from_pretrained("merged").chat_template == tiny.CHAT_TEMPLATE

    tensors = load_file("adapter/adapter_model.safetensors")
    last = sorted(name for name in tensors if "layers.1." in name and "lora_B" in name)[-1]
    tensors[last] += 1e9
    save_file(tensors, "adapter/adapter_model.safetensors", {"format": "pt"})
    said = complaint(capsys, merge_adapter.main, *inputs, "--output", "refused", *more, "merge.dtype=float16")
    assert "adapter: the merged model is not what was trained: the outputs of model.layers.1.self_attn." in said
    assert said.endswith("try merge.dtype=float32")
    assert not Path("refused").exists()
    assert not [path for path in Path().iterdir() if "refused" in path.name and path.suffix != ".lock"]


PEAK = """
import re, sys
from pathlib import Path
from tests.model.test_shards import LORA, in_shards, merging_of
from temper.model import serving, shards
from temper.model.threads import computing_threads

def memory(of):
    return int(re.search(of + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def merge(base):
    Path(base, "merged").mkdir()
    merging = merging_of(Path(base), Path(base, "lora"), "merge.dtype=" + sys.argv[1])
    serving.weights(Path(base))
    shards.sharded(merging).write(Path(base, "merged"))

with computing_threads(1):
    merge("small")  # imports and what libraries keep
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    merge("large")
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a part")
@pytest.mark.slow
@pytest.mark.parametrize("saved", ["auto", "float32"])
def test_the_memory_is_that_of_one_shard(workspace, saved):
    """Below 1.5 shards of what is written, where one whole network takes 4.

    Measured is the peak of the resident memory (VmHWM) of a process while it sums, merges, compares and writes the
    weights, beyond its memory after the same for a small model. It counts all pages, those of mapped files as well. The
    C library gives back at once what is freed (MALLOC_MMAP_THRESHOLD_), of which it keeps some MB otherwise.
    """
    stored = "float32" if saved == "auto" else "bfloat16"
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "initializer_range": 0.02}
    trained(in_shards(Path("small"), stored), Path("small/lora"), LORA)
    size = "32MB" if stored == "float32" else "16MB"
    base = in_shards(Path("large"), stored, size, **sizes)
    trained(base, base / "lora", {**LORA, "target_modules": "all-linear"})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PEAK, saved], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = [file.stat().st_size for file in Path("large/merged").glob("model-*.safetensors")]
    assert sum(written) > 3.5 * max(written)
    assert int(done.stdout.split()[-1]) < 1.5 * max(written)
