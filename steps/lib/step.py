"""What all steps share: flags, config, lock, temporary folder, provenance.

A step is a module with a `STAGE` name, a `run(config, <inputs>, output)` and a `main()`. This
module turns that into a command::

    python -m steps.train_adapter --splits DIR --model DIR --output DIR [--config FILE_OR_JSON] [key=value ...]

The config comes from ``--config`` (a YAML or JSON file, or JSON text: what the workflow passes) or,
by hand, from Hydra overrides such as ``experiment=smoke train.learning_rate=1e-3``.
"""

import argparse
import atexit
import contextlib
import gc
import importlib.metadata
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from steps.lib.errors import UserError, one_line_errors, visible
from steps.lib.files import read_json
from steps.lib.folders import (
    PROVENANCE,
    check_name,
    is_complete,
    locked,
    made_by_a_step,
    refuse_damaged,
    sizes,
    temporary_folder,
)
from steps.lib.keys import changed_keys, code_hashes, flat
from steps.lib.secrets import redacted

log = logging.getLogger("temper")

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "tokenizers",
    "mlflow",
    "hydra-core",
    "snakemake",
)


def run_command(step, inputs: dict[str, str], argv=None, work=None) -> None:
    """Run the step module as a command and exit the process with 0, 2 (user error) or as a signal asked it to.

    Args:
        step: the step's module; its `STAGE`, `run` and docstring are used.
        inputs: flag name -> help text, one per input that `run` takes as a keyword. A name that
            ends in ``?`` may be left out; `run` then gets None.
        argv: the arguments, `sys.argv[1:]` unless given.
        work: what to call in place of `execute`, for a step whose output is no folder.
    """
    arguments = _parser(step, inputs).parse_intermixed_args(argv)
    spare_the_collector()
    bound_shape_caches()
    with one_line_errors(arguments.output, step.STAGE, arguments.log), logging_to(arguments.log):
        (work or execute)(step, arguments, [name.rstrip("?") for name in inputs])


def spare_the_collector() -> None:
    """Keep Python's garbage collector from walking through the libraries, in a process of our own: 2.5 s of each.

    While they load it would do so again and again (after every 700 objects), and at the end once more.
    """
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


SHAPES = 128  # products of one training step differ in some 30 shapes


def bound_shape_caches() -> None:
    """Keep oneDNN, in a process of our own, from hoarding the code it made for each shape of a product: a gigabyte.

    It and its wrapper keep 1,024 shapes each, at half a megabyte and more, and most are never met again: no two batches
    have as many tokens. Both look at the environment when the first product is computed.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(SHAPES))


@contextlib.contextmanager
def computing_threads(count: int):
    """Let torch compute with so many threads: sums are cut by their number, so that results depend on it.

    What the environment says (OMP_NUM_THREADS, Snakemake's threads) makes no difference then.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parser(step, inputs: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m steps.{step.STAGE}",
        description=step.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in inputs.items():
        flag = "--" + name.rstrip("?").replace("_", "-")
        parser.add_argument(flag, required=not name.endswith("?"), help=text)
    output_help = getattr(step, "OUTPUT_HELP", "folder to write; must not exist, or be complete already")
    parser.add_argument("--output", required=True, help=output_help)
    parser.add_argument("--config", help="config of this stage: a YAML or JSON file, or JSON text")
    parser.add_argument("--plan", help="frozen plan of the workflow: this output's config, settings, tracking targets")
    parser.add_argument("--log", help="also write the log lines to this file")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides (key=value), when there is no --config")
    return parser


class _OneLine(logging.Formatter):
    """A record as one line that steers no terminal, whatever the names and texts in it."""

    def formatMessage(self, record) -> str:
        record.message = visible(record.message)
        return super().formatMessage(record)


@contextlib.contextmanager
def logging_to(path: str | None):
    """Log to the terminal and, when `path` is given, to that file."""
    logging.getLogger().addHandler(logging.NullHandler())  # or a library's basicConfig shows every line twice
    handlers = [logging.StreamHandler(sys.stderr)]
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
    output = _output_path(arguments.output)
    inputs = {name: _input_path(name, getattr(arguments, name)) for name in names}
    config, settings = config_and_settings(step.STAGE, arguments)
    with locked(output):
        if is_complete(output):
            _refuse_other_config(output, config)
            log.info("%s is complete already: nothing to do", output)
            return
        started = time.time()
        with temporary_folder(output) as folder:
            facts = step.run(_deep_merge(config, settings), output=folder, **inputs) or {}
            _readable_weights(folder)
            write_provenance(folder, step.STAGE, config, inputs, time.time() - started, facts)
        log.info("%s: wrote %s in %.0f s", step.STAGE, output, time.time() - started)


def _refuse_other_config(output: Path, config: dict) -> None:
    """By hand, a folder has no key in its name: one made with another config must not pass for this one."""
    from steps.lib.config import stored_config

    if not (output / "config.yaml").is_file():
        return
    before, now = stored_config(output), flat(config)
    for key in changed_keys(before, now):
        raise UserError(
            f"--output {output}: was made with another config ({key}: {before.get(key)}, now {now.get(key)}); "
            "delete it, or name another folder"
        )


def _readable_weights(folder: Path) -> None:
    """safetensors makes files that only their owner can read; give them the mode of others, which are the umask's."""
    mask = os.umask(0)
    os.umask(mask)
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o666 & ~mask)


# What a folder must hold to be what a flag asks for, and the stages that make such a folder.
MARKERS = {
    "prompts": (("train.jsonl",), "format_prompts"),
    "splits": (("dataset_dict.json",), "tokenize_splits"),
    "model": (("config.json", "diverged.json"), "fetch_model or merge_adapter"),
    "references": (("references.json",), "reference_logprobs"),
    "adapter": (("training.json",), "train_adapter"),
    "base_report": (("metrics.json",), "evaluate_model"),
    "start_report": (("metrics.json",), "evaluate_model"),
}


def _input_path(name: str, value: str | None) -> Path | None:
    if value is None:
        return None
    path, flag = Path(value), "--" + name.replace("_", "-")
    if not path.exists():
        raise UserError(f"{flag} {value}: no such file or folder; run the stage that makes it first")
    files, stage = MARKERS.get(name, ((), ""))
    if files and not any((path / file).is_file() for file in files):
        raise UserError(f"{flag} {value}: not a folder of {stage}: it has no {' or '.join(files)}")
    refuse_damaged(path, f"{flag} ")
    return path


def _output_path(value: str) -> Path:
    """The output folder; nobody's files are ever replaced by it.

    Raises:
        UserError: the path is taken by a file, or by a folder that no step wrote.
    """
    path = Path(value)
    if not path.name or path.name == "..":
        raise UserError(f"--output {value!r}: name a new folder")
    check_name(path, f"--output {value[:40]}...")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"--output {value}: is there already and is no folder; name a new folder")
    if path.is_dir() and not made_by_a_step(path):
        raise UserError(f"--output {value}: has files that no step wrote; name a new folder, or move them away")
    return path


def config_and_settings(stage: str, arguments) -> tuple[dict, dict]:
    """The stage's config, and what the workflow knows beside it that is in no key.

    Both are the plan's, by the name of the output, so that no command line grows with a sweep. A config that is
    given on the command line counts before the plan's.
    """
    from steps.lib.config import load_stage_config, validated_stage

    job = _planned_job(arguments.plan, arguments.output) if arguments.plan else {}
    by_hand = arguments.config or arguments.overrides or not arguments.plan
    config = load_stage_config(stage, arguments.config, arguments.overrides) if by_hand else job["config"]
    return (config if by_hand else validated_stage(stage, config)), job.get("settings", {})


def _planned_job(plan: str, output: str) -> dict:
    """The plan's entry for this output."""
    jobs = read_json(Path(plan), {"jobs": dict[str, dict]}, "run snakemake again, which writes it anew")["jobs"]
    if output not in jobs:
        raise UserError(f"--plan {plan}: has no {output}; name the output as the plan does, or give --config")
    return jobs[output]


def _deep_merge(base: dict, extra: dict) -> dict:
    merged = dict(base)
    for name, value in extra.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _deep_merge(merged[name], value) if both_dicts else value
    return merged


def write_provenance(folder: Path, stage: str, config: dict, inputs: dict, seconds: float, facts: dict) -> None:
    """Add `config.yaml` and `provenance.json`: all that is needed to make this folder again."""
    import yaml

    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    facts = provenance(stage, inputs, seconds, facts) | {"files": sizes(folder)}
    (folder / PROVENANCE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def provenance(stage: str, inputs: dict, seconds: float, facts: dict) -> dict:
    """Who made an artefact, from what, with which code and packages; `facts` are the step's own."""
    return {
        "stage": stage,
        "inputs": {name: str(path) for name, path in inputs.items() if path is not None},
        "code": code_hashes(f"steps.{stage}"),
        "command": redacted(" ".join(sys.argv)),
        "packages": package_versions(),
        "python": platform.python_version(),
        "git": git_commit(),
        "seconds": round(seconds, 3),
        "ended": round(time.time(), 3),
        "peak_memory_bytes": peak_memory(),
        **facts,
    }


def package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def git_commit() -> str | None:
    """The commit the code stands at, with ``+changes`` when the work tree differs; None outside git."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if status.stdout.strip() else "")


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: what getrusage says there may be that of the process which started this one
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        [kilobytes] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(kilobytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
