"""Disks that are small."""

import contextlib
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    """A file system of that size at `folder`; yields a function that gives it another size or other options."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={kilobytes}k"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # weights that were read are still mapped
