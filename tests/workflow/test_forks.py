"""A job as a fork of the server is the job that `python -m` starts: what it sees, how it ends, and what it makes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from steps import train_adapter
from temper.config.stages import load_stage_config
from temper.forks import start
from temper.forks.client import SOCKETS
from tests.conftest import ROOT
from tests.support.trainings import OPTIONS

# Says all that a module can see of its process, and ends as it is told.
PROBE = """
import json, os, signal, sys, time
handlers = [str(signal.getsignal(number)) for number in signal.Signals]
seen = {"argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ), "name": __name__}
seen |= {"handlers": handlers, "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))}
seen |= {"group": os.getpgrp(), "session": os.getsid(0), "input": sys.stdin.read(), "spec": __spec__.name}
for stream in (sys.stdin, sys.stdout, sys.stderr):
    seen[stream.name] = [stream.encoding, stream.errors, stream.line_buffering, stream.seekable(), stream.isatty()]
seen["environment"].pop("_", None)
print(json.dumps(seen), flush=True)
print("said", file=sys.stderr, flush=True)
print("in a fork" if "torch" in sys.modules else "by itself", os.getpid(), flush=True)
how = sys.argv[1]
if how == "sleep": time.sleep(60)
if how == "raise": raise ValueError("no")
if how == "text": sys.exit("words")
if how.startswith("-"): os.kill(os.getpid(), -int(how))
time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
sys.exit(int(how))
"""
SHELL = """
import re, sys, tempfile
from pathlib import Path
from snakemake.shell import shell
from temper.forks import start
start.LIBRARIES = ("torch",)
print(start.start([1] * start.WORTH, tracked=False)[0].pid, flush=True)
shell.executable("bash")
source = Path("Snakefile").read_text(encoding="utf-8")
shell.prefix(eval(re.search(r"shell\\.prefix(\\(.*?\\n\\))", source, flags=re.DOTALL)[1]))
for threads in (1, 2):
    resources = {"tmpdir": tempfile.gettempdir()}
    shell("run probe 0 2>&1 | log_to {log} > /dev/null", threads=threads, resources=resources, log=sys.argv[1])
    print(Path(sys.argv[1]).read_text().splitlines()[-1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """An environment with a server and the module `probe`; and the server's process."""
    folder = tmp_path_factory.mktemp("forks")
    (folder / "probe.py").write_text(PROBE)
    before = dict(os.environ)
    os.environ |= dict.fromkeys(start.THREADS, "1") | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "LIBRARIES", ("torch", "datasets", "transformers.trainer", "peft"))
        [server] = start.start([1] * start.WORTH, tracked=False)
    environment = os.environ | dict.fromkeys(start.FOLDERS, "/tmp")
    os.environ.clear()
    os.environ.update(before)
    yield environment, server, folder
    server.kill()
    server.wait()


def client(environment, *argv: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-SP", "-m", "temper.forks.client", *argv]
    return begun(command, environment, **options)


def begun(command, environment, **options) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **(pipes | options))


def where(out: str) -> tuple[str, int]:
    how, _, pid = out.splitlines()[-1].rpartition(" ")
    return how, int(pid)


def test_a_server_has_loaded_libraries_and_done_nothing_else(surroundings):
    environment, server, _ = surroundings
    assert where(client(environment, "probe", "0").communicate("")[0])[0] == "in a fork"
    assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) == 1, "no thread"
    maps = Path(f"/proc/{server.pid}/maps").read_text()
    assert "libtorch" in maps
    assert str(ROOT / "temper") not in maps


@pytest.mark.parametrize("how", ["0", "3", "raise", "text", f"-{signal.SIGSEGV:d}", f"-{signal.SIGKILL:d}"])
def test_a_fork_sees_what_a_new_process_sees_and_ends_as_it_ends(surroundings, how):
    environment, _, folder = surroundings
    environment = environment | {"RAYON_NUM_THREADS": "7"}
    both = [client(environment, "probe", how, cwd=folder)]
    both.append(begun([sys.executable, "-m", "probe", how], environment, cwd=folder))
    (out, err), (out_expected, err_expected) = [process.communicate("asked") for process in both]
    found, expected = (json.loads(text.splitlines()[0]) for text in (out, out_expected))
    assert found == expected
    assert both[0].returncode == both[1].returncode
    assert (where(out)[0], where(out_expected)[0]) == ("in a fork", "by itself")
    assert err.splitlines()[-1] == err_expected.splitlines()[-1]


def test_ignored_signals_and_files_as_streams(surroundings, tmp_path):
    environment, _, _ = surroundings
    seen = []
    for words in (["-SP", "-m", "temper.forks.client"], ["-m"]):
        file = tmp_path / "out"
        with file.open("w") as out:
            command = ["bash", "-c", "trap '' HUP; exec \"$@\"", "bash", sys.executable, *words, "probe", "0"]
            assert begun(command, environment, stdin=subprocess.DEVNULL, stdout=out).wait() == 0
        seen.append(json.loads(file.read_text().splitlines()[0]))
    assert seen[0] == seen[1]
    assert str(signal.Handlers.SIG_IGN) in str(seen[0]["handlers"]) or "1" in seen[0]["handlers"]


@pytest.mark.parametrize(
    "change", [{"OMP_NUM_THREADS": "2"}, {"HF_HUB_OFFLINE": "0"}, {"ANOTHER": "1"}, {SOCKETS: "/x"}]
)
def test_a_job_with_another_environment_runs_by_itself(surroundings, change):
    environment, _, _ = surroundings
    out, _ = client(environment | change, "probe", "4").communicate("")
    assert where(out)[0] == "by itself"
    assert json.loads(out.splitlines()[0])["environment"].items() >= change.items()


def test_code_is_read_from_the_disk_by_each_job(surroundings):
    environment, _, folder = surroundings
    for text in ("one", "two"):
        (folder / "edited.py").write_text(f"print('{text}')\n")
        assert client(environment, "edited").communicate("")[0] == f"{text}\n"


def gone(pid: int) -> bool:
    """Whether a process ends within a moment."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=20)
    return not psutil.pid_exists(pid)


def said(process: subprocess.Popen) -> int:
    """The pid of a probe, once it sleeps."""
    process.stdin.close()
    process.stdout.readline()
    return where(process.stdout.readline())[1]


def test_a_killed_client_takes_its_job_along(surroundings):
    environment, server, _ = surroundings
    process = client(environment, "probe", "sleep")
    job = said(process)
    assert job in [child.pid for child in psutil.Process(server.pid).children()], "the workflow's signals reach it"
    process.kill()
    assert gone(job)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_client_reaches_the_job(surroundings, number):
    environment, _, _ = surroundings
    process, plain = client(environment, "probe", "sleep"), begun([sys.executable, "-m", "probe", "sleep"], environment)
    job, _ = said(process), said(plain)
    process.send_signal(number)
    plain.send_signal(number)
    assert process.wait(timeout=20) == plain.wait(timeout=20) != 0
    assert gone(job)


def test_an_interrupt_before_the_server_is_ready_ends_the_client_without_a_word(surroundings, tmp_path):
    environment, _, _ = surroundings
    with socket.socket(socket.AF_UNIX) as importing:
        importing.bind(str(tmp_path / "1"))
        importing.listen()
        process = client(environment | {SOCKETS: str(tmp_path)}, "probe", "0")
        connection, _ = importing.accept()
        connection.recv(100)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.communicate("", timeout=20) == ("", "")
        connection.close()
    assert process.returncode == -signal.SIGINT


def test_without_its_server_a_job_goes_on_and_its_end_is_known(surroundings, tmp_path):
    environment, _, folder = surroundings
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\nfrom temper.forks import start\nstart.LIBRARIES = ('torch',)\n"
        "print(start.start([1] * 3, False)[0].pid, __import__('os').environ['TEMPER_FORKS'], flush=True)\n"
        "sys.stdin.read()\n"
    )
    without = {name: value for name, value in environment.items() if name != SOCKETS}
    main = begun([sys.executable, str(script)], without)
    pid, sockets = main.stdout.readline().split()
    process = client(environment | {SOCKETS: sockets}, "probe", "5", "3")
    job = said(process)
    main.kill()  # and the server ends with it
    assert gone(int(pid))
    assert not Path(sockets).exists()
    assert psutil.pid_exists(job), "an orphan, as that of a killed workflow always was"
    assert process.wait(timeout=20) == 5
    late = client(environment | {SOCKETS: sockets}, "probe", "0")
    assert where(late.communicate("")[0])[0] == "by itself"


def test_the_shell_of_the_workflow_uses_the_server_of_its_threads(surroundings, tmp_path):
    environment, _, _ = surroundings
    without = {name: value for name, value in environment.items() if name not in (SOCKETS, *start.FOLDERS)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "-c", SHELL, str(tmp_path / "log")]
    process = begun(command, without | {"PATH": path}, cwd=ROOT)
    out, err = process.communicate("")
    assert process.returncode == 0, err
    pid, one, two = out.splitlines()
    assert (where(one)[0], where(two)[0]) == ("in a fork", "by itself")
    assert gone(int(pid))


def test_a_training_has_the_same_bits_in_a_fork(surroundings, workspace, tiny_splits, tiny_model):
    environment, _, _ = surroundings
    config = load_stage_config("train_adapter", None, [*OPTIONS, "train.num_train_epochs=1"])
    flags = ["--splits", str(tiny_splits), "--model", str(tiny_model)]
    options = [json.dumps({**config, "trunk": name}) for name in ("fork", "here")]
    _, err = client(environment, "steps.train_adapter", *flags, "--output", "fork", "--config", options[0]).communicate(
        ""
    )
    train_adapter.main([*flags, "--output", "here", "--config", options[1]])
    assert Path("fork/adapter_model.safetensors").read_bytes() == Path("here/adapter_model.safetensors").read_bytes(), (
        err
    )
    made = json.loads(Path("fork/provenance.json").read_text())
    assert made["command"].split()[0] == str(ROOT / "steps" / "train_adapter.py")
    assert 0 < made["cpu_seconds"] < 60
