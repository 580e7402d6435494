"""What Snakemake makes of a plan, without running it: queries, names, command lines, folders that are not whole."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from temper.planning import planner
from tests.conftest import ROOT, rarely
from tests.support import tiny
from tests.support.workflow_tools import PLANNED_OF_TWO, environment, executed, own_sources, snakemake

OTHERS = ["--rulegraph", "--filegraph", "--detailed-summary", "--lint", "--report"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_model):
    """(an empty folder, the overrides for a data set and a model of one's own)."""
    folder = tmp_path_factory.mktemp("snakefile")
    return folder, own_sources(folder, tiny_model, tiny.tiny_rows(60))


def dry_run(folder, overrides: str):
    return snakemake(folder, "-n", "-p", "--config", "experiment=smoke", f"overrides={overrides}")


def commands(output: str) -> list[str]:
    """The shell commands that Snakemake says it would run, prefix included."""
    return [line for line in output.splitlines() if re.search(r"\b(run|python -m) steps\.", line)]


@pytest.mark.parametrize(
    "query", ["--dag", "--summary", "--list", *(pytest.param(query, marks=pytest.mark.slow) for query in OTHERS)]
)
def test_a_query_needs_no_cores(sources, query):
    folder, overrides = sources
    profile = ROOT / "profiles" / "default"
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--workflow-profile", str(profile), query, "--config", "experiment=smoke", f"overrides={overrides}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == (1 if query == "--lint" else 0), done.stderr  # it has advice: see lint_workflow.py
    assert "Error" not in done.stderr


def test_rules_name_all_that_their_jobs_read(sources, monkeypatch):
    """An input that a rule does not name would be made by nobody, or too late."""
    named = set(re.findall(r'(\w+)=path_of\("(\w+)", "(\w+)"\)', (ROOT / "Snakefile").read_text()))
    assert all(flag == name for flag, _, name in named)
    own = f"{sources[1]} method.own_answers={{max_new_tokens: 8}} ~data.rejected_from"
    plans = [planner.build(name) for name in ("demo", "sft_dpo", "documents_sft")]
    plans.append(planner.build("sft_dpo", overrides=own))
    plans.append(planner.build("smoke", overrides="train.num_train_epochs=1,2 train.lr_scheduler_type=constant"))
    monkeypatch.setattr("temper.config.harness.version", lambda: "0")  # lm-eval need not be installed to plan for it
    monkeypatch.setattr("temper.config.harness.check_tasks", lambda *_: None)
    plans.append(planner.build("smoke", overrides="eval.harness={tasks:[arc_easy]}"))
    read = {(job.stage, name) for plan in plans for job in plan.jobs.values() for name in job.inputs}
    read = {(stage, name) for stage, name in read if stage not in ("rank_runs", "compare_runs")}
    assert read == {(stage, name) for _, stage, name in named} - {("fetch_model", "source")}


@pytest.mark.parametrize("name", rarely(["base", "base-line", "a" * 25, "results"], ("base-line", "results")))
def test_no_name_of_a_users_decides_what_is_made(sources, name):
    """Snakemake drops a rule whose wildcard looks periodic, and would then take an old leaderboard for the new one."""
    folder, overrides = sources
    sweep = folder / "results" / "sweeps" / name
    sweep.mkdir(parents=True, exist_ok=True)
    for file in ("leaderboard.csv", "leaderboard.json", "report.html", "provenance.json"):
        (sweep / file).write_text('{"key": "of another plan"}')
    named = overrides.replace("data.name=tiny", f"data.name={name}").replace("model.name=tiny", f"model.name={name}")
    done = dry_run(folder, f"{named} sweep.name={name} train.learning_rate=1e-3,1e-2")
    assert executed(done) == PLANNED_OF_TWO, done.stdout + done.stderr
    tuned = [command for command in commands(done.stdout) if "evaluate_model" in command and "--adapter" in command]
    assert len(tuned) == 2
    assert all("--base-report" in command for command in tuned)


def longest_command(folder, overrides: str, runs: int) -> int:
    done = dry_run(folder, overrides)
    assert executed(done)["evaluate_model"] == runs
    (compared,) = [command for command in commands(done.stdout) if "compare_runs" in command]
    assert "results/reports/" not in compared
    return max(map(len, commands(done.stdout)))


def test_no_command_line_grows_with_the_sweep_or_the_data(sources):
    folder, overrides = sources
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    files = [folder / "many" / f"rows{number}.jsonl" for number in range(30)]
    files[0].parent.mkdir()
    for number, file in enumerate(files):
        file.write_text("".join(rows[number::30]))
    paths = ",".join(map(str, files))
    many = re.sub(r"data\.source\.path=\S+", f"data.source.path=[{paths}]", overrides)
    longest = longest_command(folder, f"{many} adapter.r=1,2,3,4,5,6,7,8 train.learning_rate=1e-3", 8)
    assert longest < 1500, "of paths alone, and there are five at most"


@pytest.mark.slow
def test_a_thousand_runs_can_be_compared(sources):
    folder, overrides = sources
    rates = ",".join(f"{number}e-5" for number in range(1, 101))
    axes = f"train.learning_rate={rates} adapter.r=1,2,3,4,5,6,7,8,9,10 train.num_train_epochs=1"
    assert longest_command(folder, f"{overrides} {axes}", 1000) < 1500


def test_an_old_comparison_is_no_reason_to_do_nothing(sources):
    """Its provenance names the comparison it is of."""
    from temper import workflow
    from temper.planning import plan

    folder, _ = sources
    planned = plan.Plan("s", "smoke", {}, {"enabled": False}, [], {})
    planned.jobs["results/sweeps/s"] = plan.Job("compare_runs", "results/sweeps/s", "key", {}, {})
    for recorded, stays in (({"key": "key"}, True), ({"key": "other"}, False), ([], False)):
        file = folder / "provenance.json"
        file.write_text(json.dumps(recorded))
        assert workflow._is_of(planned, file) is stays


def test_what_reused_folders_were_made_with_is_said_once(workspace):
    from temper import workflow
    from temper.planning import plan
    from temper.provenance import package_versions, processor

    planned = plan.Plan("s", "smoke", {}, {"enabled": False}, [], {})
    same = {"packages": package_versions(), "processor": processor()}
    older = {"packages": {**package_versions(), "torch": "2.0.0", "mlflow": "1.0"}, "processor": "abacus"}
    for number, recorded in enumerate([same, older, older]):
        path = f"results/adapters/{number}"
        planned.jobs[path] = plan.Job("train_adapter", path, "key", {}, {})
        Path(path).mkdir(parents=True)
        Path(path, "provenance.json").write_text(json.dumps(recorded))
    planned.jobs["results/adapters/none"] = plan.Job("train_adapter", "results/adapters/none", "key", {}, {})
    torch, abacus = workflow.made_otherwise(planned)
    assert "of 2 folder(s) that are reused, each was made with torch 2.0.0, here is" in torch
    assert "was made on abacus, this is" in abacus


def test_names_of_folders_do_not_end_in_what_snakemake_calls_periodic():
    from snakemake.io import PeriodicityDetector

    detector = PeriodicityDetector()
    assert detector.is_periodic("a" * 25), "what the names above are for"
    assert not detector.is_periodic("a" * 25 + "/pin-0123456789")
    assert not detector.is_periodic("1" * 25 + "-1111111111")
    assert shutil.which("bash"), "the rules' prefix is for it"


def test_an_override_reaches_the_plan_as_it_was_written(sources):
    """Snakemake reads --config values as YAML, in which this one is half a mapping and half a comment."""
    folder, overrides = sources
    dry_run(folder, overrides + """ sweep=none prompt.system='To whom: # "you"'""")
    frozen = [path.read_text() for path in (folder / "results" / ".plans").glob("*")]
    assert any(json.dumps('To whom: # "you"') in text for text in frozen)
