"""Real tracking stores that misbehave: an MLflow server or its database that dies, a slow line, a locked file."""

import contextlib
import csv
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Server:
    """`mlflow server` on a free port, with its store in `folder`. Can be killed, frozen and started again.

    Args:
        options: instead of those for SQLite in `folder`.
        environment: variables beyond our own.
    """

    def __init__(self, folder: Path, options: list[str] | None = None, environment: dict[str, str] | None = None):
        self.port = free_port()
        self.folder, self.process = Path(folder), None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.options = options or ["--workers=1", f"--backend-store-uri=sqlite:///{self.folder.resolve()}/store.db"]
        self.environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(environment or {})}

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Server":
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", *self.options, "--host=127.0.0.1", f"--port={self.port}"]
        with (self.folder / "server.out").open("a") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        deadline = time.monotonic() + 600
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


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's programs: that on the PATH, or Debian's newest; None: it is not installed."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    of_debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in of_debian), key=lambda folder: int(folder.parent.name), default=None)


class Database:
    """PostgreSQL on a free port, with the database `mlflow`. Can be killed and started again.

    It refuses to be root's, so it then runs as the user postgres or nobody, in a folder of its own below /tmp, because
    that user cannot enter ours.
    """

    def __init__(self):
        self.programs, self.port, self.password = postgres_programs(), free_port(), secrets.token_hex(8)
        self.folder = Path(tempfile.mkdtemp(prefix="temper-postgres-", dir="/tmp"))
        self.user: dict = {}
        if os.geteuid() == 0:
            names = [user.pw_name for user in pwd.getpwall()]
            user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            self.user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        (self.folder / "password").write_text(self.password)
        # nothing is synced to the disk: no test cuts the power, and other work on the disk would hold us up
        options = ["--username=mlflow", "--auth=scram-sha-256", f"--pwfile={self.folder}/password", "--no-sync"]
        self._run("initdb", f"--pgdata={self.folder}/data", *options)
        self.start()
        self._run("createdb", "mlflow")

    @property
    def environment(self) -> dict[str, str]:
        """What libpq needs to find it."""
        address = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "mlflow", "PGPASSWORD": self.password}
        return address | {"PGDATABASE": "mlflow"}

    def _run(self, program: str, *arguments: str) -> str:
        command = [str(self.programs / program), *arguments]
        with tempfile.TemporaryFile("w+") as output:  # no pipe: the server keeps what it inherits
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, **self.environment},
                check=False,
                **self.user,
            )
            output.seek(0)
            text = output.read()
        if done.returncode:
            raise RuntimeError(f"{program}: {text}")
        return text

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        log = f"--log={self.folder}/log"
        self._run("pg_ctl", f"--pgdata={self.folder}/data", log, f"--options={options}", "--wait", "start")

    def kill(self) -> None:
        """End it without a word to those who use it; it recovers at the next start."""
        self._run("pg_ctl", f"--pgdata={self.folder}/data", "--mode=immediate", "stop")

    def query(self, sql: str) -> list[list[str]]:
        """The rows of an answer, as text."""
        answer = self._run("psql", "--no-psqlrc", "--csv", "--tuples-only", "--command", sql)
        return list(csv.reader(answer.splitlines()))

    def remove(self) -> None:
        with contextlib.suppress(RuntimeError):  # it may not run
            self.kill()
        shutil.rmtree(self.folder)


class TeamServer(Server):
    """The server of deploy/mlflow: on PostgreSQL, with logins and artifacts of its own, by the command of its image."""

    def __init__(self, folder: Path, database: Database, deploy: Path):
        command = re.search(r'^CMD \["mlflow", "server", (.*?)\]', (deploy / "Dockerfile").read_text(), re.M | re.S)
        options = [word for word in re.findall(r'"(.*?)"', command[1]) if not re.match("--(host|port)=", word)]
        assert "--artifacts-destination=/artifacts" in options
        options[options.index("--artifacts-destination=/artifacts")] = f"--artifacts-destination={folder}/artifacts"
        self.deploy, self.admin = deploy, {"MLFLOW_TRACKING_USERNAME": "admin"}
        self.admin["MLFLOW_TRACKING_PASSWORD"] = secrets.token_hex(8)
        settings = {
            "MLFLOW_AUTH_CONFIG_PATH": str(deploy / "auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.admin["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(8),
        }
        super().__init__(folder, options, {**database.environment, **settings})

    def add_user(self, name: str, password: str) -> subprocess.CompletedProcess[str]:
        """Run add_user.py as the administrator does."""
        return subprocess.run(
            [sys.executable, str(self.deploy / "add_user.py"), name],
            input=f"{password}\n",
            env={**os.environ, **self.admin, "MLFLOW_TRACKING_URI": self.uri},
            capture_output=True,
            text=True,
            check=False,
        )


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
