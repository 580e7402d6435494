"""How much a tracking store that is locked, slow, killed or frozen slows a training.

    python -m tests.benchmarks.tracking --rounds 5

Trains the tiny model of tests/support/tiny.py with `python -m steps.train_adapter`, as the workflow does, each
variant beside an undisturbed training. Prints a table with the median over the rounds of `train_seconds`, and of the
training thread's own time: less what it waited for a core that others had (Linux counts that in
/proc/<pid>/task/<tid>/schedstat), but with all that it computed and waited for otherwise, such as the interpreter's
lock. On a machine that does nothing else both are the same; on a busy one only the second can be compared. Needs 2
cores and nothing but this repository; writes to a temporary folder.

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

from tests.conftest import ROOT
from tests.support import stores, tiny

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
            print(table(measured), flush=True)


def table(measured: dict[tuple, list]) -> str:
    """Medians over the rounds, as Markdown."""
    lines = [
        "| tracking store | beside | train_seconds | own seconds | ratio, lowest to highest |",
        "|---|---|---|---|---|",
    ]
    for (variant, base), rounds in measured.items():
        ratios = [one["own"] / other["own"] for one, other in rounds]
        spread = f"{statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
        train, own = (
            " : ".join(f"{statistics.median(pair[side][name] for pair in rounds):.1f}" for side in (0, 1))
            for name in ("train", "own")
        )
        lines.append(f"| {variant} | {base} | {train} | {own} | {spread} |")
    return "\n".join(lines)


def measure(variant: str, place: Path, folder: Path, steps: int, together: threading.Barrier) -> dict[str, float]:
    """Train once; {"train": train_seconds, "own": the same, less waiting for a core}."""
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
        prepare = f"from temper.tracking import prepare; prepare({tracking!r}, 'benchmark')"
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
    process = subprocess.Popen([str(part) for part in command], cwd=place, env=environment(), stderr=subprocess.DEVNULL)
    curve = place / "results" / ".state" / "trunk" / "metrics.jsonl"
    seen, acted = [], False
    while process.poll() is None:
        with contextlib.suppress(OSError):  # not begun, or just ended
            lines, waited = curve.read_text().splitlines(), waited_for_core(process.pid)
            if lines and (not seen or len(lines) > seen[-1][0]):
                seen.append((len(lines), time.monotonic(), waited))
            if not acted and len(lines) >= steps / 20:
                middle()
                acted = True
        time.sleep(0.05)
    assert process.returncode == 0, (place / "log").read_text()
    (_, began, before), (_, ended, after) = seen[0], seen[-1]
    facts = json.loads((place / "out" / "training.json").read_text())
    return {"train": facts["train_seconds"], "own": round(ended - began - (after - before), 3)}


def waited_for_core(pid: int) -> float:
    """Seconds that a process's main thread could have run, had there been a core for it."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
