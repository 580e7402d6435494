"""How a sweep stands while it runs and afterwards: `temper status`, from results/ alone."""

import json
import os
import time
from pathlib import Path

import pytest

from temper import running
from temper.commands import status as command_module
from temper.config.stages import STAGES
from temper.folders import is_locked, locked
from temper.planning import planner
from temper.planning.forecast import Archive
from temper.reports import status
from temper.reports.status import AT_WORK, DONE, FAILED, WAITING
from tests.support import finished
from tests.support.asking import command, complaint


@pytest.fixture
def plan(workspace, finished_run):
    """A frozen plan of two runs, of which the first has its report."""
    made = planner.build("smoke", None, ["tracking=none"])
    finished.put(finished_run, made.runs[0].artefacts)
    made.freeze()
    return made


@pytest.fixture
def training(plan):
    """The second run's training; its model, rows and report of the untouched model are there, as in the first run."""
    return plan.jobs[plan.runs[1].artefacts["train_adapter"]]


def write_log(job, text: str, age: float = 0.0) -> None:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.log.write_text(text)
    os.utime(job.log, (time.time() - age,) * 2)


def look(plan, **more):
    now = status.standing(plan, **more)
    return now, {run.name: run for run in now.runs}


PROGRESS = "12:00:01 GPU: 0\n12:00:11 train: 10/40 steps (25%), 1.00 steps/s, 00:30 left, loss 0.5000\n"
PROGRESS += "12:00:14 step 12: validation loss 0.4000\n"


def test_a_training_at_work_is_told_by_its_lock_and_its_log(plan, training):
    write_log(training, PROGRESS)
    with running.marked(plan.sweep), locked(Path(training.path)):
        now, runs = look(plan, archive=Archive())
    one, two = (runs[run.name] for run in plan.runs)
    assert (one.state, two.state, two.stage) == (DONE, AT_WORK, "train_adapter")
    assert two.said == "train: 10/40 steps (25%), 1.00 steps/s, 00:30 left, loss 0.5000"
    assert one.value is not None and one.interval
    assert now.best is one, "the best of those that have figures"
    [job] = now.of(AT_WORK)
    assert (job.path, job.seconds_left) == (training.path, 30.0)
    assert now.seconds_left is not None and now.seconds_left >= 30
    text = "\n".join(line for _, line in status.lines(now))
    assert text.startswith(f"sweep {plan.sweep}: 2 runs: 1 done, 1 at work; at work for ")
    assert "10/40 steps (25%)" in text and "best of 1 so far: learning_rate=" in text
    assert "\nwaiting: " in text


def test_before_its_lock_a_job_starts_and_after_a_while_it_was_killed(plan, training):
    write_log(training, "")
    with running.marked(plan.sweep):
        assert look(plan)[1][plan.runs[1].name].said == "starts"
        write_log(training, "12:00:01 2 GPU(s) wanted, and too few of 2 are free of other jobs: waiting\n", age=9999)
        assert look(plan)[0].of(FAILED) == [], "it was started before this command, which may still start it"
    begun = running.begun
    with running.marked(plan.sweep), pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "begun", lambda sweep: begun(sweep) - 99999)
        assert look(plan)[1][plan.runs[1].name].state == AT_WORK, "a job that waits for a GPU may be silent for hours"
        write_log(training, PROGRESS, age=9999)
        [job] = look(plan)[0].of(FAILED)
        assert job.said.startswith("killed from outside") and "validation loss 0.4000" in job.said


def test_a_failure_is_told_with_its_log_and_forgotten_when_a_new_command_begins(plan, training):
    write_log(training, f"{PROGRESS}error: config: no\x1b[2J good\n", age=60)
    now, runs = look(plan)
    assert (runs[plan.runs[1].name].state, now.begun) == (FAILED, None)
    text = "\n".join(line for _, line in status.lines(now))
    assert "2 runs: 1 done, 1 failed; no command is at work on it" in text
    assert f"error: config: no\\x1b[2J good  (log: {training.log})" in text
    with running.marked(plan.sweep):
        again = look(plan)[1][plan.runs[1].name]
    assert (again.state, again.stage) == (WAITING, "train_adapter")


def test_looking_changes_nothing(plan, training):
    before = sorted(Path("results").rglob("*"))
    assert not is_locked(Path(training.path))
    command("status")([])
    assert sorted(Path("results").rglob("*")) == before


def test_the_sweep_at_work_is_shown_else_the_last_one(plan, capsys):
    other = planner.build("smoke", "none", ["sweep.name=other", "tracking=none"])
    os.utime(other.freeze(), (time.time() + 9,) * 2)
    command("status")([])
    assert capsys.readouterr().out.startswith("sweep other: 1 run: ")
    command("status")([f"results/sweeps/{plan.sweep}"])
    assert capsys.readouterr().out.startswith(f"sweep {plan.sweep}: 2 runs: ")
    with running.marked(plan.sweep):
        command("status")(["--json"])
        [shown] = json.loads(capsys.readouterr().out)
    assert (shown["sweep"], len(shown["runs"])) == (plan.sweep, 2)
    assert {job["stage"] for job in shown["jobs"]} <= STAGES.keys()
    assert shown["begun"] <= time.time()


def test_what_is_not_there_is_one_line(workspace, capsys):
    assert complaint(capsys, command("status")).startswith("results/.plans: no sweep was started here")
    planner.build("smoke", "none", ["tracking=none"]).freeze()
    assert complaint(capsys, command("status"), "nosuch").startswith(
        "nosuch: no such sweep was started here; there are "
    )


def test_a_killed_command_is_at_work_no_more(plan):
    """The system frees its lock, and the file stays."""
    with running.marked(plan.sweep):
        [path] = Path("results/.plans").glob("*.lock")
        assert running.begun(plan.sweep) is not None and running.begun("another") is None
    path.touch()
    assert running.begun(plan.sweep) is None


def test_watching_without_a_terminal_tells_changes_once(plan, training, capsys, monkeypatch):
    write_log(training, PROGRESS)
    looks = []
    with running.marked(plan.sweep):
        looks.append([look(plan)[0]])
        with locked(Path(training.path)):
            looks += [[look(plan)[0]], [look(plan)[0]]]
        write_log(training, "error: no good\n")
        looks.append([look(plan)[0]])
    command_module._tell(iter(looks))
    said = capsys.readouterr().out
    name = f"adapters/{Path(training.path).name}"
    assert said.count(f"at work: {name}") == 1
    assert said.count(f"failed: {name}: error: no good") == 1
    assert said.count("best of 1 so far") == 2, "when it is known, and at the end"


def test_watching_ends_when_the_command_does(plan, monkeypatch, capsys):
    monkeypatch.setattr(command_module, "EVERY", 0.01)
    looks = command_module._looks(plan.sweep)
    next(looks)
    next(looks)  # nothing is at work yet: it is waited for
    with running.marked(plan.sweep):
        assert next(looks)[0].begun is not None
    assert next(looks)[0].begun is None
    assert list(looks) == []


def test_a_terminal_gets_colours_and_no_line_is_wrapped(plan, training):
    from rich.console import Console

    write_log(training, "error: " + "x" * 300)
    with Path("shown").open("w") as file:
        console = Console(file=file, force_terminal=True, width=80, color_system="standard")
        console.print(command_module._text([look(plan)[0]]))
    lines = Path("shown").read_text().splitlines()
    assert any("\x1b[1;31m" in line for line in lines), "what failed is red"
    assert any("…" in line for line in lines)


def test_a_thousand_runs_are_summed_up(workspace):
    rates = ",".join(f"{number}e-5" for number in range(1, 101))
    made = planner.build("smoke", "none", [f"train.learning_rate={rates}", "adapter.r=1,2,3,4,5,6,7,8,9,10"])
    lines = [line for _, line in status.lines(status.standing(made))]
    assert lines[0] == "sweep single: 1000 runs: 1000 waiting; no command is at work on it"
    assert len(lines) < 40 and "and 980 more" in lines
