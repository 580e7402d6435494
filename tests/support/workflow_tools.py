"""Run the workflow in a test as a user does, and read what it did."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

JOBS_OF_TWO = {
    "fetch_data": 1,
    "fetch_model": 1,
    "format_prompts": 1,
    "tokenize_splits": 1,
    "train_adapter": 2,
    "merge_adapter": 1,
    "evaluate_base": 2,
    "evaluate_model": 3,
    "rank_runs": 1,
    "score_rows": 1,
    "compare_runs": 1,
}  # all of a sweep of two runs, of which one is merged, judged on the test split, and lists suspicious rows
# What a dry run knows of them: the ranking will say which one.
PLANNED_OF_TWO = {**JOBS_OF_TWO, "evaluate_base": 1, "evaluate_model": 2}
del PLANNED_OF_TWO["score_rows"], PLANNED_OF_TWO["merge_adapter"]


def snakemake_command(folder: Path, project: Path = ROOT) -> list[str]:
    """Snakemake on the workflow of `project`, with data/ and results/ in `folder`.

    It says all of its jobs but why they run, for `executed` to count.
    """
    profile = project / "profiles" / "default"
    arguments = ["--quiet", "reason", "-s", project / "Snakefile", "--directory", folder, "--cores", "2"]
    arguments += ["--workflow-profile", profile]
    return [sys.executable, "-m", "snakemake", *map(str, arguments)]


def own_sources(folder: Path, model: Path, rows: list[tuple[str, str]]) -> str:
    """Write (review, sentiment) rows to `folder`; the overrides that name them and a model of one's own."""
    lines = [{"text": text, "rating": 1 if label == "positive" else -1} for text, label in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (
        f"data.name=tiny data.source.kind=files data.source.path={folder}/rows.jsonl data.format=jsonl ~data.csv "
        f"model.name=tiny model.source.kind=files model.source.path={model} model.load.dtype=float32"
    )


def environment() -> dict[str, str]:
    """Ours, less what the tests set for themselves and a user has not."""
    return {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TEMPER_PLAN")}


def snakemake(folder: Path, *arguments: str, check=True, project: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `snakemake_command` with more arguments. `check`: unless it ends well, fail and show the output."""
    whole = [*snakemake_command(folder, project), *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, env=environment(), cwd=project, check=False)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def executed(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """rule -> how many of its jobs ran (with -n: would run), less the rule that only asks."""
    return jobs_in(done.stdout + done.stderr)


def jobs_in(output: str) -> dict[str, int]:
    """As `executed`, from the text that Snakemake printed."""
    counts: dict[str, int] = {}
    for rule in re.findall(r"^\s*(?:local)?(?:rule|checkpoint) (\w+):", output, flags=re.MULTILINE):
        counts[rule] = counts.get(rule, 0) + 1
    counts.pop("all", None)
    return counts


def leaderboard(folder: Path, sweep: str) -> list[dict]:
    """The rows of a sweep's leaderboard, as text."""
    with (folder / "results" / "sweeps" / sweep / "leaderboard.csv").open() as file:
        return list(csv.DictReader(file))
