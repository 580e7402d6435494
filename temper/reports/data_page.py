"""The page of a data set: what became of its rows, which repeat or contradict each other, and what they are like."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from temper.data.columns import SPLITS
from temper.data.languages import NO_LANGUAGE, UNKNOWN
from temper.data.overlap import HELD_OF_TRAIN, KINDS, NEAR
from temper.data.report import PAGE
from temper.reports import html
from temper.units import count

LONGEST = 600  # characters of a text that are shown
UNLIKELY = 0.001  # probability of so different shares of labels by chance, below which the page says so
RARE = 0.01  # share of the rows in another language from which the page says so
LANGUAGES = 15  # listed
NAMES = {UNKNOWN: "not sure (short texts, names, code)", NO_LANGUAGE: "none (numbers, markup)"}
DIFFERENT = {
    "answers": ("Prompts with several answers", "prompts have more than one answer"),
    "labels": ("Contradicting labels", "prompts have more than one label"),
    "pairs": ("Pairs ranked both ways", "pairs stand in the data in both orders, each answer chosen once"),
    "documents": ("", ""),
    "judged": ("Answers judged both ways", "answers to the same prompt are called desirable and undesirable"),
}


def write_page(output: Path, report: dict[str, Any]) -> None:
    """Write report.html. `report`: the content of report.json, of the splits that are in `output`."""
    texts = dict(_texts(output, _named(report)))
    kind = "labels" if report["kind"] == "answers" and report["labels"] else report["kind"]
    title, what = DIFFERENT[kind]
    html.render(
        "data.html",
        output / PAGE,
        report=report,
        rows=report["rows"],
        splits=[split for split in SPLITS if report["rows"]["kept"][split]],
        findings=list(_findings(report, what)),
        kinds=KINDS,
        unit="documents" if kind == "documents" else "prompts",
        near=NEAR,
        most_held=HELD_OF_TRAIN,
        several={**report["several"], "title": title, "what": what, "first": _answers(report, texts)},
        duplicates=[(some, texts.get(_key(some[-1]))) for some in report["duplicates"]["first"]],
        near_pairs=[_side_by_side(pair, texts) for pair in report["near_duplicates"]["first"]],
        overlaps=[[_side_by_side(pair, texts) for pair in some["first"]] for some in report["overlap"]],
        labels=_shares(report["labels"], report["rows"]["kept"]),
        lengths=_lengths(report["characters"]),
        languages=_languages(report["languages"]),
    )


# --- the rows that are shown ---------------------------------------------------------------------


def _named(report: dict) -> list[dict]:
    """All rows that the report names and that are in its splits."""
    pairs = [*report["near_duplicates"]["first"], *(pair for some in report["overlap"] for pair in some["first"])]
    some = [*report["several"]["first"], *report["duplicates"]["first"], *(pair["rows"] for pair in pairs)]
    return [row for rows in some for row in rows if row["line"] is not None]


def _key(row: dict) -> tuple[str, int | None]:
    return row["split"], row["line"]


def _texts(folder: Path, rows: list[dict]) -> Iterator[tuple[tuple, dict[str, str]]]:
    """(split, line) -> the texts of the row there, cut."""
    wanted = {_key(row) for row in rows}
    for split in {split for split, _ in wanted}:
        with (folder / f"{split}.jsonl").open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if (split, number) in wanted:
                    yield (split, number), _row_texts(json.loads(line))


def _row_texts(record: dict) -> dict[str, str]:
    *before, last = record["messages"]
    alone = len(before) == 1
    lines = [message["content"] if alone else f"{message['role']}: {message['content']}" for message in before]
    calls = f"\n{json.dumps(last['tool_calls'], ensure_ascii=False)}" if last.get("tool_calls") else ""
    if not before:
        return {"prompt": _cut(last["content"])}
    found = {"prompt": "\n".join(lines), "answer": last["content"] + calls}
    if "rejected" in record:
        found["rejected"] = record["rejected"]
    if "label" in record:
        found["answer"] += " (desirable)" if record["label"] else " (undesirable)"
    return {name: _cut(text) for name, text in found.items()}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({count(len(text) - LONGEST)} characters more)"


def _answers(report: dict, texts: dict) -> list[tuple[str, list[tuple[dict, dict]]]]:
    """(prompt, its rows and their texts) of what has different answers."""
    several = [[(row, texts[_key(row)]) for row in some] for some in report["several"]["first"]]
    return [(some[0][1]["prompt"], some) for some in several]


def _side_by_side(pair: dict, texts: dict) -> dict:
    """A pair of rows with the words of their prompts, and which of these the other has not."""
    found = [texts.get(_key(row)) for row in pair["rows"]]
    there = [text["prompt"] for text in found if text]  # data.on_overlap may have taken out one, or both
    marked = iter(_marked(*there) if len(there) == 2 else [[(prompt, False)] for prompt in there])
    sides = [
        {"row": row, "prompt": next(marked) if text else None, "answer": text and text.get("answer")}
        for row, text in zip(pair["rows"], found, strict=True)
    ]
    return {**pair, "sides": sides}


def _marked(one: str, other: str) -> list[list[tuple[str, bool]]]:
    """The two texts in parts, each with whether it differs from the other text."""
    first, second = (re.findall(r"\s+|\S+", text) for text in (one, other))
    steps = difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    left = [("".join(first[start:end]), kind != "equal") for kind, start, end, _, _ in steps if end > start]
    right = [("".join(second[start:end]), kind != "equal") for kind, _, _, start, end in steps if end > start]
    return [left, right]


# --- what the tables and the first lines say -----------------------------------------------------


def _findings(report: dict, different: str) -> Iterator[tuple[bool, str]]:
    """(whether it makes figures wrong or trains on what nobody meant, what there is to look into)."""
    rows, train = report["rows"], report["rows"]["kept"]["train"] - report["repeated_by_weights"]
    unit = "documents" if report["kind"] == "documents" else "prompts"
    for some in report["overlap"]:
        number, taken = sum(some["rows"].values()), rows["left_out_by_overlap"][some["other"]]
        done = f"; data.on_overlap took {count(taken)} rows out of {some['other']}" if taken else ""
        yield not taken, f"{count(number)} rows of {some['split']} stand in {some['other']}, too{done}."
    several = report["several"]
    if several["prompts"]:
        contradict = report["labels"] is not None or report["kind"] != "answers"
        yield contradict, f"{count(several['prompts'])} {different} ({count(several['rows'])} rows)."
    if bad := sum(one["rows"] for one in rows.get("rejected", {}).values()):
        yield True, f"{count(bad)} of {count(rows['read'])} rows are bad and left out."
    if (chance := report["labels_differ_by_chance"]) is not None and chance < UNLIKELY:
        yield True, f"The labels' shares differ between the splits, by more than chance (p={chance:.1g})."
    if again := report["duplicates"]["rows"]["train"]:
        yield False, f"{count(again)} of {count(train)} training rows repeat an earlier one."
    near = report["near_duplicates"]
    if near["prompts"]:
        of = "" if near["whole"] else " of a sample"
        prompts = f"{count(near['prompts'])} of {count(near['looked_at'])} {unit}{of} in train"
        yield False, f"{prompts} nearly repeat another there."
    languages = report["languages"]["prompt"]
    known = {name: rows for name, rows in languages.items() if name not in (UNKNOWN, NO_LANGUAGE)}
    if (others := sum(list(known.values())[1:])) > RARE * sum(languages.values()):
        main = next(iter(known))
        yield False, f"{count(others)} of {count(sum(known.values()))} {unit} are in another language than {main}."


def _shares(labels: dict[str, dict[str, int]] | None, kept: dict[str, int]) -> list[tuple[str, int, dict[str, float]]]:
    """(label, its rows, split -> its share of the rows there)."""
    sums = {split: sum(rows[split] for rows in (labels or {}).values()) for split in kept}
    return [
        (label, sum(rows.values()), {split: rows[split] / sums[split] for split in rows if sums[split]})
        for label, rows in (labels or {}).items()
    ]


def _lengths(characters: dict) -> list[dict]:
    """For prompts and answers their quantiles by split, and a bar for each span of lengths."""
    texts = {name: found for name, found in characters.items() if name != "quantiles"}
    return [
        {
            "name": name,
            "quantiles": found["quantiles"],
            "histogram": [
                (span, rows, rows / max(found["histogram"].values())) for span, rows in found["histogram"].items()
            ],
        }
        for name, found in texts.items()
    ]


def _languages(found: dict) -> list[tuple[str, int, int | None]]:
    """(language, prompts, answers), the most frequent first."""
    answers = found["answer"]
    codes = dict.fromkeys([*found["prompt"], *(answers or ())])
    rows = [(NAMES.get(code, code), found["prompt"].get(code, 0), answers and answers.get(code, 0)) for code in codes]
    return sorted(rows, key=lambda row: -(row[1] + (row[2] or 0)))[:LANGUAGES]
