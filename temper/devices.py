"""The GPU that a job computes on: one of its own, which no other job on this machine has; of a training several.

CUDA and HIP show a process all GPUs of the machine, and libraries take the first, or all. So a job takes a lock on one
and shows itself that one only, before any library asks. Locks are files of the machine, not of a project, for projects
share GPUs; they end with the job, in whatever way it ends.

A scheduler that gives a job one GPU has said so in the same variable, and nothing is changed.
"""

import contextlib
import logging
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from temper.errors import UserError

log = logging.getLogger("temper")
CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"  # environment variables
AMD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")  # of the Linux driver: a folder for each CPU and GPU
PAUSE = 1.0  # seconds between two looks at GPUs that are all taken


def gpus() -> list[str]:
    """The GPUs that a job on this machine may use, as their variable names them; [] if there are none.

    Of NVIDIA's UUIDs, of AMD's numbers. A GPU that is cut into MIG instances is its instances.
    """
    return _left(*_installed())


def gpus_wanted(config: dict) -> int:
    """How many GPUs a job of this config takes, which may not be checked yet: one for each process."""
    train, processes = config.get("train"), config.get("num_processes", 1)
    if isinstance(train, dict) and train.get("use_cpu"):
        return 0
    return processes if isinstance(processes, int) and processes > 0 else 1  # what is wrong is refused with the config


def _left(variable: str | None, there: list[str]) -> list[str]:
    """Of the installed GPUs those that the environment leaves."""
    given = os.environ.get(variable) if variable else None
    if given is None or not there:
        return there
    return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]


def _installed() -> tuple[str | None, list[str]]:
    """(the variable that chooses among this machine's GPUs, their names)."""
    if found := _of_nvidia():
        return CUDA, found
    if found := _of_amd():
        return HIP, found
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return None, ["mps"]
    return None, []


def _of_nvidia() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    found: list[str] = []
    for name in re.findall(r"UUID: ((?:GPU|MIG)-[\w/-]+)", listed.stdout) if listed.returncode == 0 else ():
        if name.startswith("MIG") and found and found[-1].startswith("GPU"):
            found.pop()  # its instances follow
        found.append(name)
    return found


def _of_amd() -> list[str]:
    ids = [file.read_text().strip() for file in sorted(AMD_NODES.glob("*/gpu_id"))]
    return [str(number) for number in range(sum(one != "0" for one in ids))]  # a CPU's is 0


@contextlib.contextmanager
def own_gpus(count: int = 1) -> Iterator[None]:
    """While the block runs, this process sees so many GPUs that no other one has taken; it waits until there are.
    With `count` 0 it sees all and must use none.

    Where there is no choice, with one GPU or none, nothing is locked.

    Raises:
        UserError: there are some, but not so many; the locks cannot be written.
    """
    variable, there = _installed()
    names = _left(variable, there)
    if names and len(names) < count:
        raise UserError(
            f"num_processes={count}, a GPU for each, and here are {len(names)}: give num_processes={len(names)} (and "
            "train.gradient_accumulation_steps that make the same batch), or train.use_cpu=true"
        )
    if variable is None or len(names) < 2 or not count:
        yield
        return
    before = os.environ.get(variable)
    with _taken(names, there, count) as taken:
        try:
            os.environ[variable] = ",".join(taken)
            log.info("GPU: %s, of %d", ", ".join(taken), len(names))
            yield
        finally:
            os.environ.pop(variable) if before is None else os.environ.update({variable: before})


@contextlib.contextmanager
def _taken(names: list[str], there: list[str], count: int) -> Iterator[list[str]]:
    """So many of the GPUs with these names, locked; waits until they are free.

    All or none: two jobs that each hold a part of what they want would wait for each other.
    """
    waits = False
    while True:
        with contextlib.ExitStack() as locks:
            taken: list[str] = []
            for name in names:
                if len(taken) < count and _take(locks, _lock_file(name, there)):
                    taken.append(name)
            if len(taken) == count:
                yield taken
                return
        if not waits:
            log.info("%d GPU(s) wanted, and too few of %d are free of other jobs: waiting", count, len(names))
        waits = True
        time.sleep(PAUSE * random.uniform(1, 1.5))  # two that want several do not always meet


def _take(locks: contextlib.ExitStack, file: Path) -> bool:
    """Take a lock until the end of the stack, unless somebody has it."""
    import filelock

    lock = filelock.FileLock(file, mode=0o666)
    try:
        locks.enter_context(lock.acquire(timeout=0))
    except filelock.Timeout:
        return False
    except OSError as error:
        raise UserError(
            f"{file}: cannot be locked ({error.strerror}): make it writable, or choose GPUs for each job by the "
            "environment"
        ) from None
    return True


def _lock_file(name: str, there: list[str]) -> Path:
    """One for each GPU, whether a number names it or a UUID."""
    if name.isdecimal() and int(name) < len(there):
        name = there[int(name)]
    folder = Path(tempfile.gettempdir()) / "temper-gpus"
    with contextlib.suppress(OSError):  # of another user, who has done the same
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    return folder / f"{name.replace('/', '-')}.lock"
