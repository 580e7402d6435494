"""A run's merged model as a folder: the one that is there, or else made now."""

import json
import os
import subprocess
import sys
from pathlib import Path

from temper.config.stages import FOLDERS, flag_words, stage_config
from temper.errors import UserError
from temper.keys import python_path, stage_key
from temper.planning.plan import RESULTS
from temper.runs import find as runs

STAGE = "merge_adapter"


def merged_folder(run: runs.FinishedRun, purpose: str) -> Path:
    """The folder of a run's merged model, where the workflow would have put it.

    Args:
        purpose: what it is needed for, for the message if a part is missing that it is made of.

    Raises:
        UserError: a part is missing, or base and adapter cannot be merged.
    """
    if run.has(STAGE):
        return run.part(STAGE, purpose)
    if "train_adapter" not in run.parts:
        raise UserError(f"{run.asked}: is of a model that no training made, so there is nothing to merge; name a run")
    inputs = {"model": runs.base_folder(run), "adapter": run.part("train_adapter", purpose)}
    if run.has("tokenize_splits"):
        inputs["splits"] = run.parts["tokenize_splits"]
    config = stage_config(STAGE, run.config("evaluate_model", "and only it knows how the run is merged"))
    folder = run.parts.get(STAGE) or _place(inputs, config)
    print(f"merging {inputs['adapter']} into {folder}", file=sys.stderr)
    words = flag_words({name: str(path) for name, path in inputs.items()})
    command = [sys.executable, "-m", f"steps.{STAGE}", *words, "--config", json.dumps(config), "--output", str(folder)]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["(nothing)"])[-1]
        raise UserError(f"{run.asked}: cannot be merged: {last.removeprefix('error: ')}")
    run.parts[STAGE] = folder
    return folder


def _place(inputs: dict[str, Path], config: dict) -> Path:
    """Where the workflow would put it: the names of folders end in their keys."""
    upstream = {name: path.name.rpartition("-")[2] for name, path in inputs.items()}
    name = f"{inputs['adapter'].name.rpartition('-')[0]}-{stage_key(STAGE, config, upstream)}"
    results = inputs["adapter"].parent.parent
    return (results if results.name == RESULTS.name else RESULTS) / FOLDERS[STAGE] / name
