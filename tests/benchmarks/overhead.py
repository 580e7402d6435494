"""What the workflow itself costs: planning, comparing and tracking 1,000 runs, and the seconds around each job.

    python -m tests.benchmarks.overhead [--runs 10000]

Prints a Markdown table, of seconds of computing beside those on the clock, which other work prolongs. The 1,000
runs are made up: each has figures, 100 answers and a curve of its own, and the adapter of one real tiny run. The last
line is the wall time of a real sweep of a tiny model on one core, less the seconds that its steps measured themselves,
by job: Snakemake, the shell, the start of Python.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from steps.compare_runs import compare
from temper import tracking
from temper.commands.explain import explain
from temper.planning import plan, planner
from tests.support import finished, tiny
from tests.support.sweeps import write_report
from tests.support.workflow_tools import executed, own_sources, snakemake


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=1_000)
    runs = parser.parse_args().runs
    print("| what | computing | clock |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        source = _tiny_project(project)
        rates = ",".join(f"{1e-4 * (1 + number / runs):.8f}" for number in range(runs))
        overrides = f"overrides=sweep=none {source} train.learning_rate={rates}"
        with contextlib.chdir(project):
            with _measured(f"plan {runs:,} runs, first time"):
                planned = planner.build("smoke", None, overrides.removeprefix("overrides="))
            with _measured(f"explain {runs:,} new runs"):
                explain(planned)
            _pretend_made(project, planned)
            if runs <= 1_000:  # of ten times as many it takes ten times as long
                _compare_and_mirror(planned)
        snakemake(project, "--touch", "--config", "experiment=smoke", overrides)
        with _measured(f"a command with nothing to do, {runs:,} runs"):
            done = snakemake(project, "--config", "experiment=smoke", overrides)
        assert executed(done) == {}, "nothing was to be done"
    with tempfile.TemporaryDirectory() as folder:
        print(f"| overhead per job of a real sweep, one core | | {_overhead(Path(folder)):.2f} s |")


def _compare_and_mirror(planned: plan.Plan) -> None:
    runs = f"{len(planned.runs):,} runs"
    with _measured(f"leaderboard and page of {runs}"):
        compare(planned.comparison.config, Path(planned.leaderboard).parent)
    tracking.prepare(planned.tracking, planned.sweep)
    for what in ("first", "with nothing new"):
        with _measured(f"mirror {runs} to MLflow, {what}"):
            done, said = tracking.mirror(planned, None)
        assert done, said


@contextlib.contextmanager
def _measured(what: str) -> Iterator[None]:
    """Print a line of the table."""
    started, before = time.perf_counter(), _computed()
    yield
    print(f"| {what} | {_computed() - before:.1f} s | {time.perf_counter() - started:.1f} s |", flush=True)


def _computed() -> float:
    """Seconds of computing of this process and of those that it waited for."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _tiny_project(folder: Path) -> str:
    """A tiny model and a tiny data set in `folder`; the overrides that name them."""
    return own_sources(folder, tiny.make_tiny_model(folder / "model"), tiny.tiny_rows(150))


def _pretend_made(folder: Path, planned: plan.Plan) -> None:
    """What a thousand trainings would have left, and of the other stages only what is asked for: that it is there."""
    (folder / "real").mkdir()
    real = finished.make(folder / "real", folder / "model") / finished.PARTS["train_adapter"]
    for number, run in enumerate(planned.runs):
        share = number / len(planned.runs)
        write_report(folder / run.artefacts["evaluate_model"], 0.6 + 0.3 * share, 0.5 - 0.2 * share)
        shutil.copytree(real, folder / run.artefacts["train_adapter"], copy_function=os.link)
    for job in planned.jobs.values():
        path = folder / job.path
        if job.stage == "fetch_data":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"source": job.config["data"]["source"], "files": {}}))
            continue
        path.mkdir(parents=True, exist_ok=True)
        for name in ("provenance.json", "leaderboard.csv", "leaderboard.json", "report.html"):
            if not (path / name).exists():
                (path / name).write_text("{}")
        if job.stage == "tokenize_splits":  # which planning reads
            (path / "audit.json").write_text('{"max_length": 1, "splits": {}}')
    names, last = [run.name for run in planned.runs], planned.runs[-1].name
    ranking = {"metric": "accuracy", "order": [[name] for name in reversed(names)], "tied": [last], "chosen": last}
    (folder / planned.ranking.path / plan.RANKING).write_text(json.dumps({**ranking, "tested": [last]}))


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
