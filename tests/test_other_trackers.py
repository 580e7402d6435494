"""TensorBoard and W&B: copies of the same files, beside MLflow and without it."""

import time
from pathlib import Path

import pytest

from temper import other_trackers, tracking
from temper.errors import UserError
from tests.test_tracking import LINES, SETTINGS, plan, target_at  # noqa: F401


def events_of(folder) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of each point, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_a_tracker_that_is_not_installed_is_refused_before_any_job():
    with pytest.raises(UserError, match=r"tracking.report_to: no_such is not installed: pip install no_such"):
        tracking.check({**SETTINGS, "enabled": False, "report_to": ["no_such"]})


@pytest.mark.parametrize("enabled", [True, False])
def test_tensorboard_gets_curves_while_they_grow_and_all_at_the_end(plan, enabled):  # noqa: F811
    pytest.importorskip("tensorboard")
    made, board = plan
    made.tracking |= {"report_to": ["tensorboard"], "enabled": enabled}
    run = made.runs[0]
    target = {"tracking": made.tracking, "sweep": made.sweep, "run": run.name, "title": run.title}
    folder = other_trackers.folder_of("tensorboard", made.sweep, run.name)
    with tracking.follow(target) as listener:
        for line in LINES[:3]:
            listener(line)
        deadline = time.monotonic() + 60
        while not (folder.is_dir() and [step for step, _ in events_of(folder).get("loss", [])] == [1, 2, 3]):
            assert time.monotonic() < deadline, "the curve never came"
            time.sleep(0.5)
    with tracking.follow(target) as listener:  # after a kill: from step 2 on again
        for line in LINES[1:3]:
            listener(line)
    assert [step for step, _ in events_of(folder)["loss"]] == [1, 2, 3]
    assert "tensorboard: 2 new run(s)" in tracking.mirror(made, board)[1]
    found = events_of(folder)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert found["validation_accuracy"] == [(0, pytest.approx(0.8))]
    assert "tensorboard: 0 new run(s)" in tracking.mirror(made, board)[1]


def test_a_tensorboard_that_cannot_write_stops_no_training(plan, caplog):  # noqa: F811
    pytest.importorskip("tensorboard")
    made, board = plan
    Path("results/tensorboard").write_text("in the way")
    target = target_at(None) | {"tracking": {**SETTINGS, "enabled": False, "report_to": ["tensorboard"]}}
    with caplog.at_level("INFO", logger="temper"), tracking.follow(target) as listener:
        listener(LINES[0])
    assert "training goes on" in caplog.text
    made.tracking["report_to"] = ["tensorboard"]
    done, said = tracking.mirror(made, board)
    assert done and "tensorboard: not up to date" in said, "MLflow has all"


def test_wandb_gets_a_run_that_can_be_synced(plan):  # noqa: F811
    pytest.importorskip("wandb")
    made, board = plan
    made.tracking["report_to"] = ["wandb"]
    assert "wandb: 2 new run(s)" in tracking.mirror(made, board)[1]
    for run in made.runs:
        folder = other_trackers.folder_of("wandb", made.sweep, run.name)
        [offline] = folder.glob("wandb/offline-run-*")
        assert list(offline.glob("*.wandb")) and (folder / "complete").read_text() == run.key
    assert "wandb: 0 new run(s)" in tracking.mirror(made, board)[1]
