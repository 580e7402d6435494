"""Checkpoints that are complete or ignored.

Trainer writes a checkpoint file by file, so a kill leaves half of one. A checkpoint is complete (sealed) if its
`complete.json`, written last, lists every file with its current sha256.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from pathlib import Path

from temper.files import known_json, whole_file
from temper.hashing import file_sha256

log = logging.getLogger("temper")
SEAL = "complete.json"
STATE = "trainer_state.json"
# If one of these is missing, Trainer silently starts that part from scratch.
NEEDED = ("optimizer.pt", "scheduler.pt", STATE)
RANDOM = ("rng_state.pth", "rng_state_0.pth")  # of one process, and of the first of several
NAME = re.compile(r"checkpoint-\d+")


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step of ``checkpoint-<step>``; 0 for None."""
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def seal(checkpoint: Path) -> None:
    """Seal a checkpoint: everything is on the disk before `complete.json` appears, by one rename."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL]
    for path in files:
        _to_disk(path)
    sums = {str(path.relative_to(checkpoint)): file_sha256(path) for path in files}
    with whole_file(checkpoint / SEAL) as temporary:
        temporary.write_text(json.dumps(sums, indent=1), encoding="utf-8")
        _to_disk(temporary)
    _to_disk(checkpoint)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is complete."""
    if not (checkpoint / SEAL).is_file():
        return "was not written to its end"
    sums, state = known_json(checkpoint / SEAL), known_json(checkpoint / STATE)
    if not sums:
        return f"has no list of files in {SEAL}"
    if state.get("global_step") != step_of(checkpoint):
        return f"is not of the step that its {STATE} tells"
    if lacking := [name for name in NEEDED if name not in sums]:
        return f"has no {lacking[0]}"
    if not any(name in sums for name in RANDOM):
        return f"has no {RANDOM[0]}"
    if odd := _odd_entry(state):
        return f"has another '{odd}' in its {STATE} than Trainer writes"
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != expected:
            return f"{name} is damaged"
    return None


def _odd_entry(state: dict) -> str | None:
    """An entry of Trainer's state that is missing or not as Trainer writes it."""
    from transformers import TrainerState

    kinds = {"epoch": int | float, "log_history": list, "stateful_callbacks": dict}
    odd = state.keys() ^ {field.name for field in dataclasses.fields(TrainerState)}
    odd |= {name for name, kind in kinds.items() if not isinstance(state.get(name), kind)}
    return min(odd, default=None)


def cut(folder: Path, keep: str) -> None:
    """Delete the checkpoints of a complete training: all but the last one (`keep`: last), or all of them (none).

    One that the last one names as the best stays with it.
    """
    found = sorted((path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=step_of)
    if keep == "last" and found:
        best = known_json(found[-1] / STATE).get("best_model_checkpoint") or ""
        found = [path for path in found[:-1] if path.name != Path(best).name]
    for checkpoint in found:
        (checkpoint / SEAL).unlink(missing_ok=True)  # first: half of one is none
        shutil.rmtree(checkpoint)


def last_whole(folders: list[Path], up_to: int) -> Path | None:
    """The newest complete checkpoint in `folders` up to step `up_to`. Damaged ones are reported and skipped."""
    found = [path for folder in folders for path in folder.glob("checkpoint-*") if path.is_dir()]
    for odd in [path for path in found if not NAME.fullmatch(path.name)]:
        log.info("%s: passed over, for its name is not checkpoint-<step>", odd)
    for checkpoint in sorted(filter(lambda path: NAME.fullmatch(path.name), found), key=step_of, reverse=True):
        if step_of(checkpoint) > up_to:
            continue
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint
        log.info("%s %s: the one before it is used", checkpoint, wrong)
    return None
