"""A job that Slurm preempts starts again by itself, also if it ends before it has to.

Slurm puts a preempted job back into the queue when it kills it, at the end of the partition's GraceTime. A step that
heeds the SIGTERM at its beginning has ended by then, and its job counts as failed. So the step asks for that itself.
"""

import contextlib
import logging
import os
import re
import subprocess
from collections.abc import Iterator

from temper.signals import Interrupted

log = logging.getLogger("temper")
SECONDS = 20.0  # that Slurm gets to answer


@contextlib.contextmanager
def requeued() -> Iterator[None]:
    """If a signal ends the block because Slurm preempts this job, put the job back into the queue."""
    try:
        yield
    except Interrupted:
        job = os.environ.get("SLURM_JOB_ID")
        if job and is_preempted(_scontrol("show", "job", job)):
            log.info("preempted: back into the queue %s", _scontrol("requeue", job).strip())
        raise


def is_preempted(shown: str) -> bool:
    """Whether a batch job, as `scontrol show job` shows it, runs in the time that a preemption has left it."""
    fields = dict(re.findall(r"(\w+)=(\S+)", shown))
    running = fields.get("JobState") == "RUNNING" and fields.get("BatchFlag") == "1"
    return running and fields.get("PreemptTime", "None") != "None"


def _scontrol(*words: str) -> str:
    """What scontrol says; nothing where there is none, or it does not answer."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr
