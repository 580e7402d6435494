"""How an artefact was made: package versions, the commit, time, peak memory."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from temper.files import json_text
from temper.folders import PROVENANCE, sizes
from temper.keys import PACKAGE_ROOT, code_hashes
from temper.secrets import redacted

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
NOT_COMPUTING = ("mlflow", "snakemake", "hydra-core")


def write_provenance(folder: Path, stage: str, config: dict, inputs: dict, seconds: float, facts: dict) -> None:
    """Add `config.yaml` and `provenance.json`: everything needed to make this folder again."""
    import yaml

    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    facts = provenance(stage, inputs, seconds, facts) | {"files": sizes(folder)}
    (folder / PROVENANCE).write_text(json_text(facts), encoding="utf-8")


def provenance(stage: str, inputs: dict, seconds: float, facts: dict) -> dict:
    """What an artefact was made from, by which code and packages; `facts` come from the step."""
    return {
        "stage": stage,
        "inputs": {name: str(path) for name, path in inputs.items() if path is not None},
        "code": code_hashes(f"steps.{stage}"),
        "command": redacted(" ".join(sys.argv)),
        "packages": package_versions(),
        "python": platform.python_version(),
        "processor": processor(),
        "git": git_commit(),
        "seconds": round(seconds, 3),
        "ended": round(time.time(), 3),
        "cpu_seconds": round(sum(os.times()[:4]), 3),
        "peak_memory_bytes": peak_memory(),
        **facts,
    }


@functools.cache
def package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def other_circumstances(recorded: dict) -> list[str]:
    """What of the packages and the processor is other now than a provenance says, and may change the last digits."""
    now = package_versions()
    found = [
        f"was made with {name} {version}, here is {now.get(name)}"
        for name, version in recorded.get("packages", {}).items()
        if now.get(name) != version and name not in NOT_COMPUTING
    ]
    if recorded.get("processor", processor()) != processor():
        found.append(f"was made on {recorded['processor']}, this is {processor()}")
    return found


@functools.cache
def processor() -> str:
    """The kind of processor, with what decides by which products PyTorch computes."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return " ".join([platform.machine(), *(flag for flag in known if flag in flags)])


def git_commit() -> str | None:
    """The commit of the code, with ``+changes`` if the work tree differs; None outside git."""
    git = ["git", "-C", str(PACKAGE_ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if status.stdout.strip() else "")


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: there getrusage may include the process that started this one
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        [kilobytes] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(kilobytes) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
