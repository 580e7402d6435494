"""Which folders of results/ are never deleted: those of the runs that sweeps chose, and of runs that a person keeps."""

from pathlib import Path

from temper.errors import UserError
from temper.files import json_text, read_json, write_whole
from temper.planning.plan import RESULTS
from temper.reports.leaderboard import BOARD, Board, read_board
from temper.runs import find as runs

FILE = RESULTS / "keep.json"


def marked() -> list[str]:
    """The runs that are kept by hand, by the folders that name them."""
    return read_json(FILE, {"runs": list[str]})["runs"] if FILE.is_file() else []


def mark(names: list[str]) -> None:
    """Keep these runs and no others."""
    write_whole(FILE, json_text({"runs": sorted(names)}))


def sweeps() -> dict[str, Board]:
    """Sweep -> its leaderboard, of all that have one."""
    return {path.parent.name: read_board(path.parent) for path in sorted((RESULTS / "sweeps").glob(f"*/{BOARD}"))}


def protected() -> dict[Path, str]:
    """Folder -> why it stays: the parts of chosen and of kept runs.

    Raises:
        UserError: a leaderboard is damaged, or a kept run is not to be found, so that nothing tells what to spare.
    """
    found: dict[Path, str] = {}
    for name, board in sweeps().items():
        if report := board.chosen_row.get("report"):
            _add(found, Path(report), f"is of the run that sweep {name} chose")
    for name in marked():
        _add(found, Path(name), "is of a run that is kept")
    return found


def _add(found: dict[Path, str], folder: Path, why: str) -> None:
    if not folder.is_dir():
        return  # deleted by a person: its other parts are found by nothing
    try:
        parts = runs.find(str(folder)).parts
    except UserError as error:
        raise UserError(f"{folder}: {why}, and its parts cannot be told: {error}") from None
    for part in parts.values():
        found.setdefault(part.resolve(), why)
