"""ORPO, SimPO and KTO: loss, gradients and figures equal TRL's, and trainings are as exact as any other."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file

from steps import evaluate_model, merge_adapter, reference_logprobs, train_adapter
from temper.config.stages import load_stage_config
from temper.data.batches import Batch
from temper.model.predictions import SupervisedLoss, flat_way, plain_way
from temper.training import unpaired
from temper.training.preferences import FIGURES, PAIR_LOSSES, answers_and_rest, chosen_of
from temper.training.trainers import _means
from tests.support.tiny import gradients, make_tiny_splits, moved_model, tiny_tokenizer
from tests.support.trainings import assert_equal, forget_after

TRL = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": None, "output_dir": "trl"}
SMALL = [
    "adapter.r=4",
    "train.per_device_train_batch_size=4",
    "train.logging_steps=1",
    "train.warmup_steps=2",
    "train.learning_rate=1e-2",
    "model.load.dtype=float32",
]
METHODS = ["orpo", "simpo", "kto", "kto-unpaired"]


@pytest.fixture
def policy(tiny_model):
    return moved_model(tiny_model)


@pytest.fixture(scope="module")
def rows(tiny_pairs):
    return list(load_from_disk(tiny_pairs)["train"])[:6]


@pytest.fixture(scope="module")
def tiny_labels(tmp_path_factory, tiny_model):
    return make_tiny_splits(tmp_path_factory.mktemp("labels") / "splits", tiny_model, labels=True)


def texts_of(rows: list[dict]) -> Dataset:
    """What TRL is given: it tokenizes by itself."""
    tokenizer = tiny_tokenizer()
    prompts = [tokenizer.decode(row["input_ids"][: row["prompt_length"]]) for row in rows]
    return Dataset.from_list(
        [
            {"prompt": prompt, "chosen": row["reference"], "rejected": row["rejected"]}
            for prompt, row in zip(prompts, rows, strict=True)
        ]
    )


def ours(policy, method: dict, rows: list[dict], way=None):
    """(loss of the batch, figures) of a method of pairs."""
    preference_loss, loss = PAIR_LOSSES[method["name"]](method), SupervisedLoss()
    loss.way = way
    if way is not None:
        loss.ways = {True: way, False: way}
    batch = preference_loss.batch_of(rows, tiny_tokenizer().pad_token_id)
    logps, cross_entropies = answers_and_rest(loss.predictions(policy, batch, answers=2), batch)
    losses, figures = preference_loss(logps, batch)
    figures = {name: values.mean().item() for name, values in figures.items()}
    assert way is not None or loss.way is flat_way
    total = losses.mean() + preference_loss.nll_weight * cross_entropies.mean()
    return total, {**figures, "nll_loss": cross_entropies.mean().item()}


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=5e-6 * scale)


# --- losses of pairs, without a reference ----------------------------------------------------------

SIMPO = {"name": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "orpo", "beta": 0.1},
        {"name": "orpo", "beta": 2.0},
        SIMPO,
        {**SIMPO, "beta": 0.5, "simpo_gamma": 0.3},
        {**SIMPO, "cpo_alpha": 0.7},
    ],
)
def test_loss_gradients_and_figures_equal_trls(workspace, policy, rows, method, monkeypatch):
    """TRL learns all of a chosen text in ORPO: that is `prompt.loss_on=all`."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    if method["name"] == "orpo":
        rows = [{**row, "labels": list(row["input_ids"])} for row in rows]
        trainer, args = ORPOTrainer, ORPOConfig(beta=method["beta"], **{**TRL, "max_length": 512})
    else:
        loss = {name: value for name, value in method.items() if name != "name"}
        trainer, args = CPOTrainer, CPOConfig(loss_type="simpo", **loss, **{**TRL, "max_length": 512})
    theirs = trainer(model=policy, args=args, train_dataset=texts_of(rows), processing_class=tiny_tokenizer())
    batch = theirs.data_collator(list(theirs.train_dataset))
    for row, ids, mask in zip(rows, batch["chosen_input_ids"], batch["chosen_attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == row["input_ids"]
    policy.train()
    expected, figures = theirs.get_batch_loss_metrics(policy, batch)
    expected_gradients = gradients(policy, expected)
    loss, found = ours(policy, method, rows)
    torch.testing.assert_close(loss, expected)
    assert_close(gradients(policy, loss), expected_gradients)
    names = FIGURES if method.get("cpo_alpha") == 0 else (*FIGURES, "nll_loss")
    for name in names:
        assert found[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-6), name
    assert found["rewards/accuracies"] not in (0, 1), "a batch on which all figures matter"


def test_the_fine_tuning_in_orpo_learns_what_fine_tuning_learns(policy, rows):
    """By default that is the answers of the assistant, all of them: the formulas of the paper, written out."""
    first = rows[0]["prompt_length"] // 2
    rows = [dict(row) for row in rows]
    rows[0]["labels"] = [-100] * (first - 2) + rows[0]["input_ids"][first - 2 : first] + rows[0]["labels"][first:]
    loss, figures = ours(policy, {"name": "orpo", "beta": 0.5}, rows)
    cross_entropies, means = [], {"chosen": [], "rejected": []}
    for row in rows:
        learned = plain_way(policy, Batch([row], 0))
        cross_entropies.append(learned.losses())
        rejected = Batch([{"input_ids": row["rejected_input_ids"], "labels": row["rejected_labels"]}], 0)
        means["rejected"].append(-plain_way(policy, rejected).losses().mean())
        means["chosen"].append(-plain_way(policy, Batch([chosen_of(row)], 0)).losses().mean())
    chosen, rejected = (torch.stack(means[name]).double() for name in ("chosen", "rejected"))
    odds = [torch.exp(logp) / (1 - torch.exp(logp)) for logp in (chosen, rejected)]
    ratio = -torch.nn.functional.logsigmoid(torch.log(odds[0] / odds[1])).mean()
    expected = torch.cat(cross_entropies).mean() + 0.5 * ratio
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(policy, loss), gradients(policy, expected))
    assert figures["nll_loss"] == pytest.approx(torch.cat(cross_entropies).mean().item())


@pytest.mark.parametrize("method", [{"name": "orpo", "beta": 0.1}, {**SIMPO, "cpo_alpha": 0.5}])
def test_answers_that_share_their_prompt_give_what_they_give_alone(policy, rows, method):
    shared, alone = (ours(policy, method, rows, way)[0] for way in (None, plain_way))
    torch.testing.assert_close(shared, alone)
    assert_close(gradients(policy, shared), gradients(policy, alone))


def test_an_answer_that_is_certain_has_a_gradient():
    loss = PAIR_LOSSES["orpo"]({"beta": 0.1})
    rows = [{"labels": [1]}, {"labels": [2]}]
    for logps in ([0.0, -3.0], [-3.0, 0.0], [0.0, 0.0]):
        certain = torch.tensor(logps, requires_grad=True)
        losses, _ = loss(certain, Batch(rows, 0))
        losses.sum().backward()
        assert losses.isfinite().all()
        assert certain.grad.isfinite().all()


# --- single answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rotated", "swapped"), [(True, False), (True, True), (False, False), (False, True)])
def test_kto_equals_trls(workspace, tiny_model, rows, rotated, swapped):
    """With TRL's mismatched texts and with ours, on this and on the other side of the bound of the estimated KL.

    TRL cuts these texts to its max_length, we to the longest row.
    """
    from trl import KTOConfig, KTOTrainer

    policy, reference = moved_model(tiny_model), moved_model(tiny_model, seed=2)
    policy, reference = (reference, policy) if swapped else (policy, reference)
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    texts = texts_of(rows)
    labels = [True, False, False, True, False, True]
    completions = [text["chosen"] if label else text["rejected"] for text, label in zip(texts, labels, strict=True)]
    single = Dataset.from_dict({"prompt": texts["prompt"][:], "completion": completions, "label": labels})
    made = [row if label else _rejected(row) for row, label in zip(rows, labels, strict=True)]
    longest = max(len(row["input_ids"]) for row in made)
    theirs = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=KTOConfig(per_device_train_batch_size=6, **weights, **{**TRL, "max_length": longest}),
        train_dataset=single,
        processing_class=tiny_tokenizer(),
    )
    split = Dataset.from_list([{**row, "label": label} for row, label in zip(made, labels, strict=True)])
    answers = unpaired.unpaired(split)
    others = [5, 0, 1, 2, 3, 4] if rotated else unpaired.mismatched(answers)
    dataset = list(theirs.train_dataset)
    of_others = [dataset[other]["completion_ids"] for other in others]
    if rotated:
        assert [row["KL_completion_ids"] for row in dataset] == of_others, "TRL's own"
    batch = theirs.data_collator(
        [{**row, "KL_completion_ids": ids} for row, ids in zip(dataset, of_others, strict=True)]
    )
    policy.train()
    expected = theirs.compute_loss(policy, batch)
    expected_gradients = gradients(policy, expected)

    found = Dataset.from_dict(_figures(reference, answers, others))
    ours = Batch(list(unpaired.with_references(split, found)), 0)
    loss, kto = SupervisedLoss(), unpaired.KtoLoss(**weights)
    mismatched = loss.sequence_logps(policy, unpaired.mismatched_batch(ours))
    logps = loss.sequence_logps(policy, ours)
    losses, figures = kto(*unpaired.ratios(ours, logps, mismatched))
    torch.testing.assert_close(losses.mean(), expected)
    assert_close(gradients(policy, losses.mean()), expected_gradients)
    means = _means(figures)
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert means[name] == pytest.approx(theirs._metrics["train"][name][0], rel=1e-4, abs=1e-5), name
    moved = (mismatched.detach() - torch.tensor(found["ref_KL_logps"][:])).mean().item()
    assert abs(moved) > 0.01, "so that with the two models swapped it is on the other side"
    assert means["kl"] == pytest.approx(max(moved, 0), abs=1e-5)


def _rejected(row: dict) -> dict:
    return {**row, "input_ids": row["rejected_input_ids"], "labels": row["rejected_labels"]}


def _figures(reference, answers: list[dict], others: list[int]) -> dict:
    reference.eval()
    with torch.no_grad():
        logps, mismatched = (
            SupervisedLoss().sequence_logps(reference, Batch(texts, 0)).tolist()
            for texts in (answers, unpaired.with_answers_of(answers, others))
        )
    ids = [row["id"] for row in answers]
    return {"id": ids, "KL_row": others, "ref_logps": logps, "ref_KL_logps": mismatched}


def test_mismatched_texts_have_another_prompt_and_use_each_answer_once(tiny_pairs):
    answers = unpaired.unpaired(load_from_disk(tiny_pairs)["train"])
    others = unpaired.mismatched(answers)
    assert sorted(others) == list(range(len(answers)))
    assert unpaired.of_one_prompt(answers, others) == 0, "though the two answers of a pair stand side by side"
    texts = unpaired.with_answers_of(answers, others)
    for row, text, other in zip(answers, texts, others, strict=True):
        start = row["start"]
        assert text["input_ids"] == row["input_ids"][:start] + answers[other]["input_ids"][answers[other]["start"] :]
        assert text["labels"][:start] == [-100] * start
        assert text["labels"][start:] == text["input_ids"][start:]
    longest = max(len(row["input_ids"]) for row in answers)
    long = [{**answers[0], "input_ids": answers[0]["input_ids"] + [3] * 40}, *answers[1:]]
    assert max(len(text["input_ids"]) for text in unpaired.with_answers_of(long, others)) <= longest + 40


# --- training --------------------------------------------------------------------------------------


def train(method: str, splits, model, output, *overrides, trunk=None) -> dict[str, torch.Tensor]:
    name = method.partition("-")[0]
    rows = ["data.rejected_from=null", "data.label=text"] if method.endswith("unpaired") else []
    base = [f"experiment={name}", *rows, "model.load.dtype=float32"]
    arguments = ["--splits", str(splits), "--model", str(model), "--output", str(output)]
    if name == "kto":
        references = Path(f"references-{method}")
        if not references.exists():
            made = ["--splits", str(splits), "--model", str(model), "--output", str(references)]
            config = load_stage_config("reference_logprobs", None, base)
            reference_logprobs.main([*made, "--config", json.dumps(config)])
        arguments += ["--references", str(references)]
    config = load_stage_config("train_adapter", None, [*base, *SMALL, *overrides]) | ({"trunk": trunk} if trunk else {})
    train_adapter.main([*arguments, "--config", json.dumps(config)])
    return load_file(Path(output) / "adapter_model.safetensors")


def lines_of(output) -> list[dict]:
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "seconds": 0} for line in lines]


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def splits(method, tiny_pairs, tiny_labels):
    return tiny_labels if method.endswith("unpaired") else tiny_pairs


def test_it_learns_to_prefer(workspace, method, splits, tiny_model):
    train(method, splits, tiny_model, "out", "train.num_train_epochs=4", "train.eval_on_start=true")
    lines = lines_of("out")
    before, *_, after = [line for line in lines if "eval_loss" in line]
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert after["eval_rewards/margins"] == pytest.approx(after["eval_rewards/chosen"] - after["eval_rewards/rejected"])
    if method.startswith("kto"):
        assert before["eval_loss"] == pytest.approx(0.5), "the model is the reference"
        assert before["eval_kl"] == pytest.approx(0, abs=1e-5)
        assert "kl" in lines[1]
        assert not any("rewards/accuracies" in line for line in lines)
    else:
        assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"]
    assert ("eval_nll_loss" in after) == (method == "orpo")
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_resuming_and_trunks_are_exact(workspace, method, splits, tiny_model):
    """Epochs of a shared trunk, and a training that continues in the middle of an epoch: to the bit."""
    options = [
        "train.num_train_epochs=2",
        "train.save_strategy=steps",
        "train.save_steps=4",
        "adapter.lora_dropout=0.1",
    ]
    alone = train(method, splits, tiny_model, "alone", *options, trunk="alone")
    one_epoch = ["train.num_train_epochs=1", *options[1:]]
    train(method, splits, tiny_model, "shared1", *one_epoch, "train.save_total_limit=9", trunk="shared")
    shared = train(method, splits, tiny_model, "shared2", *options, "train.save_total_limit=9", trunk="shared")
    epoch = 12 if method == "kto" else 6  # of a pair it learns both answers, one by one
    assert json.loads(Path("shared2/training.json").read_text())["resumed_from_step"] == epoch
    assert_equal(alone, shared)
    saved = epoch + 4 - epoch % 4
    forget_after(saved, Path("results/.state/shared"))
    resumed = train(method, splits, tiny_model, "resumed", *options, trunk="shared")
    assert json.loads(Path("resumed/training.json").read_text())["resumed_from_step"] == saved
    assert_equal(alone, resumed)
    assert lines_of("alone") == lines_of("resumed"), "rewards included"


@pytest.mark.parametrize("small", [6, 5])
@pytest.mark.parametrize("pair_method", ["orpo", "simpo"])
def test_accumulating_equals_one_large_batch(workspace, tiny_pairs, tiny_model, pair_method, small):
    """Also when the last batch is not full: every pair, and in ORPO every learned token, counts once."""
    options = ["train.optim=sgd", "train.learning_rate=0.1", "train.max_grad_norm=0", "train.warmup_steps=0"]
    options += ["method.cpo_alpha=0.5"] if pair_method == "simpo" else []
    large = train(pair_method, tiny_pairs, tiny_model, "large", *options, "train.per_device_train_batch_size=24")
    batches = [f"train.per_device_train_batch_size={small}", f"train.gradient_accumulation_steps={-(-24 // small)}"]
    parts = train(pair_method, tiny_pairs, tiny_model, "small", *options, *batches)
    for name, weight in large.items():
        torch.testing.assert_close(weight, parts[name], rtol=1e-4, atol=1e-6)
    one, other = lines_of("large")[0], lines_of("small")[0]
    for name in ("loss", "nll_loss", *FIGURES):
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


def test_splits_that_do_not_fit_a_method_are_named(workspace, tiny_splits, tiny_labels, tiny_model, capsys):
    def refused(method, splits, message):
        with pytest.raises(SystemExit) as stopped:
            train(method, splits, tiny_model, "out")
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    refused("orpo", tiny_splits, "no preference pairs in the train split, which method=orpo needs")
    refused("simpo", tiny_labels, "no preference pairs in the train split, which method=simpo needs")
    refused("kto", tiny_splits, "does not say which answers are desirable; choose data.layout=unpaired_preference")
    arguments = ["--splits", str(tiny_labels), "--model", str(tiny_model), "--output", "out"]
    with pytest.raises(SystemExit):
        train_adapter.main([*arguments, "experiment=smoke", "sweep=none"])
    assert "method=sft would learn these as well: choose method=kto" in capsys.readouterr().err


# --- what comes after ------------------------------------------------------------------------------


def evaluate(model, splits, output, *flags) -> dict:
    settings = load_stage_config("evaluate_model", None, ["experiment=kto", "model.load.dtype=float32"])
    arguments = ["--model", str(model), "--splits", str(splits), "--output", str(output), *map(str, flags)]
    evaluate_model.main([*arguments, "--config", json.dumps(settings)])
    return json.loads((Path(output) / "metrics.json").read_text())


def test_a_report_of_kto_on_pairs_has_rewards(workspace, tiny_pairs, tiny_model):
    train("kto", tiny_pairs, tiny_model, "adapter", "train.num_train_epochs=4")
    merge_adapter.main(["--model", str(tiny_model), "--adapter", "adapter", "--output", "merged"])
    facts = evaluate("merged", tiny_pairs, "report", "--adapter", "adapter", "--references", "references-kto")
    lines = [json.loads(line) for line in Path("report/predictions.jsonl").read_text().splitlines()]
    logps = load_from_disk("references-kto")["validation"]["ref_logps"][:]
    gains = [0.1 * (line["chosen_logp"] - logp) for line, logp in zip(lines, logps[::2], strict=True)]
    assert facts["values"]["rewards/chosen"] == pytest.approx(sum(gains) / len(gains))
    assert facts["values"]["rewards/margins"] > 0
    assert "loss (per answer)" in Path("report/report.html").read_text()


def test_models_are_judged_by_the_desirable_answers_alone(workspace, tiny_labels, tiny_model):
    facts = evaluate(tiny_model, tiny_labels, "report")
    desirable = sum(load_from_disk(tiny_labels)["validation"]["label"])
    assert facts["rows"] == desirable < len(load_from_disk(tiny_labels)["validation"])
    assert "preference_accuracy" not in facts["values"]


def test_the_advised_weights_are_said_for_answers_mostly_of_one_kind():
    method = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert unpaired.imbalance([True] * 4 + [False] * 4, method) is None
    assert unpaired.imbalance([True] * 4 + [False] * 3, method) is None
    note = unpaired.imbalance([True] * 2 + [False] * 6, method)
    assert "method.desirable_weight from 3 to 4 gives that" in note
    for weight in (3.0, 4.0):
        assert unpaired.imbalance([True] * 2 + [False] * 6, {**method, "desirable_weight": weight}) is None
    assert unpaired.imbalance([False] * 3, method) == "all 3 answers are undesirable: KTO learns from both kinds"
