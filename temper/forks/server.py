"""The process that has imported the libraries and forks itself for each job. Nothing of Temper is imported here.

    python temper/forks/server.py SOCKET_FD SOCKET_PATH PARENT LIBRARY [LIBRARY ...]

What a fork inherits must be what a new process would have: libraries are imported, and that is all. No thread runs, no
parallel region was entered and no device was asked for, or this ends before it serves anyone. Temper's own code is not
among the libraries: each job imports it from the disk, as it is then. A job with another environment is sent away, for
libraries read it when they are imported.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

OWN = ("PWD", "OLDPWD", "SHLVL", "_")  # of each shell
LATE = ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")  # read when tokenizers first uses its threads
PLAN = "TEMPER_PLAN"  # read by each job; a search that goes on has another
MAY_DIFFER = (*OWN, *LATE, PLAN)
ARROW = "JE_ARROW_MALLOC_CONF"  # Arrow's allocator would start a thread
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PARENT_ENDED = signal.SIGUSR2
PATIENCE = 10.0  # seconds that a client may take to say what it wants


def main(argv: list[str]) -> None:
    """Import, and serve until the workflow ends. Returns in each job's process, to run it."""
    listener, path, parent, libraries = socket.socket(fileno=int(argv[0])), argv[1], int(argv[2]), argv[3:]
    end_with(parent, path)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # they are for jobs, whose end has to be told
    environment = dict(os.environ)
    os.environ[ARROW] = "background_thread:false"
    load(libraries)
    if unfit := why_unfit():
        print(f"note: {unfit}: each job imports its libraries by itself", file=sys.stderr)
        return
    gc.freeze()
    become(serve(listener, environment), mask)


def end_with(parent: int, path: str) -> None:
    """End, and remove the socket, when the process that started this one ends in whatever way."""
    import ctypes

    def end(*_) -> None:
        with contextlib.suppress(OSError):
            Path(path).unlink()
            Path(path).parent.rmdir()  # unless there are others
        os._exit(0)

    signal.signal(PARENT_ENDED, end)
    set_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>; a fork does not inherit it
    ctypes.CDLL(None).prctl(set_death_signal, int(PARENT_ENDED))
    if os.getppid() != parent:
        end()


def load(libraries: list[str]) -> None:
    """Import them; what cannot be imported is left to the job that needs it, which says so."""
    gc.set_threshold(100_000)  # as temper/step.py
    for name in libraries:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def why_unfit() -> str | None:
    """Why this process must not be forked; None if it may.

    OpenBLAS starts its threads when it is loaded, one less than it may use, and ends them itself before a fork.
    """
    import torch

    if torch.cuda.is_initialized() or torch.accelerator.is_available():
        return "a device for computing cannot be shared by forks"
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threading.active_count() > 1 or threads > int(os.environ.get("OPENBLAS_NUM_THREADS") or 1):
        return f"the libraries started {threads - 1} thread(s) when they were imported"
    return None


# --- serving -------------------------------------------------------------------------------------


class Job:
    """A job's process, as the server sees it."""

    def __init__(self, pid: int, connection: socket.socket):
        self.pid, self.connection, self.descriptor = pid, connection, os.pidfd_open(pid)

    def close(self) -> None:
        """Forget it."""
        self.connection.close()
        os.close(self.descriptor)


def serve(listener: socket.socket, environment: dict[str, str]) -> dict:
    """Fork a process for each job that is asked for. Returns in that process only: what was asked."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    jobs: dict[int, Job] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                asked = received(connection, environment)
                if asked is None:
                    connection.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    for job in jobs.values():
                        job.close()
                    selector.close()
                    listener.close()
                    return {**asked, "connection": connection}
                for descriptor in asked["streams"]:
                    os.close(descriptor)
                jobs[pid] = job = Job(pid, connection)
                tell(connection, f"job {pid}")
                selector.register(job.connection, selectors.EVENT_READ, job)
                selector.register(job.descriptor, selectors.EVENT_READ, job)
            elif key.data.pid in jobs:
                look_at(key.data, selector, jobs, ended=key.fileobj == key.data.descriptor)


def look_at(job: Job, selector, jobs: dict[int, Job], ended: bool) -> None:
    """Tell the client how its job ended; end the job whose client was killed."""
    if not ended:  # a client never says more: it has gone
        selector.unregister(job.connection)
        signal.pidfd_send_signal(job.descriptor, signal.SIGKILL)
        return
    code = os.waitstatus_to_exitcode(os.waitpid(job.pid, 0)[1])
    tell(job.connection, f"ended {code}" if code >= 0 else f"killed {-code}")
    with contextlib.suppress(KeyError):
        selector.unregister(job.connection)
    selector.unregister(job.descriptor)
    del jobs[job.pid]
    job.close()


def received(connection: socket.socket, environment: dict[str, str]) -> dict | None:
    """What a client asks for, with its standard streams; None if this process cannot do it."""
    connection.settimeout(PATIENCE)
    streams: list[int] = []
    try:
        head, streams, _, _ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as file:
            asked = json.loads(file.read(int.from_bytes(head)))
    except (OSError, ValueError):  # killed meanwhile
        asked = None
    connection.settimeout(None)
    if asked and len(streams) == 3 and same(environment, asked["environment"]):
        return {**asked, "streams": streams}
    for descriptor in streams:
        os.close(descriptor)
    return None


def same(ours: dict[str, str], theirs: dict[str, str]) -> bool:
    """Whether two environments are equal in all that libraries may have read."""
    return all(ours.get(name) == theirs.get(name) for name in {*ours, *theirs}.difference(MAY_DIFFER))


def tell(connection: socket.socket, line: str) -> None:
    """Send a line to a client, if it still is there."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{line}\n".encode())


# --- in a job's process --------------------------------------------------------------------------


def become(asked: dict, mask: set) -> None:
    """Be the process that ``python -m`` with these arguments would be, and end as that.

    Args:
        mask: the blocked signals of such a process.
    """
    import runpy

    as_new(asked)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what has come since the fork, comes now
    sys.argv = asked["argv"]
    code = 1
    try:
        runpy.run_module(asked["argv"][0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:  # before a step heeds signals by itself
        traceback.print_exc()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:  # should the server be killed, the client knows
        tell(asked["connection"], f"ends {code & 255}")


def as_new(asked: dict) -> None:
    """Give this fork what a new process would have: its streams, signals, environment, path and random numbers."""
    for number, descriptor in enumerate(asked["streams"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    renew(sys.stdin, "r", line_buffering=False)
    renew(sys.stdout, "w", line_buffering=os.isatty(1))
    renew(sys.stderr, "w", line_buffering=True)
    signal.signal(PARENT_ENDED, signal.SIG_DFL)
    for number in ENDING:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in asked["ignored"] else usual)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    if not sys.flags.safe_path:
        sys.path.insert(0, asked["folder"])
    importlib.invalidate_caches()  # files may have come since
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # from the system, as at import; Python's own does it at the fork
    with contextlib.suppress(OSError):  # the name that top shows
        Path("/proc/self/comm").write_text(asked["argv"][0].rpartition(".")[2][:15], encoding="utf-8")


def renew(stream, mode: str, line_buffering: bool) -> None:
    """Make a standard stream what it would be over its new file. It stays the same object, which libraries hold."""
    unbuffered = isinstance(stream.buffer, io.RawIOBase)  # PYTHONUNBUFFERED
    raw = io.FileIO(stream.fileno(), mode, closefd=False)
    raw.name = stream.name  # type: ignore[misc]  # as Python itself names it
    buffered = io.BufferedReader if mode == "r" else io.BufferedWriter
    same = {"encoding": stream.encoding, "errors": stream.errors, "write_through": stream.write_through}
    lines = line_buffering and not unbuffered
    io.TextIOWrapper.__init__(stream, raw if unbuffered else buffered(raw), line_buffering=lines, **same)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).resolve().parent))
    main(sys.argv[1:])
