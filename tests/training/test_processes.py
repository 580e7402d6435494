"""One training in several processes: beside one process with the same batches, killed, and what is refused.

Both processes are real and meet by gloo, on one core or two.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steps import reference_logprobs, train_adapter
from temper import workflow
from temper.config.stages import load_stage_config
from temper.data.batches import Shares, WithCopies
from temper.errors import UserError
from temper.files import read_json_lines
from temper.planning import planner
from tests.conftest import ROOT, rarely
from tests.support import tiny
from tests.support.trainings import SMALL, assert_equal, curve, start, train, wait_for_a_step, weights

PLAIN = [
    "adapter.lora_dropout=0",
    "train.learning_rate=1e-2",
    "train.warmup_steps=0",
    "train.logging_steps=1",
    "train.num_train_epochs=2",
]


@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 5),
    processes=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_shares_of_all_processes_are_the_batches(rows, size, processes, drop_last):
    shares = [list(Shares(range(rows), size, rank, processes, drop_last)) for rank in range(processes)]
    batches = [list(range(start, min(start + size * processes, rows))) for start in range(0, rows, size * processes)]
    if drop_last:
        batches = [batch for batch in batches if len(batch) == size * processes]
    assert (
        {len(share) for share in shares} == {len(batches)} == {len(Shares(range(rows), size, 0, processes, drop_last))}
    )
    table = WithCopies([{"row": row} for row in range(rows)])
    for batch, *parts in zip(batches, *shares, strict=True):
        of_all = [[table[number] for number in part] for part in parts]
        assert all(0 < len(part) <= size for part in of_all), "none waits for another in vain"
        assert sorted(row["row"] for part in of_all for row in part if WithCopies.COPY not in row) == batch
        assert all(len({WithCopies.COPY in row for row in part}) == 1 for part in of_all)


def of_method(method: str, splits, model, output, *overrides, trunk=None) -> dict[str, torch.Tensor]:
    """A training by hand with the references that the method needs; returns the trained weights."""
    base = ["experiment=smoke" if method == "sft" else f"experiment={method}", *SMALL[1:], *PLAIN]
    arguments = ["--splits", str(splits), "--model", str(model), "--output", str(output)]
    if method in ("dpo", "kto"):
        references = Path("references")
        if not references.exists():
            made = [*arguments[:4], "--output", str(references)]
            config = load_stage_config("reference_logprobs", None, base[:2] + ["model.load.dtype=float32"])
            reference_logprobs.main([*made, "--config", json.dumps(config)])
        arguments += ["--references", str(references)]
    config = load_stage_config("train_adapter", None, [*base, *overrides]) | ({"trunk": trunk} if trunk else {})
    train_adapter.main([*arguments, "--config", json.dumps(config)])
    return weights(output)


def facts(folder) -> dict:
    return json.loads(Path(folder, "training.json").read_text())


def curves(folder) -> dict[str, list[float]]:
    lines = read_json_lines(Path(folder, "metrics.jsonl"))
    not_alike = ("seconds", "epoch")  # Trainer's epoch counts batches, accumulated or not
    names = {name: 0 for line in lines for name in line if name not in not_alike}
    return {name: [line[name] for line in lines if name in line] for name in names}


def batch(rows: int, accumulated: int = 1) -> list[str]:
    return [f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={accumulated}"]


FULL = ["adapter=full", "~adapter.r", "~adapter.lora_dropout", "train.learning_rate=1e-3"]
BEST = ["train.load_best_model_at_end=true"]
SPREAD = ["train.fsdp=true"]
# name -> (method, rows to learn from, options of one process, of each of two for the same steps, of both, more of two)
SAME = {
    "batches": ("sft", 24, batch(4), batch(2), []),
    "batches that are accumulated, an epoch that ends within a step": ("sft", 24, batch(10), batch(1, 5), []),
    "fewer rows than processes at the end of an epoch": ("sft", 25, batch(8), batch(4), []),
    "the best model": ("sft", 24, batch(4), batch(2), BEST),
    "pairs": ("dpo", 24, batch(4), batch(2), []),
    "pairs and the text of the better answer": ("orpo", 23, batch(4), batch(1, 2), []),
    "single answers": ("kto", 24, batch(6), batch(3), []),
    "a model that is spread": ("sft", 25, batch(8), batch(4), [], SPREAD),
    "a model that is spread, batches that are accumulated": ("sft", 24, batch(10), batch(1, 5), [], SPREAD),
    "a model that is spread, the best model": ("sft", 24, batch(4), batch(2), BEST, SPREAD),
    "a model that is spread, pairs": ("dpo", 23, batch(4), batch(2), [], SPREAD),
    "a model that is spread, single answers": ("kto", 23, batch(6), batch(3), [], SPREAD),
    "all weights": ("sft", 25, batch(8), batch(4), FULL),
    "all weights, spread": ("sft", 25, batch(8), batch(4), FULL, SPREAD),
    "all weights, spread, the best model": ("sft", 24, batch(4), batch(2), [*FULL, *BEST], SPREAD),
    "all weights, spread, pairs": ("dpo", 23, batch(10), batch(1, 5), FULL, SPREAD),
}


RARELY = ["the best model", "pairs and the text of the better answer", "a model that is spread, the best model"]
RARELY += ["a model that is spread, batches that are accumulated", "a model that is spread, single answers"]
RARELY += ["all weights", "all weights, spread, the best model", "all weights, spread, pairs"]


@pytest.mark.parametrize("name", rarely(SAME, RARELY))
def test_two_processes_train_as_one_does_on_the_same_batches(workspace, tiny_model, name):
    method, rows, alone, shared, both, *more = SAME[name]
    if FULL[0] in both:
        tiny_model = tiny.make_tiny_model(Path("untied"), tie_word_embeddings=False)
    splits = tiny.make_tiny_splits(Path("splits"), tiny_model, {"train": rows}, pairs=method != "sft")
    expected = of_method(method, splits, tiny_model, "one", *alone, *both)
    found = of_method(method, splits, tiny_model, "two", *shared, *both, *sum(more, []), "num_processes=2")
    one, two = curves("one"), curves("two")
    assert one.keys() == two.keys()
    for figure, values in one.items():
        first = int(figure == "rewards/accuracies")  # before the first step all rewards are rounding
        assert two[figure][first:] == pytest.approx(values[first:], rel=1e-4, abs=1e-5), figure
    for weight in expected:
        torch.testing.assert_close(found[weight], expected[weight], rtol=1e-3, atol=1e-4)
    assert found.keys() == expected.keys()
    assert (facts("two")["num_processes"], facts("one")["num_processes"]) == (2, 1)
    assert facts("two")["best_step"] == facts("one")["best_step"]


KILLED = ["num_processes=2", "train.per_device_train_batch_size=2", "train.num_train_epochs=4"]
KILLED += ["train.save_strategy=steps", "train.save_steps=3", "train.logging_steps=1"]


def others_of(process) -> list[psutil.Process]:
    """The processes that a training has started."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if found := psutil.Process(process.pid).children():
            return found
        time.sleep(0.05)
    return []


UNSTOPPED = {"each has all of the model": [], "a model that is spread": SPREAD, "all weights, spread": [*FULL, *SPREAD]}


@pytest.fixture(scope="module", params=rarely(UNSTOPPED, ["a model that is spread"]))
def undisturbed(request, tiny_model, tiny_splits, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A training that nothing stopped, its model and its options."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = [*KILLED, *UNSTOPPED[request.param]]
    if FULL[0] in options:
        tiny_model = tiny.make_tiny_model(folder / "untied", tie_word_embeddings=False)
    with contextlib.chdir(folder):
        train(tiny_splits, tiny_model, "out", *options)
    return folder / "out", tiny_model, options


@pytest.mark.parametrize("which", ["the first", "the other"])
def test_killed_processes_end_together_and_go_on_exactly(workspace, tiny_splits, undisturbed, which):
    expected, model, options = undisturbed
    config = load_stage_config("train_adapter", None, [*SMALL, *options])
    killed = start(tiny_splits, model, "killed", {**config, "trunk": "killed"})
    (other,) = others_of(killed)
    wait_for_a_step(killed, Path("results/.state/killed"), 4)
    os.kill(killed.pid if which == "the first" else other.pid, signal.SIGKILL)
    said = killed.stderr.read()
    assert killed.wait(60) == (-signal.SIGKILL if which == "the first" else 2), said
    psutil.wait_procs([other], timeout=30)
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
    if which == "the other":
        assert "process 2 of the 2 of this training was killed by signal 9" in said
    assert not Path("killed").exists()
    again = start(tiny_splits, model, "killed", {**config, "trunk": "killed"})
    assert again.wait() == 0, again.stderr.read()
    assert facts("killed")["resumed_from_step"] >= 3
    assert_equal(weights(expected), weights("killed"))
    assert curve(expected) == curve("killed")


def test_what_another_process_cannot_do_is_told_before_training(
    workspace, tiny_model, tiny_splits, monkeypatch, capsys
):
    broken = Path("broken")
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import sys\nif 'temper.training.processes' in sys.orig_argv: sys.exit('no luck')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(broken.absolute()))
    with pytest.raises(SystemExit) as ended:
        train(tiny_splits, tiny_model, "out", "num_processes=2")
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "process 2 of the 2 of this training ended with 1: SystemExit: no luck" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["num_processes=2", "train.label_smoothing_factor=0.1"], "is a mean over each process's rows"),
        (["num_processes=2", "train.average_tokens_across_devices=false"], "the mean over the tokens of all processes"),
        (["train.ddp_find_unused_parameters=true"], "is for num_processes above 1"),
        (["num_processes=0"], "num_processes"),
        (["train.fsdp=true"], "'train.fsdp' is for num_processes above 1"),
        (["num_processes=2", "train.fsdp=false"], "is true or left out"),
        (["num_processes=2", "train.fsdp=full_shard"], "train.fsdp"),
        (["num_processes=2", "train.fsdp=true", "adapter.use_dora=true"], "with adapter.use_dora"),
        (["num_processes=2", "train.fsdp=true", "adapter.init_lora_weights=pissa"], "with adapter.init_lora_weights"),
        (["num_processes=2", "train.fsdp=true", "quantization=4bit"], "with a quantized base"),
        (
            [
                "num_processes=2",
                "train.fsdp=true",
                "train.load_best_model_at_end=true",
                "train.metric_for_best_model=accuracy",
            ],
            "gives no answers",
        ),
        (["num_processes=2", "train.fsdp=true", "train.use_cpu=true"], "with train.use_cpu"),
        (["num_processes=2", "train.deepspeed=zero3.json"], "is spread by train.fsdp=true"),
    ],
)
def test_options_that_do_not_go_with_the_number_of_processes_are_refused(workspace, options, said):
    with pytest.raises(UserError, match=said):
        planner.build("smoke", "none", options)


def test_the_number_of_processes_is_part_of_a_training_and_of_nothing_else(workspace, monkeypatch):
    one, two = (planner.build("smoke", "none", ["num_threads=3", *more]) for more in ([], ["num_processes=2"]))
    paths = [made.runs[0].artefacts for made in (one, two)]
    assert paths[0]["tokenize_splits"] == paths[1]["tokenize_splits"]
    assert paths[0]["train_adapter"] != paths[1]["train_adapter"]
    monkeypatch.setattr(workflow, "has_gpus", lambda: True)
    for stage, threads, gpus in (("train_adapter", 6, 2), ("evaluate_model", 3, 1)):
        wildcards = SimpleNamespace(name=Path(paths[1][stage]).name)
        assert workflow.threads_of(two, stage)(wildcards) == threads
        assert workflow.gpus_of(two, stage)(wildcards) == gpus


UNUSED = """
import sys
from pathlib import Path
import torch
from temper.training import processes
rank = int(sys.argv[1])
with processes.joined(rank, 2, Path("meeting"), use_cpu=True):
    network = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    wrapped = torch.nn.parallel.DistributedDataParallel(network)
    try:
        for _ in range(2):
            processes.within_forward(wrapped, lambda inner, x: inner["used"](x).sum(), torch.ones(3, 2)).backward()
    except RuntimeError as error:
        print(processes.UNUSED in str(error), "forward" in vars(network))
"""


def test_weights_without_a_gradient_are_recognized(workspace):
    """By torch's own words, which may change."""
    command = [sys.executable, "-c", UNUSED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment) for rank in (0, 1)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["True False"] * 2


SPREAD_MODEL = """
import sys
from pathlib import Path
import torch
from temper.errors import UserError
from temper.model.loading import load_model
from temper.model.spread import is_spread, local, refuse_tied, whole_copy
from temper.training import processes
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
load = {"dtype": "float32", "attn_implementation": "eager"}
whole = load_model(folder, load)
with processes.joined(rank, 2, Path("meeting"), use_cpu=True):
    model = load_model(folder, load, processes=2)
    parts = sum(local(weight).numel() for weight in model.parameters())
    layer = whole_copy(model.get_submodule("model.layers.0.mlp"))
    same = torch.equal(layer.up_proj.weight, whole.get_submodule("model.layers.0.mlp.up_proj").weight)
    print(is_spread(model), is_spread(whole), same, parts, sum(weight.numel() for weight in whole.parameters()))
    try:
        refuse_tied(model)
    except UserError as error:
        print(error)
"""


def test_a_model_is_spread_as_it_is_loaded(workspace, tiny_model):
    """Of tied embeddings the head has a stale copy in transformers 5.23, so training them is refused."""
    command = [sys.executable, "-c", SPREAD_MODEL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([*command, str(rank), str(tiny_model)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0].strip().splitlines() for process in both]
    (first, first_part, total), (second, second_part, _) = (facts.rsplit(" ", 2) for facts, _ in said)
    assert first == second == "True False True"
    assert int(first_part) + int(second_part) == int(total)
    assert abs(int(first_part) - int(second_part)) < int(total) / 20, "a row more or less"
    assert all("shares its embeddings with its head" in refusal for _, refusal in said)
