"""Weights are loaded whole or not at all, no model's program runs, and what cannot be merged or fit is known before."""

import io
import json
import logging
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import load_from_disk
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from steps import (
    evaluate_model,
    fetch_model,
    merge_adapter,
    reference_logprobs,
    sample_answers,
    tokenize_splits,
    train_adapter,
)
from temper import api
from temper.commands import export
from temper.config.stages import load_stage_config
from temper.errors import UserError
from temper.model import adapters, limits, loading
from temper.training import checkpoints
from tests.bad_inputs import weights as bad
from tests.support import finished, tiny
from tests.support.asking import command
from tests.support.networks import FAMILIES, network_of, tokenizer_of

LOAD = {"dtype": "float32", "attn_implementation": "eager"}
PLAIN = {"load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SMALL = ["experiment=smoke", "sweep=none", "model.load.dtype=float32", "train.warmup_steps=0", "adapter.r=4"]
SMALL += ["train.per_device_train_batch_size=8", "train.num_train_epochs=2"]


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as refused:
        call(*arguments, **named)
    return str(refused.value)


# --- no false alarm ------------------------------------------------------------------------------


def saved(network, folder: Path, kind: str) -> Path:
    """The network as people publish it: in one file, in shards, or as torch saves it."""
    network.save_pretrained(folder, max_shard_size="30KB" if kind == "shards" else "5GB")
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_whole(tmp_path, monkeypatch, family, tied):
    kind, arguments, *rest = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (kind, {**arguments, "tie_word_embeddings": tied}, *rest))
    network = network_of(family, tokenizer_of(family))
    for form in ("one", "shards", "bin"):
        folder = saved(network, tmp_path / form, form)
        loading.check_weights(folder)
        loaded, expected = loading.load_model(folder, LOAD).state_dict(), network.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(weight, loaded[name]) for name, weight in expected.items()), form
    if tied:
        loading.load_model(folder, LOAD, {**PLAIN, "load_in_4bit": True})
        loading.load_model(folder, LOAD, {**PLAIN, "load_in_8bit": True})


MASK = torch.ones(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("family", "more"),
    [  # what older versions of transformers wrote, and what published models still have
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": MASK, "gpt_neox.layers.0.attention.masked_bias": MASK[0, 0]}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": MASK[0, 0, 0]}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": MASK[0, 0, 0]}),
        ("t5", {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": MASK[0, 0]}),
    ],
)
def test_leftovers_of_older_versions_do_no_harm(tmp_path, family, more):
    network = network_of(family, tokenizer_of(family))
    network.save_pretrained(tmp_path)
    leftovers = {name: mask.clone() for name, mask in more.items()}
    save_file({**load_file(tmp_path / "model.safetensors"), **leftovers}, tmp_path / "model.safetensors")
    loading.check_weights(tmp_path)
    loaded = loading.load_model(tmp_path, LOAD).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in network.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_lacks_is_named(tmp_path, family):
    network_of(family, tokenizer_of(family)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = sorted(name for name in tensors if ".1." in name)[0]
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (lambda: loading.check_weights(tmp_path), lambda: loading.load_model(tmp_path, LOAD)):
        assert f"1 missing ({name.removeprefix('transformer.')}" in refusal(load).replace("(transformer.", "(")


@pytest.mark.parametrize(
    "more",
    [
        ["adapter.modules_to_save=[lm_head]"],
        ["adapter.trainable_token_indices=[1,2,3]"],
        ["adapter=dora"],
        ["adapter=prompt_tuning"],
        ["adapter=prefix_tuning"],
        ["adapter=p_tuning"],
        ["adapter.init_lora_weights=pissa"],
    ],
)
def test_every_kind_of_adapter_is_put_on_whole(workspace, tiny_model, tiny_splits, more):
    """As PEFT does it, and half of an adapter is none."""
    small = [*SMALL[:-3], "train.max_steps=2", *more]
    train_adapter.main(["--splits", str(tiny_splits), "--model", str(tiny_model), "--output", "a", *small])
    ids = torch.arange(3, 40)[None]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32"), "a").eval()
    found = adapters.put_on(loading.load_model(tiny_model, LOAD), Path("a")).eval()
    with torch.no_grad():
        assert torch.allclose(found(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    tensors = load_file("a/adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors or {"other": torch.ones(1)}, "a/adapter_model.safetensors")
    refusal(adapters.put_on, loading.load_model(tiny_model, LOAD), Path("a"))


# --- a program in a model ------------------------------------------------------------------------


def entry_points(project: Path, model: str, splits: Path, pairs: Path) -> dict:
    """Every command that reads a model's folder, `model` being it."""
    hand = ["--model", model, "--output", "out", *SMALL[:3]]
    dpo = [*hand, "--splits", str(pairs), "method=dpo", "data.rejected_from=[positive,negative]"]
    prompts = ["--prompts", str(project / "results/prompts/reviews-00000000a1")]
    asked = ["--run", f"results/merged/{finished.MERGED}"]
    Path("prompts.txt").write_text("The plot is a joy.\n")
    rows = [{"prompt": "a", "completion": "b"}] * 4
    source = ["model.source.kind=files", f"model.source.path={model}", "sweep=none"]
    return {
        "fetch_model": lambda: fetch_model.main(["--output", "out", *source]),
        "tokenize_splits": lambda: tokenize_splits.main([*prompts, *hand]),
        "train_adapter": lambda: train_adapter.main(["--splits", str(splits), *hand]),
        "init from text": lambda: train_adapter.main(
            ["--splits", str(splits), *hand, "adapter=prompt_tuning", "adapter.prompt_tuning_init=TEXT"]
            + ["adapter.prompt_tuning_init_text=positive"]
        ),
        "evaluate_model": lambda: evaluate_model.main(["--splits", str(splits), *hand]),
        "reference_logprobs": lambda: reference_logprobs.main(dpo),
        "sample_answers": lambda: sample_answers.main([*dpo, "method.own_answers={max_new_tokens: 4}"]),
        "merge_adapter": lambda: merge_adapter.main(
            ["--model", model, "--adapter", f"results/adapters/{finished.ADAPTER}", "--output", "out"]
        ),
        "chat": lambda: command("chat")(asked),
        "predict": lambda: command("predict")([*asked, "--input", "prompts.txt", "--output", "answers.jsonl"]),
        "export": lambda: command("export")([*asked, "--output", "out.gguf"]),
        "publish": lambda: command("publish")([*asked, "--repository", "me/it", "--merged", "--dry-run", "card"]),
        "api": lambda: api.train(rows, model=model, output="out"),
    }


@pytest.mark.parametrize("damage", [bad._own_code, bad._own_tokenizer, bad._pickled(raw=False), bad._pickled(raw=True)])
def test_no_program_of_a_model_runs(
    workspace, finished_run, tiny_model, tiny_splits, tiny_pairs, monkeypatch, capsys, damage
):
    """Whatever is asked, whatever stands on standard input."""
    shutil.copytree(finished_run / "results", "results")
    merged = Path(f"results/merged/{finished.MERGED}")
    shutil.copytree(tiny_model, "m")
    for folder in (Path("m"), merged):
        damage(folder)
    held = 0
    for name, run in entry_points(finished_run, "m", tiny_splits, tiny_pairs).items():
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
        if name in ("tokenize_splits",) and damage not in (bad._own_code, bad._own_tokenizer):
            continue  # it reads no weights
        with pytest.raises((SystemExit, UserError)) as ended:
            run()
        assert isinstance(ended.value, UserError) or ended.value.code == 2, f"{name}: {capsys.readouterr().err}"
        assert "[y/N]" not in capsys.readouterr().out, name
        assert not list(Path().rglob(bad.MARKER)), name
        assert not Path("out").is_dir() or name == "api", name
        held += 1
    assert held >= 12


# --- bases in few bits, tied embeddings: what is merged is what was trained ------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_stored_in_few_bits(workspace, capsys, bits):
    """It is trained, merged into its plain weights, and what cannot be is refused before."""
    tiny.make_tiny_model(Path("wide"), hidden_size=64, intermediate_size=128)
    packed = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained("wide", quantization_config=packed).save_pretrained("packed")
    AutoTokenizer.from_pretrained("wide").save_pretrained("packed")
    source = ["model.source.kind=files", "model.source.path=packed", "sweep=none"]
    fetch_model.main(["--output", "m", *source])
    tiny.make_tiny_splits(Path("splits"), Path("m"))
    train = ["--splits", "splits", "--model", "m", *SMALL]
    train.remove("adapter.r=4")
    train_adapter.main([*train, "--output", "a"])
    merge_adapter.main(["--model", "m", "--adapter", "a", "--output", "g"])
    assert "quantization_config" not in json.loads(Path("g/config.json").read_text())
    plain = loading.load_model(Path("m"), LOAD).dequantize()
    tuned, merged = PeftModel.from_pretrained(plain, "a").eval(), AutoModelForCausalLM.from_pretrained("g").eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, tuned(input_ids=ids).logits, atol=1e-3)
    other = ["adapter=qlora"] if bits == 8 else ["adapter=qlora_8bit"]
    for more, says in ((["adapter=full"], "cannot be trained themselves"), (other, "stored quantized already")):
        with pytest.raises(SystemExit):
            train_adapter.main([*train, "--output", "no", *more])
        assert says in capsys.readouterr().err


def test_what_is_proposed_for_tied_embeddings_works(workspace, tiny_model, tiny_splits, capsys):
    train = ["--splits", str(tiny_splits), "--model", str(tiny_model), *SMALL, "train.learning_rate=1e-2"]
    with pytest.raises(SystemExit):
        train_adapter.main([*train, "--output", "a", "adapter.target_modules=[q_proj,lm_head]"])
    assert "adapter.modules_to_save=[lm_head]" in capsys.readouterr().err
    proposed = ["adapter.target_modules=[q_proj]", "adapter.modules_to_save=[lm_head]"]
    train_adapter.main([*train, "--output", "a", *proposed])
    merge_adapter.main(["--model", str(tiny_model), "--adapter", "a", "--output", "g"])
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), "a").eval()
    merged = AutoModelForCausalLM.from_pretrained("g").eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, tuned(input_ids=ids).logits, atol=1e-3)
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight), "the embeddings stay as they were"


# --- limits --------------------------------------------------------------------------------------


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (transformers.GPT2Config(n_positions=128), 128),
        (transformers.OPTConfig(max_position_embeddings=64), 64),
        (transformers.LlamaConfig(max_position_embeddings=256), 256),
        (
            transformers.Qwen2Config(
                max_position_embeddings=32768,
                rope_parameters={
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            ),
            131072,
        ),
        (transformers.MistralConfig(max_position_embeddings=512, sliding_window=64), 512),
        (transformers.BartConfig(max_position_embeddings=96), 96),
        (transformers.LEDConfig(max_encoder_position_embeddings=200, max_decoder_position_embeddings=100), 100),
        (transformers.BloomConfig(), None),
        (transformers.MptConfig(), None),
        (transformers.FalconConfig(alibi=True), None),
        (transformers.T5Config(n_positions=512), None),
    ],
)
def test_a_models_context(tmp_path, config, positions):
    config.save_pretrained(tmp_path)
    found = limits.limits_of(tmp_path)
    assert (found.positions, found.vocabulary) == (positions, config.vocab_size)
    assert found.apart == config.is_encoder_decoder


def test_prompt_and_answer_share_the_context_of_a_causal_model():
    causal = limits.Limits(Path(), 100, 9, apart=False, virtual_tokens=10)
    causal.check_answer(60, 30)
    assert "context is 90" in refusal(causal.check_answer, 61, 30)
    apart = limits.Limits(Path(), 100, 9, apart=True, virtual_tokens=0)
    apart.check_answer(100, 100)
    refusal(apart.check_answer, 101, 1)
    refusal(apart.check_answer, 1, 101)
    limits.Limits(Path(), None, 9, apart=False, virtual_tokens=10).check_answer(10**6, 10**6)


@pytest.fixture
def gpt2(workspace):
    """A model with learned positions, 128 of them, that computes nothing beyond; prompts whose rows fill it."""
    tokenizer = tiny.tiny_tokenizer()
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=128, bos_token_id=1, eos_token_id=2, **GPT2)
    transformers.GPT2LMHeadModel(config).save_pretrained("m")
    tokenizer.save_pretrained("m")
    Path("prompts").mkdir()
    number = 0
    for split, count in {"train": 24, "validation": 4, "test": 6}.items():
        lines = []
        for index in range(count):
            number += 1
            text = f"Question {number}? " + "The plot is a joy. " * (30 if split == "train" and index == 5 else 2)
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "positive"}]
            lines.append(json.dumps({"id": number, "messages": turns}) + "\n")
        Path(f"prompts/{split}.jsonl").write_text("".join(lines))


def test_rows_beyond_the_context(gpt2, capsys):
    """Refused where they become tokens; what is proposed works, up to the report."""
    run = ["--prompts", "prompts", "--model", "m", *SMALL]
    with pytest.raises(SystemExit):
        tokenize_splits.main([*run, "--output", "s"])
    assert "train split, row 6 of the raw data" in (said := capsys.readouterr().err)
    assert "set tokenize.max_length=128" in said
    tokenize_splits.main([*run, "--output", "s", "tokenize.max_length=128"])
    assert len(load_from_disk("s")["train"]) == 23
    train_adapter.main(["--splits", "s", "--model", "m", "--output", "a", *SMALL])
    merge_adapter.main(["--model", "m", "--adapter", "a", "--output", "g"])
    judge = ["--model", "g", "--splits", "s", "--adapter", "a", "--output", "r", *SMALL]
    with pytest.raises(SystemExit):
        evaluate_model.main([*judge, "eval.max_new_tokens=100"])
    assert "(eval.max_new_tokens), but the model's context is 128" in capsys.readouterr().err
    evaluate_model.main([*judge, "eval.max_new_tokens=8"])


def test_training_knows_how_long_the_answers_of_its_evaluation_may_be(gpt2, capsys):
    """The plan tells it, in no key; the longest of several evaluations counts."""
    tokenize_splits.main(["--prompts", "prompts", "--model", "m", "--output", "s", *SMALL, "tokenize.max_length=128"])
    evaluation = load_stage_config("evaluate_model", None, SMALL)["eval"]
    plan = {"jobs": {"a": {"settings": {"max_new_tokens": 100, "evaluations": [evaluation]}}}}
    Path("plan.json").write_text(json.dumps(plan))
    train = ["--splits", "s", "--model", "m", "--output", "a", *SMALL, "--plan", "plan.json"]
    with pytest.raises(SystemExit):
        train_adapter.main(train)
    assert "validation split, row" in (said := capsys.readouterr().err)
    assert "(eval.max_new_tokens)" in said
    assert "training " not in said, "before it began"
    plan["jobs"]["a"]["settings"]["max_new_tokens"] = 8
    Path("plan.json").write_text(json.dumps(plan))
    train_adapter.main(train)


def test_tokens_that_the_model_does_not_know(workspace, capsys):
    """An added token that rows have is refused, and what is proposed works; an added pad token is not needed."""
    tiny.make_tiny_model(Path("m"))
    tokenizer = AutoTokenizer.from_pretrained("m")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.add_tokens(["joyful"])
    tokenizer.save_pretrained("m")
    assert loading.load_tokenizer(Path("m")).pad_token == tokenizer.eos_token
    texts = [("The plot is joyful.", "positive")] + tiny.tiny_rows(8)
    tiny.make_tiny_splits(Path("s"), Path("m"), rows={"train": texts})
    train = ["--splits", "s", "--model", "m", *SMALL]
    with pytest.raises(SystemExit):
        train_adapter.main([*train, "--output", "a"])
    assert "train split, row 1 of the raw data: it has token" in (said := capsys.readouterr().err)
    assert "resize_token_embeddings" in said
    model = AutoModelForCausalLM.from_pretrained("m")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained("m")
    train_adapter.main([*train, "--output", "a"])


# --- checkpoints and GGUF ------------------------------------------------------------------------


def _seal_is_a_list(checkpoint: Path) -> None:
    (checkpoint / checkpoints.SEAL).write_text("[]")


def _no_state(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text("{}")


def _program_in(name: str):
    def damage(checkpoint: Path) -> None:
        torch.save({"state": bad._Program()}, checkpoint / name)

    return damage


def _another_optimizer(checkpoint: Path) -> None:
    saved = torch.load(checkpoint / "optimizer.pt")
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][:1]
    torch.save(saved, checkpoint / "optimizer.pt")


def _lacking(name: str):
    return lambda checkpoint: (checkpoint / name).unlink()


def _state(change):
    """`change` makes other entries of Trainer's state."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / "trainer_state.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def _half_of_the_adapter(checkpoint: Path) -> None:
    bad._tensors(bad._half, bad.ADAPTER)(checkpoint)


REMEDY = "delete .*checkpoint-3 and run the same command again"


@pytest.mark.parametrize(
    ("damage", "says", "goes_on"),
    [
        (_seal_is_a_list, "checkpoint-6 has no list of files", True),
        (_no_state, "checkpoint-6 is not of the step", True),
        (_lacking("optimizer.pt"), "checkpoint-6 has no optimizer.pt", True),
        (_lacking("rng_state.pth"), "checkpoint-6 has no rng_state.pth", True),
        (_state(lambda state: state | {"log_history": 7}), "checkpoint-6 has another 'log_history' in", True),
        (_state(lambda state: state.pop("epoch") and state), "checkpoint-6 has another 'epoch' in", True),
        (_another_optimizer, f"optimizer.pt has 'exp_avg' of another shape.*{REMEDY}", False),
        (_program_in("optimizer.pt"), f"never run.*{REMEDY}", False),
        (_program_in("scheduler.pt"), f"never run.*{REMEDY}", False),
        (_program_in("rng_state.pth"), f"never run.*{REMEDY}", False),
        (_half_of_the_adapter, "8 missing", False),
        (bad._pickled(False, "adapter_model.bin", bad.ADAPTER), f"never run.*{REMEDY}", False),
    ],
)
def test_a_checkpoint_that_somebody_changed(trained_once, workspace, caplog, capsys, damage, says, goes_on):
    """Passed over for the one before it, or refused by name; a copy beside it does no harm. No program runs."""
    import re

    shutil.copytree(trained_once, "results")
    [state] = Path("results/.state").glob("by-hand-*")
    last = state / "checkpoint-6"
    shutil.copytree(last, state / "checkpoint-6.bak")
    if not goes_on:  # else nothing is left to train, nor to read for it
        shutil.rmtree(last)
        last = state / "checkpoint-3"
    damage(last)
    if damage is not _seal_is_a_list:
        checkpoints.seal(last)
    caplog.set_level(logging.INFO, logger="temper")
    train = [*once(trained_once), "--output", "a"]
    if goes_on:
        train_adapter.main(train)
        assert "continuing from" in caplog.text
        assert "checkpoint-3" in caplog.text
    else:
        with pytest.raises(SystemExit) as ended:
            train_adapter.main(train)
        assert ended.value.code == 2
    assert "checkpoint-6.bak: passed over" in caplog.text
    assert re.search(says, caplog.text + capsys.readouterr().err)
    assert not list(Path().rglob(bad.MARKER))


def test_a_checkpoint_of_all_parameters_is_whole(workspace, tiny_model, tiny_splits, capsys):
    """Tied embeddings stand in it once, and that is no lack; a layer that is not there is."""
    train = ["--splits", str(tiny_splits), "--model", str(tiny_model), *SMALL, "adapter=full", "--output", "a"]
    train.remove("adapter.r=4")
    train_adapter.main(train)
    [state] = Path("results/.state").glob("by-hand-*")
    shutil.rmtree("a")
    shutil.rmtree(state / "checkpoint-6")
    shutil.copytree(state / "checkpoint-3", "whole")
    capsys.readouterr()
    train_adapter.main(train)
    assert "continuing from" in capsys.readouterr().err
    shutil.rmtree("a")
    shutil.rmtree(state)
    shutil.copytree("whole", last := state / "checkpoint-3")
    bad._tensors(bad._without_a_layer)(last)
    checkpoints.seal(last)
    with pytest.raises(SystemExit):
        train_adapter.main(train)
    assert "checkpoint-3: its tensors do not fit the model: 9 missing (model.layers.1." in capsys.readouterr().err


def once(results: Path) -> list[str]:
    return ["--splits", str(results.parent / "splits"), "--model", str(results.parent / "m"), *SMALL]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """The results folder of a training of two epochs of three steps, checkpoints and all."""
    import contextlib

    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        tiny.make_tiny_model(folder / "m")
        tiny.make_tiny_splits(folder / "splits", folder / "m")
        train_adapter.main([*once(folder / "results"), "--output", "a"])
    return folder / "results"


HEADER = struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"JUNK" + HEADER[4:],
        HEADER,
        HEADER[:10],
        struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 2**60) + bytes(1000),
        struct.pack("<4sIQQ", b"GGUF", 99, 1, 1) + bytes(100),
        struct.pack("<4sIQQ", b"GGUF", 1, 1, 1) + bytes(100),
    ],
)
def test_a_damaged_gguf_file(tmp_path, content):
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    (tmp_path / "out").mkdir()
    assert refusal(fetch_model._convert, file, tmp_path / "out").startswith("model.source.member: m.gguf: cannot be")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_gguf_file_that_is_cut_short(workspace, project_gguf, share):
    content = project_gguf.read_bytes()
    Path("m.gguf").write_bytes(content[: int(len(content) * share)])
    Path("out").mkdir()
    assert "m.gguf: " in refusal(fetch_model._convert, Path("m.gguf").absolute(), Path("out"))


@pytest.fixture(scope="module")
def project_gguf(tmp_path_factory, finished_run) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    export.export(finished_run / f"results/merged/{finished.MERGED}", file, "bf16", {"apply_chat_template": True})
    return file
