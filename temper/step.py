"""What all steps share: flags, config, lock, temporary folder, provenance.

A step is a module with a `STAGE` name, a `run(config, <inputs>, output)` and a `main()`. This module makes it a
command::

    python -m steps.train_adapter --splits DIR --model DIR --output DIR [--config FILE_OR_JSON] [key=value ...]

The config comes from ``--config`` (a YAML or JSON file, or JSON text: what the workflow passes) or,
by hand, from Hydra overrides such as ``experiment=smoke train.learning_rate=1e-3``.
"""

import argparse
import atexit
import contextlib
import gc
import inspect
import logging
import os
import sys
import time
from pathlib import Path

from temper import energy, preemption, shared_disk
from temper.devices import gpus_wanted, own_gpus
from temper.errors import NetworkError, UserError, one_line_errors, visible
from temper.folders import check_name, is_complete, locked, made_by_a_step, refuse_damaged, temporary_folder
from temper.keys import changed_keys, flat
from temper.model.threads import bound_shape_caches
from temper.provenance import write_provenance
from temper.units import seconds

log = logging.getLogger("temper")
PAUSES = (2.0, 5.0)  # seconds before a step is tried again that the network failed


def run_command(step, argv=None, work=None) -> None:
    """Run the step module as a command and exit with 0, 2 (user error) or 128 + signal.

    Args:
        step: the step's module; its `STAGE`, `run` and docstring are used. `run` takes the inputs that the stage has in
            `temper.config.stages.STAGES` as keywords; one that was left out is None.
        argv: the arguments, `sys.argv[1:]` unless given.
        work: called instead of `execute`, for a step whose output is not a folder.
    """
    spare_the_collector()
    bound_shape_caches()
    arguments = step_parser(step).parse_intermixed_args(argv)
    stage = _stage(step)
    with (
        one_line_errors(arguments.output, step.STAGE, arguments.log),
        logging_to(arguments.log),
        preemption.requeued(),
        own_gpus(_gpus(arguments)) if stage.on_gpu else contextlib.nullcontext(),  # before a library asks for GPUs
    ):
        _patiently(work or execute, step, arguments, [name.rstrip("?+") for name in stage.inputs])


def _patiently(work, *arguments) -> None:
    """Do the work, again if the network failed it; what was refused would be refused again."""
    for pause in PAUSES:
        try:
            return work(*arguments)
        except NetworkError as error:
            log.info("%s; trying again in %.0f s", error, pause)
            time.sleep(pause)
    return work(*arguments)


def _gpus(arguments) -> int:
    """How many GPUs a step wants, read without the libraries that check a config."""
    from temper.config.stages import config_given

    if arguments.plan and not (arguments.config or arguments.overrides):
        given = _planned_job(arguments.plan, arguments.output)["config"]
    elif arguments.config:
        given = config_given(arguments.config)
    else:
        words = dict(word.partition("=")[::2] for word in arguments.overrides)
        number, use_cpu = words.get("num_processes", "1"), words.get("train.use_cpu", "").lower() == "true"
        given = {"num_processes": int(number) if number.isdecimal() else 1, "train": {"use_cpu": use_cpu}}
    return gpus_wanted(given)


def spare_the_collector() -> None:
    """Keep Python's garbage collector from scanning the libraries, which takes 2.5 s. Only for our own process.

    It would scan them again and again while they load (after every 700 objects), and once more at exit.
    """
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


def _stage(step):
    from temper.config.stages import STAGES

    return STAGES[step.STAGE]


def step_parser(step) -> argparse.ArgumentParser:
    """The parser of a step's flags."""
    from temper.config.stages import flag_of

    parser = argparse.ArgumentParser(
        prog=f"python -m steps.{step.STAGE}",
        description=step.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in _stage(step).inputs.items():
        several = {"nargs": "+"} if name.endswith("+") else {}
        parser.add_argument(flag_of(name.rstrip("?+")), required=not name.endswith("?"), help=text, **several)
    output_help = getattr(step, "OUTPUT_HELP", "folder to write; must not exist, or be complete already")
    parser.add_argument("--output", required=True, help=output_help)
    parser.add_argument("--config", help="config of this stage: a YAML or JSON file, or JSON text")
    parser.add_argument(
        "--plan", help="frozen plan of the workflow; it has this output's config, settings and tracking target"
    )
    parser.add_argument("--log", help="also write the log lines to this file")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides (key=value), if --config is not given")
    return parser


class _OneLine(logging.Formatter):
    """A record as one line without control characters, whatever names and texts it holds."""

    def formatMessage(self, record) -> str:
        record.message = visible(record.message)
        return super().formatMessage(record)


@contextlib.contextmanager
def logging_to(path: str | None):
    """Log to the terminal and, when `path` is given, to that file."""
    logging.getLogger().addHandler(logging.NullHandler())  # or a library's basicConfig shows every line twice
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if path:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(path, mode="w", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--log {path}: cannot be written ({error.strerror}); name another file") from None
    for handler in handlers:
        handler.setFormatter(_OneLine("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def execute(step, arguments, names: list[str]) -> None:
    """Load the config, lock the output, run the step into a temporary folder, rename it into place."""
    from temper.config.stages import Planned

    output = _output_path(arguments.output)
    inputs = {name: _input_paths(name, getattr(arguments, name)) for name in names}
    config, settings = config_and_settings(step.STAGE, arguments)
    shared_disk.check()
    with locked(output):
        if is_complete(output):
            _refuse_other_config(output, config)
            log.info("%s is complete already: nothing to do", output)
            return
        started = time.time()
        with temporary_folder(output) as folder:
            with energy.measured(settings) as energy_facts:
                facts = _run(step, deep_merge(config, settings), inputs, folder)
            facts |= energy_facts
            facts["not_in_key"] = Planned.apart(settings)[0]
            _readable_weights(folder)
            write_provenance(folder, step.STAGE, config, _one_by_one(inputs), time.time() - started, facts)
        if hasattr(step, "finish"):
            step.finish(Planned(**Planned.apart(settings)[1]))
        log.info("%s: wrote %s in %s", step.STAGE, output, seconds(time.time() - started))


def _run(step, view: dict, inputs: dict, folder: Path) -> dict:
    """Run the step with its config as an object, and with what the planner adds, if the step takes that."""
    from temper.config.stages import Planned, typed

    sections, known = Planned.apart(view)
    asked = {"planned": Planned(**known)} if "planned" in inspect.signature(step.run).parameters else {}
    if known and not asked:
        raise UserError(f"config: {step.STAGE} takes no '{next(iter(known))}': leave it out")
    return step.run(typed(step.STAGE, sections), output=folder, **inputs, **asked) or {}


def _refuse_other_config(output: Path, config: dict) -> None:
    """Refuse a folder made with another config: by hand, its name has no key that would tell."""
    from temper.config.stages import stored_config

    if not (output / "config.yaml").is_file():
        return
    before, now = stored_config(output), flat(config)
    for key in changed_keys(before, now):
        raise UserError(
            f"--output {output}: was made with another config ({key}: {before.get(key)}, now {now.get(key)}); "
            "delete it, or name another folder"
        )


def _readable_weights(folder: Path) -> None:
    """Give files the mode of the umask; safetensors makes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o666 & ~mask)


def _input_paths(name: str, value: str | list[str] | None) -> Path | list[Path | None] | None:
    return [_input_path(name, one) for one in value] if isinstance(value, list) else _input_path(name, value)


def _one_by_one(inputs: dict) -> dict[str, Path | None]:
    """The inputs with a name for each, where a flag takes several."""
    from temper.config.stages import numbered

    found: dict[str, Path | None] = {}
    for name, value in inputs.items():
        found |= numbered(name, value) if isinstance(value, list) else {name: value}
    return found


def _input_path(name: str, value: str | None) -> Path | None:
    from temper.config.stages import flag_of, makers_of

    if value is None:
        return None
    path, flag = Path(value), flag_of(name)
    if not path.exists():
        raise UserError(f"{flag} {value}: no such file or folder; run the stage that makes it first")
    makers = makers_of(name)
    files = dict.fromkeys(file for stage in makers for file in stage.holds)
    if files and not any((path / file).is_file() for file in files):
        names = " or ".join(stage.name for stage in makers)
        raise UserError(f"{flag} {value}: not a folder of {names}: it has no {' or '.join(files)}")
    refuse_damaged(path, f"{flag} ")
    return path


def _output_path(value: str) -> Path:
    """The output folder, which must not replace a user's files.

    Raises:
        UserError: the path is taken by a file, or by a folder that no step wrote.
    """
    path = Path(value)
    if not path.name or path.name == "..":
        raise UserError(f"--output {value!r}: name a new folder")
    check_name(path, f"--output {value[:40]}...")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"--output {value}: is there already and is not a folder; name a new folder")
    if path.is_dir() and not made_by_a_step(path):
        raise UserError(f"--output {value}: has files that no step wrote; name a new folder, or move them away")
    return path


def config_and_settings(stage: str, arguments) -> tuple[dict, dict]:
    """The stage's config, and the workflow's settings that are in no key.

    Both are looked up in the plan by the name of the output, so that command lines do not grow with the sweep. A config
    on the command line takes precedence.
    """
    from temper.config.stages import load_stage_config, validated_stage

    job = _planned_job(arguments.plan, arguments.output) if arguments.plan else {}
    by_hand = arguments.config or arguments.overrides or not arguments.plan
    config = load_stage_config(stage, arguments.config, arguments.overrides) if by_hand else job["config"]
    return (config if by_hand else validated_stage(stage, config)), job.get("settings", {})


def _planned_job(plan: str, output: str) -> dict:
    """The plan's entry for this output."""
    from temper.planning.plan import job_in

    job = job_in(plan, output)
    if job is None:
        raise UserError(f"--plan {plan}: has no {output}; name the output as the plan does, or give --config")
    return job


def deep_merge(base: dict, extra: dict) -> dict:
    """The two configs as one; values of `extra` replace those of `base`."""
    merged = dict(base)
    for name, value in extra.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = deep_merge(merged[name], value) if both_dicts else value
    return merged
