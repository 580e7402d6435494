"""The receipt of a run: hashes of all that it was made from and of all that was made, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from temper.config.stages import FOLDERS
from temper.evaluation.figures import Figures, finite, read_figures
from temper.files import read_json
from temper.hashing import file_sha256
from temper.runs.find import FinishedRun, read_provenance
from temper.sources.pins import data_files, is_pin

FILE = "receipt.json"
RECORDED = ("code", "packages", "python", "processor", "git", "inputs")


class Part(BaseModel):
    """What one stage made. `files`: path below `folder` -> sha256; of raw data beside its pin."""

    model_config = ConfigDict(strict=True, extra="ignore")
    stage: str
    folder: str
    made_with: dict[str, Any]
    files: dict[str, str]


class Receipt(BaseModel):
    """Of the run that a sweep chose."""

    model_config = ConfigDict(strict=True, extra="ignore")
    run: str
    metric: str
    split: str
    values: dict[str, float | None]
    parts: list[Part]


def receipt_of(run: FinishedRun) -> Receipt:
    """The receipt of a finished run; folders as they are called in results/."""
    figures = read_figures(run.judged or run.part("evaluate_model", "and it has the figures"))
    assert isinstance(figures, Figures), "a run that diverged is not found"
    parts = [_part(stage, path) for stage, path in run.made()]
    return Receipt(run=run.name, metric=figures.metric, split=figures.split, values=finite(figures.values), parts=parts)


def public_receipt(run: FinishedRun) -> Receipt:
    """The receipt without what is the author's own: raw data, and the places of folders and inputs."""
    whole = receipt_of(run)
    parts = [
        part.model_copy(
            update={"folder": f"{FOLDERS[part.stage]}/{Path(part.folder).name}", "made_with": _public(part)}
        )
        for part in whole.parts
        if part.stage in FOLDERS
    ]
    return whole.model_copy(update={"parts": parts})


def _public(part: Part) -> dict[str, Any]:
    return {name: value for name, value in part.made_with.items() if name != "inputs"}


def read_receipt(path: Path) -> Receipt:
    """Raises: UserError: it is not there, or damaged."""
    return read_json(path, Receipt, "compare the sweep again: snakemake writes it anew")


def faults(receipt: Receipt) -> list[str]:
    """What is not as the receipt says, a line each."""
    found = []
    for part in receipt.parts:
        now = _files(Path(part.folder)) if Path(part.folder).exists() else {}
        if not now:
            found.append(f"{part.folder}: is missing")
            continue
        for name in sorted({*part.files, *now}):
            if name not in now:
                found.append(f"{part.folder}: {name} is missing")
            elif name not in part.files:
                found.append(f"{part.folder}: {name} is not in the receipt")
            elif now[name] != part.files[name]:
                found.append(f"{part.folder}: {name} has another sha256")
    return found


def _part(stage: str, path: Path) -> Part:
    recorded = read_provenance(path)
    made_with = {name: recorded[name] for name in RECORDED if name in recorded}
    return Part(stage=stage, folder=str(path), made_with=made_with, files=_files(path))


def _files(path: Path) -> dict[str, str]:
    """Name -> sha256. A folder's provenance is hashed as well; Snakemake's own marks are not."""
    if path.is_file():
        raw = data_files(path) if is_pin(path) else []
        return {file.name: file_sha256(file) for file in [path, *raw]}
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".snakemake"))
    return {file.relative_to(path).as_posix(): file_sha256(file) for file in files}
