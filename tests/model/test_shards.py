"""A base in several shards is merged shard by shard: the bits of merging whole networks, with the memory of one shard."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steps import merge_adapter, train_adapter
from temper.config.stages import load_stage_config, typed
from temper.model import shards
from temper.model.adapters import add_adapter, save_adapter
from temper.model.merging import Merging
from tests.config.test_option_tables import LORA_FIELDS, METHODS
from tests.conftest import ROOT
from tests.support import tiny
from tests.support.asking import complaint

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
    network = add_adapter(AutoModelForCausalLM.from_pretrained(base), adapter, seed=3)
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


@pytest.mark.parametrize("kind", MERGED)
def test_each_method_gives_the_bits_of_whole_networks(tmp_path, kind):
    base = in_shards(tmp_path / "base", tie_word_embeddings=False)
    assert_merged_by_shards(tmp_path, base, {"peft_type": kind, **MERGED[kind]})


@pytest.mark.parametrize("fields", LORA_FIELDS, ids=str)
def test_each_kind_of_lora_gives_the_bits_of_whole_networks(tmp_path, fields):
    base = in_shards(tmp_path / "base", tie_word_embeddings=False)
    assert_merged_by_shards(tmp_path, base, {**LORA, **fields})
