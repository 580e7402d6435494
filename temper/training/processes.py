"""One training in several processes of this machine, a device for each: what they share, and how they find each other.

The step's own process is the first. It checks everything, starts the others, and alone writes: log, metrics, MLflow,
checkpoints (but for their random states), output. The others run the same training on their share of each batch, by
`torch.distributed` and accelerate, as `accelerate launch` would start them. They find each other by a file, so no port
is chosen or left open.

A process that dies takes all others along: those that are started end when their standard input does, and the first
ends when one of them does. So the next command finds the state of one training, as after any kill.
"""

import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from temper.errors import UserError, one_line_errors
from temper.model.spread import is_spread
from temper.signals import ENDING

log = logging.getLogger("temper")
READY = "ready"
CODE = Path(__file__).resolve().parents[2]  # that of this process, whatever is installed
UNUSED = "Expected to have finished reduction"  # DistributedDataParallel, of weights that got no gradient
# While the first process writes a checkpoint of a large model, or all of them evaluate, the others wait.
PATIENCE = timedelta(hours=6)
# Seconds that the first process gets to notice by itself that another has ended; within NCCL it may never.
GRACE = 20.0


# --- in each of them -----------------------------------------------------------------------------


def count() -> int:
    """How many processes train together; 1: this one by itself."""
    import torch

    return torch.distributed.get_world_size() if _are_joined() else 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    import torch

    return not _are_joined() or torch.distributed.get_rank() == 0


def gathered(value) -> list:
    """The value of each process, in their order. All of them must call this."""
    import torch

    if not _are_joined():
        return [value]
    values: list = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def gathered_rows(rows):
    """A tensor of each process, without gradient, as one on this process's device, one below the other."""
    import torch

    if not _are_joined():
        return rows
    return torch.cat([part.to(rows.device) for part in gathered(rows.detach().cpu())])


def added(figures: dict) -> dict:
    """Sums over the processes of the figures that each has by name. All of them must call this."""
    parts = gathered(figures)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def of_first(value):
    """The first process's value. All of them must call this."""
    return gathered(value)[0]


def wait_for_all() -> None:
    """Return when all of them have come here."""
    import torch

    if _are_joined():
        torch.distributed.barrier()


def within_forward(model, function, *arguments):
    """`function(network, *arguments)` as the forward pass of what holds the network together in several processes.

    DistributedDataParallel averages gradients, and FSDP gathers weights; both prepare for that in their own forward
    pass, while our loss calls the layers one by one. So for one call the function is the forward pass of the network
    within the one, or of the outermost network that the other has spread.
    """
    from torch.nn.parallel import DistributedDataParallel

    whole: Any = model
    call = model
    if isinstance(model, DistributedDataParallel):
        whole = network = model.module
    elif is_spread(model):
        call = network = model.get_base_model() if hasattr(model, "get_base_model") else model
    else:
        return function(model, *arguments)
    own = vars(network).get("forward")  # mixed precision and hooks set one on the object itself

    def once(*given):
        restore()
        return function(whole, *given)

    def restore():
        if own is None:
            vars(network).pop("forward", None)
        else:
            network.forward = own

    network.forward = once
    try:
        return call(*arguments)
    finally:
        restore()


def _are_joined() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def joined(rank: int, processes: int, meeting: Path, use_cpu: bool) -> Iterator[None]:
    """Within the block this process is one of several.

    Args:
        rank: which; the first is 0.
        meeting: a file that does not exist yet, the same for all.
        use_cpu: compute there, whatever else the machine has.
    """
    import torch
    from accelerate.state import AcceleratorState

    on_gpu = not use_cpu and torch.cuda.is_available()
    if on_gpu:
        if torch.cuda.device_count() < processes:
            raise UserError(f"num_processes={processes}: this job sees {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(rank)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    interface = "lo0" if sys.platform == "darwin" else "lo"  # of this machine alone, whatever its name resolves to
    environment = {name: str(value) for name, value in places.items()} | {
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", interface),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # accelerate would choose a number
        "ACCELERATE_USE_CPU": str(not on_gpu),
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=meeting.absolute().as_uri(),
        rank=rank,
        world_size=processes,
        timeout=PATIENCE,
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# --- in the first --------------------------------------------------------------------------------


class Others:
    """The other processes of a training, from when they start to import the libraries until it has ended."""

    def __init__(self, module: str, job: dict, processes: int, use_cpu: bool, folder: Path):
        self.processes, self.use_cpu, self.meeting = processes, use_cpu, folder / "meeting"
        self.logs = [folder / f"{rank}.log" for rank in range(1, processes)]
        self.over = threading.Event()
        self.started = [self._start(module, job, rank) for rank in range(1, processes)]

    def _start(self, module: str, job: dict, rank: int) -> subprocess.Popen:
        words = [sys.executable, "-m", "temper.training.processes", module]
        code = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": code}
        pipe = subprocess.PIPE
        with self.logs[rank - 1].open("w") as errors:
            process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=errors, text=True, env=environment)
        place = {"rank": rank, "processes": self.processes, "meeting": str(self.meeting), "use_cpu": self.use_cpu}
        with contextlib.suppress(BrokenPipeError):  # it has ended: its log says why
            process.stdin.write(json.dumps({"place": place, "job": job}) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        return process

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Within the block, this process and the others train together. All of the training must be in it.

        Raises:
            UserError: one of the others ended before the training did.
        """
        for process in self.started:
            if not any(line.strip() == READY for line in process.stdout):  # type: ignore[union-attr]
                raise UserError(self._end_of(process))
        with joined(0, self.processes, self.meeting, self.use_cpu):
            threading.Thread(target=self._watch, daemon=True).start()
            try:
                yield
            except BaseException as error:
                reason = self._reason(error)
                self.end()  # before this process leaves, which may wait for them
                if reason:
                    raise UserError(reason) from error
                raise
            finally:
                self.over.set()

    def _reason(self, error: BaseException) -> str | None:
        """What an error of this process came from, if it says too little: often another process that has failed."""
        if UNUSED in str(error):
            return (
                "not all trained weights were part of a step's loss, which several processes must know before: "
                "set train.ddp_find_unused_parameters=true"
            )
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return None
        ended = self._first_to_end(GRACE / 2)  # what torch raises when another process is gone has many types
        return self._end_of(ended) if ended else None

    def _first_to_end(self, seconds: float) -> subprocess.Popen | None:
        """A process that has failed, or fails within some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            for process in self.started:
                if process.poll():
                    return process
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)

    def _watch(self) -> None:
        """End this process if another one has failed, and it waits for that one for ever."""
        while not self.over.wait(0.5):
            ended = self._first_to_end(0)
            if ended is not None and not self.over.wait(GRACE):
                print(f"error: {self._end_of(ended)}", file=sys.stderr, flush=True)
                os._exit(1)

    def _end_of(self, process: subprocess.Popen) -> str:
        """Why a process ended, in a line."""
        rank, code = self.started.index(process) + 1, process.wait()
        lines = self.logs[rank - 1].read_text(errors="replace").strip().splitlines()
        why = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        said = f": {lines[-1].removeprefix('error: ')}" if lines else ""
        return (
            f"process {rank + 1} of the {self.processes} of this training {why}{said}; run the same command again, and "
            "it goes on from the last checkpoint"
        )

    def end(self) -> None:
        """End those that are left: what they compute nobody needs."""
        for process in self.started:
            process.stdin.close()  # type: ignore[union-attr]
            process.kill()
            process.wait()


class Alone:
    """No other processes."""

    joined = staticmethod(contextlib.nullcontext)


@contextlib.contextmanager
def started(module: str, job: dict, processes: int, use_cpu: bool) -> Iterator[Others | Alone]:
    """Start the other processes of a training; at the end of the block none is left.

    Args:
        module: name of the module whose `other_process(job)` gives what the others call when they have joined.
        job: of values that JSON has.
        processes: how many there are with this one.
        use_cpu: see `joined`.
    """
    if processes == 1:
        yield Alone()
        return
    with tempfile.TemporaryDirectory(prefix="temper-") as folder:
        others = Others(module, job, processes, use_cpu, Path(folder))
        try:
            yield others
        finally:
            others.end()


# --- in the others -------------------------------------------------------------------------------


def main() -> None:
    """Join a training that another process started, and do its share."""
    for number in ENDING:  # the first process decides; without it this one ends below
        signal.signal(number, signal.SIG_IGN)
    what = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    place = {**what["place"], "meeting": Path(what["place"]["meeting"])}
    with one_line_errors(stage="train_adapter"):
        train = importlib.import_module(sys.argv[1]).other_process(what["job"])
        print(READY, flush=True)
        os.dup2(2, 1)  # nobody reads what libraries print from now on
        with joined(**place):
            train()


def _end_with_the_first() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
