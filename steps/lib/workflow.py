"""What the Snakefile calls: the plan, and look-ups in it for rules."""

import contextlib
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from steps.lib import plan as planning
from steps.lib import tracking
from steps.lib.errors import UserError, one_line_errors, suggest
from steps.lib.keys import PACKAGE_ROOT, canonical_json

FROZEN = "TEMPER_PLAN"  # environment variable: jobs that parse the Snakefile again read this plan
STARTED = time.time()  # logs older than this command are not its failures
CONFIG_KEYS = ("experiment", "sweep", "overrides")


def load_plan(config: dict) -> planning.Plan:
    """The plan of this command: frozen once by the main process, then read by every job."""
    # Jobs run with our Python, and with the very code that the keys were made of, whatever is installed.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    with one_line_errors():
        for key in config:
            if key not in CONFIG_KEYS:
                raise UserError(
                    f'--config {key}=...: {suggest(key, CONFIG_KEYS)} (config values go into overrides="{key}=...")'
                )
        if not os.environ.get(FROZEN):
            texts = {key: _with_quotes(str(config[key])) for key in CONFIG_KEYS if config.get(key) is not None}
            os.environ[FROZEN] = str(planning.build(**texts).freeze())
        return planning.load(os.environ[FROZEN])


def _with_quotes(text: str) -> str:
    """Put back the closing quote of ``key='a b'``: Snakemake strips quotes from the ends of --config values."""
    for quote in "'\"":
        if text.replace(f"\\{quote}", "").count(quote) % 2:
            text += quote
    return text


def inputs_of(plan: planning.Plan, stage: str, prefix: str = ""):
    """Input function of a stage's rule: wildcards -> {input name: path}."""
    return lambda wildcards: plan.job(stage, prefix + wildcards.name).inputs


def config_of(plan: planning.Plan, stage: str, prefix: str = ""):
    """Params function: wildcards -> the stage's config as one JSON text.

    One text, because Snakemake compares params as a set of values: two values that swap places would go unseen.
    """
    if stage == "fetch_data":
        return lambda wildcards: canonical_json(plan.jobs[f"data/raw/{wildcards.data}/pin-{wildcards.key}.json"].config)
    return lambda wildcards: canonical_json(plan.job(stage, prefix + wildcards.name).config)


def flags_of(plan: planning.Plan, stage: str, *names: str):
    """Params function: wildcards -> the flags of inputs that only some of the stage's jobs have, as one text."""

    def flags(wildcards) -> str:
        inputs = plan.job(stage, wildcards.name).inputs
        return " ".join(f"--{name.replace('_', '-')} {shlex.quote(inputs[name])}" for name in names if name in inputs)

    return flags


def key_of(plan: planning.Plan, stage: str):
    """Params function: wildcards -> the artefact's key."""
    return lambda wildcards: plan.job(stage, wildcards.name).key


def reports(plan: planning.Plan) -> list[str]:
    """The reports that the comparison waits for."""
    return [run.artefacts["evaluate_model"] for run in plan.runs]


def complete(plan: planning.Plan, workflow):
    """Input function: the file that a whole comparison writes last.

    It goes when the comparison could not reach the tracking store, so that this command compares, and mirrors, again.
    """

    def path(_wildcards) -> str:
        file = Path(plan.complete)
        look = plan.tracking["enabled"] and not workflow.dryrun and file.is_file()
        if look and json.loads(file.read_text()).get("mirrored", True) is not True:
            file.unlink()
        return plan.complete

    return path


def threads_of(plan: planning.Plan, stage: str, prefix: str = ""):
    """Threads function of a stage's rule: what the config says (it is in the key), whatever the number of cores."""
    return lambda wildcards: plan.job(stage, prefix + wildcards.name).config["num_threads"]


def idle_cores(plan: planning.Plan, cores: int) -> str | None:
    """A line on how to use the cores that the trainings to come leave idle, if they do."""
    to_do = [job for job in plan.jobs.values() if "trunk" in job.settings and not Path(job.path).exists()]
    trunks = {job.settings["trunk"]: job.config["num_threads"] for job in to_do}
    if not trunks or sum(trunks.values()) >= cores or gpus_per_job():
        return None
    each = max(1, cores // len(trunks))
    return (
        f"note: {len(trunks)} training(s) of {max(trunks.values())} thread(s) on {cores} cores: num_threads={each} is "
        "faster (the number is part of a run, as its seed is: other last digits, another key)"
    )


def tokenizing_threads(plan: planning.Plan, cores: int | None) -> int:
    """Cores per tokenization: two, where that keeps none of the others waiting; a third finds little to do."""
    jobs = sum(job.stage == "tokenize_splits" for job in plan.jobs.values())
    return max(1, min(2, (cores or 1) // max(1, jobs)))


@functools.cache
def gpus_per_job() -> int:
    """1 where there is an NVIDIA GPU: the profile's ``resources: gpu=1`` then lets one training run at a time."""
    return int(
        shutil.which("nvidia-smi") is not None
        and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    )


# --- the workflow's handlers ---------------------------------------------------------------------


def on_start(plan: planning.Plan, cores: int | None) -> None:
    """Make the tracking store before eight jobs meet there; if it is away, nobody trains before they know."""
    if note := idle_cores(plan, cores or 1):
        print(note, file=sys.stderr)
    if not all(map(_has_report, plan.runs)):
        with one_line_errors():
            tracking.prepare(plan.tracking, plan.sweep)


def on_success(plan: planning.Plan) -> None:
    """Show what came out."""
    from steps.compare_runs import print_leaderboard

    if not (Path(plan.complete).exists() and all(map(_has_report, plan.runs))):  # --until some stage
        _mirror(plan, None, unfinished="FINISHED")
        return
    folder = Path(plan.leaderboard).parent
    print_leaderboard(folder)
    best = json.loads((folder / "leaderboard.json").read_text())["rows"][0]["run"]
    print(f"best model: {next(run.artefacts['merge_adapter'] for run in plan.runs if run.name == best)}")
    if plan.tracking["enabled"]:
        print("MLflow: make ui, then http://127.0.0.1:5000")


def on_error(plan: planning.Plan) -> None:
    """A leaderboard of the runs that did end, and one line per failed job with the end of its log."""
    _compare_what_is_there(plan)
    for job in plan.jobs.values():
        if not Path(job.path).exists() and job.log.is_file() and job.log.stat().st_mtime >= STARTED:
            print(f"failed: {job.stage} {job.log.stem}: {_end_of(job.log)}  (log: {job.log})", file=sys.stderr)


def _end_of(log: Path) -> str:
    """Why a job ended: the last line of its log, unless it was killed before it could say anything."""
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()] or ["(nothing)"]
    if lines[-1].startswith(("error: ", "interrupted")) or "Traceback (most recent call last)" in text:
        return lines[-1]
    return (
        "killed from outside: by somebody, or by the system for want of memory "
        f"(then lower train.per_device_train_batch_size, or run with fewer --cores); its last line was: {lines[-1]}"
    )


def _compare_what_is_there(plan: planning.Plan) -> None:
    """A partial leaderboard, when at least one run has its report."""
    from steps import compare_runs

    folder, board = Path(plan.leaderboard).parent, None
    if any(map(_has_report, plan.runs)):
        Path(plan.complete).unlink(missing_ok=True)
        with contextlib.suppress(UserError):  # then the comparison itself failed, and its log says why
            board = compare_runs.compare(plan.jobs[str(folder)].config, folder)
    _mirror(plan, board)
    if board:
        compare_runs.print_leaderboard(folder)


def _mirror(plan: planning.Plan, board: dict | None, **options) -> None:
    done, said = tracking.mirror(plan, board, **options)
    if done is False:
        print(said, file=sys.stderr)


def _has_report(run: planning.Run) -> bool:
    return (Path(run.artefacts["evaluate_model"]) / "metrics.json").is_file()
