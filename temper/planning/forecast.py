"""How long the next run will take and how much disk, from what earlier jobs took.

A job's time is that of the most similar artefact, scaled by how much more or less it has to do (rows, epochs).
The time of all is that of jobs started as soon as their inputs are there and cores are free, as Snakemake does.
"""

import dataclasses
import functools
import heapq
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from temper.files import read_json
from temper.keys import flat
from temper.units import seconds, size


@dataclasses.dataclass
class Made:
    """An artefact that is there: its config, as flat keys and texts, without what is in no key; and its provenance."""

    path: Path
    config: dict[str, str]
    provenance: dict
    items: frozenset = dataclasses.field(init=False)  # what is set in the config

    def __post_init__(self):
        self.items = set_items(self.config)

    @functools.cached_property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())


def set_items(config: dict[str, str]) -> frozenset:
    """The config's items less those that are null: a key that is not set and one that is null are the same."""
    return frozenset(item for item in config.items() if item[1] != "null")


class Archive:
    """The artefacts of each stage that are in results/, read once."""

    def __init__(self):
        self.stages: dict[Path, list[tuple[Made, int, int]]] = {}  # folder -> artefacts, with their masks
        self.found: dict[str, Made | None] = {}  # by the job's path
        self.bits: dict[tuple, int] = {}  # of a mask: one for each item of a config, and for each input

    def most_similar(self, job) -> Made | None:
        """Of the artefacts of the job's stage, the one whose inputs and config differ least; the newest of equals."""
        if job.path not in self.found:
            self.found[job.path] = self._most_similar(job)
        return self.found[job.path]

    def _most_similar(self, job) -> Made | None:
        folder = Path(job.path).parent
        if folder not in self.stages:
            there = [made for path in folder.glob("*/provenance.json") if (made := _read(path.parent))]
            self.stages[folder] = [
                (made, self._mask(made.items), self._mask(_inputs(made.provenance["inputs"]))) for made in there
            ]
        items, inputs = self._mask(set_items(flat(job.config))), self._mask(_inputs(job.inputs))
        names = job.inputs.keys() - {"previous"}
        alike = (
            ((items ^ theirs).bit_count() + (inputs ^ read).bit_count() // 2 + (not same_part(job, made)), made)
            for made, theirs, read in self.stages[folder]
            if made.provenance["inputs"].keys() == names
        )
        newest = min(alike, key=lambda pair: (pair[0], -pair[1].provenance.get("ended", 0)), default=None)
        return newest and newest[1]

    def _mask(self, items: Iterable[tuple]) -> int:
        """A set as a number: those of a thousand jobs and a thousand artefacts are compared a million times."""
        return sum(1 << self.bits.setdefault(item, len(self.bits)) for item in items)


def _inputs(inputs: dict[str, str]) -> set[tuple]:
    return {("input", *item) for item in inputs.items() if item[0] != "previous"}


def same_part(job, made: Made) -> bool:
    """Whether both are plateaus of a trunk, or both are not."""
    return made.provenance.get("part") == job.settings.get("part")


def _read(folder: Path) -> Made | None:
    from temper.config.stages import stored_config

    if not (folder / "config.yaml").is_file():
        return None
    provenance = read_json(folder / "provenance.json", {"stage": str, "inputs": dict[str, str], "seconds": float})
    stored = stored_config(folder).items()
    return Made(folder, {key: value for key, value in stored if not _in_no_key(provenance["stage"], key)}, provenance)


def _in_no_key(stage: str, key: str) -> bool:
    """Whether a flat key (``tokenize.max_share.dropped``) is of what the stage's jobs do not have in their config."""
    from temper.config.stages import STAGES, keys_hidden

    section, _, name = key.partition(".")
    return section in STAGES[stage].config.model_fields and name.partition(".")[0] in keys_hidden(stage, section)


class Forecast:
    """Adds up jobs, and says what they take together.

    Args:
        plan: the plan the jobs are of.
        cores: how many cores Snakemake will have.
    """

    def __init__(self, plan, cores: int):
        self.plan, self.cores = plan, cores
        self.jobs: dict[str, float] = {}  # path -> seconds
        self.bytes, self.unknown = 0, 0

    def add(self, job, like: Made | None) -> None:
        """Expect of `job` what `like` took; None, or a `like` of another model, tells nothing."""
        if job.stage == "rank_runs":  # it takes a second
            return
        if like is None or not self.tells(job, like):
            self.unknown += 1
            self.jobs[job.path] = 0.0
            return
        self.jobs[job.path] = like.provenance["seconds"] * self._work(job, like)
        self.bytes += like.bytes

    @staticmethod
    def tells(job, like: Made) -> bool:
        """Whether an artefact tells what a job takes: it is of the same model, and of the same tasks of lm-eval."""
        return _same_model(job, like) and _same_tasks(job, like)

    def _work(self, job, like: Made) -> float:
        """How much more a job has to do than `like` had."""
        if job.stage == "train_adapter":
            previous = self.plan.jobs.get(job.inputs.get("previous", ""))
            return self._rows(job, like, "train") * _epochs(job, previous, like)
        if job.stage == "score_rows":
            return self._rows(job, like, "train")
        return self._judged(job, like) if job.stage == "evaluate_model" else 1.0

    def _judged(self, job, like: Made) -> float:
        """The ratio of the rows that a model is judged on, which may be of different splits."""
        before = rows_of(Path(like.provenance["inputs"]["splits"]), like.config.get("eval.split", "test"))
        now = self._rows_now(job, job.config["eval"]["split"])
        return now / before if now and before else 1.0

    def _rows(self, job, like: Made, split: str) -> float:
        """The ratio of the rows of a split. One still to be made has what the config limits it to, else as many."""
        before, now = rows_of(Path(like.provenance["inputs"]["splits"]), split), self._rows_now(job, split)
        return now / before if now and before else 1.0

    def _rows_now(self, job, split: str) -> int | None:
        now = rows_of(Path(job.inputs["splits"]), split)
        if now is None:
            prompts = self.plan.jobs[self.plan.jobs[job.inputs["splits"]].inputs["prompts"]]
            now = prompts.config["data"].get("limit", {}).get(split)  # of a mixture each data set has its own
        return now

    def wall_clock(self) -> float:
        """Seconds from start to end when every job starts as soon as it can. Needs are met in the plan's order."""
        free, clock = self.cores, 0.0
        places = {path: place for place, path in enumerate(path for path in self.plan.jobs if path in self.jobs)}
        needs = {path: {need for need in self.plan.jobs[path].inputs.values() if need in self.jobs} for path in places}
        wanted_by: dict[str, list[str]] = {}
        for path, some in needs.items():
            for need in some:
                wanted_by.setdefault(need, []).append(path)
        ready = [(place, path) for path, place in places.items() if not needs[path]]
        running: list[tuple[float, str, int]] = []
        while ready or running:
            passed = []  # which want more cores than are free
            while ready and free:
                place, path = heapq.heappop(ready)
                cores = min(self.plan.jobs[path].threads, self.cores)
                if cores > free:
                    passed.append((place, path))
                    continue
                free -= cores
                heapq.heappush(running, (clock + self.jobs[path], path, cores))
            for one in passed:
                heapq.heappush(ready, one)
            clock, path, cores = heapq.heappop(running)
            free += cores
            for other in wanted_by.get(path, ()):
                needs[other].discard(path)
                if not needs[other]:
                    heapq.heappush(ready, (places[other], other))
        return clock

    def text(self) -> str:
        """The forecast in a line or two."""
        if self.unknown == len(self.jobs):
            return "forecast: nothing to go by yet"
        unknown = f"; nothing to go by for {self.unknown} job(s)" if self.unknown else ""
        lines = [
            f"forecast: about {seconds(self.wall_clock())} on {self.cores} core(s) "
            f"({seconds(sum(self.jobs.values()))} of jobs), {size(self.bytes)} of disk{unknown}"
        ]
        free = shutil.disk_usage(os.curdir).free
        if self.bytes > free:
            lines.append(f"warning: only {size(free)} of disk are free")
        return "\n".join(lines)


def _same_model(job, like: Made) -> bool:
    """By its name: a new key, after an edit of the code, takes the same time. Splits are named after data and model."""
    name = "splits" if job.stage in ("evaluate_model", "score_rows") else "model"
    name = "base_harness" if "base_harness" in job.inputs else name
    before, now = like.provenance["inputs"].get(name, ""), job.inputs.get(name, "")
    return Path(before).name.rpartition("-")[0] == Path(now).name.rpartition("-")[0]


def _same_tasks(job, like: Made) -> bool:
    """Of lm-eval: one takes seconds, another takes hours."""
    now = set_items(flat({"eval": job.config["eval"]})) if job.stage == "run_harness" else frozenset()
    return now <= like.items


def _epochs(job, previous, like: Made) -> float:
    """The ratio of the epochs that a training job goes through to those that `like` went through.

    Args:
        previous: the job whose training it continues, if it does.
    """
    done, steps = like.provenance.get("trained_epochs"), like.provenance.get("trained_steps")
    if not done:
        return 1.0
    train = job.config["train"]
    if job.settings.get("plateau") and not job.settings.get("part"):  # the decay that ends a run
        return train["lr_scheduler_kwargs"]["num_decay_steps"] / steps
    before = previous.config["train"] if previous else {}
    if train.get("max_steps", -1) > 0:
        return (train["max_steps"] - before.get("max_steps", 0)) / steps
    return (float(train.get("num_train_epochs", 3)) - before.get("num_train_epochs", 0)) / done


def rows_of(splits: Path, split: str) -> int | None:
    """Rows of a split that is there; None when it is not."""
    audit = splits / "audit.json"
    if not audit.is_file():
        return None
    return read_json(audit, {"splits": dict[str, dict]})["splits"].get(split, {}).get("rows")
