"""A stand-in for what lists a machine's GPUs."""

import os
from pathlib import Path

from temper import devices

TWO = """GPU 0: NVIDIA H200 (UUID: GPU-0a)
GPU 1: NVIDIA H200 (UUID: GPU-0b)"""


def install(monkeypatch, folder: Path, listed: str, status: int = 0) -> None:
    """Put an `nvidia-smi` first on the path; locks and all are in `folder`."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{listed}'\nexit {status}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(devices.tempfile, "tempdir", None)
    monkeypatch.delenv(devices.CUDA, raising=False)
