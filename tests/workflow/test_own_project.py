"""Configs, results and workflows outside the checkout: conf_dir, TEMPER_CONF, `temper init`, Temper as a module."""

import json
import os
import re
import subprocess
import sys

import pytest

from temper.config import compose
from temper.errors import UserError
from tests.conftest import ROOT
from tests.support.asking import command, complaint
from tests.support.workflow_tools import PLANNED_OF_TWO, environment, executed, leaderboard

JOBS = {**PLANNED_OF_TWO, "train_adapter": 4}  # of two epochs each
OUTER = """
module temper:
    snakefile: "{root}/Snakefile"
    config: {{"experiment": "reviews", "conf_dir": "mine/conf", "overrides": "data.source.path=mine/rows.jsonl"}}

use rule * from temper

rule champion:
    input: "results/sweeps/reviews/leaderboard.csv"
    output: "champion.csv"
    shell: "head -2 {{input}} > {{output}}"
"""


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, check=False)


@pytest.fixture
def mine(workspace, monkeypatch):
    """The folder of a starter project, below the current one."""
    command("init")(["mine"])
    monkeypatch.delenv(compose.OWN_CONF, raising=False)
    yield workspace / "mine"
    os.environ.pop(compose.OWN_CONF, None)


def test_a_starter_project_runs_from_its_own_folder(mine):
    own = ["conf_dir=conf", "experiment=reviews"]
    done = snakemake(mine, "-s", ROOT / "Snakefile", "-n", "--config", *own)
    assert executed(done) == JOBS, done.stdout + done.stderr
    assert "snakemake -s" in (mine / "README.md").read_text() or "Snakefile" in (mine / "README.md").read_text()


def test_a_starter_project_is_put_over_nothing(mine, capsys):
    assert complaint(capsys, command("init"), "mine") == "mine: is there already; name a new folder, or an empty one"


def test_ones_own_configs_come_first_and_both_are_known(mine, capsys, monkeypatch):
    monkeypatch.chdir(mine)
    (mine / "conf/eval/sentiment.yaml").write_text("task: labels\nlabels: [negative, positive]\nmax_new_tokens: 3\n")
    command("plan")(["--config-dir", "conf", "--experiment", "reviews"])
    assert f"configs: {mine}/conf, then conf/" in capsys.readouterr().out
    chosen = ["experiment=reviews", "eval=sentiment", "adapter=qlora", "sweep=none"]
    _, config = compose.expand(compose.parse_overrides(chosen))[1][0]
    assert (config["eval"]["max_new_tokens"], config["eval"]["published"]) == (3, [])
    assert {"reviews", "movie_reviews"} <= set(compose.groups()["data"])
    with pytest.raises(UserError, match="conf/data/review.yaml does not exist; did you mean 'reviews'"):
        compose.parse_overrides(["data=review"])
    with pytest.raises(UserError, match="conf_dir: config: no such folder"):
        compose.use_folder("config")


def test_the_command_of_the_page_names_the_folder(mine, monkeypatch):
    monkeypatch.chdir(mine)
    command("plan")(["--config-dir", "conf", "--experiment", "reviews", "--json"])
    from temper.planning import planner
    from temper.reports.sweep_page import _command_for

    plan = planner.build("reviews")
    shown = _command_for(plan.runs[0].point, plan.comparison.config)
    assert "conf_dir=conf experiment=reviews sweep=none" in shown


def test_temper_as_a_module_of_another_workflow(mine, workspace):
    (workspace / "Snakefile").write_text(OUTER.format(root=ROOT))
    done = snakemake(workspace, "-n", "champion", "--config", "colour=blue")
    assert done.returncode == 0, done.stderr
    assert executed(done)["champion"] == 1
    second = OUTER.replace("module temper", "module other").replace("rule champion", "rule second")
    second = second.replace("from temper", "from other as other_*").replace("champion.csv", "second.csv")
    other = second.replace('"experiment": "reviews"', '"experiment": "smoke"').format(root=ROOT)
    (workspace / "Snakefile").write_text(OUTER.format(root=ROOT) + other)
    refused = snakemake(workspace, "-n", "champion")
    assert refused.returncode == 2
    assert "error: a workflow can hold one sweep as its module" in refused.stderr


@pytest.mark.slow
def test_a_starter_project_and_a_module_make_their_leaderboards(mine, workspace, tiny_model):
    model = f"model.name=tiny model.source.kind=files model.source.path={tiny_model} model.load.dtype=float32"
    own = ["conf_dir=conf", "experiment=reviews", f"overrides={model}"]
    done = snakemake(mine, "-s", ROOT / "Snakefile", "--config", *own)
    assert done.returncode == 0, done.stderr
    rows = leaderboard(mine, "reviews")
    assert len(rows) == 2
    asked = {"experiment": "reviews", "conf_dir": "mine/conf", "overrides": f"{model} data.source.path=mine/rows.jsonl"}
    outer = re.sub(r"config: {.*}", lambda _: f"config: {json.dumps(asked)}", OUTER.format(root=ROOT))
    (workspace / "Snakefile").write_text(outer)
    done = snakemake(workspace, "champion")
    assert done.returncode == 0, done.stderr
    assert (workspace / "champion.csv").read_text().count("\n") == 2
