"""The data report: what became of the rows, and what those that are left are like, for report.json and its page."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from temper.data import rejected
from temper.data.columns import SPLITS
from temper.data.languages import count_languages
from temper.data.overlap import KINDS, NearTrain, Overlap, by_pair
from temper.data.places import Place, named_place
from temper.data.survey import DOCUMENTS, QUANTILES, Row, Survey
from temper.errors import short
from temper.files import each_json_line, json_text, read_json, write_whole

log = logging.getLogger("temper")
FILE = "report.json"
PAGE = "report.html"
SHOWN = 5  # of each kind of rows that repeat or contradict each other
SHOWN_ANSWERS = 3  # to one prompt


@dataclasses.dataclass
class Report:
    """The content of report.json, but for the places of the rows that it names until it is written."""

    content: dict[str, Any]
    named: list[dict]
    """All rows in `content`."""

    @property
    def ids(self) -> set[int]:
        """Of the rows named."""
        return {row["id"] for row in self.named}

    def write(self, folder: Path, where: dict[int, Place]) -> None:
        """Write report.json, with the places of the rows in the raw data, and warn of contradicting labels."""
        for row in self.named:
            row["place"] = named_place(where, row["id"])
        write_whole(folder / FILE, json_text(self.content))
        several = self.content["several"]
        if several["prompts"] and self.content["labels"]:
            places = ", ".join(row["place"] for row in several["first"][0])
            log.warning(
                "warning: %d prompts have more than one label (%d rows): the first is %s (%s shows more)",
                several["prompts"],
                several["rows"],
                short(places),
                PAGE,
            )


# --- what became of the rows ---------------------------------------------------------------------


def rows_of(folder: Path, stats: dict) -> dict:
    """What became of the rows of one data set.

    Args:
        folder: of format_prompts, with its rejected.jsonl if it has one.
        stats: the content of stats.json. A row of several pairs counts as often as it has some there.
    """
    splits = stats["splits"]
    return {
        "read": stats["rows"] + stats.get("ties", 0),
        "left_out_by_where": stats["left_out_by_where"],
        "rejected": _rejected(folder / rejected.FILE, stats.get("rejected", {}).get("by_reason", {})),
        "ties": stats.get("ties", 0),
        "left_out_by_limit": {split: splits[split]["left_out_by_limit"] for split in SPLITS},
        "left_out_by_overlap": {split: splits[split]["left_out_by_overlap"] for split in SPLITS},
        "kept": {split: splits[split]["rows"] for split in SPLITS},
    }


def _rejected(path: Path, by_reason: dict[str, int]) -> dict[str, dict]:
    """Kind of reason -> how many rows, and where the first is and why."""
    first: dict[str, dict] = {}
    for row in each_json_line(path) if by_reason else ():
        at = Place(row["file"], row.get("line", row.get("row")), counts_rows="row" in row)
        first.setdefault(row["kind"], {"place": str(at), "reason": row["reason"]})
        if len(first) == len(by_reason):
            break
    return {kind: {"rows": count, **first[kind]} for kind, count in by_reason.items()}


def rows_of_mixture(prompts: list[Path], weights: dict[str, float], splits: dict[str, dict]) -> dict:
    """What became of the rows of a mixture.

    Args:
        prompts: folders of format_prompts, with their report.json.
        weights: of the data sets, in the same order.
        splits: as in stats.json.
    """
    sources = {
        source: {
            **read_json(folder / FILE, {"rows": dict})["rows"],
            "weight": weight,
            "report": str(folder / PAGE),
            "mixed": {split: splits[split]["by_source"].get(source, 0) for split in SPLITS},
        }
        for source, weight, folder in zip(weights, weights.values(), prompts, strict=True)
    }
    return {
        "sources": sources,
        "left_out_by_overlap": {split: splits[split]["left_out_by_overlap"] for split in SPLITS},
        "kept": {split: splits[split]["rows"] for split in SPLITS},
    }


# --- what the rows are like ----------------------------------------------------------------------


def make(folder: Path, rows: dict, found: list[Overlap], near: NearTrain) -> Report:
    """Look at the splits in a folder.

    Args:
        folder: of format_prompts or mix_prompts, with its splits as they are to be.
        rows: what became of the rows of the raw data: `rows_of` or `rows_of_mixture`.
        found, near: what `temper.data.overlap.find` found.
    """
    told = [*_once(near.found), *(one for some in by_pair(found) for one in _first_of_kinds(some))]
    sides = {side for one in told for side in ((one.split, one.id), (one.other, one.other_id))}
    survey, report = Survey(folder, sum(rows["kept"].values()), sides), Report({}, [])
    repeats, several, labels = survey.repeats(SHOWN), survey.several(SHOWN, SHOWN_ANSWERS), survey.labels.table()

    no_language = labels is not None or survey.kind == DOCUMENTS  # of answers: too short to tell, or there is none

    def named(row: Row) -> dict:
        report.named.append({**row._asdict(), "place": ""})
        return report.named[-1]

    def both(one: Overlap) -> dict:
        sides = survey.find(one.split, one.id), survey.find(one.other, one.other_id)
        return {"kind": one.kind, "similarity": one.similarity, "rows": [named(side) for side in sides]}

    report.content |= {
        "rows": rows,
        "kind": survey.kind,
        "repeated_by_weights": survey.repeated,
        "labels": labels,
        "labels_differ_by_chance": _chance(labels) if labels else None,
        "several": {**several._asdict(), "first": [list(map(named, some)) for some in several.first]},
        "duplicates": {"rows": repeats.rows, "first": [list(map(named, some)) for some in repeats.first]},
        "near_duplicates": {
            "looked_at": near.prompts,
            "whole": near.whole,
            "prompts": len(near.found),
            "first": list(map(both, _once(near.found))),
        },
        "overlap": [_overlap(some, both) for some in by_pair(found)],
        "characters": {"quantiles": QUANTILES, **survey.lengths_of()},
        "languages": {
            "rows": len(survey.sampled),
            "prompt": count_languages(asked for asked, _ in survey.sampled),
            "answer": None if no_language else count_languages(answer for _, answer in survey.sampled),
        },
    }
    return report


def _chance(labels: dict[str, dict[str, int]]) -> float | None:
    """Probability that the labels' shares differ so much between the splits by chance: p of Pearson's chi-squared test.

    As scipy.stats.chi2_contingency without Yates' correction, which takes a second to import.
    """
    import numpy as np
    from scipy.special import chdtrc

    table = np.array([list(rows.values()) for rows in labels.values()])
    table = table[:, table.any(axis=0)]
    if min(table.shape) < 2:
        return None
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    return float(chdtrc(freedom, ((table - expected) ** 2 / expected).sum()))


def _once(found: list[Overlap]) -> list[Overlap]:
    """The first near prompts of train, each two of them once."""
    pairs = {frozenset((one.id, one.other_id)): one for one in reversed(found)}
    return sorted(pairs.values(), key=lambda one: one.id)[:SHOWN]


def _of_kinds(found: list[Overlap]) -> dict[str, list[Overlap]]:
    return {kind: [one for one in found if one.kind == kind] for kind in KINDS}


def _first_of_kinds(found: list[Overlap]) -> list[Overlap]:
    return [one for some in _of_kinds(found).values() for one in some[:SHOWN]]


def _overlap(found: list[Overlap], both: Callable[[Overlap], dict]) -> dict:
    """Of two splits: how many rows they share, by kind, and the first of each kind."""
    return {
        "split": found[0].split,
        "other": found[0].other,
        "rows": {kind: len(some) for kind, some in _of_kinds(found).items()},
        "first": list(map(both, _first_of_kinds(found))),
    }
