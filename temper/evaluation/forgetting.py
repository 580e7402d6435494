"""Forgetting: how well a model still predicts general text that it was not tuned on.

A probe is a fixed text in passages. Both the untouched and the tuned model read it as plain text, without a chat
template, and are judged by bits per byte: the natural logarithm's loss of all its tokens / ln 2 / its UTF-8 bytes, as
lm-eval counts it. What the tuned one has more is forgetting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

from temper.data import documents, templates, texts
from temper.data.columns import IGNORED
from temper.data.rows import TEXTS, RawFile, format_of
from temper.errors import UserError
from temper.evaluation.figures import Delta, ProbeFigures
from temper.evaluation.intervals import delta_interval, interval
from temper.evaluation.metrics import Statistic
from temper.files import read_json_lines
from temper.progress import Progress
from temper.sources import pins

FILE = "probe.jsonl"
MOST_TOKENS = 1024  # in a window, also where a model's context is longer: cost, and models stay comparable
TRIED = 24  # tokens of the rows on which the way of computing is tried
AT_ONCE = 1024  # tokens that go through the model together: logits of 200 MB for a vocabulary of 49,152
FEWEST = 2  # passages: of one there is no interval
OF_DATA = re.compile(
    r"(?<![\w/])data\.(source|field|format|encoding|csv\.(?:delimiter|quotechar|escapechar|fieldnames))\b"
)
log = logging.getLogger("temper")


# --- the text ------------------------------------------------------------------------------------


@contextlib.contextmanager
def told_of_probe():
    """Errors that name a key of `data` name that of `probe`, which is read by the same code."""
    try:
        yield
    except UserError as error:
        raise UserError(OF_DATA.sub(r"probe.\1", str(error))) from None


def read_passages(raw: Path, settings: dict) -> list[str]:
    """The passages of a probe, in the order of its files.

    Args:
        raw: the folder of the fetched text, its pin, or a file.
        settings: the config section `probe`.

    Raises:
        UserError: a file that cannot be read, a template that does not fit its rows, or too few passages.
    """
    with told_of_probe():
        found = [passage for path in pins.data_files(raw) for passage in _passages(path, settings)]
    if len(found) < FEWEST:
        raise UserError(
            f"{raw}: the probe has {len(found)} passage(s), and its interval takes {FEWEST}: blank lines separate the "
            "passages of a text; of rows, probe.passage says which belong together"
        )
    return _limited(found, settings["limit"])


def _limited(passages: list[str], most: int | None) -> list[str]:
    """Most so many, chosen by a hash of their text, so that a passage more or less leaves the others."""
    if most is None or len(passages) <= most:
        return passages
    chosen = sorted(range(len(passages)), key=lambda number: hashlib.sha256(passages[number].encode()).digest())
    return [passages[number] for number in sorted(chosen[:most])]


def _passages(path: Path, settings: dict) -> Iterator[str]:
    kind = settings["format"] or format_of(path.name)
    if kind is None and path.suffix.lower() in TEXTS:
        kind = "text"
    if kind is None:
        raise UserError(f"{path}: cannot tell by its ending what it is: set probe.format to text, csv, json, ...")
    if kind != "text":
        yield from _of_rows(RawFile.of(path, {**settings, "format": kind}), settings)
        return
    if settings["text"] is not None:
        raise UserError(f"{path}: 'probe.text' is for rows, and this is text: leave it out (~probe.text)")
    text = RawFile.of(path, {"format": "json", "encoding": settings["encoding"]}).text()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield from filter(None, (part.strip() for part in re.split(r"\n\s*\n", text)))


def _of_rows(file: RawFile, settings: dict) -> Iterator[str]:
    """What `probe.text` makes of each row; of rows in succession with one `probe.passage`, together."""
    if settings["text"] is None:
        raise UserError(f"{file.path}: has rows: say what their text is (probe.text='{{{{ text }}}}')")
    render = {key: _template(key, settings[key]) for key in ("text", "passage") if settings[key] is not None}

    def made(key: str, number: int, row: dict) -> str:
        what = f"{file.place(number)}: probe.{key} (columns: {', '.join(map(str, row))})"
        return templates.render(render[key], row, what).strip()

    def passage_of(numbered: tuple[int, dict]) -> str | int:
        return made("passage", *numbered) if "passage" in render else numbered[0]

    for _, rows in itertools.groupby(file, key=passage_of):
        if passage := " ".join(filter(None, (made("text", *numbered) for numbered in rows))):
            yield passage


def _template(key: str, source: str):
    with templates.bounded(f"config: 'probe.{key}'"):
        return texts.environment().from_string(source)


# --- the score -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Probed:
    """What a model makes of the passages: of each its UTF-8 bytes, its tokens, and their cross entropy in nats.

    `hashes`: of the passages' text. `seconds`: how long it took.
    """

    hashes: list[str]
    sizes: list[int]
    tokens: list[int]
    loss_sums: list[float]
    seconds: float

    @property
    def statistic(self) -> Statistic:
        """Numbers of passages -> bits per byte."""
        import numpy as np

        bits, sizes = np.array(self.loss_sums) / math.log(2), np.array(self.sizes, dtype=float)
        return lambda rows: float(bits[rows].sum() / sizes[rows].sum())

    @property
    def lines(self) -> list[dict]:
        """The lines of probe.jsonl."""
        columns = zip(self.hashes, self.sizes, self.tokens, self.loss_sums, strict=True)
        return [dict(zip(("sha256", "bytes", "tokens", "loss_sum"), line, strict=True)) for line in columns]


def probe(model, tokenizer, passages: list[str], context: float) -> Probed:
    """Score passages, each by itself.

    A passage begins after the token that begins a text (that which ends one, where the tokenizer has no other), so
    that each of its own tokens is predicted, once. A longer one than a window goes through several, one after the
    other, each after the last token of the one before.

    Args:
        context: the most tokens that the model takes.

    Raises:
        UserError: an encoder-decoder model, or a loss that is not finite.
    """
    refuse_encoder_decoder(model.config.is_encoder_decoder)
    started = time.perf_counter()
    found = tokenizer(passages, add_special_tokens=False)["input_ids"]
    _say_unknown(tokenizer, found)
    first, most = documents.beginning(tokenizer), int(min(context, MOST_TOKENS))
    numbered = [(number, row) for number, tokens in enumerate(found) for row in _windows(tokens, first, most)]
    rows = [row for _, row in numbered]
    sums = [0.0] * len(passages)
    for (number, _), loss in zip(numbered, _losses(model, rows, tokenizer.pad_token_id), strict=True):
        sums[number] += loss
    for number, loss in enumerate(sums, 1):
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of passage {number} of the probe is {loss}: the weights are not finite, or model.load.dtype "
                "is too narrow for them (try float32)"
            )
    hashes = [hashlib.sha256(passage.encode()).hexdigest()[:16] for passage in passages]
    sizes = [len(passage.encode()) for passage in passages]
    return Probed(hashes, sizes, list(map(len, found)), sums, time.perf_counter() - started)


def refuse_encoder_decoder(is_encoder_decoder: bool) -> None:
    """Raises: UserError: a model that does not continue texts."""
    if is_encoder_decoder:
        raise UserError(
            "config: 'probe': an encoder-decoder model such as T5 does not continue plain text, so it has no bits per "
            "byte of it: set probe=none"
        )


def _say_unknown(tokenizer, found: list[list[int]]) -> None:
    unknown, others = tokenizer.unk_token_id, (tokenizer.bos_token_id, tokenizer.eos_token_id)
    number = 0 if unknown is None or unknown in others else sum(tokens.count(unknown) for tokens in found)
    if number:
        log.info("note: %d tokens of the probe are unknown to the tokenizer: its bits per byte look too low", number)


def _windows(tokens: list[int], first: int, most: int) -> Iterator[dict]:
    """Rows of at most `most` tokens: one that is only seen, then those that are predicted."""
    for _, ids in documents.windows(tokens, first, most):
        yield {"input_ids": ids, "labels": [IGNORED, *ids[1:]], "prompt_length": 1}


def _losses(model, rows: list[dict], pad_token_id: int) -> list[float]:
    """Cross entropy of each row, in nats, summed over its tokens."""
    import torch

    from temper.data.batches import Batch
    from temper.model.predictions import SupervisedLoss

    sums, loss = [0.0] * len(rows), SupervisedLoss()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]), reverse=True)
    at_once = max(1, AT_ONCE // len(rows[order[0]]["input_ids"]))
    # On its first batch the loss finds out by which way this model can be computed. That takes several passes, which
    # are most of the time, unless the batch is small.
    short = [{name: row[name][:TRIED] for name in ("input_ids", "labels")} for row in rows[:4]]
    with Progress(len(rows), "probe", "windows") as progress, torch.inference_mode():
        loss.predictions(model, Batch(short, pad_token_id))
        for start in range(0, len(order), at_once):
            members = order[start : start + at_once]
            batch = Batch([rows[row] for row in members], pad_token_id)
            logps = loss.sequence_logps(model, batch).tolist()
            for row, logp in zip(members, logps, strict=True):
                sums[row] = -logp
            progress.update(len(members))
    return sums


# --- the figures ---------------------------------------------------------------------------------


def figures_of_probe(ours: Probed, base_report: Path | None) -> ProbeFigures:
    """Bits per byte, and how many more than the untouched model's, with 95% intervals (BCa) over the passages.

    Args:
        base_report: the untouched model's report, if there is one.

    Raises:
        UserError: that is of other passages.
    """
    count = len(ours.sizes)
    found = ProbeFigures(
        passages=count,
        bytes=sum(ours.sizes),
        tokens=sum(ours.tokens),
        bits_per_byte=ours.statistic(range(count)),
        interval=interval(ours.statistic, count),
        base=None,
        forgetting=None,
        seconds=round(ours.seconds, 3),
    )
    theirs = _read(base_report) if base_report else None
    if theirs is None:
        return found
    if theirs.hashes != ours.hashes:
        raise UserError(f"--base-report {base_report}: probed by another text; evaluate the base model with this probe")
    found.base = theirs.statistic(range(count))
    between = delta_interval(ours.statistic, theirs.statistic, count)
    found.forgetting = Delta(value=found.bits_per_byte - found.base, interval=between)
    return found


def sentence(found: ProbeFigures) -> str:
    """What the probe says, in words."""
    text = f"general text {found.bits_per_byte:.3f} bits per byte"
    if found.forgetting:
        low, high = found.forgetting.interval
        text += f", forgetting {found.forgetting.value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return text


def _read(report: Path) -> Probed | None:
    if not (report / FILE).is_file():
        log.info("no forgetting: the base model's report %s has no probe; make it with --probe, too", report)
        return None
    shape = {"sha256": str, "bytes": int, "tokens": int, "loss_sum": float}
    lines = read_json_lines(report / FILE, shape)
    hashes, sizes, tokens, sums = ([line[name] for line in lines] for name in shape)
    return Probed(hashes, sizes, tokens, sums, seconds=0.0)
