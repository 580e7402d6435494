"""What the Snakefile calls: the plan, and look-ups in it for rules."""

import contextlib
import functools
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from temper import signals, tracking
from temper.config.stages import FOLDERS
from temper.errors import UserError, one_line_errors, suggest, visible
from temper.files import read_json
from temper.folders import is_complete, remove_leftovers
from temper.keys import PACKAGE_ROOT
from temper.planning import plan as planning
from temper.planning import planner

if TYPE_CHECKING:
    from temper.reports.leaderboard import Board

FROZEN = "TEMPER_PLAN"  # environment variable: jobs that parse the Snakefile again read this plan
FROZEN_HERE: list[dict[str, str]] = []  # what was asked for when this process froze its plan
STARTED = time.time()  # logs older than this command are not its failures
CONFIG_KEYS = ("experiment", "sweep", "overrides", "conf_dir")


def load_plan(config: dict, workflow) -> planning.Plan:
    """The plan of this command: frozen once by the main process, then read by every job.

    Args:
        config: what Snakemake made of ``--config`` and of config files, or a workflow gave us as its module.
        workflow: Snakemake's own object.
    """
    is_main = Path(workflow.main_snakefile).resolve() == PACKAGE_ROOT / "Snakefile"
    asked = _as_written(config, workflow.config_settings.config_args if is_main else [])
    # Jobs run with our Python, and with the very code that the keys were made of, whatever is installed.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
    with one_line_errors():
        for key in config if is_main else ():  # of another workflow, the others are that one's
            if key not in CONFIG_KEYS:
                raise UserError(
                    f'--config {key}=...: {suggest(key, CONFIG_KEYS)} (config values go into overrides="{key}=...")'
                )
        if not os.environ.get(FROZEN):
            plan = planner.build(**asked)
            FROZEN_HERE.append(asked)
            os.environ[FROZEN] = str(plan.freeze())
            for path, wrong in plan.damaged().items():
                print(f"{path} is not whole ({wrong}): it is made again", file=sys.stderr)
        elif FROZEN_HERE and asked not in FROZEN_HERE:
            raise UserError("a workflow can hold one sweep as its module: run the other one by a command of its own")
        return planning.load(os.environ[FROZEN])


def _as_written(config: dict, arguments: list[str]) -> dict[str, str]:
    """The values of `CONFIG_KEYS`.

    Snakemake strips all quotes from the ends of ``--config`` values and reads the rest as YAML, which drops what looks
    like a comment (``key='a # b'``) and makes a mapping of ``key='a: b'``. So they are taken from the arguments.
    """
    texts = {key: str(config[key]) for key in CONFIG_KEYS if config.get(key) is not None}
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key in texts:
            texts[key] = _without_quotes(text)
    return texts


def _without_quotes(text: str) -> str:
    """A value without the quotes around all of it, which a profile may have: ``overrides="a=1 b=2"``."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def inputs(plan: planning.Plan, workflow):
    """What rules name their inputs with: (stage, input's name) -> input function of the rule.

    It gives nothing for a job that has no such input. Snakemake takes a folder that is there for made; it hears here of
    one that is not whole, whatever was asked for.
    """

    @functools.cache
    def job_of(stage: str, name: str) -> planning.Job:
        """Looked at once, however many inputs it has."""
        job = plan.job(stage, name)
        if Path(job.path).exists() and not plan.is_made(job):
            workflow.dag.forcefiles.add(job.path)
        return job

    def named(stage: str, name: str):
        return lambda wildcards: job_of(stage, wildcards.name).inputs.get(name, [])

    return named


def one_of(names: list[str]) -> str:
    """A pattern for wildcards that takes just these names."""
    return "|".join(map(re.escape, names))


def none_of(names: list[str]) -> str:
    """A pattern for wildcards that takes any name but these."""
    return f"(?!({one_of(names)})$)[^/]+"


def flags_of(plan: planning.Plan, stage: str, *names: str):
    """Params function: wildcards -> the flags of inputs that only some of the stage's jobs have, as one text."""

    def flags(wildcards) -> str:
        inputs = plan.job(stage, wildcards.name).inputs
        return " ".join(f"--{name.replace('_', '-')} {shlex.quote(inputs[name])}" for name in names if name in inputs)

    return flags


def reports(plan: planning.Plan, workflow):
    """Input function: the reports that the comparison waits for.

    Its folder may be there from another plan, for which Snakemake would take it for made.
    """

    def inputs(_wildcards) -> list[str]:
        file = Path(plan.complete)
        if file.is_file() and not _is_of(plan, file):
            workflow.dag.forcefiles.add(plan.complete)
        return [run.artefacts["evaluate_model"] for run in plan.runs]

    return inputs


def complete(plan: planning.Plan, workflow):
    """Input function: the file that a whole comparison writes last.

    It goes when the comparison could not reach the tracking store, so that this command compares, and mirrors, again.
    It also goes when it is that of another plan: should a rule then not apply, nothing old hides it.
    """

    def path(_wildcards) -> str:
        file = Path(plan.complete)
        if not workflow.dryrun and file.is_file() and not _is_of(plan, file):
            file.unlink()
        return plan.complete

    return path


def _is_of(plan: planning.Plan, file: Path) -> bool:
    """Whether a sweep's provenance is that of this plan's comparison, with all of it in the tracking store."""
    try:
        recorded = read_json(file)
    except UserError:
        return False
    mirrored = not plan.tracking["enabled"] or recorded.get("mirrored", True) is True
    of_others = "inputs" in recorded and recorded["inputs"] != plan.comparison.inputs
    return mirrored and not of_others and ("key" not in recorded or recorded["key"] == plan.comparison.key)


def threads_of(plan: planning.Plan, stage: str):
    """Threads function of a stage's rule: what the config says (it is in the key), whatever the number of cores."""
    return lambda wildcards: plan.job(stage, wildcards.name).config["num_threads"]


def idle_cores(plan: planning.Plan, cores: int) -> str | None:
    """A line on how to use the cores that the trainings to come leave idle, if they do."""
    to_do = [job for job in plan.jobs.values() if "trunk" in job.settings and not plan.is_made(job)]
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

ASKED_TO_END: list[int] = []  # the signal that did, if any
PATIENCE = 30.0  # seconds that jobs get to leave everything in order


def on_start(plan: planning.Plan, workflow) -> None:
    """Make the tracking store before eight jobs meet there; if it is away, nobody trains before they know."""
    if note := idle_cores(plan, workflow.cores or 1):
        print(note, file=sys.stderr)
    with one_line_errors():
        _remove_leftovers()
        if not all(map(_has_report, plan.runs)):
            tracking.prepare(plan.tracking, plan.sweep)
    if workflow.local_exec:  # a cluster's jobs are Snakemake's to cancel
        signals.on_ending(lambda number: _end_jobs(number, workflow.scheduler), _end_at_once)


def _remove_leftovers() -> None:
    for folder in FOLDERS.values():
        remove_leftovers(planning.RESULTS / folder)


def _end_jobs(number: int, scheduler) -> None:
    """Tell all jobs to end, and start no others; Snakemake itself would wait for those that run.

    In a thread: the scheduler's lock may be held by the very code that the signal interrupted.
    """
    ASKED_TO_END.append(number)
    logging.getLogger("snakemake").setLevel(logging.CRITICAL)  # jobs that end now are no news
    logging.getLogger("snakemake.logging").setLevel(logging.CRITICAL)

    def tell() -> None:
        scheduler.exit_gracefully()
        told: set[int] = set()
        again = time.monotonic() + PATIENCE
        while True:  # one may be starting just now
            if time.monotonic() > again:  # then a step ends at once
                told, again = set(), time.monotonic() + PATIENCE
            told |= _signal(signal.SIGTERM, told)
            time.sleep(0.1)

    threading.Thread(target=tell, daemon=True).start()


def _end_at_once(number: int) -> None:
    _signal(signal.SIGKILL, set())
    print("interrupted again: all jobs were killed; run the same command again", file=sys.stderr, flush=True)
    os._exit(128 + number)


def _signal(number: int, but: set[int]) -> set[int]:
    """Send a signal to all processes that this one started, less some; returns which got it."""
    import psutil

    sent = set()
    for process in psutil.Process().children(recursive=True):
        if process.pid not in but:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
                sent.add(process.pid)
    return sent


def on_success(plan: planning.Plan) -> None:
    """Show what came out."""
    from temper.reports.leaderboard import print_leaderboard, read_board

    if not (Path(plan.complete).exists() and all(map(_has_report, plan.runs))):  # --until some stage
        _mirror(plan, None, unfinished="FINISHED")
        return
    with one_line_errors():
        folder = Path(plan.leaderboard).parent
        print_leaderboard(folder)
        best = read_board(folder).rows[0]["run"]
        print(f"best model: {next(run.artefacts['merge_adapter'] for run in plan.runs if run.name == best)}")
        if plan.tracking["enabled"]:
            print("MLflow: make ui, then http://127.0.0.1:5000")


def on_error(plan: planning.Plan) -> None:
    """A leaderboard of the runs that did end, and one line per failed job with the end of its log."""
    if ASKED_TO_END:
        _end_as_asked(plan)
    with one_line_errors():
        _compare_what_is_there(plan)
        for job in plan.jobs.values():
            if not plan.is_made(job) and job.log.is_file() and job.log.stat().st_mtime >= STARTED:
                end = visible(_end_of(job.log))
                print(f"failed: {job.stage} {job.log.stem}: {end}  (log: {job.log})", file=sys.stderr)


def _end_as_asked(plan: planning.Plan) -> None:
    """Leave the tracking store and the disk as they should be, and end with the signal's exit code."""
    number = ASKED_TO_END[0]
    _mirror(plan, None, unfinished="KILLED")
    _remove_leftovers()
    name = signal.Signals(number).name
    print(f"interrupted ({name}): run the same command again, and it goes on from what is whole", file=sys.stderr)
    sys.exit(128 + number)


def _end_of(log: Path) -> str:
    """Why a job ended: the last line of its log, unless it was killed before it could say anything."""
    text = log.read_text(encoding="utf-8", errors="replace")
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
    from temper.reports import leaderboard

    folder, board = Path(plan.leaderboard).parent, None
    if any(map(_has_report, plan.runs)):
        with contextlib.suppress(UserError, OSError):  # then the comparison itself failed, and its log says why
            Path(plan.complete).unlink(missing_ok=True)
            board = compare_runs.compare(plan.comparison.config, folder)
    _mirror(plan, board)
    if board:
        leaderboard.print_leaderboard(folder)


def _mirror(plan: planning.Plan, board: "Board | None", **options) -> None:
    done, said = tracking.mirror(plan, board, **options)
    if done is False:
        print(said, file=sys.stderr)


def _has_report(run: planning.PlannedRun) -> bool:
    return is_complete(Path(run.artefacts["evaluate_model"]))
