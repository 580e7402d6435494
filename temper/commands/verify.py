"""Make stages of a finished sweep or run again in a fresh folder, and compare them with what is there, bit for bit.

temper verify --sweep demo --sample 3                       # three stages, drawn by chance
temper verify --run best --sweep demo --stages train_adapter,evaluate_model
temper verify --receipt results/sweeps/demo/receipt.json    # are the chosen run's files as they were?

What is compared: tensors, rows of data sets, and the figures in JSON files but for times and memory. With other
packages, another processor or other code than recorded, which is said, figures and tensors may differ by 0.001 of their
size. Exit code 1 if anything differs by more.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from temper import units
from temper.config.stages import STAGES, flag_words
from temper.errors import UserError, suggest, visible
from temper.files import known_json, known_json_lines, load_rows, read_json, read_yaml
from temper.folders import PROVENANCE, refuse_damaged
from temper.keys import code_hashes, python_path
from temper.planning.plan import RESULTS
from temper.provenance import other_circumstances
from temper.step import deep_merge

TOLERANCE = 1e-3  # of a value's size, where another machine computes
FETCHED = ("fetch_data", "fetch_model")
# What no two trainings have in common: time and memory. `device` and versions are compared by provenance.
VOLATILE = ("seconds", "_per_second", "memory_bytes", "resumed_from_step")
NOT_COMPARED = (PROVENANCE, "config.yaml", "report.html", "README.md", ".snakemake_timestamp")


@dataclasses.dataclass
class Difference:
    """Between a file and the same made again; `size`: relative, inf where something is missing or of another kind."""

    file: str
    what: str
    size: float


def arguments(parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--run", help="name, key or folder of a run, or best; default: all runs of the sweep")
    parser.add_argument("--sweep", help="name of a finished sweep; with --run best: the sweep whose best run is meant")
    parser.add_argument("--stages", help="only these, with commas between them")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of the folders, drawn by chance")
    parser.add_argument("--receipt", metavar="FILE", help="compare the files of a run with the hashes of its receipt")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing; default: 0")


def run(arguments) -> None:
    """Verify the folders that the arguments select; exit with 1 if one differs."""
    if arguments.receipt:
        _check_receipt(arguments)
        return
    folders = _selected(arguments)
    with tempfile.TemporaryDirectory(prefix="temper-verify-") as scratch:
        failed = [folder for number, folder in enumerate(folders) if not _verify(folder, Path(scratch, str(number)))]
    print(f"{len(folders) - len(failed)} of {len(folders)} folder(s) came out the same")
    if failed:
        sys.exit(1)


def _check_receipt(arguments) -> None:
    from temper.runs.receipt import faults, read_receipt

    if arguments.run or arguments.sweep or arguments.stages or arguments.sample:
        raise UserError("--receipt: goes alone, as it makes nothing: leave the other flags out")
    receipt = read_receipt(Path(arguments.receipt))
    found = faults(receipt)
    for fault in found:
        print(visible(fault))
    files = sum(len(part.files) for part in receipt.parts)
    verdict = f"{len(found)} fault(s)" if found else f"all {files} files are as in the receipt"
    print(f"{receipt.run}: {verdict}")
    if found:
        sys.exit(1)


# --- which folders -------------------------------------------------------------------------------


def _selected(arguments) -> list[Path]:
    stages = _stages(arguments.stages)
    folders = [folder for stage, folder in _folders(arguments) if stage in stages]
    if not folders:
        raise UserError(f"--stages {arguments.stages}: no folder of these stages here; leave it out")
    if arguments.sample is not None:
        if arguments.sample < 1:
            raise UserError(f"--sample {arguments.sample}: draw at least 1")
        drawn = random.Random(arguments.seed).sample(folders, min(arguments.sample, len(folders)))
        folders = [folder for folder in folders if folder in drawn]
    return folders


def _stages(given: str | None) -> list[str]:
    known = [name for name in STAGES if name not in (*FETCHED, "rank_runs", "score_rows", "compare_runs")]
    if given is None:
        return known
    for name in given.split(","):
        if name not in known:
            raise UserError(f"--stages {name}: cannot be verified; {suggest(name, known)}")
    return given.split(",")


def _folders(arguments) -> list[tuple[str, Path]]:
    """(stage, folder) of all that steps made of one run, or of all runs of a sweep, in the order of the pipeline."""
    from temper.runs.find import BEST, find

    if arguments.run:
        runs = [arguments.run]
    elif arguments.sweep:
        runs = _reports(arguments.sweep)
    else:
        raise UserError("--sweep or --run is missing: what to verify; results/sweeps has the finished sweeps")
    made = [part for name in runs for part in find(name, arguments.sweep if name == BEST else None).made()]
    found = {path.resolve(): (stage, path) for stage, path in made if (path / PROVENANCE).is_file()}
    order = list(STAGES)
    return sorted(found.values(), key=lambda part: (order.index(part[0]), part[1].name))


def _reports(sweep: str) -> list[str]:
    from temper.reports.leaderboard import read_board

    board = read_board(RESULTS / "sweeps" / sweep)
    return [row["report"] for row in board.rows if row.get(f"{board.split}_{board.metric}") is not None]


# --- one folder ----------------------------------------------------------------------------------


def _verify(folder: Path, again: Path) -> bool:
    """Make a folder again and say how it compares; whether it is the same."""
    refuse_damaged(folder, "")
    recorded = read_json(folder / PROVENANCE)
    changed = _changes(recorded)
    for change in changed:
        print(f"{folder}: {change}", flush=True)

    _make_again(folder, recorded, again)
    found = list(_differences(folder, again))
    worst = max((one.size for one in found), default=0.0)
    allowed = TOLERANCE if changed else 0.0
    if not found:
        print(f"{folder}: the same, bit for bit", flush=True)
    else:
        one = max(found, key=lambda one: one.size)
        verdict = "within the tolerance" if worst <= allowed else "DIFFERS"
        print(visible(f"{folder}: {verdict}: {one.file}: {one.what} ({len(found)} difference(s))"), flush=True)
    return worst <= allowed


def _changes(recorded: dict) -> list[str]:
    """What of the recorded circumstances is different now, and may change the last digits."""
    changes, code = other_circumstances(recorded), code_hashes(f"steps.{recorded['stage']}")
    edited = [name for name, value in recorded.get("code", {}).items() if code.get(name) != value]
    return changes + ([f"the code of {', '.join(edited[:3])} has changed since"] if edited else [])


def _make_again(folder: Path, recorded: dict, again: Path) -> None:
    """Run the stage by hand, with the recorded inputs and config, also what is in no key but in the curves."""
    command = [sys.executable, "-m", f"steps.{recorded['stage']}", *flag_words(recorded["inputs"])]
    config = deep_merge(read_yaml(folder / "config.yaml"), recorded.get("not_in_key", {}))
    command += ["--config", json.dumps(config), "--output", str(again)]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    environment.pop("TEMPER_PLAN", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["(nothing)"])[-1]
        raise UserError(f"{folder}: cannot be made again: {last.removeprefix('error: ')}")


# --- comparing -----------------------------------------------------------------------------------


def _differences(folder: Path, again: Path) -> Iterator[Difference]:
    files = {str(path.relative_to(root)) for root in (folder, again) for path in root.rglob("*") if path.is_file()}
    if (folder / "dataset_dict.json").is_file():
        yield from _of_rows(folder, again)
        files = {name for name in files if not (folder / name).parent.joinpath("state.json").is_file()}
        files.discard("dataset_dict.json")
    for name in sorted(files):
        if Path(name).name not in NOT_COMPARED and not Path(name).parts[0].startswith("checkpoint-"):
            yield from _of_file(name, folder / name, again / name)


def _of_file(name: str, before: Path, now: Path) -> Iterator[Difference]:
    if not (before.is_file() and now.is_file()):
        yield Difference(name, "is missing here" if now.is_file() else "is not made any more", math.inf)
    elif name.endswith(".safetensors"):
        yield from _of_tensors(name, before, now)
    elif name.endswith(".json"):
        yield from _of_values(name, _content(before), _content(now), "")
    elif name.endswith(".jsonl"):
        yield from _of_values(name, known_json_lines(before), known_json_lines(now), "line")
    elif before.read_bytes() != now.read_bytes():
        yield Difference(name, "has other bytes", math.inf)


def _content(path: Path) -> dict:
    """A JSON object. PEFT writes sets of module names, in an order of chance."""
    content = known_json(path)
    if path.name != "adapter_config.json":
        return content
    return {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in content.items()}


def _of_tensors(name: str, before: Path, now: Path) -> Iterator[Difference]:
    import torch
    from safetensors import safe_open

    with safe_open(before, "pt") as old, safe_open(now, "pt") as new:
        old_keys, new_keys = set(old.keys()), set(new.keys())
        for key in sorted(old_keys ^ new_keys):
            yield Difference(name, f"tensor {key} is in one of them only", math.inf)
        for key in sorted(old_keys & new_keys):
            ours, theirs = old.get_tensor(key), new.get_tensor(key)
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                yield Difference(name, f"tensor {key} has another shape or dtype", math.inf)
            elif not torch.equal(ours, theirs):
                apart = (ours.float() - theirs.float()).abs().max().item()
                size = apart / max(ours.float().abs().max().item(), 1e-12)
                yield Difference(name, f"tensor {key} differs by up to {apart:.2g}", size)


def _of_rows(folder: Path, again: Path) -> Iterator[Difference]:
    before, now = load_rows(folder), load_rows(again)
    for split in sorted({*before, *now}):
        same = split in before and split in now and before[split].data.table.equals(now[split].data.table)
        if not same:
            yield Difference(split, "has other rows", math.inf)


def _of_values(name: str, before: Any, now: Any, place: str) -> Iterator[Difference]:
    """Differences of two JSON values, but for times and memory."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if not key.endswith(VOLATILE):
                yield from _of_values(name, before.get(key), now.get(key), f"{place}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True), 1):
            yield from _of_values(name, *pair, f"{place} {index}".strip())
    elif isinstance(before, float | int) and isinstance(now, float | int) and not isinstance(before, bool):
        if before != now:
            size = abs(before - now) / max(abs(before), 1e-12)
            yield Difference(name, f"{place} is {units.figure(now)}, was {units.figure(before)}", size)
    elif before != now:
        yield Difference(name, f"{place} is {json.dumps(now)[:60]}, was {json.dumps(before)[:60]}", math.inf)
