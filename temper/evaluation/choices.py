"""Task labels: the label that a model finds the likeliest, row by row."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from temper.data.columns import IGNORED, answer_start
from temper.evaluation.class_tokens import class_answers

if TYPE_CHECKING:
    from datasets import DatasetDict

    from temper.evaluation.likelihoods import RowLosses


@dataclasses.dataclass
class Choices:
    """Task labels: the label that a model finds the likeliest, row by row.

    `chosen_by`: how it was found. `logps`: of each row, the log-probabilities of all labels. `losses`: of the rows with
    the answers that they have.
    """

    chosen: list[str]
    chosen_by: str
    logps: list[tuple]
    losses: RowLosses


# How the likeliest label is found; the second way where a label is the beginning of another one.
ALONE = "the log-probability of its tokens"
WITH_END = "the log-probability of its tokens and of the one that ends an answer"


def likeliest(
    model,
    rows: DatasetDict,
    asked: list[dict],
    class_names: list[str],
    tokenizer,
    size: tuple[int, int],
    whose: tuple[str, str],
) -> Choices:
    """The label that the model finds the likeliest, row by row, and the loss of the rows.

    As lm-eval compares the choices of a question: by their own tokens. Where a label is the beginning of another one
    (``C``, ``C++``), the shorter would always be the likelier: there the end of each counts as well. Elsewhere it does
    not, for how readily a model ends its answer says nothing about the label.

    Args:
        rows: all splits, which know the tokens of labels; `asked` are those of one of them.
        whose: what messages call the model and the split.

    Raises:
        UserError: a loss or a log-probability that is not finite.
    """
    from temper.evaluation import likelihoods

    ended = class_answers(class_names, rows, tokenizer)
    with_end = _one_begins_another([answer[:-1] for answer in ended])
    judged = likelihoods.answer_losses(model, asked, ended, *size)
    losses = _of_own_answers(model, asked, ended, judged, size)
    likelihoods.check_finite(*whose, asked, losses.sums)
    counted = slice(None) if with_end else slice(-1)
    logps = [tuple(-sum(answer.tokens[counted]) for answer in of_row) for of_row in judged]
    for name, of_label in zip(class_names, zip(*logps, strict=True), strict=True):
        likelihoods.check_finite(*whose, asked, of_label, f"log-probability of '{name}' in")
    chosen = [class_names[max(range(len(class_names)), key=of_row.__getitem__)] for of_row in logps]
    return Choices(chosen, WITH_END if with_end else ALONE, logps, losses)


def _of_own_answers(model, asked: list[dict], answers: list[list[int]], judged: list[tuple], size) -> RowLosses:
    """The loss of each row: nothing is to be computed where all that is learned is an answer that has been judged."""
    from temper.evaluation import likelihoods

    places: dict[tuple | None, int] = {tuple(answer): place for place, answer in enumerate(answers)}
    known = [places.get(_learned(row)) for row in asked]
    others = [row for row, place in zip(asked, known, strict=True) if place is None]
    computed = iter(likelihoods.text_losses(model, others, *size) if others else ())
    found = zip(judged, known, strict=True)
    return likelihoods.RowLosses.of([next(computed) if place is None else of_row[place] for of_row, place in found])


def _learned(row: dict) -> tuple[int, ...] | None:
    """The tokens of a row's answer, if these are all that is learned of it."""
    start = answer_start(row["input_ids"], row["prompt_length"])
    return None if any(label != IGNORED for label in row["labels"][:start]) else tuple(row["labels"][start:])


def _one_begins_another(answers: list[list[int]]) -> bool:
    ordered = sorted(answers)  # a label stands right before those that begin with it
    return any(after[: len(label)] == label for label, after in itertools.pairwise(ordered))
