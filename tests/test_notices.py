"""notify.command: what it is told, and that it changes nothing."""

import json
from pathlib import Path

import pytest

from temper import notices
from temper.errors import UserError
from temper.planning import planner
from tests.support.sweeps import board_of

KEEP = "cat > told.json; printf '%s' \"$TEMPER_STATUS: $TEMPER_TEXT\" > told.txt"


def plan_with(command: str):
    return planner.build("smoke", None, [f"notify.command='{command}'"])


def board_for(plan):
    rows = [{"run": run.name, "validation_accuracy": 0.9 - index / 10} for index, run in enumerate(plan.runs)]
    return board_of(plan.sweep, rows).model_copy(update={"base": {"accuracy": 0.6}})


def test_the_command_is_told_in_a_line_and_in_json(workspace):
    Path("tell.sh").write_text(KEEP)
    plan = plan_with("sh tell.sh")
    notices.tell(plan, notices.FINISHED, board_for(plan), link="http://127.0.0.1:5000/#/experiments/1")
    told = json.loads(Path("told.json").read_text())
    assert Path("told.txt").read_text() == f"finished: {told['text']}"
    assert told["text"].startswith(
        "sweep smoke finished; best of 2 run(s): accuracy 0.900 on validation, untouched model"
    )
    assert (told["status"], told["best"], told["value"], told["base"]) == ("finished", plan.runs[0].name, 0.9, 0.6)
    assert told["mlflow"].startswith("http://") and told["page"] == "results/sweeps/smoke/report.html"


def test_a_sweep_without_results_is_told_as_well(workspace):
    Path("tell.sh").write_text(KEEP)
    notices.tell(plan_with("sh tell.sh"), notices.FAILED, None, failed=2)
    assert Path("told.txt").read_text() == "failed: sweep smoke failed; 2 job(s) failed"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no such channel >&2; exit 3", "notify.command ended with exit code 3: no such channel"),
        ("sleep 5", "notify.command was ended after 0 seconds"),
    ],
)
def test_a_command_that_fails_is_said_and_changes_nothing(workspace, monkeypatch, capsys, command, said):
    monkeypatch.setattr(notices, "LONGEST", 0.2 if "sleep" in command else 60)
    notices.tell(plan_with(command), notices.FINISHED, None)
    assert said in capsys.readouterr().err


def test_a_notice_is_no_axis_and_in_no_key(workspace):
    with pytest.raises(UserError, match="notify.command cannot be an axis"):
        planner.build("smoke", None, ["notify.command=a,b"])
    assert set(plan_with("true").jobs) == set(planner.build("smoke", None, []).jobs)
