"""Task labels: the label that a model finds the likeliest, row by row."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from temper.evaluation.class_tokens import class_answers

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclasses.dataclass
class Choices:
    """Task labels: the label that a model finds the likeliest, row by row.

    `chosen_by`: how it was found. `logps`: of each row, the log-probabilities of all labels.
    """

    chosen: list[str]
    chosen_by: str
    logps: list[tuple]


# How the likeliest label is found; the second way where a label is the beginning of another one.
ALONE = "the log-probability of its tokens"
WITH_END = "the log-probability of its tokens and of the one that ends an answer"


def likeliest(model, rows: DatasetDict, asked: list[dict], class_names: list[str], tokenizer, size: tuple[int, int]):
    """The label that the model finds the likeliest, row by row.

    As lm-eval compares the choices of a question: by their own tokens. Where a label is the beginning of another one
    (``C``, ``C++``), the shorter would always be the likelier: there the end of each counts as well. Elsewhere it does
    not, for how readily a model ends its answer says nothing about the label.
    """
    from temper.evaluation import likelihoods

    ended = class_answers(class_names, rows, tokenizer)
    alone = [answer[:-1] for answer in ended]
    with_end = _one_begins_another(alone)
    logps = likelihoods.class_logps(model, asked, ended if with_end else alone, *size)
    chosen = [class_names[max(range(len(class_names)), key=of_row.__getitem__)] for of_row in logps]
    return Choices(chosen, WITH_END if with_end else ALONE, logps)


def _one_begins_another(answers: list[list[int]]) -> bool:
    ordered = sorted(answers)  # a label stands right before those that begin with it
    return any(after[: len(label)] == label for label, after in itertools.pairwise(ordered))
