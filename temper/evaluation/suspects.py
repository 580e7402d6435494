"""Suspicious rows: training and validation rows whose answers a trained model trusts the least.

For labels as in confident learning (Northcutt, Jiang & Chuang, "Confident Learning: Estimating Uncertainty in Dataset
Labels", JAIR 2021): by how much the model finds another label likelier than the given one. For tags and text by the
loss of the answer. The model has learned most of these rows, wrong answers included, and yet trusts those less;
docs/trust.md says how well that works.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from temper.evaluation.choices import likeliest
from temper.evaluation.class_names import gold_class

if TYPE_CHECKING:
    from datasets import DatasetDict

    from temper.model.merging import Source

SPLITS = ("train", "validation")  # the test split stays closed
FIGURES = {"labels": "margin", "tags": "loss", "text": "loss"}  # task -> what rows are ordered by


@dataclasses.dataclass
class Score:
    """A row, and how suspicious its answer is.

    `suspicion`: for labels the margin in nats by which the likeliest other label is likelier than the given one
    (negative where the model agrees with the data), else the loss in nats per token of the answer. `other`: that label.
    """

    id: int
    split: str
    prompt: str
    given: str
    suspicion: float
    other: str | None = None


def scores(source: Source, config: dict, rows: DatasetDict, tokenizer) -> list[Score]:
    """Score all rows of `SPLITS` in their order.

    Args:
        source: the model.
        config: of the stage score_rows.
        rows: split -> its rows, as tokenize_splits makes them.

    Raises:
        UserError: a log-probability that is not finite, an answer that is none of the labels.
    """
    settings = config["eval"]
    model = source.network(config["model"]["load"])
    found = []
    for split in (name for name in SPLITS if name in rows):
        asked = list(rows[split])
        if settings["task"] == "labels":
            found += _by_margin(source.name, model, rows, split, asked, tokenizer, settings)
        else:
            found += _by_loss(source.name, model, split, asked, tokenizer, settings)
    return found


def most_suspicious(found: list[Score], count: int) -> list[Score]:
    """The most suspicious rows first; of equal ones the earlier row."""
    return sorted(found, key=lambda score: (-score.suspicion, score.id))[:count]


def _by_margin(name: str, model, rows, split: str, asked: list[dict], tokenizer, settings: dict) -> list[Score]:
    labels = settings["labels"]
    size = settings["batch_size"], tokenizer.pad_token_id
    choices = likeliest(model, rows, asked, labels, tokenizer, size, (name, split))
    made = []
    for row, logps in zip(asked, choices.logps, strict=True):
        given = labels.index(gold_class(row["reference"], labels, f"{split} split, row {row['id']} of the raw data"))
        other = max((at for at in range(len(labels)) if at != given), key=logps.__getitem__)
        made.append(_score(row, split, logps[other] - logps[given], labels[other]))
    return made


def _by_loss(name: str, model, split: str, asked: list[dict], tokenizer, settings: dict) -> list[Score]:
    from temper.evaluation import likelihoods

    losses = likelihoods.row_losses(model, asked, settings["batch_size"], tokenizer.pad_token_id)
    likelihoods.check_finite(name, split, asked, losses.sums)
    pairs = zip(asked, losses.sums, losses.tokens, strict=True)
    return [_score(row, split, total / max(1, tokens)) for row, total, tokens in pairs]


def _score(row: dict, split: str, suspicion: float, other: str | None = None) -> Score:
    return Score(row["id"], split, row["prompt"], row["reference"], suspicion, other)
