"""Real tracking stores that misbehave: an MLflow server that dies or freezes, a slow line, a locked SQLite file."""

import contextlib
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

LOCKER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=20, isolation_level=None)
database.execute(f"PRAGMA locking_mode={sys.argv[2]}")
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


class Server:
    """`mlflow server` on a free port, with its store in `folder`. Can be killed, frozen and started again."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder, self.process = Path(folder), None
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Server":
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--backend-store-uri", f"sqlite:///{self.folder.resolve()}/store.db"]
        with (self.folder / "server.out").open("a") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return self
            time.sleep(0.1)
        raise RuntimeError(f"mlflow server did not start: {(self.folder / 'server.out').read_text()[-2000:]}")

    def freeze(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def locked(database: Path, readers: bool = False):
    """Hold an SQLite file from another process, so that nobody can write it, nor, if `readers`, read it.

    The latter works only if nobody has the file open.
    """
    command = [sys.executable, "-c", LOCKER, str(database), "EXCLUSIVE" if readers else "NORMAL"]
    locker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert locker.stdout.readline() == "locked\n"
        yield
    finally:
        locker.stdin.close()
        locker.wait()


@contextlib.contextmanager
def slow_line(port: int, seconds: float):
    """A proxy to a local HTTP server that holds each request back. Yields its URI and a list that grows by each."""
    requests = []

    class Pass(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection(("127.0.0.1", port)) as server:
                back = threading.Thread(target=_pump, args=(server, self.request), daemon=True)
                back.start()
                _pump(self.request, server, lambda: (requests.append(1), time.sleep(seconds)))
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Pass) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}", requests
        finally:
            proxy.shutdown()


def _pump(source: socket.socket, sink: socket.socket, before=lambda: None) -> None:
    """Copy bytes until the source ends. A new request begins when the other side has been heard, or with a pause."""
    starts = (b"GET ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ")
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if data.startswith(starts):
                before()
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
