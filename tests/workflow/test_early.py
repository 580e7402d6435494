"""The page and leaderboard that grow while a sweep runs, who watches them, and in which order reports are made."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from temper import early, workflow
from temper.commands import leaderboard
from temper.planning import planner
from temper.reports.leaderboard import read_board
from tests.conftest import ROOT
from tests.support import finished


@pytest.fixture
def plan(workspace, finished_run):
    """A plan of two runs, of which the first has its report."""
    made = planner.build("smoke", None, ["tracking=none"])
    finished.put(finished_run, made.runs[0].artefacts)
    return made


def test_the_page_before_the_end_says_that_it_is_partial_and_does_not_pass_for_the_complete_one(plan):
    early.compare_what_is_there(plan)
    folder = Path(plan.leaderboard).parent
    assert read_board(folder).missing == [plan.runs[1].name]
    page = (folder / "report.html").read_text()
    assert "1 of 2 runs have no report" in page
    assert "location.reload()" in page and "loads itself anew every 20 seconds" in page
    assert not Path(plan.complete).exists()


def test_the_page_of_an_ended_command_looks_for_no_newer_one(plan):
    """Also where runs failed."""
    workflow._compare_what_is_there(plan)
    page = (Path(plan.leaderboard).parent / "report.html").read_text()
    assert "1 of 2 runs have no report" in page
    assert "location.reload" not in page and "refresh" not in page


def test_a_complete_comparison_is_left_alone(plan):
    early.compare_what_is_there(plan)
    page = Path(plan.leaderboard).parent / "report.html"
    page.write_text("complete")
    Path(plan.complete).write_text("{}")
    early.compare_what_is_there(plan)
    assert page.read_text() == "complete"


def test_pages_are_made_when_there_are_new_reports_and_time_for_them(plan, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(early, "POLL", 0.1)
    none = early.Pages(plan, lambda: str(plan.freeze()))
    time.sleep(1)
    none.stop()
    assert not Path(plan.leaderboard).exists(), "a twentieth of a second is too short for a page"
    monkeypatch.setattr(early, "FIRST", 0.0)
    pages, deadline = early.Pages(plan, lambda: str(plan.freeze())), time.monotonic() + 60
    while not Path(plan.leaderboard).with_name("leaderboard.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pages.stop()
    assert len(read_board(Path(plan.leaderboard).parent).rows) == 1, pages.log.read_text()
    assert not Path(plan.complete).exists()


def test_watching_shows_each_board_and_ends_with_the_complete_one(plan, capsys, monkeypatch):
    monkeypatch.setattr(leaderboard, "POLL", 0.01)
    shown = threading.Thread(target=leaderboard.run, args=[SimpleNamespace(sweep=plan.sweep, watch=True)])
    shown.start()
    time.sleep(0.1)
    early.compare_what_is_there(plan)
    time.sleep(0.3)
    assert shown.is_alive(), "the sweep is not complete"
    Path(plan.complete).write_text("{}")
    shown.join(timeout=10)
    assert not shown.is_alive()
    said = capsys.readouterr().out
    assert said.startswith(f"results/sweeps/{plan.sweep}: waiting for the first reports")
    assert said.count("partial: 1 run(s) without a report") == 1


@pytest.mark.parametrize(("runs", "cores", "first"), [(1, 2, 1), (5, 2, 1), (8, 2, 4), (16, 4, 8), (5, 4, 1)])
def test_the_first_half_of_the_reports_goes_before_trainings_and_the_others_after_them(workspace, runs, cores, first):
    rates = ",".join(f"{number}e-4" for number in range(1, runs + 1))
    plan = planner.build("smoke", "none", [f"train.learning_rate={rates}", "train.num_train_epochs=2"])
    given: dict[str, list[float]] = {}
    for stage in ("train_adapter", "evaluate_model"):
        priority = workflow.report_priority(plan, stage, SimpleNamespace(cores=cores, local_exec=True))
        names = [job.path.rpartition("/")[2] for job in plan.jobs.values() if job.stage == stage]
        given[stage] = [priority(SimpleNamespace(name=name)) for name in names]
    assert given["train_adapter"].count(1.5) == 2 * first, "two epochs each"
    assert given["train_adapter"].count(1) == 2 * (runs - first)
    assert given["evaluate_model"].count(2) == first
