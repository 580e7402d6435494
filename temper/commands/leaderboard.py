"""Show the leaderboard of a sweep again.

temper leaderboard demo
temper leaderboard results/sweeps/demo
temper leaderboard demo --watch     # in a second terminal, while the sweep runs
"""

import time
from pathlib import Path

from temper.folders import PROVENANCE
from temper.planning.plan import RESULTS
from temper.reports.leaderboard import BOARD, print_leaderboard

POLL = 1.0  # seconds


def arguments(parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("sweep", help="name of a sweep, or its folder")
    parser.add_argument(
        "--watch", action="store_true", help="show it anew as reports come, until the sweep is complete"
    )


def run(arguments) -> None:
    """Print the leaderboard that the comparison wrote."""
    named = Path(arguments.sweep)
    folder = named if named.is_dir() else RESULTS / "sweeps" / arguments.sweep
    if arguments.watch:
        watch(folder)
    else:
        print_leaderboard(folder)


def watch(folder: Path) -> None:
    """Print the leaderboard whenever it is written, until it is that of the complete sweep."""
    board, shown = folder / BOARD, None
    if not board.is_file():
        print(f"{folder}: waiting for the first reports", flush=True)
    while True:
        complete = (folder / PROVENANCE).is_file()  # written last
        written = board.stat().st_mtime_ns if board.is_file() else None
        if written != shown or (complete and not shown):
            print_leaderboard(folder)
            print(flush=True)
        if complete:
            return
        shown = written
        time.sleep(POLL)
