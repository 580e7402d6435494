"""The list of suspicious rows: as CSV, and on the page of a sweep."""

from pathlib import Path

from temper.files import read_json
from temper.reports import html
from temper.reports.leaderboard import csv_text as csv_of

FILE = "suspects.json"
CSV = "suspects.csv"
LONGEST_TEXT = 200  # characters of a prompt or an answer


def csv_text(listed: list[dict], figure: str) -> str:
    """The list as CSV.

    Args:
        listed: as `suspects` in suspects.json.
        figure: what the rows are ordered by, the heading of that column.
    """
    return csv_of([_cells(line, figure) for line in listed])


def _cells(line: dict, figure: str) -> dict:
    names = {"suspicion": figure}
    return {names.get(name, name): _shown(value) for name, value in line.items() if name != "id"}


def _shown(value):
    return html.short(value, LONGEST_TEXT) if isinstance(value, str) else value


def read(folder: str | None) -> dict | None:
    """What the page shows of a folder of score_rows; None where it is not made, or not yet."""
    if folder is None or not (Path(folder) / FILE).is_file():
        return None
    return read_json(Path(folder) / FILE, {"figure": str, "rows": dict[str, int], "suspects": list[dict]})
