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


def test_the_file_names_the_template_and_tokenizer_of_training(project, tmp_path):
    from gguf import GGUFReader

    file = tmp_path / "run.gguf"
    command("export")(["--run", RUN, "--output", str(file)])
    fields = GGUFReader(file).fields
    sums = json.loads(Path(f"results/merged/{MERGED}/serving.json").read_text())
    for name in ("tokenizer", "special_tokens", "chat_template", "generation_config"):
        assert fields[f"temper.serving.{name}"].contents() == sums[name]


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_llama_cpp_tokenizes_and_answers_as_the_merged_model(project, tmp_path, outtype):
    """llama.cpp itself, where llama-cpp-python is installed (pip install -e .[llama])."""
    llama_cpp = pytest.importorskip("llama_cpp")
    import numpy
    from datasets import load_from_disk

    from temper.model import agreement, loading

    file, folder = tmp_path / "run.gguf", Path(f"results/merged/{MERGED}")
    command("export")(["--run", RUN, "--output", str(file), "--outtype", outtype])
    tokenizer = loading.load_tokenizer(folder)
    rows = load_from_disk("results/splits/reviews-tiny-00000000a2")["validation"]
    network = loading.load_model(folder, {"dtype": "float32", "attn_implementation": "eager"}).eval()
    prompts = agreement.prompts_of(rows)
    spoken = agreement.speak(network, prompts, loading.stop_token_ids(folder, tokenizer))
    whole = llama_cpp.GGML_TYPE_F32  # its cache would have 16 bits
    options = {"n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": whole, "type_v": whole}
    reader = llama_cpp.Llama(str(file), **options)
    found = []
    for prompt, answer in zip(prompts, spoken.answers, strict=True):
        text = tokenizer.decode(prompt, skip_special_tokens=False).encode()
        assert reader.tokenize(text, add_bos=False, special=True) == prompt
        reader.reset()
        reader.eval([*prompt, *answer[:-1]])
        scores = reader.scores[len(prompt) - 1 : len(prompt) + len(answer) - 1]
        found.append(torch.from_numpy(numpy.array(scores)))
    alike = agreement.compare(spoken.logits, found)
    assert alike.within({"f32": 1e-4, "q8_0": 0.05}[outtype]), alike
    assert alike.answers == len(prompts) > 0
