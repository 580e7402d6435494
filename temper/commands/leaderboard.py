"""Show the leaderboard of a sweep again.

temper leaderboard demo
temper leaderboard results/sweeps/demo
"""

from pathlib import Path

from temper.planning.plan import RESULTS
from temper.reports.leaderboard import print_leaderboard


def arguments(parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("sweep", help="name of a sweep, or its folder")


def run(arguments) -> None:
    """Print the leaderboard that the comparison wrote."""
    folder = Path(arguments.sweep)
    print_leaderboard(folder if folder.is_dir() else RESULTS / "sweeps" / arguments.sweep)
