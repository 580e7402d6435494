"""Say what the folders of results/ cost, and delete those that are named.

    temper prune --dry-run                 # what there is, what it costs, and what it would cost to make again
    temper prune merged checkpoints        # delete these
    temper prune adapters --sweep demo     # of the runs of a sweep alone

    merged        merged models, but for what other trainings started from: temper merge writes one again
    checkpoints   states of trainings in results/.state: what a longer training, or a killed one, continues from
    adapters      what trainings made: the reports stay, but nothing can answer
    reports       reports that no sweep has
    downloads     archives in results/.state/downloads, out of which data and base models were unpacked

Folders of the run that a sweep chose, and of those that `temper keep` names, are never deleted, nor is anything while a
step is at work in results/. data/raw is not touched, for it may have been edited.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from temper.config.stages import FOLDERS
from temper.errors import UserError, visible
from temper.files import known_json, known_json_lines
from temper.folders import PROVENANCE, delete, working
from temper.planning.plan import RESULTS, STATE
from temper.runs import kept
from temper.units import seconds, size

KINDS = ("merged", "checkpoints", "adapters", "reports", "downloads")


@dataclasses.dataclass
class Item:
    """A folder that may go. `seconds`: what making it took; None: nothing says. `again`: what it would need."""

    kind: str
    folder: Path
    seconds: float | None
    again: str

    @property
    def bytes(self) -> int:
        return sum(path.lstat().st_size for path in self.folder.rglob("*") if path.is_file())


def arguments(parser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; with --dry-run: default: all")
    parser.add_argument("--dry-run", action="store_true", help="delete nothing")
    parser.add_argument("--sweep", help="only folders of this sweep's runs")


def run(arguments) -> None:
    """Print, or delete."""
    for kind in arguments.kinds:
        if kind not in KINDS:
            raise UserError(f"temper prune {kind}: no such kind: name some of {', '.join(KINDS)}")
    if not arguments.kinds and not arguments.dry_run:
        raise UserError(f"name what to delete ({', '.join(KINDS)}), or look at what there is with --dry-run")
    spared = kept.protected()
    wanted = [kind for kind in KINDS if kind in (arguments.kinds or KINDS)]
    items = [item for kind in wanted for item in _of_kind(kind) if item.folder.resolve() not in spared]
    if arguments.sweep:
        items = [item for item in items if item.folder.resolve() in _of_sweep(arguments.sweep)]
    _print(items, wanted)
    if arguments.dry_run:
        print("nothing was deleted")
    else:
        _delete(items)


def _print(items: list[Item], kinds: list[str]) -> None:
    for kind in kinds:
        mine = [(item, item.bytes) for item in items if item.kind == kind]
        print(f"{kind}: {len(mine)} folder(s), {size(sum(number for _, number in mine))}")
        for item, number in sorted(mine, key=lambda pair: -pair[1]):
            took = "nothing says how long it takes" if item.seconds is None else f"takes {seconds(item.seconds)}"
            print(visible(f"  {size(number):>10}  {item.folder}: to make it again {took}{item.again}"))


def _delete(items: list[Item]) -> None:
    freed, gone = 0, 0
    for item in items:
        if busy := working(RESULTS):
            print(f"stopped: {busy} is being made: run this again when nothing is at work")
            break
        number = item.bytes
        delete(item.folder)
        freed, gone = freed + number, gone + 1
    print(f"deleted {gone} of {len(items)} folder(s), {size(freed)}")


# --- what there is -------------------------------------------------------------------------------


def _of_kind(kind: str) -> Iterator[Item]:
    yield from {
        "merged": _merged,
        "checkpoints": _checkpoints,
        "adapters": _adapters,
        "reports": _reports,
        "downloads": _downloads,
    }[kind]()


def _made(stage: str) -> Iterator[tuple[Path, dict]]:
    """(folder, its provenance) of all that a stage made."""
    for path in sorted((RESULTS / FOLDERS[stage]).glob(f"*/{PROVENANCE}")):
        yield path.parent, known_json(path)


def _inputs(stage: str) -> set[str]:
    """Names of the folders that the folders of a stage were made of."""
    return {Path(path).name for _, made in _made(stage) for path in made.get("inputs", {}).values()}


def _item(kind: str, folder: Path, made: dict) -> Item:
    missing = [path for path in made.get("inputs", {}).values() if not Path(path).exists()]
    needs = f", and first {', '.join(missing)}, which is not there" if missing else ""
    return Item(kind, folder, made.get("seconds"), needs)


def _merged() -> Iterator[Item]:
    started_from = _inputs("train_adapter")
    for folder, made in _made("merge_adapter"):
        if folder.name not in started_from:
            yield _item("merged", folder, made)


def _adapters() -> Iterator[Item]:
    for folder, made in _made("train_adapter"):
        trained = known_json(folder / "training.json").get("train_seconds")
        yield dataclasses.replace(_item("adapters", folder, made), seconds=trained or made.get("seconds"))


def _reports() -> Iterator[Item]:
    rows = [row for board in kept.sweeps().values() for row in board.rows]
    shown = {Path(row[name]).name for row in rows for name in ("report", "test_report") if row.get(name)}
    read = _inputs("evaluate_model")
    for folder, made in _made("evaluate_model"):
        if folder.name not in shown | read:
            yield _item("reports", folder, made)


def _checkpoints() -> Iterator[Item]:
    for folder in sorted(path for path in STATE.glob("*") if any(path.glob("checkpoint-*"))):
        lines = known_json_lines(folder / "metrics.jsonl")
        took = lines[-1].get("seconds") if lines else None
        yield Item("checkpoints", folder, took, ", which only a training that was killed, or is to be longer, needs")


def _downloads() -> Iterator[Item]:
    for folder in sorted((STATE / "downloads").glob("*/")):
        yield Item("downloads", folder, None, ", from where its pin says")


def _of_sweep(name: str) -> set[Path]:
    """The folders of a sweep's runs."""
    from temper.runs import find as runs

    board = kept.sweeps().get(name)
    if board is None:
        raise UserError(f"--sweep {name}: has no leaderboard in {RESULTS}/sweeps")
    found: set[Path] = set()
    for row in board.rows:
        report = Path(row["report"])
        parts = [] if row.get("diverged_at_step") or not report.is_dir() else runs.find(str(report)).parts.values()
        found |= {part.resolve() for part in (report, *parts)}
    return found
