"""Start the servers in Snakemake's main process: one for each number of threads that several jobs have."""

import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from temper.forks import server
from temper.forks.client import SOCKETS

# What the stages import, in their order of weight; the last ones as tracking and the reports do.
LIBRARIES = (
    "pydantic.main",
    "yaml",
    "jinja2",
    "filelock",
    "torch",
    "safetensors.torch",
    "datasets",
    "transformers.trainer",
    "peft",
    "scipy.stats",
    "sklearn.metrics",
    "matplotlib.pyplot",
)
TRACKING = ("mlflow", "mlflow.store.tracking.sqlalchemy_store")
WORTH = 3  # jobs: importing for fewer is not faster than their own imports
THREADS = (
    "OMP_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)  # which Snakemake sets for each job
FOLDERS = ("TMPDIR", "TMP", "TEMPDIR", "TEMP")  # and these, by its resource tmpdir


def start(threads: Iterable[int], tracked: bool) -> list[subprocess.Popen]:
    """Start a server for each number of threads that at least `WORTH` of the coming jobs have.

    The servers end with this process, in whatever way it ends. Call it from the thread that lives longest: to the
    system, that is the parent.

    Args:
        threads: of each coming job.
        tracked: whether trainings write to a tracking store.
    """
    wanted = sorted(number for number, jobs in Counter(threads).items() if jobs >= WORTH)
    if not wanted or sys.platform != "linux" or os.environ.get(SOCKETS):
        return []
    folder = Path(tempfile.mkdtemp(prefix="temper-"))
    os.environ[SOCKETS] = str(folder)
    libraries = [*LIBRARIES, *(TRACKING if tracked else ())]
    return [_start(folder / str(number), number, libraries) for number in wanted]


def _start(path: Path, threads: int, libraries: list[str]) -> subprocess.Popen:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(128)
        descriptor = listener.fileno()
        command = [sys.executable, server.__file__, str(descriptor), str(path), str(os.getpid()), *libraries]
        environment = os.environ | dict.fromkeys(THREADS, str(threads)) | dict.fromkeys(FOLDERS, tempfile.gettempdir())
        return subprocess.Popen(command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, env=environment)
