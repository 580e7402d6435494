"""The plan: jobs and the runs they make, and how both are stored in a file."""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
from pathlib import Path

from temper.config.stages import FOLDERS
from temper.errors import UserError
from temper.files import read_json, write_whole
from temper.folders import fault, is_complete
from temper.hashing import KEY_LENGTH

RESULTS = Path("results")
STATE = RESULTS / ".state"
HASHES = STATE / "hashes.json"  # of raw files, which planning has read
PLANS = RESULTS / ".plans"
RANKING = "ranking.json"
# Artefacts of a run that are made only for the one that the ranking chooses -> what the comparison calls them.
FOR_CHOSEN = {"score_rows": "suspects", "run_harness": "harness"}
REMEDY = "run snakemake again, which writes it anew"


@dataclasses.dataclass
class Job:
    """One artefact to make: by which stage, from what, with which config.

    The key hashes `config`; `settings` are values of the stage that are in no key.
    """

    stage: str
    path: str
    key: str
    config: dict
    inputs: dict[str, str]
    settings: dict = dataclasses.field(default_factory=dict)

    @property
    def processes(self) -> int:
        """How many of them compute."""
        return self.config.get("num_processes", 1)

    @property
    def threads(self) -> int:
        """Of all its processes."""
        return self.config.get("num_threads", 1) * self.processes

    @property
    def log(self) -> Path:
        """Where the Snakefile's rule of this stage writes its log."""
        path = Path(self.path)
        name = f"{path.parent.name}/{path.stem}" if self.stage == "fetch_data" else path.name
        return RESULTS / "logs" / self.stage / f"{name}.log"


@dataclasses.dataclass
class PlannedRun:
    """One sweep point, trained and evaluated."""

    name: str
    key: str
    point: dict  # swept config key -> value
    config: dict
    # stage -> path; `base_report`: of the untouched model; `start_report`: of the training before this one;
    # `base_harness`: of the untouched model; made only if the ranking asks for it: `test_report`, `merge_adapter`, and
    # those in `FOR_CHOSEN`
    artefacts: dict[str, str]
    segments: list[str] = dataclasses.field(default_factory=list)  # adapters along the trunk, oldest first

    @property
    def title(self) -> str:
        """A name for a table or a curve: the swept values, or the whole name if nothing is swept."""
        return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.point.items()) or self.name


@dataclasses.dataclass
class Plan:
    """All runs of a sweep and the jobs that make them."""

    sweep: str
    experiment: str
    axes: dict[str, list]
    tracking: dict
    runs: list[PlannedRun]
    jobs: dict[str, Job]
    path: str | None = None  # the frozen file it was read from
    coming: list[dict] = dataclasses.field(default_factory=list)  # the rounds after the ranking (`Search.coming`)

    @property
    def later(self) -> str:
        """What a search adds after the next ranking, in words; empty where nothing follows."""
        return ", ".join(
            f"{one['runs']} of {key.rpartition('.')[2]}={one[key]}" if (key := _rung(one)) else f"{one['runs']} more"
            for one in self.coming
        )

    def job(self, stage: str, name: str) -> Job:
        """The job that makes `<stage folder>/<name>`."""
        path = str(RESULTS / FOLDERS[stage] / name)
        if path not in self.jobs:
            raise UserError(f"{path} is not part of this plan: check experiment, sweep and overrides")
        return self.jobs[path]

    @property
    def comparison(self) -> Job:
        """The last job."""
        return self.jobs[str(RESULTS / "sweeps" / self.sweep)]

    @property
    def ranking(self) -> Job:
        """The job that decides which runs are judged on the test split; of a search first which runs come next."""
        return next(job for job in reversed(self.jobs.values()) if job.stage == "rank_runs")

    def asked_by_ranking(self) -> list[str]:
        """What the ranking, which must be there, asks for.

        These are reports on the test split, parts of the chosen run, and merged models.
        """
        lists = dict.fromkeys(("tied", "tested"), list[str])
        found = read_json(Path(self.ranking.path) / RANKING, {"chosen": str, "order": list[list], **lists})
        asked = self._asked(
            [run for run in self.runs if run.name in found["tested"]],
            next(run for run in self.runs if run.name == found["chosen"]),
        )
        with_figures = [name for recipe in found["order"] for name in recipe]
        return asked + self._merged(found["chosen"], found["tied"], with_figures)

    def _likely_asked(self) -> list[str]:
        """The same. Before there is a ranking, the first run stands for the chosen one."""
        if self.is_made(self.ranking):
            return self.asked_by_ranking()
        test = self.comparison.config["eval"]["test"]
        number = {"none": 0, "all": len(self.runs)}.get(test, 1)
        names = [run.name for run in self.runs]
        return self._asked(self.runs[:number], self.runs[0]) + self._merged(names[0], [], names)

    @staticmethod
    def _asked(tested: list[PlannedRun], chosen: PlannedRun) -> list[str]:
        parts = [chosen.artefacts[name] for name in FOR_CHOSEN if name in chosen.artefacts]
        return [run.artefacts["test_report"] for run in tested] + parts

    def _merged(self, chosen: str, tied: list[str], ranked: list[str]) -> list[str]:
        """The merged models that are wanted (`merge.runs`): of runs by their names. `ranked`: those with figures."""
        wanted = {"chosen": [chosen], "tied": [chosen, *tied], "all": ranked, "none": []}
        merged = ((run, run.name in wanted[run.config["merge"]["runs"]]) for run in self.runs)
        return [run.artefacts["merge_adapter"] for run, is_wanted in merged if is_wanted]

    @property
    def base_harness(self) -> list[str]:
        """What lm-eval measures of the untouched model, if it is needed whichever run is chosen."""
        found = {run.artefacts.get("base_harness") for run in self.runs}
        return [path for path in found if path and len(found) == 1]

    @property
    def untouched(self) -> list[str]:
        """The names of the untouched models' reports, recognized by what they are made from."""
        reports = (job for job in self.jobs.values() if job.stage == "evaluate_model" and "adapter" not in job.inputs)
        return [Path(job.path).name for job in reports]

    def damaged(self) -> dict[str, str]:
        """Incomplete folder -> what is wrong with it. They count as not made everywhere."""
        there = (job.path for job in self._kept() if Path(job.path).exists())
        return {path: wrong for path in there if (wrong := fault(Path(path)))}

    def missing(self, whole: bool = True) -> list[Job]:
        """The jobs to run before the comparison: whatever it needs that is missing or damaged.

        Before there is a ranking, the first run stands for the one that it will choose.

        Args:
            whole: whether to look for damaged folders, which reads all that are there.
        """
        found = dict.fromkeys(self.damaged() if whole else ())
        todo = [self.ranking.path, *self._likely_asked()]
        todo += [run.artefacts["evaluate_model"] for run in self.runs]
        todo += [path for broken in found for path in self.jobs[broken].inputs.values()]
        while todo:
            path = todo.pop()
            if path not in found and not Path(path).exists():
                found[path] = None
                todo += self.jobs[path].inputs.values()
        return [job for path, job in self.jobs.items() if path in found]

    def is_made(self, job: Job) -> bool:
        """Whether a job's output exists and is complete."""
        if job.stage == "compare_runs":
            return Path(self.complete).exists()
        return Path(job.path).exists() if job.stage == "fetch_data" else is_complete(Path(job.path))

    def _kept(self) -> list[Job]:
        """The jobs whose folders never change: all but raw data and the sweep's folder, which is made anew."""
        return [job for job in self.jobs.values() if job.stage not in ("fetch_data", "compare_runs")]

    @property
    def leaderboard(self) -> str:
        return str(RESULTS / "sweeps" / self.sweep / "leaderboard.csv")

    @property
    def complete(self) -> str:
        """Written last, and only by a comparison of all runs, so that a partial leaderboard is made again.

        It also says whether the tracking store has everything (`mirrored`).
        """
        return str(RESULTS / "sweeps" / self.sweep / "provenance.json")

    def freeze(self) -> Path:
        """Write the plan to ``results/.plans/<hash>.json`` and return the path.

        Each run and each job has a line of its own, so that a job finds its own without reading the others (see
        `job_in`), which at thousands of runs takes longer than some jobs.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        runs = ",\n".join(_json(vars(run)) for run in fields.pop("runs"))
        jobs = ",\n".join(f"{_json(path)}: {_json(vars(job))}" for path, job in fields.pop("jobs").items())
        text = f'{_json(fields)[:-1]},\n"runs": [\n{runs}\n],\n"jobs": {{\n{jobs}\n}}}}\n'
        path = PLANS / f"{hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]}.json"
        try:
            PLANS.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)  # always: repairs a damaged one
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); make results/ a writable folder") from None
        return path


def _rung(round_: dict) -> str:
    """The config key of a round's rung; empty if it has none."""
    return next((key for key in round_ if key != "runs"), "")


def load(path: str | os.PathLike) -> Plan:
    """Read a frozen plan.

    Raises:
        UserError: it is damaged.
    """
    content = read_json(Path(path), {"runs": list[dict], "jobs": dict[str, dict]}, REMEDY)
    try:
        content["runs"] = [PlannedRun(**run) for run in content["runs"]]
        content["jobs"] = {name: Job(**job) for name, job in content["jobs"].items()}
        return Plan(**{**content, "path": str(path)})
    except TypeError as error:
        raise UserError(f"{path}: is not a plan of this version ({error}); {REMEDY}") from None


def sweep_of(path: Path) -> str:
    """The sweep of a frozen plan, by its first line alone."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    try:
        return json.loads(first.rstrip(",\n") + "}")["sweep"]
    except (ValueError, KeyError):  # cut, or edited: reading the whole says what is wrong
        return load(path).sweep


def job_in(path: str | os.PathLike, output: str) -> dict | None:
    """A frozen plan's entry for the job that makes `output`; None if it has no such job.

    Raises:
        UserError: the plan is damaged.
    """
    line = _line_of(Path(path), output)
    if line is not None:
        try:
            return json.loads(line.rstrip(b",\r\n"))
        except ValueError:
            pass  # cut, or edited: reading the whole says what is wrong
    return read_json(Path(path), {"jobs": dict[str, dict]}, REMEDY)["jobs"].get(output)


def _line_of(path: Path, output: str) -> bytes | None:
    """What follows a job's path on its line of a plan that `Plan.freeze` wrote."""
    start = f"\n{_json(output)}: ".encode()
    with (
        contextlib.suppress(OSError, ValueError),  # ValueError: an empty file
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
    ):
        at = text.rfind(start)  # jobs stand last
        if at >= 0:
            text.seek(at + len(start))
            return text.readline()
    return None


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)
