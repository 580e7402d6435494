"""Trainings at once, as the tracking store sees them: each a process of its own with the listener of a training.

    python -m tests.support.followers plan.json

plan.json: {"targets": [as `temper.tracking.follow` takes them], "adapters": [folder], "logs": [file], "ends": [file]},
one of each for a training. A training takes a step every half second, writes its line to metrics.jsonl and gives it to
the listener, until its file in "ends" is there. The last line of its log says how long it then waited for the store.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

from temper import tracking

STEP_SECONDS = 0.5


def train(target: dict, adapter: Path, end: Path) -> float:
    """Train until `end` is there; returns the seconds from then on."""
    with (adapter / "metrics.jsonl").open("w", encoding="utf-8") as file, tracking.follow(target) as listener:
        step, started = 0, time.monotonic()
        while not end.exists():
            step += 1
            line = {"step": step, "loss": 1 / step, "tokens": 10 * step, "seconds": time.monotonic() - started}
            file.write(json.dumps(line) + "\n")
            listener(line)
            time.sleep(STEP_SECONDS)
        file.flush()
        over = time.monotonic()
    return time.monotonic() - over


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import mlflow  # noqa: F401  # once for all, as the workflow does

    children = []
    columns = [plan[name] for name in ("targets", "adapters", "logs", "ends")]
    for target, adapter, log, end in zip(*columns, strict=True):
        if child := os.fork():
            children.append(child)
            continue
        logger = logging.getLogger("temper")
        logger.addHandler(logging.FileHandler(log))
        logger.setLevel(logging.INFO)
        logger.info("waited %.2f s", train(target, Path(adapter), Path(end)))
        os._exit(0)
    assert {os.waitpid(child, 0)[1] for child in children} == {0}


if __name__ == "__main__":
    main()
