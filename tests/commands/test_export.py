"""GGUF: what transformers reads back from the file is the model that was exported."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from temper.commands import export
from temper.errors import UserError
from tests.support import tiny
from tests.support.asking import command, complaint
from tests.support.finished import MERGED, RUN

IDS = torch.arange(3, 90)[None]


def read_back(file: Path):
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


@pytest.mark.parametrize("outtype", ["auto", "f32", "f16", "bf16", "q8_0"])
def test_the_file_has_the_models_logits(project, tmp_path, outtype):
    """Those of the model itself, its matrices rounded as the type rounds them."""
    file = tmp_path / "run.gguf"
    command("export")(["--run", RUN, "--output", str(file), "--outtype", outtype])
    model = AutoModelForCausalLM.from_pretrained(f"results/merged/{MERGED}", dtype=torch.float32)
    plain = model(IDS).logits
    round_to = {"f16": torch.float16, "bf16": torch.bfloat16}.get(outtype, torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = weight.data.to(round_to).float()
    found = read_back(file)(IDS).logits
    if outtype == "q8_0":
        assert 0 < (found - plain).abs().mean() < 0.1 * plain.std()
    else:
        assert torch.equal(found, model(IDS).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["run.gguf"]


def test_grouped_heads_and_an_output_layer_of_its_own(tmp_path):
    folder = tiny.make_tiny_model(
        tmp_path / "model",
        vocab_size=len(tiny.tiny_tokenizer()) + 5,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        head_dim=16,
        rope_theta=5000.0,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    export.export(tmp_path / "model", tmp_path / "m.gguf", "auto", {"apply_chat_template": True})
    assert (read_back(tmp_path / "m.gguf")(IDS).logits - model(IDS).logits).abs().max().item() < 1e-4


def test_the_tokenizer_goes_along(project, tmp_path):
    file = tmp_path / "run.gguf"
    command("export")(["--run", RUN, "--output", str(file)])
    ours, read = (
        AutoTokenizer.from_pretrained(f"results/merged/{MERGED}"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="run.gguf"),
    )
    text = "<|im_start|>user\nA joy, 12 times; où?\n\n  I'm 🦙<|im_end|>\n"
    assert read(text)["input_ids"] == ours(text)["input_ids"]
    assert read.chat_template == ours.chat_template
    assert (read.bos_token_id, read.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)


BPE = {"model": {"type": "BPE"}, "normalizer": None}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": export.LLAMA3}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, "smollm"),
        ({"type": "Sequence", "pretokenizers": [SPLIT, {**BYTES, "use_regex": False}]}, "llama-bpe"),
        ({**BYTES, "add_prefix_space": True}, None),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTES]}, None),
        ({"type": "Sequence", "pretokenizers": [{**SPLIT, "pattern": {"Regex": "x"}}, BYTES]}, None),
        (None, None),
    ],
)
def test_how_words_are_split_has_a_known_name_or_is_refused(parts, name):
    tokenizer = {**BPE, "pre_tokenizer": parts}
    if name:
        assert export.pre_tokenizer(tokenizer, Path("m")) == name
        with pytest.raises(UserError, match="m: its tokenizer"):
            export.pre_tokenizer({**tokenizer, "normalizer": {"type": "NFC"}}, Path("m"))
    else:
        with pytest.raises(UserError, match="use llama.cpp's own converter"):
            export.pre_tokenizer(tokenizer, Path("m"))


def test_other_models_and_outputs_are_refused(finished_run, workspace, capsys):
    import shutil

    shutil.copytree(finished_run / "results", workspace / "results")
    config = Path(f"results/merged/{MERGED}/config.json")
    original = json.loads(config.read_text())
    for change, what in (
        ({"model_type": "mistral"}, "architecture mistral"),
        ({"attention_bias": True}, "biases"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embedding of type linear",
        ),
    ):
        config.write_text(json.dumps(original | change))
        message = complaint(capsys, command("export"), "--run", RUN, "--output", "a.gguf")
        assert message.startswith(f"results/merged/{MERGED}: {what}: this exporter is for plain Llama models; use")
    assert complaint(capsys, command("export"), "--run", RUN, "--output", "a.bin").startswith(
        "--output a.bin: name a file"
    )
    assert not Path("a.gguf").exists()
