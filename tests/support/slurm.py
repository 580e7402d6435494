"""A real Slurm on this machine, on loopback, for tests: munged, slurmctld and slurmd, of Debian's packages.

Everything but one file is in the cluster's own folder: Slurm's commands find their configuration at
/etc/slurm/slurm.conf only, because Snakemake removes SLURM_* variables from the environment of a job's steps.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CONFIG = Path("/etc/slurm/slurm.conf")
MARK = "# written by tests/support/slurm.py"
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
KILL_WAIT = 30  # seconds from SIGTERM to SIGKILL, Slurm's own default


def why_not() -> str | None:
    """Why no cluster can be started here, in one line; None if one can."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
        return f"{', '.join(missing)} not found: {INSTALL}"
    if os.geteuid() != 0:
        return f"Slurm's commands read {CONFIG}, which only root can write: run the tests as root, in a container say"
    if CONFIG.exists() and MARK not in CONFIG.read_text():
        return f"{CONFIG} is of another cluster: run the tests on a machine that is in none"
    try:
        import snakemake_executor_plugin_slurm  # noqa: F401
    except ImportError:
        return "Snakemake's executor for Slurm is not installed: pip install -e .[slurm]"
    return None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _ports() -> tuple[int, int]:
    """Two free ports."""
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def _config(folder: Path, cpus: int, megabytes: int) -> str:
    controller, node = _ports()
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    return f"""{MARK}
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoAddrCache,NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Without cgroups Slurm itself looks at a job's memory; it has ended none in the tests so far.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill,NoShared
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_min_interval=200000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={KILL_WAIT}
ReturnToService=2
MinJobAge=7200
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={socket.gethostname()} CPUs={cpus} RealMemory={megabytes}
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime={KILL_WAIT}
PartitionName=urgent Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def _start(folder: Path, name: str, *command: str) -> subprocess.Popen:
    log = (folder / f"{name}.out").open("w")
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PATH": _path()}, start_new_session=True)


@contextlib.contextmanager
def cluster(folder: Path, cpus: int = 2, megabytes: int = 16_000) -> Iterator[Path]:
    """A cluster of one node, `localhost`, with a partition `main` and one, `urgent`, that preempts its jobs.

    Args:
        folder: an empty one for its state and logs.
        cpus: of the node, as Slurm sees it; it may have others.
        megabytes: the node's memory.
    """
    folder.chmod(0o755)
    CONFIG.parent.mkdir(exist_ok=True)
    before = os.environ["PATH"]
    daemons: list[subprocess.Popen] = []
    try:
        CONFIG.write_text(_config(folder, cpus, megabytes))
        os.environ["PATH"] = _path()
        subprocess.run(["mungekey", "--create", f"--keyfile={folder}/munge.key"], check=True)
        places = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        places += [f"--seed-file={folder}/munge.seed", f"--key-file={folder}/munge.key"]
        daemons.append(_start(folder, "munged", "munged", "--foreground", "--num-threads=1", "--force", *places))
        _until(lambda: (folder / "munge.socket").exists(), folder, "munged")
        daemons.append(_start(folder, "slurmctld", "slurmctld", "-D", "-i"))
        _until(lambda: _said("scontrol", "ping").find("UP") >= 0, folder, "slurmctld")
        daemons.append(_start(folder, "slurmd", "slurmd", "-D", "-N", "localhost"))
        _until(lambda: "idle" in _said("sinfo", "--noheader", "--format=%t", "--partition=main"), folder, "slurmd")
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if daemons:
                _said("scancel", "--partition=main")
                _said("scancel", "--partition=urgent")
                _until(lambda: not _said("squeue", "--noheader").strip(), folder, "the end of all jobs", seconds=60)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(timeout=60)
        os.environ["PATH"] = before
        CONFIG.unlink(missing_ok=True)


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _until(condition, folder: Path, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob(f"{what}.*o*")) if path.is_file())
            raise TimeoutError(f"{what} was not there after {seconds} s\n{logs}")
        time.sleep(0.2)


def jobs(*states: str) -> list[dict[str, str]]:
    """The cluster's jobs, newest last: id, state, name, comment, memory, time limit."""
    wanted = f"--states={','.join(states) or 'all'}"
    text = _said("squeue", "--noheader", "--sort=i", wanted, "--format=%i|%T|%j|%k|%m|%l")
    names = ("id", "state", "name", "comment", "memory", "limit")
    return [dict(zip(names, line.split("|"), strict=True)) for line in text.splitlines()]
