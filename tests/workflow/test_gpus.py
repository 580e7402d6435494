"""The workflow on a machine with two GPUs. What lists them is a stand-in, and the jobs compute on the CPU."""

import re
from pathlib import Path

import pytest

from temper.files import read_json
from tests.support import tiny
from tests.support.gpus import TWO, install
from tests.support.workflow_tools import own_sources, snakemake


@pytest.mark.slow
def test_jobs_share_the_gpus_that_the_workflow_may_use(workspace, tiny_model, monkeypatch):
    install(monkeypatch, workspace, TWO)
    rows = own_sources(workspace, tiny_model, tiny.tiny_rows(60))
    swept = "num_processes=1,2 train.learning_rate=1e-3,3e-3 train.num_train_epochs=30 train.eval_strategy=no"
    config = ["--config", "experiment=smoke", "sweep=none", f"overrides={rows} {swept} tracking=none"]
    snakemake(workspace, "--resources", "gpu=2", "--until", "train_adapter", *config)
    taken = {}
    for log in Path("results/logs/train_adapter").glob("*.log"):
        processes = read_json(Path("results/adapters", log.stem, "training.json"))["num_processes"]
        taken.setdefault(processes, []).append(re.search(r"GPU: (.*), of 2\n", log.read_text())[1])
    assert sorted(taken[1]) == ["GPU-0a", "GPU-0b"], "the second is only taken while the first is"
    assert taken[2] == ["GPU-0a, GPU-0b"] * 2
