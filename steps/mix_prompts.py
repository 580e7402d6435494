r"""Put the splits of several data sets together.

    python -m steps.mix_prompts --prompts results/prompts/alpaca-1 results/prompts/quotes-2 \
        --output results/mixtures/by-hand data=my_mixture

Reads:  folders of format_prompts, in the order of data.mix; the config section data (mix, on_overlap).
Writes: train.jsonl, validation.jsonl, test.jsonl as format_prompts does, each row with its "source", the name of the
        data set. Its "id" counts the rows of all data sets on. stats.json counts the rows of each split by source;
        mixture.json says which ids are of which folder; overlap.jsonl as in format_prompts, also of rows of one data
        set in another. report.html and report.json as in format_prompts, by data set.

A training row of a data set with weight 2 comes twice, so it is learned twice in an epoch; with weight 0.5 half of them
come, and with 1.5 all of them once and half of them twice. A hash of the row says which. Rows of validation and test
come once: weights decide what is learned, not what is judged.
"""

import collections
import functools
import hashlib
import json
import logging
import sys
from pathlib import Path

from temper.config.stages import MixPrompts
from temper.data import overlap, report
from temper.data.columns import SPLITS
from temper.data.places import MIXTURE, Part, Place, ids_of, of_mixture
from temper.data.workers import of_lines
from temper.errors import UserError
from temper.files import each_json_line, json_text, write_whole
from temper.progress import Progress
from temper.step import run_command

STAGE = "mix_prompts"
log = logging.getLogger("temper")


def run(config: MixPrompts, prompts: list[Path], output: Path) -> dict:
    """Mix the splits of `prompts` into `output`.

    Raises:
        UserError: not one folder for each data set, or a weight that leaves none of its training rows.
    """
    from temper.reports.data_page import write_page

    mix = config.data.mix
    if len(prompts) != len(mix):
        raise UserError(
            f"--prompts: {len(prompts)} folder(s), and data.mix has {len(mix)} data sets: give one for each"
        )
    parts, before = [], 0
    for folder, entry in zip(prompts, mix, strict=True):
        rows = ids_of(folder)
        parts.append(Part(entry.source, str(folder), before + 1, rows))
        before += rows
    counts = {split: _mixed(split, parts, [entry.weight for entry in mix], output) for split in SPLITS}
    _refuse_nothing_of(counts["train"], mix)
    write_whole(output / MIXTURE, json_text([part._asdict() for part in parts]))

    drop = config.data.on_overlap == "drop"
    found, shared, near = overlap.find(output, sum(counts["train"].values()), drop)
    kept = counts
    if drop:
        overlap.leave_out(output, shared)
        kept = {split: {**dict.fromkeys(by, 0), **_sources(output / f"{split}.jsonl")} for split, by in counts.items()}
    splits = {split: _stats(by, sum(counts[split].values())) for split, by in kept.items()}
    weights = {entry.source: entry.weight for entry in mix}
    made = report.make(output, report.rows_of_mixture(prompts, weights, splits), found, near)
    where = _places(parts, made.ids)
    told = overlap.tell(output, found, config.data.on_overlap, where)
    write_whole(output / "stats.json", json_text({"rows": before, "splits": splits, "overlap": told}))
    made.write(output, where)
    write_page(output, made.content)
    for split, by in kept.items():
        log.info("%s: %s", split, ", ".join(f"{source} {rows}" for source, rows in by.items()))
    return {"rows": splits}


def _places(parts: list[Part], ids: set[int]) -> dict[int, Place]:
    """Where rows are in the raw data, if that is still there."""
    try:
        return of_mixture(parts, ids)
    except UserError as error:
        log.warning("warning: rows are named by their numbers, not by file and line: %s", error)
        return {}


def _sources(path: Path) -> dict[str, int]:
    """Source -> its rows in a split."""
    return dict(collections.Counter(row["source"] for row in each_json_line(path)))


def _stats(by_source: dict[str, int], before: int) -> dict:
    """Counts of a split. `before`: its rows before those were taken out that stand in another."""
    rows = sum(by_source.values())
    return {"rows": rows, "by_source": by_source, "left_out_by_overlap": before - rows}


def _mixed(split: str, parts: list[Part], weights: list[float], output: Path) -> dict[str, int]:
    """Write a split; source -> how many rows of it."""
    counts = dict.fromkeys((part.source for part in parts), 0)
    with (output / f"{split}.jsonl").open("wb") as file, Progress(None, split, "rows") as progress:
        for part, weight in zip(parts, weights, strict=True):
            path = Path(part.prompts) / f"{split}.jsonl"
            write = functools.partial(_written, part, weight if split == "train" else 1)
            for read, times, lines in of_lines(path, write):
                file.write(lines)
                counts[part.source] += times
                progress.update(read)
    return counts


def _written(part: Part, weight: float, lines: list[bytes]) -> tuple[int, int, bytes]:
    """(number of lines, number of lines made of them, these) for some lines of a data set."""
    made, rows = [], 0
    for line in lines:
        times = _times(line, weight)
        record = json.loads(line)
        about = {"id": part.first - 1 + record["id"], "source": part.source}
        made.append((json.dumps({**record, **about}, ensure_ascii=False) + "\n") * times)
        rows += times
    return len(lines), rows, "".join(made).encode()


def _times(line: bytes, weight: float) -> int:
    """How often a row comes: the whole part of its weight, and once more if its hash is below the rest.

    The hash is of the conversation alone: adding a row before it, which moves its number, changes nothing.
    """
    conversation = line[line.index(b'"messages"') :]
    at = int.from_bytes(hashlib.sha256(conversation).digest()[:8]) / 2**64
    return int(weight) + (at < weight % 1)


def _refuse_nothing_of(counts: dict[str, int], mix: list) -> None:
    for entry in mix:
        if not counts[entry.source]:
            raise UserError(
                f"config: 'data.mix': weight {entry.weight} of {entry.source} picks none of its training rows: raise it"
            )


def main(argv=None) -> None:
    run_command(sys.modules[__name__], argv)


if __name__ == "__main__":
    main()
