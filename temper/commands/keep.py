"""Keep runs: `temper prune` deletes none of their folders. The run that a sweep chose is kept in any case.

    temper keep 09da7523a6 a07cb3abd7
    temper keep --release 09da7523a6
    temper keep                        # which are kept

A run is named as in `temper predict`: by its name, the key that the leaderboard shows, or one of its folders. The list
is results/keep.json.
"""

from temper.runs import find as runs
from temper.runs import kept


def arguments(parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("run", nargs="*", help="name, key or folder of a run")
    parser.add_argument("--release", action="store_true", help="keep these no longer")


def run(arguments) -> None:
    """Change the list, and print it."""
    named = {str(runs.find(word).asked) for word in arguments.run}
    before = set(kept.marked())
    for name in sorted(named - before if arguments.release else []):
        print(f"{name}: was not kept")
    now = before - named if arguments.release else before | named
    if now != before:
        kept.mark(sorted(now))
    print("\n".join(["kept:", *sorted(now)]) if now else "kept: no run but those that sweeps chose")
