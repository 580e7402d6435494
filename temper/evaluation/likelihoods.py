"""The loss of a split: how surprised a model is by the gold answers, row by row."""

import dataclasses
import math
from array import array
from collections.abc import Sequence

from temper.data.batches import Batch
from temper.data.columns import IGNORED
from temper.errors import UserError
from temper.model.predictions import SupervisedLoss
from temper.progress import Progress
from temper.training.preferences import chosen_of, rejected_of

CHUNK = 1024  # positions whose logits are held at once: 200 MB in float32 for a vocabulary of 49,152


@dataclasses.dataclass
class TextLosses:
    """Cross entropy in nats of each supervised token of a text, in 4 bytes, for texts may be long and many.

    `matched`: how many tokens of its answer, from the first on, are supervised and what the model finds likeliest.
    """

    tokens: array = dataclasses.field(default_factory=lambda: array("f"))
    matched: int = 0

    @property
    def logp(self) -> float:
        """Log-probability of the supervised tokens, in nats."""
        return -sum(self.tokens)


@dataclasses.dataclass
class RowLosses:
    """Per row: cross entropy in nats, summed over its supervised tokens, and how many those are.

    `matched`: see `TextLosses`.
    """

    sums: list[float]
    tokens: list[int]
    matched: list[int]

    @classmethod
    def of(cls, rows: list[TextLosses]) -> "RowLosses":
        """Those of rows whose tokens have been judged."""
        return cls([sum(row.tokens) for row in rows], [len(row.tokens) for row in rows], [row.matched for row in rows])

    @property
    def loss(self) -> float:
        """Mean per token over the whole split, every token counted once whatever its batch."""
        return sum(self.sums) / sum(self.tokens)


def row_losses(model, rows: list[dict], batch_size: int, pad_token_id: int) -> RowLosses:
    """Loss of each row (`input_ids`, `labels` with -100 where not supervised, `prompt_length`: see tokenize_splits).

    Rows of similar length share a batch, and what its rows begin with is computed once; see `loss.SupervisedLoss`.
    """
    return RowLosses.of(text_losses(model, rows, batch_size, pad_token_id))


def text_losses(model, rows: list[dict], batch_size: int, pad_token_id: int) -> list[TextLosses]:
    """As `row_losses`, token by token."""
    judged = _losses_of_texts(model, [(row,) for row in rows], batch_size, pad_token_id, ("loss", "rows"))
    return [losses for (losses,) in judged]


def check_finite(model: str, split: str, rows: list[dict], sums: Sequence[float], what: str = "loss of") -> None:
    """Refuse losses, or what else, that are no number.

    Args:
        model: what the message calls the model.
        what: what it calls the figures.
    """
    for row, total in zip(rows, sums, strict=True):
        if not math.isfinite(total):
            raise UserError(
                f"{model}: the {what} {split} row {row['id']} is {total}, so no figure would mean anything: the "
                "weights are not finite, or model.load.dtype is too narrow for them (try float32)"
            )


def pair_logps(model, rows: list[dict], batch_size: int, pad_token_id: int) -> list[tuple[float, float]]:
    """Log-probability of each preference pair's chosen and of its rejected answer; their prompt is computed once.

    `batch_size`: in texts, of which a pair has two.
    """
    texts = [(chosen_of(row), rejected_of(row)) for row in rows]
    judged = _losses_of_texts(model, texts, max(1, batch_size // 2), pad_token_id, ("preferences", "pairs"))
    return [(chosen.logp, rejected.logp) for chosen, rejected in judged]


def answer_losses(
    model, rows: list[dict], answers: list[list[int]], batch_size: int, pad_token_id: int
) -> list[tuple[TextLosses, ...]]:
    """Losses of each of `answers` (tokens) after each row's prompt, which is computed once.

    Returns:
        per row those of the answers, in their order
    """
    texts = [tuple(_answered(row, answer, model.config.is_encoder_decoder) for answer in answers) for row in rows]
    at_once = max(1, 2 * batch_size // len(answers))
    return _losses_of_texts(model, texts, min(batch_size, at_once), pad_token_id, ("labels", "rows"))


def _answered(row: dict, answer: list[int], in_decoder: bool) -> dict:
    """A row with another answer, which alone counts."""
    prompt = row["input_ids"][: row["prompt_length"]]
    if in_decoder:
        return {"input_ids": prompt, "labels": answer, "prompt_length": len(prompt)}
    labels = [IGNORED] * len(prompt) + answer
    return {"input_ids": [*prompt, *answer], "labels": labels, "prompt_length": len(prompt)}


def _losses_of_texts(
    model, rows: Sequence[tuple[dict, ...]], at_once: int, pad_token_id: int, shown: tuple[str, str]
) -> list[tuple[TextLosses, ...]]:
    """Losses of each row's texts, which begin with one prompt.

    Args:
        rows: of each the same number of texts (`input_ids`, `labels`, and if matched tokens count, `prompt_length`).
        at_once: rows in a batch.
        shown: what the progress bar is called, and what it counts.
    """
    import torch

    result: list[tuple[TextLosses, ...]] = [()] * len(rows)
    loss, answers = SupervisedLoss(), len(rows[0]) if rows else 1
    order = sorted(range(len(rows)), key=lambda row: max(len(text["input_ids"]) for text in rows[row]), reverse=True)
    with Progress(len(rows), *shown) as progress:
        for start in range(0, len(order), at_once):  # rows of similar length together, the longest first
            members = order[start : start + at_once]
            texts = [rows[row][number] for number in range(answers) for row in members]
            with torch.inference_mode():
                found = loss.predictions(model, Batch(texts, pad_token_id), answers=answers)
                judged = _judged(found, [_first_place(text, model.config.is_encoder_decoder) for text in texts])
            for place, row in enumerate(members):
                result[row] = tuple(judged[place :: len(members)])
            progress.update(len(members))
    return result


def _first_place(text: dict, in_decoder: bool) -> int:
    """What predicts the answer's first token: the decoder's first position, or that of the prompt's last token."""
    return 0 if in_decoder else text.get("prompt_length", 1) - 1


def _judged(found, places: list[int]) -> list[TextLosses]:
    """Losses of each of a batch's texts.

    Args:
        found: the `Predictions` of the batch.
        places: of each text the position that predicts its answer's first token.
    """
    import torch
    from torch.nn.functional import cross_entropy

    losses, likeliest = [], []
    for at in range(0, len(found.targets), CHUNK):
        part = slice(at, at + CHUNK)
        logits = found.logits(part)
        losses.append(cross_entropy(logits, found.targets[part], reduction="none").cpu())
        likeliest.append((logits.argmax(dim=1) == found.targets[part]).cpu())
    texts = [TextLosses() for _ in places]
    if losses:
        learned = found.learned.rows, found.learned.positions
        figures = torch.cat(losses).tolist(), torch.cat(likeliest).tolist()
        for number, position, loss, is_likeliest in zip(*learned, *figures, strict=True):
            text = texts[number]
            text.tokens.append(loss)
            if is_likeliest and position == places[number] + text.matched:
                text.matched += 1
    return texts
