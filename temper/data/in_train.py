"""Which rows of the splits that models are judged on stand in train as well, from the prompts to the evaluation."""

import shutil
from pathlib import Path
from typing import NamedTuple

from temper.data import overlap, report
from temper.files import each_json_line, json_text, read_json, write_whole

FILE = "overlap.json"
KINDS = ("prompt", "near")  # of overlaps; rows of one group are others


class InTrain(NamedTuple):
    """`rows`: split -> kind -> ids of the rows that stand in train with the same prompt, or nearly the same one.

    `report`: where the data report is.
    """

    rows: dict[str, dict[str, list[int]]]
    report: str


def write(prompts: Path, splits: Path) -> None:
    """Take over into a folder of splits what format_prompts or mix_prompts found, if that is in their folder."""
    if not (prompts / overlap.FILE).is_file():
        return
    stats = read_json(prompts / "stats.json", {"splits": dict[str, dict]})["splits"]
    rows: dict[str, dict[str, list[int]]] = {"validation": {}, "test": {}}
    # What data.on_overlap=drop finds does not stand in train any more.
    for one in each_json_line(prompts / overlap.FILE) if not stats["train"].get("left_out_by_overlap") else ():
        if one["other"] == "train" and one["kind"] in KINDS:
            rows[one["split"]].setdefault(one["kind"], []).append(one["id"])
    write_whole(splits / FILE, json_text({"rows": rows, "report": str(prompts / report.PAGE)}))


def copy(splits: Path, other: Path) -> None:
    """Take it over into splits that are made of splits."""
    if (splits / FILE).is_file():
        shutil.copyfile(splits / FILE, other / FILE)


def read(splits: Path) -> InTrain | None:
    """What is known of a folder of splits; None where nothing is."""
    if not (splits / FILE).is_file():
        return None
    return InTrain(**read_json(splits / FILE, {"rows": dict[str, dict[str, list[int]]], "report": str}))
