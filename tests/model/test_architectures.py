"""The whole chain on tiny random models of each family: causal ones of several kinds, and encoder-decoders."""

import functools
import json
import math
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from steps import evaluate_model, merge_adapter, reference_logprobs, tokenize_splits, train_adapter
from temper.data import batches
from temper.data.batches import Batch, collate
from temper.data.columns import IGNORED
from temper.data.encoder import Encoder
from temper.errors import UserError
from temper.evaluation import generation
from temper.model import loading
from temper.model.adapters import add_adapter, attention_projections
from temper.model.predictions import SupervisedLoss, flat_way, plain_way, short_way
from temper.training.preferences import chosen_of, rejected_of
from tests.commands.test_publish import code_of
from tests.conftest import rarely
from tests.support.asking import command
from tests.support.networks import ENCODER_DECODERS, FAMILIES, network_of, tokenizer_of
from tests.support.tiny import gradients, tiny_rows

ROWS = {"train": 24, "validation": 4, "test": 6}
LOAD = {"dtype": "float32", "attn_implementation": "eager"}
GREEDY = {"batch_size": 8, "max_new_tokens": 6, "do_sample": False}


@functools.cache
def network_and_rows(family: str):
    """(model, rows as tokenize_splits makes them, pad token)"""
    tokenizer = tokenizer_of(family)
    network = network_of(family, tokenizer)
    prompt = {"apply_chat_template": FAMILIES[family][2], "template": "{{ prompt }}\n\n", "loss_on": "assistant"}
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id], prompt, apart=family in ENCODER_DECODERS)
    rows = [
        encoder.encode([{"role": "user", "content": text}, {"role": "assistant", "content": answer}])
        for text, answer in tiny_rows(12)
    ]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return network, [{"input_ids": row.input_ids, "labels": row.labels} for row in rows], pad


def write_inputs(family: str, pairs: bool = False) -> None:
    tokenizer = tokenizer_of(family)
    network_of(family, tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("prompts").mkdir()
    number = 0
    for split, count in ROWS.items():
        lines = []
        for prompt, answer in tiny_rows(count, number):
            number += 1
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            other = {"positive": "negative", "negative": "positive"}[answer]
            lines.append(json.dumps({"id": number, "messages": turns, **({"rejected": other} if pairs else {})}))
        Path(f"prompts/{split}.jsonl").write_text("\n".join(lines) + "\n")


def options(family: str) -> list[str]:
    chosen = ["experiment=smoke", "model.load.dtype=float32", "train.per_device_train_batch_size=4"]
    chosen += ["train.learning_rate=1e-2", "train.num_train_epochs=3", "eval.split=test"]
    return chosen if FAMILIES[family][2] else [*chosen, "prompt=plain"]


def run_chain(family: str, *more: str) -> None:
    """Splits, adapter, merged and report, in the current folder."""
    small = [*options(family), *more]
    tokenize_splits.main(["--prompts", "prompts", "--model", "model", "--output", "splits", *small])
    train = ["--splits", "splits", "--model", "model", "--output", "adapter"]
    judge = ["--model", "merged", "--splits", "splits", "--adapter", "adapter", "--output", "report"]
    if "method=dpo" in more:
        reference = ["--splits", "splits", "--model", "model", "--output", "references"]
        reference_logprobs.main([*reference, *small])
        train, judge = [*train, "--references", "references"], [*judge, "--references", "references"]
    train_adapter.main([*train, *small])
    merge_adapter.main(["--model", "model", "--adapter", "adapter", "--output", "merged", *small])
    evaluate_model.main([*judge, *small])


def own_loss(network, rows: list[dict], pad: int) -> tuple[float, int]:
    """(sum, tokens) of the loss that transformers computes itself, row by row."""
    total = tokens = 0
    for row in rows:
        batch = collate([row], pad)
        count = int((batch["labels"] != IGNORED).sum())
        with torch.no_grad():
            total += network(**batch).loss.item() * count
        tokens += count
    return total, tokens


def own_answer(network, row: dict, tokenizer) -> list[int]:
    """What transformers' own greedy generation answers, up to and with the end of sequence."""
    prompt = torch.tensor([row["input_ids"][: row["prompt_length"]]])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    network.generation_config.forced_eos_token_id = None  # BART's default, which Temper leaves out like all of them
    made = network.generate(prompt, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False, **ends)[0].tolist()
    ids = made[1 if network.config.is_encoder_decoder else prompt.shape[1] :]
    return ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids


OLDER = ("qwen2", "gemma2")  # their successors differ in little of what Temper sees


@pytest.mark.parametrize("family", rarely(FAMILIES, OLDER))
def test_the_whole_chain(workspace, family):
    write_inputs(family)
    run_chain(family)
    kind = transformers.AutoModelForSeq2SeqLM if family in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    base, plain = (kind.from_pretrained(folder, attn_implementation="eager").eval() for folder in ("model", "merged"))
    tuned = PeftModel.from_pretrained(base, "adapter").eval()
    tokenizer = loading.load_tokenizer(Path("merged"))
    test = list(load_from_disk("splits")["test"])

    targets = json.loads(Path("adapter/adapter_config.json").read_text())["target_modules"]
    assert set(targets) == FAMILIES[family][3]
    losses = [json.loads(line).get("loss") for line in Path("adapter/metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0], "it learns"

    batch = collate(test, tokenizer.pad_token_id)
    with torch.no_grad():
        assert torch.allclose(plain(**batch).logits, tuned(**batch).logits, atol=1e-3), "merged is what was trained"

    facts = json.loads(Path("report/metrics.json").read_text())["values"]
    total, tokens = own_loss(plain, test, tokenizer.pad_token_id)
    assert facts["loss"] == pytest.approx(total / tokens, rel=1e-4)
    answers = [json.loads(line) for line in Path("report/predictions.jsonl").read_text().splitlines()]
    assert {answer["choice"] for answer in answers} <= {"positive", "negative"}, "the first token tells them apart"

    stop = loading.stop_token_ids(Path("merged"), tokenizer)
    model = loading.load_model(Path("model"), LOAD).eval()  # untrained, so that its answers differ
    together = generation.generate_answers(model, tokenizer, test, GREEDY, stop).ids
    single = [generation.generate_answers(model, tokenizer, [row], GREEDY, stop).ids[0] for row in test]
    assert together == single, "padding changes no answer"
    assert len({tuple(ids) for ids in together}) > 1
    assert single == [own_answer(model, row, tokenizer) for row in test]
    text = Path("splits/audit.txt").read_text()
    assert ">>>positive<|im_end|><<<" in text
    assert ("\n=> >>>" in text) == (family in ENCODER_DECODERS)


def test_the_code_of_an_encoder_decoders_card_answers_as_its_evaluation_did(workspace, capsys):
    write_inputs("t5")
    run_chain("t5")
    row = json.loads(Path("report/predictions.jsonl").read_text().splitlines()[0])
    for flags in (["--merged"], ["--base-model", "model"]):
        command("publish")(["--run", "report", "--repository", "acme/tuned", *flags, "--dry-run", "acme/tuned"])
        capsys.readouterr()
        code = code_of(Path("acme/tuned/README.md").read_text())
        exec(code.replace("Your prompt here.", row["prompt"]), {})
        assert capsys.readouterr().out.strip() == row["prediction"] != ""
        shutil.rmtree("acme")


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_transformers_own(family, caplog):
    network, rows, pad = network_and_rows(family)
    batch, padded = Batch(rows, pad), collate(rows, pad)
    learned = int((padded["labels"] != IGNORED).sum())
    expected = gradients(network, reference := network(**padded).loss * learned)
    loss = SupervisedLoss()
    with caplog.at_level("INFO", logger="temper"):
        total, count = loss(network, batch)
        found = gradients(network, total)
        loss(network, batch)
    assert count == learned
    torch.testing.assert_close(total, reference)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)
    plain = family in ENCODER_DECODERS | {"gemma2"}  # Gemma 2 caps its logits
    expected_way = plain_way if plain else short_way if family == "bloom" else flat_way
    assert loss.way is expected_way
    assert caplog.text.count("loss:") == int(loss.way is not flat_way), "said, and once"


def test_a_cap_that_hardly_shows_is_found(tiny_model):
    """Gemma 2's own cap moves a random model's loss by far less than rounding; a trained one's by more."""
    network = network_of("gemma2", tokenizer_of("gemma2"))
    network.config.final_logit_softcapping = 1000.0
    _, rows, pad = network_and_rows("gemma2")
    loss = SupervisedLoss()
    loss(network, Batch(rows, pad))
    assert loss.way is plain_way


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(["llama", "bloom", "gpt_neox", "t5", "bart"]),
    members=st.lists(st.integers(0, 11), min_size=1, max_size=5),
    extra=st.integers(1, 20),
)
def test_padding_is_never_learned_and_the_end_always_is(family, members, extra):
    """Where the pad token is the end of sequence as well: more padding changes neither the loss nor what is learned."""
    network, rows, pad = network_and_rows(family)
    rows = [rows[member] for member in members]
    for row in rows:
        assert row["labels"][-1] == network.config.eos_token_id
        assert row["labels"].count(network.config.eos_token_id) == 1
    batch = Batch(rows, pad)
    assert int((batch.padded()["labels"] == network.config.eos_token_id).sum()) == len(rows)
    width = batch.padded()["input_ids"].shape[1] + extra
    with torch.no_grad():
        total, count = SupervisedLoss()(network, batch)
        with mock.patch.object(batches, "PAD_TO", width):
            assert batch.padded()["input_ids"].shape[1] == width
            more, same = SupervisedLoss()(network, batch)
    alone, tokens = own_loss(network, rows, pad)
    assert count == same == tokens
    assert more.item() == pytest.approx(total.item(), rel=1e-4)
    assert total.item() == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_label_smoothing_is_transformers_own(tmp_path, family):
    from datasets import Dataset
    from transformers.trainer_pt_utils import LabelSmoother

    from temper.training import arguments, trainers

    network, rows, pad = network_and_rows(family)
    train = {"label_smoothing_factor": 0.1, "use_cpu": True}
    trainer = trainers.trainer_for(
        {"name": "sft"},
        model=network,
        args=arguments.training_arguments(train, 0, tmp_path),
        train_dataset=Dataset.from_list(rows),
        pad_token_id=pad,
        schedule_steps=1,
    )
    batch, padded = Batch(rows, pad), collate(rows, pad)
    with torch.no_grad():
        found = trainer.compute_loss(network, batch)
        expected = LabelSmoother(epsilon=0.1)(network(**padded), padded["labels"])
    torch.testing.assert_close(found, expected)
    learned = int((padded["labels"] != IGNORED).sum())
    assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == learned


def test_preferences_of_an_encoder_decoder(workspace):
    """The figures that the preference loss is made of are T5's own, and the chain goes through."""
    write_inputs("t5", pairs=True)
    pairs = ["method=dpo", "data.rejected_from=[positive,negative]"]
    run_chain("t5", *pairs)
    network = transformers.AutoModelForSeq2SeqLM.from_pretrained("model").eval()
    figures, rows = load_from_disk("references")["train"], load_from_disk("splits")["train"]
    for row, figure in zip(rows, figures, strict=True):
        assert row["prompt_length"] == len(row["input_ids"]) == len(row["rejected_input_ids"])
        for side, name in ((chosen_of, "ref_chosen_logps"), (rejected_of, "ref_rejected_logps")):
            assert figure[name] == pytest.approx(-own_loss(network, [side(row)], 0)[0], rel=1e-4)
    answers = [{"input_ids": [5, 2], "labels": [token, 2]} for token in (7, 8)]
    assert len({reference_logprobs._key(answer) for answer in answers}) == 2, "remembered apart"
    facts = json.loads(Path("report/metrics.json").read_text())["values"]
    assert math.isfinite(facts["rewards/margins"])
    assert facts["preference_accuracy"] >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "qlora", "full", "prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_every_adapter_of_an_encoder_decoder(workspace, family, adapter):
    write_inputs(family)
    run_chain(family, f"adapter={adapter}")
    model, test = loading.load_model(Path("merged"), LOAD).eval(), list(load_from_disk("splits")["test"])
    total, tokens = own_loss(model, test, 0)
    assert json.loads(Path("report/metrics.json").read_text())["values"]["loss"] == pytest.approx(
        total / tokens, rel=1e-4
    )
    together = generation.generate_answers(model, tokenizer_of(family), test, GREEDY, [2]).ids
    single = [generation.generate_answers(model, tokenizer_of(family), [row], GREEDY, [2]).ids[0] for row in test]
    assert together == single


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_max_length_is_for_prompt_and_answer_each(workspace, policy):
    write_inputs("t5")
    limits = ["tokenize.max_share.dropped=null", "tokenize.max_share.truncated=null"]
    run = ["--prompts", "prompts", "--model", "model", *options("t5"), f"tokenize.max_length_policy={policy}", *limits]
    tokenize_splits.main([*run, "--output", "all"])
    everything = load_from_disk("all")["train"]
    lengths = [len(row["input_ids"]) for row in everything]
    limit = sorted(lengths)[len(lengths) // 2]
    assert any(len(row["input_ids"]) + len(row["labels"]) > limit >= len(row["input_ids"]) for row in everything)
    tokenize_splits.main([*run, "--output", "limited", f"tokenize.max_length={limit}"])
    limited = load_from_disk("limited")["train"]
    if policy == "drop":
        assert limited["id"][:] == [row["id"] for row in everything if len(row["input_ids"]) <= limit]
        return
    assert len(limited) == len(everything)
    for row, whole in zip(limited, everything, strict=True):
        kept = len(row["input_ids"])
        assert kept == row["prompt_length"] == min(limit, len(whole["input_ids"]))
        assert row["input_ids"] == [*whole["input_ids"][: kept - 1], 2], "a prompt that is cut is closed as before"
        assert row["labels"] == whole["labels"]


def test_an_encoder_predicts_nothing():
    prompt = {"apply_chat_template": False, "template": "{{ prompt }}", "loss_on": "all"}
    with pytest.raises(UserError, match="prompt.loss_on=all is for causal models"):
        Encoder(tokenizer_of("t5"), [2], prompt, apart=True)


def test_attention_of_other_families():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50)
    assert attention_projections(transformers.GPT2LMHeadModel(config)) == ["attn.c_attn", "attn.c_proj"]
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50))
    lora = {"peft_type": "LORA", "r": 2, "target_modules": "attention"}
    with pytest.raises(UserError, match="finds no attention layer.*its linear layers are called .*in_proj"):
        add_adapter(mamba, lora, seed=0)


def test_attention_of_a_llama_is_what_naming_its_projections_gives(tiny_model):
    named = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    found = []
    for lora in (named, {**named, "target_modules": "attention"}):
        network = loading.load_model(tiny_model, LOAD)
        found.append({name: weight.clone() for name, weight in add_adapter(network, lora, seed=3).named_parameters()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
