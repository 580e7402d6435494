"""Preference optimization: equal to TRL's, a reference that is computed once, and training as exact as any other."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from steps import evaluate_model, merge_adapter, reference_logprobs, train_adapter
from temper.config.stages import load_stage_config
from temper.data.batches import Batch
from temper.evaluation import likelihoods
from temper.model.predictions import SupervisedLoss, flat_way, plain_way
from temper.training.preferences import FIGURES, PreferenceLoss, chosen_of, pairs_batch, rejected_of
from tests.support.tiny import gradients, make_tiny_splits, moved_model, tiny_tokenizer
from tests.support.trainings import assert_equal, forget_after

LOAD = {"dtype": "float32", "attn_implementation": "eager"}
SMALL = [
    "experiment=dpo",
    "adapter.r=4",
    "train.per_device_train_batch_size=4",
    "train.logging_steps=1",
    "train.warmup_steps=2",
    "train.learning_rate=1e-2",
    "model.load.dtype=float32",
]


def make_references(splits, model, output, dtype="float32") -> Path:
    config = json.dumps({"model": {"load": {**LOAD, "dtype": dtype}}, "quantization": {}})
    arguments = ["--splits", str(splits), "--model", str(model), "--output", str(output), "--config", config]
    reference_logprobs.main(arguments)
    return Path(output)


@pytest.fixture(scope="module")
def references(tiny_pairs, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return make_references(tiny_pairs, tiny_model, folder / "made")


# --- the loss ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tiny_pairs, references):
    """Pairs with the figures of their reference."""
    pairs, figures = load_from_disk(tiny_pairs)["train"], load_from_disk(references)["train"]
    return [{**pair, **figure} for pair, figure in zip(pairs, figures, strict=True)][:6]


@pytest.fixture
def policy(tiny_model):
    """The tiny model, moved away from where the reference stands."""
    return moved_model(tiny_model)


def trl_trainer(policy, tiny_model, rows, **loss):
    """TRL's trainer for the texts of `rows`."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = tiny_tokenizer()
    starts = [tokenizer.decode(row["input_ids"][: row["prompt_length"]]) for row in rows]
    texts = [
        {"prompt": start, "chosen": row["reference"], "rejected": row["rejected"]}
        for start, row in zip(starts, rows, strict=True)
    ]
    options = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": None, "output_dir": "trl"}
    return DPOTrainer(
        model=policy,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=DPOConfig(**loss, **options),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize(
    ("loss_type", "beta", "label_smoothing"),
    [("sigmoid", 0.1, 0.0), ("sigmoid", 2.0, 0.0), ("hinge", 0.5, 0.0), ("ipo", 0.1, 0.0), ("robust", 0.3, 0.2)],
)
def test_loss_gradients_and_figures_equal_trls(workspace, policy, tiny_model, rows, loss_type, beta, label_smoothing):
    """From the same texts: TRL tokenizes, pads and computes the reference by itself."""
    tokenizer = tiny_tokenizer()
    theirs = trl_trainer(policy, tiny_model, rows, beta=beta, loss_type=[loss_type], label_smoothing=label_smoothing)
    batch = theirs.data_collator(list(theirs.train_dataset))
    ours = pairs_batch(rows, tokenizer.pad_token_id)
    padded = ours.padded()
    for index, mask in enumerate(batch["attention_mask"].bool()):
        assert (
            batch["input_ids"][index][mask].tolist()
            == padded["input_ids"][index][padded["attention_mask"][index].bool()].tolist()
        )
    policy.train()
    expected = theirs.compute_loss(policy, batch)
    expected_gradients = gradients(policy, expected)
    losses, figures = PreferenceLoss(beta, loss_type, label_smoothing)(
        SupervisedLoss().sequence_logps(policy, ours, answers=2), ours
    )
    torch.testing.assert_close(losses.mean(), expected)
    found = gradients(policy, losses.mean())
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        scale = max(1.0, expected_gradients[name].abs().max().item())
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=5e-6 * scale)
    for name in FIGURES:
        assert figures[name].mean().item() == pytest.approx(theirs._metrics["train"][name][0], rel=1e-4, abs=1e-6)
    assert figures["rewards/accuracies"].mean() not in (0, 1), "a batch on which all figures matter"


def test_answers_that_share_their_prompt_give_what_they_give_alone(policy, rows):
    batch, loss = pairs_batch(rows, 0), SupervisedLoss()
    shared = loss.sequence_logps(policy, batch, answers=2)
    assert loss.way is flat_way
    found = gradients(policy, shared.square().mean())
    loss.way = plain_way
    alone = loss.sequence_logps(policy, batch, answers=2)
    torch.testing.assert_close(shared, alone)
    for name, gradient in gradients(policy, alone.square().mean()).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_only_the_last_answer_counts(rows):
    """Supervised fine-tuning learns all turns of the assistant; those before the answers are no preference."""
    row = {**rows[0], "labels": list(rows[0]["input_ids"]), "rejected_labels": list(rows[0]["rejected_input_ids"])}
    for side in (chosen_of(row), rejected_of(row)):
        counted = [index for index, label in enumerate(side["labels"]) if label != -100]
        assert counted == list(range(row["prompt_length"], len(side["input_ids"])))


# --- the reference -------------------------------------------------------------------------------


def test_references_are_the_models_own_log_probabilities(references, tiny_pairs, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    pairs, figures = load_from_disk(tiny_pairs), load_from_disk(references)
    assert {split: part["id"][:] for split, part in pairs.items()} == {s: part["id"][:] for s, part in figures.items()}
    for pair, figure in zip(pairs["test"], figures["test"], strict=True):
        for name, side in (("ref_chosen_logps", chosen_of(pair)), ("ref_rejected_logps", rejected_of(pair))):
            with torch.no_grad():
                found = plain_way(model, Batch([side], 0))
            expected = -found.losses().sum()
            assert figure[name] == pytest.approx(expected.item(), rel=1e-5)


def counts(folder) -> dict:
    return json.loads((Path(folder) / "references.json").read_text())


def test_an_edited_row_computes_one_row_and_equals_computing_all(workspace, tiny_model):
    from tests.support.tiny import tiny_rows

    texts = tiny_rows(24)
    edited = [*texts[:7], ("Quite another review, which moves you.", "positive"), *texts[8:]]
    before = make_tiny_splits(workspace / "before", tiny_model, rows={"train": texts}, pairs=True)
    after = make_tiny_splits(workspace / "after", tiny_model, rows={"train": edited}, pairs=True)
    first = make_references(before, tiny_model, "first")
    assert counts(first) == {"computed": 80, "known": 0}
    second = make_references(after, tiny_model, "second")
    assert counts(second) == {"computed": 2, "known": 78}, "both answers of the edited row"
    shutil.rmtree("results")
    anew = make_references(after, tiny_model, "anew")
    assert counts(anew) == {"computed": 80, "known": 0}
    for split, part in load_from_disk(anew).items():
        assert part.to_dict() == load_from_disk(second)[split].to_dict(), "to the bit, whatever stood beside a row"


def test_another_model_or_precision_knows_nothing_of_the_first(workspace, tiny_pairs, tiny_model):
    from tests.support.tiny import make_tiny_model

    make_references(tiny_pairs, tiny_model, "first")
    other = make_tiny_model(workspace / "other", seed=1)
    assert counts(make_references(tiny_pairs, other, "second"))["known"] == 0
    assert counts(make_references(tiny_pairs, tiny_model, "third", dtype="bfloat16"))["known"] == 0
    assert counts(make_references(tiny_pairs, tiny_model, "fourth"))["computed"] == 0


def test_a_line_that_was_cut_off_is_computed_again(workspace, tiny_pairs, tiny_model):
    make_references(tiny_pairs, tiny_model, "first")
    (file,) = Path("results/.state/references").glob("*.jsonl")
    file.write_text(file.read_text()[:-5])
    assert counts(make_references(tiny_pairs, tiny_model, "second")) == {"computed": 1, "known": 79}
    assert counts(make_references(tiny_pairs, tiny_model, "third")) == {"computed": 0, "known": 80}


def test_splits_without_pairs_are_named(workspace, tiny_splits, tiny_model, capsys):
    with pytest.raises(SystemExit) as stopped:
        make_references(tiny_splits, tiny_model, "out")
    assert stopped.value.code == 2
    assert "has no preference pairs; choose data.layout=preference" in capsys.readouterr().err


# --- training ------------------------------------------------------------------------------------


def train(pairs, model, references, output, *overrides, trunk=None) -> dict[str, torch.Tensor]:
    arguments = ["--splits", str(pairs), "--model", str(model), "--output", str(output)]
    arguments += ["--references", str(references)] if references else []
    config = load_stage_config("train_adapter", None, [*SMALL, *overrides]) | ({"trunk": trunk} if trunk else {})
    train_adapter.main([*arguments, "--config", json.dumps(config)])
    weights = Path(output) / "adapter_model.safetensors"
    return load_file(weights if weights.is_file() else Path(output) / "model.safetensors")


def lines_of(output) -> list[dict]:
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def test_it_starts_at_log_2_and_learns_to_prefer(workspace, tiny_pairs, tiny_model, references):
    train(tiny_pairs, tiny_model, references, "out", "train.num_train_epochs=4")
    lines = lines_of("out")
    first, last = lines[0], [line for line in lines if "eval_loss" in line][-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert last["eval_loss"] < 0.6
    assert last["eval_rewards/accuracies"] > 0.7
    assert last["eval_rewards/margins"] == pytest.approx(last["eval_rewards/chosen"] - last["eval_rewards/rejected"])
    assert {f"eval_{name}" for name in FIGURES} <= last.keys()
    assert json.loads(Path("out/training.json").read_text())["beta"] == 0.1


def test_all_parameters_start_at_log_2_in_float32(workspace, tiny_pairs, tiny_model):
    references = make_references(tiny_pairs, tiny_model, "references")
    train(tiny_pairs, tiny_model, references, "out", "adapter=full", "~adapter.r", "model.load.dtype=bfloat16")
    first = lines_of("out")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/chosen"]) < 1e-5


def test_epochs_of_a_shared_trunk_equal_separate_runs_to_the_bit(workspace, tiny_pairs, tiny_model, references):
    options = ["adapter.lora_dropout=0.1"]
    for name, trunk in (("shared", lambda _: "shared"), ("alone", lambda epoch: f"alone{epoch}")):
        for epoch in (1, 2):
            epochs = f"train.num_train_epochs={epoch}"
            train(tiny_pairs, tiny_model, references, f"{name}{epoch}", *options, epochs, trunk=trunk(epoch))
    for epoch in (1, 2):
        weights = (load_file(f"{name}{epoch}/adapter_model.safetensors") for name in ("shared", "alone"))
        assert_equal(*weights)
    assert json.loads(Path("shared2/training.json").read_text())["resumed_from_step"] == 6
    curves = [[{**line, "seconds": 0} for line in lines_of(f"{name}2")] for name in ("shared", "alone")]
    assert curves[0] == curves[1]


def test_continuing_in_the_middle_of_an_epoch_is_exact(workspace, tiny_pairs, tiny_model, references):
    options = [
        "train.num_train_epochs=2",
        "train.save_strategy=steps",
        "train.save_steps=4",
        "adapter.lora_dropout=0.1",
    ]
    undisturbed = train(tiny_pairs, tiny_model, references, "undisturbed", *options, trunk="undisturbed")
    train(tiny_pairs, tiny_model, references, "first", *options, "train.save_total_limit=9", trunk="killed")
    forget_after(8, Path("results/.state/killed"))
    resumed = train(tiny_pairs, tiny_model, references, "resumed", *options, trunk="killed")
    assert json.loads(Path("resumed/training.json").read_text())["resumed_from_step"] == 8
    assert_equal(undisturbed, resumed)
    curves = [[{**line, "seconds": 0} for line in lines_of(name)] for name in ("undisturbed", "resumed")]
    assert curves[0] == curves[1], "rewards included"


@pytest.mark.parametrize("small", [6, 5])
def test_accumulating_equals_one_large_batch(workspace, tiny_pairs, tiny_model, references, small):
    """Also when the last batch is not full: every pair counts once."""
    options = ["train.optim=sgd", "train.learning_rate=0.1", "train.max_grad_norm=0", "train.warmup_steps=0"]
    steps = -(-24 // small)
    large = train(tiny_pairs, tiny_model, references, "large", *options, "train.per_device_train_batch_size=24")
    batches = [f"train.per_device_train_batch_size={small}", f"train.gradient_accumulation_steps={steps}"]
    parts = train(tiny_pairs, tiny_model, references, "small", *options, *batches)
    for name, weight in large.items():
        torch.testing.assert_close(weight, parts[name], rtol=1e-4, atol=1e-6)
    one, other = lines_of("large")[0], lines_of("small")[0]
    for name in ("loss", *FIGURES):
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


def test_references_that_are_missing_or_of_other_rows_are_named(workspace, tiny_pairs, tiny_model, references, capsys):
    with pytest.raises(SystemExit):
        train(tiny_pairs, tiny_model, None, "out")
    assert "--references is missing: method=dpo needs the folder of reference_logprobs" in capsys.readouterr().err
    others = make_tiny_splits(workspace / "others", tiny_model, rows={"train": 12}, pairs=True)
    with pytest.raises(SystemExit) as stopped:
        train(others, tiny_model, references, "out")
    assert stopped.value.code == 2
    assert "of other rows than" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 6, 64])
def test_an_evaluations_log_probabilities_are_those_of_the_single_answers(tiny_pairs, tiny_model, batch_size):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    rows = list(load_from_disk(tiny_pairs)["train"])
    found = likelihoods.pair_logps(model, rows, batch_size, 0)
    for side, logps in zip((chosen_of, rejected_of), zip(*found, strict=True), strict=True):
        answers = [{**side(row), "prompt_length": row["prompt_length"]} for row in rows]
        expected = [-total for total in likelihoods.row_losses(model, answers, 8, 0).sums]
        assert logps == pytest.approx(expected, rel=1e-4)


# --- what comes after ----------------------------------------------------------------------------


def evaluate(model, splits, output, *flags) -> dict:
    settings = load_stage_config("evaluate_model", None, ["experiment=dpo", "model.load.dtype=float32"])
    arguments = ["--model", str(model), "--splits", str(splits), "--output", str(output), *map(str, flags)]
    evaluate_model.main([*arguments, "--config", json.dumps(settings)])
    return json.loads((Path(output) / "metrics.json").read_text())


def test_merge_and_report_of_a_preference_optimization(workspace, tiny_pairs, tiny_model, references):
    train(tiny_pairs, tiny_model, references, "adapter", "train.num_train_epochs=4")
    merge_adapter.main(["--model", str(tiny_model), "--adapter", "adapter", "--output", "merged"])
    base = evaluate(tiny_model, tiny_pairs, "base")
    flags = ["--adapter", "adapter", "--base-report", "base", "--references", references, "--start-report", "base"]
    facts = evaluate("merged", tiny_pairs, "report", *flags)
    assert "rewards/accuracies" not in base["values"], "the untouched model has no reference"
    figures = facts["values"]
    assert figures["rewards/accuracies"] > 0.7
    assert figures["rewards/margins"] == pytest.approx(figures["rewards/chosen"] - figures["rewards/rejected"])
    lines = [json.loads(line) for line in Path("report/predictions.jsonl").read_text().splitlines()]
    right = [line["chosen_logp"] > line["rejected_logp"] for line in lines]
    assert figures["preference_accuracy"] == sum(right) / len(right)
    means = [tuple(line[f"{side}_logp"] / line[f"{side}_tokens"] for side in ("chosen", "rejected")) for line in lines]
    assert figures["preference_accuracy_per_token"] == sum(good > bad for good, bad in means) / len(means)
    for line, row in zip(lines, load_from_disk(tiny_pairs)["validation"], strict=True):
        counted = [sum(label != -100 for label in row[name]) for name in ("labels", "rejected_labels")]
        assert [line["chosen_tokens"], line["rejected_tokens"]] == counted
    gains = [
        0.1 * (line["chosen_logp"] - figure["ref_chosen_logps"])
        for line, figure in zip(lines, load_from_disk(references)["validation"], strict=True)
    ]
    assert figures["rewards/chosen"] == pytest.approx(sum(gains) / len(gains))
    page = Path("report/report.html").read_text()
    for text in ("reward accuracy", "rewards (points: validation)", "preference accuracy", "after fine-tuning"):
        assert text in page
    assert "loss (per pair)" in page
