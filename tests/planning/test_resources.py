"""What jobs ask of a cluster's scheduler: by what earlier ones took, else by the model's size."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from temper.planning import planner
from temper.resources import Resources

ON_A_CLUSTER = SimpleNamespace(is_main_process=True, local_exec=False)
HERE = SimpleNamespace(is_main_process=True, local_exec=True)


def asked(plan, stage: str, workflow=ON_A_CLUSTER, attempt: int = 1) -> dict[str, int]:
    job = next(job for job in plan.jobs.values() if job.stage == stage)
    name = SimpleNamespace(name=Path(job.path).name)
    return {what: function(name, attempt) for what, function in Resources(plan, workflow).of(stage).items()}


def test_without_anything_similar_a_job_asks_by_the_size_of_the_model(workspace):
    plan = planner.build("smoke", "none", [])
    full = planner.build("smoke", "none", ["adapter=full"])
    before = {"mem_mb": 2600, "runtime": 360, "disk_mb": 1000}
    assert asked(plan, "train_adapter") == before, "before the model is fetched"
    model = Path(next(job for job in plan.jobs.values() if job.stage == "train_adapter").inputs["model"])
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(bytes(100 * 10**6))
    assert asked(plan, "train_adapter") == {"mem_mb": 3000, "runtime": 360, "disk_mb": 1100}
    assert asked(full, "train_adapter") == {"mem_mb": 3600, "runtime": 360, "disk_mb": 2400}
    assert asked(plan, "evaluate_model") == {"mem_mb": 2900, "runtime": 120, "disk_mb": 1000}
    assert asked(plan, "tokenize_splits") == {"mem_mb": 2600, "runtime": 120, "disk_mb": 1000}


@pytest.fixture
def measured(workspace):
    """A plan whose training is like one in results/ that took 1 GB, 49 MB of disk and two hours, of half the epochs."""
    before = planner.build("smoke", "none", ["train.num_train_epochs=1"])
    job = next(job for job in before.jobs.values() if job.stage == "train_adapter")
    folder = Path(job.path)
    folder.mkdir(parents=True)
    took = {"peak_memory_bytes": 10**9, "seconds": 7200.0, "trained_steps": 8, "trained_epochs": 1, "ended": 1.0}
    (folder / "provenance.json").write_text(json.dumps({"stage": job.stage, "inputs": job.inputs, **took}))
    (folder / "config.yaml").write_text(json.dumps(job.config))
    (folder / "adapter.safetensors").write_bytes(bytes(49 * 10**6))
    return planner.build("smoke", "none", ["train.num_train_epochs=2", "train.lr_scheduler_type=cosine"])


def test_a_job_asks_for_what_a_similar_one_took_and_more(measured):
    once = {"mem_mb": 2100, "runtime": 10 + 3 * 2 * 120, "disk_mb": 1000 + 600}
    assert asked(measured, "train_adapter") == once
    assert asked(measured, "train_adapter", attempt=2) == {what: 2 * much for what, much in once.items()}
    assert asked(measured, "train_adapter", attempt=3) == {what: 4 * much for what, much in once.items()}


def test_on_one_machine_nothing_is_looked_for(measured):
    assert asked(measured, "train_adapter", HERE) == {"mem_mb": 2600, "runtime": 360, "disk_mb": 1000}


def test_a_job_on_its_node_asks_for_nothing(measured):
    on_a_node = SimpleNamespace(is_main_process=False)
    assert set(asked(measured, "train_adapter", on_a_node).values()) == {0}


def test_an_artefact_without_a_record_of_its_memory_tells_its_time(measured):
    file = next(Path("results/adapters").glob("*/provenance.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "peak_memory_bytes": None}))
    assert asked(measured, "train_adapter") == {"mem_mb": 2600, "runtime": 730, "disk_mb": 1600}
    shutil.rmtree(file.parent)
    assert asked(measured, "train_adapter")["runtime"] == 360
