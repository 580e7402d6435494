"""Run a step in a fork of the server, which has the libraries imported already, as `python -m` would run it.

    python -SP -m temper.forks.client steps.train_adapter --output ... [more flags of the step]

Its exit code, or the signal that ends it, becomes ours; signals that ask us to end go on to the step. The server ends a
step whose client was killed. Where no server answers, or it has another environment, this process becomes the step.

Only the standard library is imported, and little of it: this is what each job's start costs.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

SOCKETS = "TEMPER_FORKS"  # environment variable: the folder of the servers' sockets
THREADS = "OMP_NUM_THREADS"  # and the name of a socket: the number is read when the libraries are loaded
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: list[str]) -> None:
    """Run ``argv``: a module's name and its arguments."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a word, until there is a job that says something
    connection = ask(argv)
    answer = connection.makefile("r") if connection else None
    first = _line(answer)
    if not first.startswith("job "):
        os.execv(sys.executable, [sys.executable, "-m", *argv])
    end(wait(int(first.split()[1]), answer))


def ask(argv: list[str]) -> socket.socket | None:
    """Ask the server of our environment to run `argv` on our standard streams; None: there is none."""
    address = f"{os.environ.get(SOCKETS)}/{os.environ.get(THREADS)}"
    ignored = [number for number in ENDING if signal.getsignal(number) is signal.SIG_IGN]
    asked = {"argv": argv, "folder": str(Path.cwd()), "environment": dict(os.environ), "ignored": ignored}
    text = json.dumps(asked).encode()  # in ASCII: bytes of names that are no UTF-8 stay what they are
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
        socket.send_fds(connection, [len(text).to_bytes(8)], [0, 1, 2])
        connection.sendall(text)
    except OSError:
        connection.close()
        return None
    return connection


def wait(pid: int, answer) -> str:
    """How the job ended: ``ended 0`` (its exit code), ``killed 9`` (the signal), or nothing that is known."""
    try:
        job = os.pidfd_open(pid)
    except ProcessLookupError:  # over already
        job = None

    def pass_on(number, _frame) -> None:
        if job is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(job, number)

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    said = ""
    while line := _line(answer):
        said = line
        if line.startswith(("ended ", "killed ")):  # by the server; without one the job's own word counts
            break
    return said


def end(said: str) -> None:
    """End this process as the job ended."""
    how, _, number = said.partition(" ")
    if how == "killed":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the job has left its own
        if int(number) != signal.SIGKILL:
            signal.signal(int(number), signal.SIG_DFL)
        os.kill(os.getpid(), int(number))
    if not number.strip():
        print("killed: neither the step nor the process that started it says how", file=sys.stderr)
    os._exit(int(number) if how in ("ended", "ends") else 1)


def _line(answer) -> str:
    """The next line of the server's answer; empty at its end."""
    try:
        return answer.readline() if answer else ""
    except OSError:  # the server was killed before it had read what was asked
        return ""


if __name__ == "__main__":
    main(sys.argv[1:])
