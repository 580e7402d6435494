"""What the workflow itself costs: planning 1,000 runs, a command with nothing to do, and the seconds around each job.

    python -m tests.benchmarks.overhead

Prints a Markdown table. The last figure is the wall time of a real sweep of a tiny model on one core, less the seconds
that its steps measured themselves, by job: Snakemake, the shell, the start of Python.
"""

import json
import tempfile
import time
from pathlib import Path

from temper.planning import plan, planner
from tests.support import tiny
from tests.support.workflow_tools import executed, own_sources, snakemake

RUNS = 1_000


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        source = _tiny_project(project)
        rates = ",".join(f"{1e-4 * (1 + number / RUNS):.8f}" for number in range(RUNS))
        overrides = f"overrides=sweep=none {source} train.learning_rate={rates}"
        started = time.perf_counter()
        planned = _planned(project, overrides)
        print("| what | figure |\n|---|---|")
        print(
            f"| plan {RUNS:,} runs ({len(planned.jobs):,} jobs), first time | {time.perf_counter() - started:.1f} s |"
        )
        _pretend_made(project, planned)
        snakemake(project, "--touch", "--config", "experiment=smoke", overrides)
        started = time.perf_counter()
        done = snakemake(project, "--config", "experiment=smoke", overrides)
        assert executed(done) == {}, "nothing was to be done"
        print(f"| a command with nothing to do, {RUNS:,} runs | {time.perf_counter() - started:.1f} s |")
    with tempfile.TemporaryDirectory() as folder:
        print(f"| overhead per job of a real sweep, one core | {_overhead(Path(folder)):.2f} s |")


def _tiny_project(folder: Path) -> str:
    """A tiny model and a tiny data set in `folder`; the overrides that name them."""
    return own_sources(folder, tiny.make_tiny_model(folder / "model"), tiny.tiny_rows(150))


def _planned(folder: Path, overrides: str) -> plan.Plan:
    import contextlib

    with contextlib.chdir(folder):
        return planner.build("smoke", None, overrides.removeprefix("overrides="))


def _pretend_made(folder: Path, planned: plan.Plan) -> None:
    """Empty folders in place of a thousand trainings: only whether they are there is asked."""
    for job in planned.jobs.values():
        path = folder / job.path
        if job.stage == "fetch_data":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"source": job.config["data"]["source"], "files": {}}))
            continue
        path.mkdir(parents=True, exist_ok=True)
        for name in ("provenance.json", "leaderboard.csv", "leaderboard.json", "report.html"):
            (path / name).write_text("{}")


def _overhead(folder: Path) -> float:
    source = _tiny_project(folder)
    overrides = f"overrides=sweep=none {source} train.learning_rate=1e-3,2e-3,3e-3,4e-3"
    started = time.perf_counter()
    done = snakemake(folder, "--cores", "1", "--config", "experiment=smoke", overrides)
    wall = time.perf_counter() - started
    own = sum(json.loads(path.read_text())["seconds"] for path in folder.glob("results/*/*/provenance.json"))
    return (wall - own) / sum(executed(done).values())


if __name__ == "__main__":
    main()
