"""What a job asks of a cluster's scheduler: memory, time and disk. None enters a key.

A job asks for what the most similar artefact in results/ took, with a margin, and for what is named below where there
is none. Another attempt, after one that ended for want of memory or time or in any other way, asks for twice as much.
Snakemake heeds none of it on one machine, unless it is told how much there is (``--resources mem_mb=16000``).
"""

import functools
from pathlib import Path

from temper.planning import plan as planning
from temper.planning.forecast import Archive, Forecast

MEGABYTE = 10**6
SNAKEMAKE = 600  # MB: a job on a cluster is a step below two Snakemake processes, of 250 MB each with a small plan
PROGRAM = 2000  # MB: Python with PyTorch, and a batch of a small model
# Of nothing similar that was measured: memory in multiples of the model's files. They are in half precision as a rule,
# and 2 are the weights in float32 on a CPU; training adds activations, and all its parameters gradients (2) and Adam's
# moments (4).
WEIGHTS = {"tokenize_splits": 0.0, "train_adapter": 4.0, "merge_adapter": 4.0}
OF_FULL_TRAINING = 10.0
OTHER_WEIGHTS = 3.0
# Of nothing similar: disk in multiples of the model's files. A training of all parameters leaves them in float32 (2),
# and has two checkpoints at a time, with Adam's moments (6 each).
DISK = {"train_adapter": 0.5, "merge_adapter": 2.0}
OF_FULL_DISK = 14.0
MINUTES = {"train_adapter": 360, "sample_answers": 360, "run_harness": 360}
OTHER_MINUTES = 120
# Of what was measured: a job's config may differ from the similar one's, and its node from that one's.
MORE_MEMORY, MORE_TIME, START = 1.5, 3.0, 10  # START: minutes, to load libraries and model from a shared disk
MORE_DISK, SCRATCH = 2.0, 1000  # SCRATCH: MB of logs and temporary files
STATES = 6.0  # of an adapter: the two checkpoints in multiples of what the training leaves


class Resources:
    """The resources of a plan's jobs.

    Args:
        plan: the plan.
        workflow: Snakemake's own object.
    """

    def __init__(self, plan: planning.Plan, workflow):
        self.plan, self.workflow = plan, workflow
        self.made: Archive | None = None

    def of(self, stage: str) -> dict:
        """Resources functions of a stage's rule: `mem_mb` and `disk_mb`, in 10^6 bytes, and `runtime`, in minutes."""
        asked = {"mem_mb": self._megabytes, "runtime": self._minutes, "disk_mb": self._disk}
        return {name: self._function(stage, first) for name, first in asked.items()}

    def _function(self, stage: str, first):
        def function(wildcards, attempt):
            if not self.workflow.is_main_process:  # a job on its node, which has what was asked for
                return 0
            return first(self.plan.job(stage, wildcards.name)) * 2 ** (attempt - 1)

        return function

    def _megabytes(self, job: planning.Job) -> int:
        like = self._similar(job)
        peak = like.provenance.get("peak_memory_bytes") if like else None
        if peak:
            needed = peak / MEGABYTE * MORE_MEMORY
        else:
            times = OF_FULL_TRAINING if _trains_all(job) else WEIGHTS.get(job.stage, OTHER_WEIGHTS)
            needed = PROGRAM + times * _megabytes_of(job.inputs["model"])
        return _rounded(needed * job.processes + SNAKEMAKE)  # a peak is that of one process

    def _minutes(self, job: planning.Job) -> int:
        forecast = Forecast(self.plan, 1)
        forecast.add(job, self._similar(job))
        if forecast.unknown:
            return MINUTES.get(job.stage, OTHER_MINUTES)
        return round(START + forecast.jobs[job.path] * MORE_TIME / 60)

    def _disk(self, job: planning.Job) -> int:
        like = self._similar(job)
        if like:
            needed = like.bytes / MEGABYTE * MORE_DISK * (STATES if job.stage == "train_adapter" else 1)
        else:
            times = OF_FULL_DISK if _trains_all(job) else DISK.get(job.stage, 0.0)
            needed = times * _megabytes_of(job.inputs["model"]) if times else 0
        return _rounded(SCRATCH + needed)

    def _similar(self, job: planning.Job):
        """The most similar artefact of the same model; looked for only where a scheduler reads what comes of it."""
        if self.workflow.local_exec:
            return None
        self.made = self.made or Archive()
        like = self.made.most_similar(job)
        return like if like and Forecast.tells(job, like) else None


def _trains_all(job: planning.Job) -> bool:
    """Whether a job trains all parameters of the model."""
    return job.stage == "train_adapter" and job.config["adapter"].get("peft_type") is None


def _megabytes_of(model: str) -> float:
    """The size of a model's weights; 0 where they are still to be fetched (Snakemake asks again when they are)."""
    return _measured(model) if Path(model).is_dir() else 0.0


@functools.cache
def _measured(model: str) -> float:
    files = [file for file in Path(model).rglob("*") if file.suffix in (".safetensors", ".bin", ".pt")]
    return sum(file.stat().st_size for file in files) / MEGABYTE


def _rounded(megabytes: float) -> int:
    """Up, to hundreds."""
    return -int(-megabytes // 100) * 100
