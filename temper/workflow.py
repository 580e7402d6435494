"""What the Snakefile calls: the plan, and functions that look up in it what rules need."""

import atexit
import contextlib
import functools
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from temper import early, mlflow_pages, notices, other_trackers, quiet, running, shared_disk, signals, tracking
from temper.config.stages import FOLDERS, flag_words
from temper.data.workers import WORTH_READING
from temper.devices import gpus, gpus_wanted
from temper.errors import UserError, one_line_errors, suggest, visible
from temper.files import known_json, read_json
from temper.folders import PROVENANCE, is_complete, is_locked, locked, remove_leftovers
from temper.forks import start as forks
from temper.keys import PACKAGE_ROOT, python_path
from temper.logs import Log
from temper.planning import plan as planning
from temper.planning import planner
from temper.provenance import other_circumstances
from temper.reports.in_snakemake import page as page
from temper.resources import Resources as Resources

if TYPE_CHECKING:
    from temper.reports.leaderboard import Board

FROZEN = "TEMPER_PLAN"  # environment variable: jobs parse the Snakefile again, and read this plan
# What was asked for when this process froze its plan, and that plan: a search adds runs to it.
FROZEN_HERE: list[tuple[dict[str, str], planner.Growing]] = []
STARTED = time.time()  # older logs are not from this command
CONFIG_KEYS = ("experiment", "sweep", "overrides", "conf_dir")


def load_plan(config: dict, workflow) -> planning.Plan:
    """The plan of this command: frozen once by the main process, then read by every job.

    Args:
        config: Snakemake's config, from ``--config``, config files, or a workflow that has Temper as its module.
        workflow: Snakemake's own object.
    """
    is_main = Path(workflow.main_snakefile).resolve() == PACKAGE_ROOT / "Snakefile"
    asked = _as_written(config, workflow.config_settings.config_args if is_main else [])
    # Jobs run with our Python and the code that the keys were computed from, whatever is installed.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = python_path()
    with one_line_errors():
        for key in config if is_main else ():  # in another workflow, the other keys belong to that
            if key not in CONFIG_KEYS:
                raise UserError(
                    f'--config {key}=...: {suggest(key, CONFIG_KEYS)} (config values go into overrides="{key}=...")'
                )
        if workflow.storage_settings.default_storage_provider:
            raise UserError(
                "--default-storage-provider: results are folders on a disk, which appear by one rename: leave it out, "
                "and send them by temper push (docs/storage.md)"
            )
        if not os.environ.get(FROZEN):
            growing = planner.growing(**asked)
            FROZEN_HERE.append((asked, growing))
            _freeze(growing.plan)
            for path, wrong in growing.plan.damaged().items():
                print(f"{path} is not whole ({wrong}): it is made again", file=sys.stderr)
            return growing.plan
        if any(before != asked for before, _ in FROZEN_HERE):
            raise UserError("a workflow can hold one sweep as its module: run the other one by a command of its own")
        return planning.load(os.environ[FROZEN])


def _as_written(config: dict, arguments: list[str]) -> dict[str, str]:
    """The values of `CONFIG_KEYS`.

    Snakemake strips all quotes from the ends of ``--config`` values and reads the rest as YAML, which drops a comment
    (``key='a # b'``) and turns ``key='a: b'`` into a mapping. So the values are taken from the arguments.
    """
    texts = {key: str(config[key]) for key in CONFIG_KEYS if config.get(key) is not None}
    for argument in arguments:
        key, _, text = argument.partition("=")
        if key in texts:
            texts[key] = _without_quotes(text)
    return texts


def _without_quotes(text: str) -> str:
    """A value without quotes around the whole, as in a profile: ``overrides="a=1 b=2"``."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def inputs(plan: planning.Plan, workflow):
    """The function by which rules name their inputs: (stage, input's name) -> input function of the rule.

    It gives nothing for a job without such an input. Snakemake considers an existing folder made, so this reports
    incomplete ones to it, whatever the target.
    """

    @functools.cache
    def job_of(stage: str, name: str) -> planning.Job:
        """Check a folder once, however many inputs it has."""
        job = plan.job(stage, name)
        if Path(job.path).exists() and not plan.is_made(job):
            workflow.dag.forcefiles.add(job.path)
        return job

    def named(stage: str, name: str):
        return lambda wildcards: job_of(stage, wildcards.name).inputs.get(name, [])

    return named


def one_of(names: list[str]) -> str:
    """A pattern for wildcards that matches only these names."""
    return "|".join(map(re.escape, names))


def none_of(names: list[str]) -> str:
    """A pattern for wildcards that matches any name but these."""
    return f"(?!({one_of(names)})$)[^/]+"


def flags_of(plan: planning.Plan, stage: str, *names: str):
    """Params function: wildcards -> the flags of a stage's optional inputs, as one text."""

    def flags(wildcards) -> str:
        inputs = plan.job(stage, wildcards.name).inputs
        return shlex.join(flag_words({name: inputs[name] for name in names if name in inputs}))

    return flags


def numbered_inputs(plan: planning.Plan, stage: str, path_of):
    """Input function: all inputs of a stage whose flag takes several. `path_of`: see `inputs`."""

    def inputs(wildcards) -> list[str]:
        path_of(stage, "")(wildcards)  # looking it up is what finds an incomplete folder
        return list(plan.job(stage, wildcards.name).inputs.values())

    return inputs


def ranked_reports(plan: planning.Plan, path_of):
    """Input function: the reports by which runs are ranked. `path_of`: see `inputs`."""

    def inputs(wildcards) -> list[str]:
        path_of("rank_runs", "reports")(wildcards)  # looking it up is what finds an incomplete folder
        return list(plan.job("rank_runs", wildcards.name).inputs.values())

    return inputs


def compared(plan: planning.Plan, workflow, checkpoints):
    """Input function: what the comparison waits for. That is the ranking, then, of a search, that of the next round,
    and so on; at last all reports, those on the test split that the ranking asks for, and parts of the chosen run.

    The comparison's folder may exist from another plan, and Snakemake would consider it made.
    """

    def inputs(_wildcards) -> list[str]:
        file = Path(plan.complete)
        if file.is_file() and not _is_of(plan, file):
            workflow.dag.forcefiles.add(plan.complete)
        _grow(plan, checkpoints)
        return [*(run.artefacts["evaluate_model"] for run in plan.runs), *plan.asked_by_ranking()]

    return inputs


def _grow(plan: planning.Plan, checkpoints) -> None:
    """Add the rounds of a search that its rankings ask for; Snakemake makes the ranking that is not there yet."""
    while True:
        checkpoints.rank_runs.get(name=Path(plan.ranking.path).name)
        before = len(plan.runs)
        with one_line_errors():
            if not any(growing.plan is plan and growing.goes_on() for _, growing in FROZEN_HERE):
                return
            _freeze(plan)
        later = f", and then by their ranking {plan.later}" if plan.later else ""
        print(f"ranked: the search goes on with {len(plan.runs) - before} run(s){later}", file=sys.stderr)


def _freeze(plan: planning.Plan) -> None:
    """Write the plan for the jobs that are started from now on."""
    plan.path = None
    plan.path = os.environ[FROZEN] = str(plan.freeze())


def complete(plan: planning.Plan, workflow):
    """Input function: the file that a complete comparison writes last.

    It is removed if the comparison could not reach the tracking store, so that this command compares and mirrors again.
    It is also removed if it belongs to another plan, so that an old result never passes for the new one, and if the
    chosen run did not keep a bound of eval.gate, so that the same command ends in the same way.
    """

    def path(_wildcards) -> str:
        file = Path(plan.complete)
        if not workflow.dryrun and file.is_file() and not _is_of(plan, file):
            file.unlink()
        return plan.complete

    return path


def _is_of(plan: planning.Plan, file: Path) -> bool:
    """Whether a sweep's provenance belongs to this plan's comparison, which has nothing left to do or to say."""
    try:
        recorded = read_json(file)
    except UserError:
        return False
    mirrored = not plan.tracking["enabled"] or recorded.get("mirrored", True) is True
    if recorded.get("gate"):  # bounds that were not kept: compared again, this command ends as the one before
        return False
    mirrored = mirrored and other_trackers.has_all(plan)
    of_others = "inputs" in recorded and recorded["inputs"] != plan.comparison.inputs
    return mirrored and not of_others and ("key" not in recorded or recorded["key"] == plan.comparison.key)


def threads_of(plan: planning.Plan, stage: str):
    """Threads function of a stage's rule: the config's number, which is in the key, whatever the number of cores."""
    return lambda wildcards: plan.job(stage, wildcards.name).threads


def report_priority(plan: planning.Plan, stage: str, workflow):
    """Priority function of the rules from a training to its report: the first reports go before further trainings.

    These are those of the first half of the runs. The others wait for all trainings, and fill the cores that the last
    of them leave idle, two for each core at least; without that, a sweep would take up to a sixth longer.
    """
    first, others = (1.5, 1) if stage == "train_adapter" else (2, 0)

    @functools.cache
    def early_ones(count: int) -> set[str]:
        """Of so many runs; a search adds some."""
        names, at_once = set(), workflow.cores if workflow.local_exec else workflow.nodes
        for run in plan.runs[: max(1, min(count // 2, count - 2 * at_once))]:
            path = run.artefacts.get(stage)
            while path:
                names.add(Path(path).name)
                path = plan.jobs[path].inputs.get("previous")  # of a training: the epoch before
        return names

    return lambda wildcards: first if wildcards.name in early_ones(len(plan.runs)) else others


def idle_cores(plan: planning.Plan, cores: int) -> str | None:
    """Suggest how to use cores that the coming trainings would leave idle."""
    to_do = [job for job in plan.jobs.values() if "trunk" in job.settings and not plan.is_made(job)]
    trunks = {job.settings["trunk"]: job.threads for job in to_do if job.processes == 1}
    if not trunks or sum(trunks.values()) >= cores or has_gpus():
        return None
    each = max(1, cores // len(trunks))
    return (
        f"note: {len(trunks)} training(s) of {max(trunks.values())} thread(s) on {cores} cores: num_threads={each} is "
        "faster (the number is part of a run, as its seed is: other last digits, another key)"
    )


def tokenizing_threads(plan: planning.Plan, workflow) -> int:
    """Cores per tokenization: all, shared by those of the plan. It uses as many as its rows are worth.

    Of a cluster nobody knows how many that are: one, unless Snakemake's ``set-threads`` says more.
    """
    jobs = sum(job.stage == "tokenize_splits" for job in plan.jobs.values())
    return max(1, workflow.cores // max(1, jobs)) if workflow.local_exec else 1


def reading_threads(plan: planning.Plan, stage: str, workflow):
    """Threads function of a stage that reads rows in several processes: as many as the files that are there are worth.

    On a cluster one, unless ``set-threads`` says more: it runs beside the main process, of whose machine others use.
    """

    def threads(wildcards) -> int:
        size = planner.bytes_to_read(plan, plan.job(stage, wildcards.name))
        return max(1, min(workflow.cores, size // WORTH_READING)) if workflow.local_exec else 1

    return threads


@functools.cache
def has_gpus() -> bool:
    """Whether this machine has a GPU: the profile's ``resources: gpu=1`` then allows one training at a time."""
    return bool(gpus())


def gpus_of(plan: planning.Plan, stage: str):
    """Resources function of a stage's rule: how many GPUs a job takes, if there are any."""
    return lambda wildcards: gpus_wanted(plan.job(stage, wildcards.name).config) if has_gpus() else 0


# --- the workflow's handlers ---------------------------------------------------------------------

PAGES: list[early.Pages] = []  # what keeps the sweep's page up to date, from the start of the first job on
HELD = contextlib.ExitStack()  # locks that jobs on other nodes, and `temper status`, look for until this process ends
atexit.register(HELD.close)
ASKED_TO_END: list[int] = []  # the signal that ended the workflow, if any
COMPUTED = ("sample_answers", "reference_logprobs", "train_adapter", "merge_adapter", "evaluate_model")
PATIENCE = 30.0  # seconds that jobs get to clean up


def on_start(plan: planning.Plan, workflow) -> None:
    """Make the tracking store before several jobs use it. If it is unreachable, stop before any training."""
    idle = idle_cores(plan, workflow.cores) if workflow.local_exec else None
    for note in [idle, *made_otherwise(plan)]:
        if note:
            print(note, file=sys.stderr)
    with one_line_errors():
        _remove_leftovers()
        _ready_probe(plan)
        if not all(map(_has_report, plan.runs)):
            shown = mlflow_pages.shown_of(plan) if plan.tracking["enabled"] else None
            _say_link(tracking.prepare(plan.tracking, plan.sweep, shown), sys.stderr)
    quiet.a_line_for_each_job(workflow.output_settings)
    HELD.enter_context(running.marked(plan.sweep))
    PAGES.append(early.Pages(plan, lambda: os.environ[FROZEN]))
    if not workflow.local_exec:  # Snakemake cancels a cluster's jobs
        HELD.enter_context(shared_disk.held(planning.PLANS))
    else:
        if not has_gpus():  # what has asked for the GPU cannot be forked, and libraries do when they are imported
            forks.start(_threads_of_coming(workflow), plan.tracking["enabled"])
        signals.on_ending(lambda number: _end_jobs(number, workflow.scheduler), _end_at_once)


def _threads_of_coming(workflow) -> list[int]:
    """Threads of each coming job whose step may be a fork; after a checkpoint there may be more."""
    coming = [job for job in workflow.dag.needrun_jobs() if "run steps." in (job.rule.shellcmd or "")]
    return [job.threads for job in coming]


def made_otherwise(plan: planning.Plan) -> list[str]:
    """What is to be said of folders that are reused: with which other packages, or where, they were made."""
    counts: dict[str, int] = {}
    for job in plan.jobs.values():
        found = other_circumstances(known_json(Path(job.path) / PROVENANCE)) if job.stage in COMPUTED else []
        if found and plan.is_made(job):
            for what in found:
                counts[what] = counts.get(what, 0) + 1
    return [
        f"note: of {count} folder(s) that are reused, each {what}: the last digits of new ones may differ "
        "(temper verify makes folders again and compares)"
        for what, count in counts.items()
    ]


def _ready_probe(plan: planning.Plan) -> None:
    """Fetch and read the probe, so that a fault in it is told before any training, which does not wait for it."""
    waiting = [job for job in plan.jobs.values() if "probe" in job.inputs and not plan.is_made(job)]
    if not waiting:
        return
    from steps import fetch_data
    from temper.evaluation import forgetting

    pin = Path(waiting[0].inputs["probe"])
    with forgetting.told_of_probe():
        fetch_data.fetch(plan.jobs[str(pin)].config["data"]["source"], pin)
    forgetting.read_passages(pin, waiting[0].config["probe"])


def _remove_leftovers() -> None:
    for folder in FOLDERS.values():
        remove_leftovers(planning.RESULTS / folder)


def _end_jobs(number: int, scheduler) -> None:
    """End all jobs and start no others; Snakemake itself would wait for the running ones.

    In a thread, because the code that the signal interrupted may hold the scheduler's lock.
    """
    ASKED_TO_END.append(number)
    logging.getLogger("snakemake").setLevel(logging.CRITICAL)  # do not report jobs that end now
    logging.getLogger("snakemake.logging").setLevel(logging.CRITICAL)

    def tell() -> None:
        scheduler.exit_gracefully()
        told: set[int] = set()
        again = time.monotonic() + PATIENCE
        while True:  # a job may just be starting
            if time.monotonic() > again:  # the second signal ends a step at once
                told, again = set(), time.monotonic() + PATIENCE
            told |= _signal(signal.SIGTERM, told)
            time.sleep(0.1)

    threading.Thread(target=tell, daemon=True).start()


def _end_at_once(number: int) -> None:
    _signal(signal.SIGKILL, set())
    print("interrupted again: all jobs were killed; run the same command again", file=sys.stderr, flush=True)
    os._exit(128 + number)


def _signal(number: int, but: set[int]) -> set[int]:
    """Send a signal to all child processes except some; returns those that got it."""
    import psutil

    sent = set()
    for process in psutil.Process().children(recursive=True):
        if process.pid not in but:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
                sent.add(process.pid)
    return sent


def on_success(plan: planning.Plan) -> None:
    """Show the results, and end with 1 where they do not keep the bounds of eval.gate."""
    from temper.reports.leaderboard import end_at_gate, leaderboard_text, read_board

    _stop_pages()
    if not (Path(plan.complete).exists() and all(map(_has_report, plan.runs))):  # with --until <stage>
        _mirror(plan, None, unfinished="FINISHED")
        return
    with one_line_errors():
        folder = Path(plan.leaderboard).parent
        for _, growing in FROZEN_HERE:
            growing.write_study(folder / "study.db")
        board = read_board(folder)
        print(leaderboard_text(board, folder))
        best = next(run for run in plan.runs if run.name == board.chosen)
        print(best_model(best))
        _cut_checkpoints(plan)
        link = known_json(Path(plan.complete)).get("mlflow")
        _say_link(link, sys.stdout)
        if PAGES:  # jobs ran
            notices.tell(plan, notices.FINISHED, board, link)
        end_at_gate(board)


def _say_link(link: str | None, to) -> None:
    """Where a browser shows the sweep's runs, if anywhere."""
    if link:
        first = "make ui, then " if link.startswith(mlflow_pages.OWN_SERVER) else ""
        print(f"MLflow: {first}{link}", file=to)


def _cut_checkpoints(plan: planning.Plan) -> None:
    """Delete the states of trainings that none is kept of (keep.checkpoints), unless another command uses them."""
    from temper.training import checkpoints

    if any(run.config["keep"]["checkpoints"] != "none" for run in plan.runs):
        return
    for trunk in sorted({job.settings["trunk"] for job in plan.jobs.values() if "trunk" in job.settings}):
        state = planning.STATE / trunk
        if state.is_dir() and not is_locked(state):
            with locked(state):
                checkpoints.cut(state, "none")


def best_model(run: planning.PlannedRun) -> str:
    """Where the chosen run's model is, in a line."""
    if is_complete(Path(run.artefacts["merge_adapter"])):
        return f"best model: {run.artefacts['merge_adapter']}"
    return f"best model: {run.artefacts['train_adapter']} (one folder with its base: temper merge --run {run.name})"


def on_error(plan: planning.Plan) -> None:
    """Show a leaderboard of the finished runs, and one line per failed job with the end of its log."""
    _stop_pages()
    if ASKED_TO_END:
        _end_as_asked(plan)
    with one_line_errors():
        board, failed = _compare_what_is_there(plan), 0
        for job in plan.jobs.values():
            if not plan.is_made(job) and job.log.is_file() and job.log.stat().st_mtime >= STARTED:
                end, failed = visible(Log(job.log).end), failed + 1
                print(f"failed: {job.stage} {job.log.stem}: {end}  (log: {job.log})", file=sys.stderr)
        notices.tell(plan, notices.FAILED, board, failed=failed)


def _stop_pages() -> None:
    for pages in PAGES:
        pages.stop()


def _end_as_asked(plan: planning.Plan) -> None:
    """Clean up the tracking store and the disk, and end with the signal's exit code."""
    number = ASKED_TO_END[0]
    _mirror(plan, None, unfinished="KILLED")
    _remove_leftovers()
    notices.tell(plan, notices.INTERRUPTED, None)
    name = signal.Signals(number).name
    print(f"interrupted ({name}): run the same command again, and it goes on from what is whole", file=sys.stderr)
    sys.exit(128 + number)


def _compare_what_is_there(plan: planning.Plan) -> "Board | None":
    """Make a partial leaderboard, if at least one run has its report, and return it."""
    from steps import compare_runs
    from temper.reports import leaderboard

    folder, board = Path(plan.leaderboard).parent, None
    if any(map(_has_report, plan.runs)):
        with contextlib.suppress(UserError, OSError):  # otherwise the comparison itself failed, and its log says why
            Path(plan.complete).unlink(missing_ok=True)
            board = compare_runs.compare(plan.comparison.config, folder)
    _mirror(plan, board)
    if board:
        leaderboard.print_leaderboard(folder)
    return board


def _mirror(plan: planning.Plan, board: "Board | None", **options) -> None:
    done, said = tracking.mirror(plan, board, **options)
    if done is False:
        print(said, file=sys.stderr)


def _has_report(run: planning.PlannedRun) -> bool:
    return is_complete(Path(run.artefacts["evaluate_model"]))
