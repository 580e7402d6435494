"""How much a tracking store that is locked, slow, killed or frozen slows a training.

    python -m tests.benchmarks.tracking --rounds 5

Trains the tiny model of tests/tiny.py with `python -m steps.train_adapter`, as the workflow does. Each variant runs
beside an undisturbed training of the same kind, so that whatever else the machine does slows both, and the figure
is the ratio of their `train_seconds`: its median over the rounds, and the lowest and highest. Takes 2 cores and needs
nothing but this repository; writes to a temporary folder.

The model is so small that a step takes 10 ms and is mostly Python: the worst case for a thread that shares the
interpreter.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import stores, tiny
from tests.conftest import ROOT

STEPS_PER_EPOCH = 200
SQLITE, SERVER = "SQLite, undisturbed", "server, undisturbed"
PAIRS = [  # (variant, the training beside it)
    ("tracking=none", SQLITE),
    ("SQLite, locked from start to end", SQLITE),
    (SERVER, SQLITE),
    ("server, 3 s late with each answer", SERVER),
    ("server, killed in the middle", SERVER),
    ("server, frozen (SIGSTOP) in the middle", SERVER),
]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of a training")
    arguments = parser.parse_args(argv)
    measured = {pair: [] for pair in PAIRS}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as both:
        folder = Path(folder)
        tiny.make_tiny_model(folder / "model")
        tiny.make_tiny_splits(folder / "splits", folder / "model", {"train": tiny.tiny_rows(160) * 10})
        for number in range(arguments.rounds):
            for pair in PAIRS:
                places = [folder / f"{number}-{PAIRS.index(pair)}-{side}" for side in "ab"]
                together = threading.Barrier(2)
                jobs = [
                    both.submit(measure, variant, place, folder, arguments.steps, together)
                    for variant, place in zip(pair, places, strict=True)
                ]
                measured[pair].append([job.result() for job in jobs])
                print(f"round {number + 1}, {pair}: {measured[pair][-1]}", file=sys.stderr, flush=True)
    print(table(measured))


def table(measured: dict[tuple, list]) -> str:
    """Medians over the rounds, as Markdown."""
    lines = ["| tracking store | beside | train_seconds | ratio, lowest to highest | CPU, s |", "|---|---|---|---|---|"]
    for (variant, base), rounds in measured.items():
        ratios = [one["train"] / other["train"] for one, other in rounds]
        spread = f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
        train, cpu = (
            " : ".join(f"{statistics.median(pair[side][name] for pair in rounds):.1f}" for side in (0, 1))
            for name in ("train", "cpu")
        )
        lines.append(f"| {variant} | {base} | {train} | {spread} | {cpu} |")
    return "\n".join(lines)


def measure(variant: str, place: Path, folder: Path, steps: int, together: threading.Barrier) -> dict[str, float]:
    """Train once; {"train", "whole", "cpu"} in seconds."""
    server = stores.Server(place / "server")
    with contextlib.ExitStack() as undo:
        undo.callback(server.kill)
        uri = None
        if variant.startswith("server"):
            uri = server.start().uri
        tracking = {
            "enabled": variant != "tracking=none",
            "tracking_uri": uri,
            "experiment_name": "benchmark",
            "registered_model_name": None,
            "flush_seconds": 5.0,
        }
        prepare = f"from steps.lib.tracking import prepare; prepare({tracking!r}, 'benchmark')"
        subprocess.run([sys.executable, "-c", prepare], cwd=place, env=environment(), check=True)
        if "late" in variant:
            tracking["tracking_uri"], _ = undo.enter_context(stores.slow_line(server.port, 3.0))
        if "locked" in variant:
            undo.enter_context(stores.locked(place / "results" / "mlflow.db", readers=True))
        act = {"killed": server.kill, "frozen": server.freeze}
        middle = next((action for word, action in act.items() if word in variant), lambda: None)
        together.wait()
        return train(place, folder, steps, tracking, middle)


def train(place: Path, folder: Path, steps: int, tracking: dict, middle) -> dict[str, float]:
    target = {"tracking": tracking, "sweep": "benchmark", "run": "run", "title": "run"}
    plan = {"jobs": {"out": {"settings": {"trunk": "trunk", "follow": target}}}}
    (place / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "steps.train_adapter", "--splits", folder / "splits", "--model", folder / "model"]
    command += ["--output", "out", "--plan", "plan.json", "--log", "log", "experiment=smoke", "adapter.r=4"]
    command += ["model.load.dtype=float32", "train.per_device_train_batch_size=8", "train.logging_steps=10"]
    command += [f"train.num_train_epochs={steps // STEPS_PER_EPOCH}", "train.eval_strategy=no"]
    started = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], cwd=place, env=environment(), stderr=subprocess.DEVNULL)
    curve = place / "results" / ".state" / "trunk" / "metrics.jsonl"
    while not curve.is_file() or curve.read_text().count("\n") < steps / 20:
        assert process.poll() is None, (place / "log").read_text()
        time.sleep(0.2)
    middle()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (place / "log").read_text()
    facts = json.loads((place / "out" / "training.json").read_text())
    whole = round(time.monotonic() - started, 1)
    return {"train": facts["train_seconds"], "whole": whole, "cpu": round(used.ru_utime + used.ru_stime, 1)}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
