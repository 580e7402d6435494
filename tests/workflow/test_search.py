"""A search as Snakemake runs it: rounds, each after the ranking of the one before."""

import optuna
import pytest

from tests.support import tiny
from tests.support.asking import command
from tests.support.workflow_tools import executed, leaderboard, own_sources, snakemake

HALVING = "sweep=none sweep.strategy=halving sweep.rungs=[0.5,1] train.learning_rate=1e-3,1e-2"
TPE = "sweep=none sweep.strategy=tpe sweep.points_per_round=1 sweep.n=3 train.learning_rate=1e-3,1e-2,1e-4"


@pytest.fixture
def project(tmp_path, tiny_model):
    """(folder, function that runs a sweep of the tiny model there)."""
    sources = own_sources(tmp_path, tiny_model, tiny.tiny_rows(120))
    limits = "data.limit={train:40,validation:20,test:20} train.per_device_train_batch_size=4 eval.suspects=0"

    def overrides(sweep: str) -> str:
        return f"{sweep} {sources} {limits} tracking.enabled=false sweep.name=one"

    def run(sweep: str, *arguments: str):
        config = ("experiment=smoke", f"overrides={overrides(sweep)}")
        return snakemake(tmp_path, *arguments, "--config", *config)

    run.overrides = overrides
    return tmp_path, run


def test_halving(project, tmp_path_factory, monkeypatch, capsys):
    folder, run = project
    done = run(HALVING)
    assert executed(done)["train_adapter"] == 2 + 1 and executed(done)["rank_runs"] == 2
    assert "ranked: the search goes on with 1 run(s)" in done.stderr
    rows = leaderboard(folder, "one")
    assert sorted(row["train.num_train_epochs"] for row in rows) == ["0.5", "0.5", "1"]
    assert len([row for row in rows if row["test_accuracy"]]) == 1, "the test split was opened for the chosen run"
    assert not executed(run(HALVING)), "nothing is left to do"
    more = executed(run(HALVING.replace("1e-2", "1e-2,1e-4"), "-n"))
    assert more["train_adapter"] == more["evaluate_model"] == 1, "one more point, its first rung"
    study = optuna.load_study(study_name="one", storage=f"sqlite:///{folder}/results/sweeps/one/study.db")
    assert [trial.state.name for trial in study.trials].count("COMPLETE") == 1
    store, elsewhere = str(tmp_path_factory.mktemp("store")), tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(folder)
    command("push")([store])
    monkeypatch.chdir(elsewhere)
    command("pull")([store, "--experiment", "smoke", *run.overrides(HALVING).split()])
    assert "jobs to do: none but the comparison" in capsys.readouterr().out, "both rounds came, by their rankings"


@pytest.mark.slow
def test_tpe(project):
    folder, run = project
    done = run(TPE)
    assert executed(done)["train_adapter"] == 3 and executed(done)["rank_runs"] == 2
    assert len(leaderboard(folder, "one")) == 3
    assert not executed(run(TPE)), "nothing is left to do"
