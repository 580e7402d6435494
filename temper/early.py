"""The sweep's page and leaderboard while the sweep runs: made again when there are new reports.

    python -m temper.early PLAN      # once, with the reports that are there

Only leaderboard and page are written, and say that they are partial. The comparison at the end, which holds the same
lock, adds `provenance.json`: once that is there, nothing is written any more.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from temper.errors import one_line_errors
from temper.folders import PROVENANCE, locked
from temper.forks import start as forks
from temper.planning import plan as planning
from temper.step import logging_to

SHARE = 0.05  # of the sweep's time, at most
FIRST = 3.0  # seconds that the first page is expected to take
POLL = 2.0  # seconds


class Pages:
    """A thread that has the page made, at a lower priority, as often as `SHARE` allows.

    Args:
        plan: the plan, to which a search adds runs.
        path: gives the frozen plan's file of this moment.
    """

    def __init__(self, plan: planning.Plan, path):
        self.plan, self.path, self.stopped = plan, path, threading.Event()
        self.log = plan.comparison.log.with_suffix(".early.log")
        self.thread = threading.Thread(target=self._make_pages, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Make no other page. One that is being made is finished, which takes seconds."""
        self.stopped.set()
        self.thread.join()

    def _make_pages(self) -> None:
        began, spent, cost, shown = time.monotonic(), 0.0, FIRST, 0
        while not self.stopped.wait(POLL):
            now, runs = time.monotonic(), list(self.plan.runs)
            there = sum(Path(run.artefacts["evaluate_model"], PROVENANCE).is_file() for run in runs)
            if shown < there < len(runs) and spent + cost <= SHARE * (now - began):
                if not self._make():
                    print(f"note: no page before the sweep's end: see {self.log}", file=sys.stderr)
                    return
                cost, shown = time.monotonic() - now, there
                spent += cost

    def _make(self) -> bool:
        """Make the page once, in a process that shares its start-up with the jobs."""
        command = [sys.executable, "-SP", "-m", "temper.forks.client", "temper.early", self.path()]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log:
            return not subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=forks.environment_of(1), check=False
            ).returncode


def compare_what_is_there(plan: planning.Plan) -> None:
    """Write leaderboard and page, unless the comparison has done it."""
    from steps import compare_runs

    folder = Path(plan.leaderboard).parent
    with locked(folder):
        if not Path(plan.complete).exists():
            compare_runs.compare(plan.comparison.config, folder, growing=True)


def main(argv: list[str]) -> None:
    """The command."""
    os.nice(5)
    with one_line_errors(), logging_to(None):
        compare_what_is_there(planning.load(argv[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
