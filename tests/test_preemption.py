"""Which answers of `scontrol show job` mean a preemption; tests/test_slurm.py has a real one."""

import pytest

from temper.preemption import is_preempted

SHOWN = """JobId=14 JobName=temper
   JobState={state} Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag={batch} Reboot=0 ExitCode=0:0
   PreemptEligibleTime=2026-01-01T19:13:47 PreemptTime={time}
"""


@pytest.mark.parametrize(
    ("state", "batch", "time", "expected"),
    [
        ("RUNNING", 1, "2026-01-01T19:20:00", True),
        ("RUNNING", 1, "None", False),  # SIGTERM by a person
        ("CANCELLED", 1, "2026-01-01T19:20:00", False),
        ("RUNNING", 0, "2026-01-01T19:20:00", False),  # salloc: there is no script to start again
    ],
)
def test_only_a_running_batch_job_that_is_preempted_goes_back(state, batch, time, expected):
    assert is_preempted(SHOWN.format(state=state, batch=batch, time=time)) is expected


def test_without_slurm_nothing_is_preempted():
    assert not is_preempted("")
