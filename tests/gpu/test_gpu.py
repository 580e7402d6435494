"""What a GPU may change: bits of a resumed training, mixed precision, 4 bits, the fast way of the loss, several GPUs.

Each training is a process of its own, as in a workflow: libraries ask for GPUs once in a process.
"""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from steps import merge_adapter
from temper.config.stages import load_stage_config
from temper.data.batches import Batch
from temper.evaluation import generation
from temper.model import loading
from temper.model.predictions import SupervisedLoss, flat_way
from tests.gpu.conftest import DEVICE
from tests.model import test_flat_batch
from tests.support.gpus import TWO, install
from tests.support.networks import rows_of
from tests.support.trainings import SMALL, assert_equal, forget_after, start
from tests.training.test_processes import batch, curves, facts
from tests.training.test_trainers import PLAIN, figure, plain_trainer

EXACT = ["train.full_determinism=true", "train.save_strategy=steps", "train.save_steps=6", "train.logging_steps=1"]
LOAD = {"dtype": "float32", "attn_implementation": "fastest"}


def config_of(*overrides) -> dict:
    return load_stage_config("train_adapter", None, [*SMALL, *overrides])


def finished(process, output) -> dict[str, torch.Tensor]:
    """The adapter of a training, which was made on the device that is tested."""
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert facts(output)["device"].startswith(DEVICE)
    return load_file(Path(output, "adapter_model.safetensors"))


def trained(splits, model, output, *overrides, trunk=None) -> dict[str, torch.Tensor]:
    config = config_of(*overrides) | {"trunk": trunk or str(output)}
    return finished(start(splits, model, output, config), output)


@pytest.fixture
def several(workspace, monkeypatch):
    """Several GPUs; where the tests themselves are tried, what lists them is a stand-in."""
    if DEVICE == "cpu":
        install(monkeypatch, workspace, TWO)


# --- one GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [["adapter.lora_dropout=0.1"], ["adapter=qlora", "adapter.lora_dropout=0.1"]])
def test_a_training_and_its_resumption_are_exact(workspace, tiny_splits, tiny_model, monkeypatch, adapter):
    """To the bit on the same device, with torch's deterministic kernels."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # read once in a process, before transformers can set it
    options = [*EXACT, *adapter, "train.max_steps=8"]
    first = trained(tiny_splits, tiny_model, "first", *options)
    assert_equal(first, trained(tiny_splits, tiny_model, "again", *options))
    forget_after(6, Path("results/.state/first"))
    resumed = trained(tiny_splits, tiny_model, "resumed", *options, trunk="first")
    assert facts("resumed")["resumed_from_step"] == 6
    assert_equal(first, resumed)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_trainers(workspace, tiny_splits, tiny_model, precision):
    if DEVICE == "cpu" and precision == "fp16":
        pytest.skip("fp16 does nothing without a GPU, and is refused")
    options = [*PLAIN, "train.optim=sgd", "train.num_train_epochs=1"]
    options += ["train.use_cpu=true"] if DEVICE == "cpu" else []
    trained(tiny_splits, tiny_model, "full", *options)
    trained(tiny_splits, tiny_model, "mixed", *options, f"train.{precision}=true")
    plain = plain_trainer(tiny_splits, tiny_model, *options, f"train.{precision}=true")
    for name in ("loss", "eval_loss"):
        exact, mixed, expected = figure("full", name), figure("mixed", name), plain.figure(name)
        assert list(mixed.values()) == pytest.approx(list(expected.values()), rel=1e-2)
        assert max(abs(mixed[step] - exact[step]) for step in exact) > 1e-4, "it is computed in another precision"


def test_a_4_bit_base_trains_and_merges(workspace, tiny_splits, tiny_model):
    options = ["adapter=qlora", "train.learning_rate=1e-2", "train.num_train_epochs=4", "train.logging_steps=1"]
    weights = trained(tiny_splits, tiny_model, "adapter", *options)
    losses = list(figure("adapter", "loss").values())
    assert losses[-1] < 0.8 * losses[0]
    inputs = ["--model", str(tiny_model), "--adapter", "adapter", "--splits", str(tiny_splits)]
    merge_adapter.main([*inputs, "--output", "merged", "--config", json.dumps(merging_of(*options))])
    found = json.loads(Path("merged/provenance.json").read_text())
    distances = {base: figures["logit_difference"] for base, figures in found["distances"].items()}
    assert found["base"] == min(distances, key=distances.get)
    assert len(distances) == 2
    merged, base = (loading.load_model(Path(folder), LOAD).state_dict() for folder in ("merged", tiny_model))
    assert weights
    assert any(not torch.equal(weight, base[name]) for name, weight in merged.items())


def merging_of(*overrides) -> dict:
    return load_stage_config("merge_adapter", None, [*SMALL, *overrides])


ROWS = {
    "short rows": (Batch(rows_of([5, 3, 9]), 0), 1),
    "rows for torch's own kernel": (Batch(rows_of([test_flat_batch.LONGEST_PRODUCTS + 50, 40, 3]), 0), 1),
    "pairs": (Batch(rows_of([5, 3, 9, 7]), 0), 2),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_flat_way_equals_the_plain_way(name):
    rows, answers = ROWS[name]
    network = copy.deepcopy(test_flat_batch.network()).to(DEVICE)
    test_flat_batch.assert_same(network, rows, answers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_flat_way_is_taken(tiny_model, tiny_splits, dtype):
    model = loading.load_model(tiny_model, {**LOAD, "dtype": dtype})
    assert model.device.type == DEVICE
    rows = load_from_disk(tiny_splits)["train"].select(range(8))
    loss = SupervisedLoss()
    total, count = loss(model, Batch(list(rows), 0))
    assert loss.way is flat_way
    assert 0 < total.item() / count < 20


def test_greedy_answers_are_those_of_a_cpu(tiny_model, tiny_splits):
    tokenizer = loading.load_tokenizer(tiny_model)
    rows = list(load_from_disk(tiny_splits)["test"])
    stop_ids = loading.stop_token_ids(tiny_model, tokenizer)
    settings = {"batch_size": 4, "max_new_tokens": 16, "do_sample": False}
    model = loading.load_model(tiny_model, LOAD).eval()
    assert model.device.type == DEVICE
    found, expected = (
        generation.generate_answers(model.to(device), tokenizer, rows, settings, stop_ids).ids
        for device in (DEVICE, "cpu")
    )
    assert found == expected
    assert len({tuple(answer) for answer in found}) > 1


# --- several GPUs ------------------------------------------------------------------------------------


@pytest.mark.gpus(2)
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_two_processes_train_as_one_does_on_the_same_batches(several, tiny_splits, tiny_model, adapter):
    options = [*PLAIN, f"adapter={adapter}", "train.num_train_epochs=2"]
    one = trained(tiny_splits, tiny_model, "one", *options, *batch(4))
    two = trained(tiny_splits, tiny_model, "two", *options, *batch(2), "num_processes=2")
    assert (facts("one")["num_processes"], facts("two")["num_processes"]) == (1, 2)
    expected, found = curves("one"), curves("two")
    for name in ("loss", "eval_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.gpus(2)
def test_two_trainings_take_a_gpu_each(several, tiny_splits, tiny_model):
    names = ["first", "second"]
    running = [start(tiny_splits, tiny_model, name, config_of() | {"trunk": name}) for name in names]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    taken = [re.search(r"GPU: (\S+), of (\d+)\n", log) for log in said]
    assert len({found[1] for found in taken}) == 2
    assert all(int(found[2]) >= 2 for found in taken)
