"""No login of anybody's in anything that is written, printed or sent: what is refused, and what is left out."""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper import secrets, tracking
from temper.commands import explain
from temper.config.stages import FOLDERS, load_stage_config
from temper.errors import UserError
from temper.planning import planner
from tests.support import finished
from tests.support.asking import command
from tests.support.finished import CONFIG, RUN
from tests.support.sweeps import board_of
from tests.support.workflow_tools import environment, snakemake_command

PASSWORD = "s3cret-Pa55w0rd"
PLANTED = {
    "HF_TOKEN": f"hf_{PASSWORD}",
    "MLFLOW_TRACKING_USERNAME": "alice",
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    "MLFLOW_TRACKING_TOKEN": f"mt_{PASSWORD}",
    "AWS_SECRET_ACCESS_KEY": f"aws_{PASSWORD}",
    "WANDB_API_KEY": f"wandb_{PASSWORD}",
    "HTTP_PROXY": f"http://alice:{PASSWORD}@127.0.0.1:9",
    "HTTPS_PROXY": f"http://alice:{PASSWORD}@127.0.0.1:9",
    "MYURI": f"http://alice:{PASSWORD}@127.0.0.1:9",
    "MLFLOW_TRACKING_URI": f"http://alice:{PASSWORD}@127.0.0.1:9",
}


@pytest.fixture
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def files_with(folder: Path, secret: str) -> list[str]:
    """The files below a folder that hold it, in content or name."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert paths, "something was looked at"
    return [str(path) for path in paths if secret.encode() in path.read_bytes() or secret in str(path)]


def test_a_run_from_end_to_end_leaves_no_secret_of_the_environment(planted, workspace, tiny_model, capfd, monkeypatch):
    finished.make(workspace, tiny_model)
    plan = planner.build("smoke", None, ["tracking.tracking_uri=env"])
    plan.freeze()
    with pytest.raises(UserError) as away:
        tracking.prepare(plan.tracking, plan.sweep)
    print(away.value, *tracking.mirror(plan, None))
    report = f"results/reports/{RUN}"
    for run in plan.runs:  # the finished run's files as those of the plan's runs, for the store
        places = {
            "evaluate_model": RUN,
            "train_adapter": finished.ADAPTER,
            "tokenize_splits": "reviews-tiny-00000000a2",
        }
        for stage, name in places.items():
            run.artefacts[stage] = f"results/{FOLDERS[stage]}/{name}"
    rows = [{"run": run.name, "validation_accuracy": 0.5} for run in plan.runs]
    plan.tracking["tracking_uri"] = None
    Path(plan.leaderboard).parent.mkdir(parents=True)
    for name in ("leaderboard.csv", "report.html"):
        Path(plan.leaderboard).with_name(name).touch()
    board = board_of("tiny", rows)
    done, said = tracking.mirror(plan, board)
    assert done, said
    print(explain.explain(plan))
    command("publish")(["--run", RUN, "--repository", "acme/tuned", "--merged", "--dry-run", "pushed"])
    said = capfd.readouterr()
    assert "***@127.0.0.1:9" in said.out, "the store's address without its login"
    assert PASSWORD not in said.out + said.err
    assert Path("results/mlflow.db").is_file() and Path("pushed/README.md").is_file() and Path(report).is_dir()
    assert files_with(workspace, PASSWORD) == []


@pytest.mark.parametrize(
    "uri", ["${oc.env:MYURI}", pytest.param(f"http://alice:{PASSWORD}@127.0.0.1:9", marks=pytest.mark.slow)]
)
def test_a_login_in_the_config_is_refused_before_snakemake_writes_it_down(planted, workspace, uri):
    command = [
        *snakemake_command(workspace),
        "--config",
        "experiment=smoke",
        f"overrides=tracking.tracking_uri='{uri}'",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2, done.stderr
    assert "error: config: 'tracking.tracking_uri' holds a login or a query" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    assert files_with(workspace, PASSWORD) == []


def test_a_secret_of_the_environment_is_refused_wherever_it_stands(planted, workspace):
    published = "{name: a, metric: f1, value: 0.5, source: '${oc.env:WANDB_API_KEY}'}"
    for override in ("prompt.system='${oc.env:HF_TOKEN}'", f"eval.published=[{published}]"):
        with pytest.raises(UserError, match=r"holds the value of the environment variable \w+ \(not shown") as refused:
            load_stage_config("evaluate_model", None, [*CONFIG, override])
        assert PASSWORD not in str(refused.value)


# --- the two questions ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "https://mlflow.example.org/team-a/",
        "postgresql://me@host/runs",
        "postgresql://host:5432/runs",
        "mysql+pymysql://host/runs",
        "sqlite:////home/me@work/all.db",
        "sqlite:///all.db?timeout=3",
        "file:///home/me@work/mlruns",
        "databricks",
        "databricks://profile",
        "/home/me@work/mlruns",
        "env",
    ],
)
def test_addresses_without_a_login(uri):
    assert not secrets.has_login(uri)
    assert secrets.redacted(uri) == uri or "@" in uri


WORD = st.text("abcXYZ019._-", min_size=1, max_size=8)


@given(st.sampled_from(["http", "https", "postgresql", "mysql+pymysql", "s3"]), WORD, WORD, WORD)
def test_a_login_is_seen_and_left_out(scheme, user, password, host):
    uri = f"{scheme}://{user}:{password}@{host}/runs"
    assert secrets.has_login(uri)
    assert secrets.redacted(f"no answer from {uri} today") == f"no answer from {scheme}://***@{host}/runs today"


def test_every_error_is_without_secrets(planted):
    said = str(UserError(f"x {PLANTED['MYURI']} y {PLANTED['HF_TOKEN']} z http://h/?token=abc&b=1"))
    assert said == "x http://***@127.0.0.1:9 y *** z http://h/?token=***&b=1"


def test_the_command_in_a_provenance_is_without_a_login(planted, monkeypatch):
    from temper.provenance import provenance

    monkeypatch.setattr("sys.argv", ["steps/x.py", f"tracking.tracking_uri={PLANTED['MYURI']}"])
    assert PASSWORD not in json.dumps(provenance("merge_adapter", {}, 0.0, {}))
