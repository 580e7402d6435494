"""The loss of a split: how surprised a model is by the gold answers, row by row."""

import dataclasses
import math

from temper.data.batches import Batch
from temper.data.columns import IGNORED
from temper.errors import UserError
from temper.model.predictions import SupervisedLoss
from temper.progress import Progress
from temper.training.preferences import chosen_of, rejected_of

CHUNK = 1024  # positions whose logits are held at once: 200 MB in float32 for a vocabulary of 49,152


@dataclasses.dataclass
class RowLosses:
    """Per row: cross entropy in nats, summed over its supervised tokens, and how many those are.

    `matched`: how many tokens of the answer, from the first on, are supervised and what the model finds likeliest.
    """

    sums: list[float]
    tokens: list[int]
    matched: list[int]

    @property
    def loss(self) -> float:
        """Mean per token over the whole split, every token counted once whatever its batch."""
        return sum(self.sums) / sum(self.tokens)


def row_losses(model, rows: list[dict], batch_size: int, pad_token_id: int) -> RowLosses:
    """Loss of each row (`input_ids`, `labels` with -100 where not supervised, `prompt_length`: see tokenize_splits).

    Rows of similar length share a batch, and what its rows begin with is computed once; see `loss.SupervisedLoss`.
    """
    import torch

    result = RowLosses([0.0] * len(rows), [0] * len(rows), [0] * len(rows))
    loss, in_decoder = SupervisedLoss(), model.config.is_encoder_decoder
    for members, batch in _in_batches(rows, batch_size, Batch, pad_token_id, ("loss", "rows")):
        # What predicts the answer's first token: the decoder's first position, or that of the prompt's last token.
        places = [0 if in_decoder else rows[row]["prompt_length"] - 1 for row in members]
        with torch.inference_mode():
            figures_of_rows = _batch_losses(loss.predictions(model, batch), places)
        for row, *figures in zip(members, *figures_of_rows, strict=True):
            result.sums[row], result.tokens[row], result.matched[row] = figures
    return result


def check_finite(model: str, split: str, rows: list[dict], sums: list[float]) -> None:
    """Refuse losses that are no number.

    Args:
        model: what the message calls the model.
    """
    for row, total in zip(rows, sums, strict=True):
        if not math.isfinite(total):
            raise UserError(
                f"{model}: the loss of {split} row {row['id']} is {total}, so no figure would mean anything: the "
                "weights are not finite, or model.load.dtype is too narrow for them (try float32)"
            )


def pair_logps(model, rows: list[dict], batch_size: int, pad_token_id: int) -> list[tuple[float, float]]:
    """Log-probability of each preference pair's chosen and of its rejected answer; their prompt is computed once.

    `batch_size`: in texts, of which a pair has two.
    """
    texts = [(chosen_of(row), rejected_of(row)) for row in rows]
    return answer_logps(model, texts, max(1, batch_size // 2), pad_token_id, ("preferences", "pairs"))


def class_logps(model, rows: list[dict], answers: list[list[int]], batch_size: int, pad_token_id: int) -> list[tuple]:
    """Log-probability of each of `answers` (tokens) after each row's prompt, which is computed once.

    Returns:
        per row the log-probabilities in nats, in the order of `answers`
    """
    texts = [[_answered(row, answer, model.config.is_encoder_decoder) for answer in answers] for row in rows]
    at_once = max(1, 2 * batch_size // len(answers))
    return answer_logps(model, texts, min(batch_size, at_once), pad_token_id, ("labels", "rows"))


def _answered(row: dict, answer: list[int], in_decoder: bool) -> dict:
    """A row with another answer, which alone counts."""
    prompt = row["input_ids"][: row["prompt_length"]]
    if in_decoder:
        return {"input_ids": prompt, "labels": answer}
    return {"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + answer}


def answer_logps(model, texts: list, at_once: int, pad_token_id: int, shown: tuple[str, str]) -> list[tuple]:
    """Log-probability of the learned tokens of each row's texts, which begin with one prompt.

    Args:
        texts: of each row the same number of texts (`input_ids`, `labels`).
        at_once: rows in a batch.
        shown: what the progress bar is called, and what it counts.
    """
    import torch

    result, loss, answers = [()] * len(texts), SupervisedLoss(), len(texts[0])

    def together(rows, pad_token_id):
        return Batch([row[number] for number in range(answers) for row in rows], pad_token_id)

    for members, batch in _in_batches(texts, at_once, together, pad_token_id, shown):
        with torch.inference_mode():
            sums, *_ = _batch_losses(loss.predictions(model, batch, answers=answers), [0] * len(batch))
        count = len(members)
        for place, row in enumerate(members):
            result[row] = tuple(-sums[number * count + place] for number in range(answers))
            if not all(map(math.isfinite, result[row])):
                raise UserError(f"row {row + 1} of the split: an answer's log-probability is not finite; try float32")
    return result


def _in_batches(rows, batch_size, batch_of, pad_token_id, shown):
    """(which rows, their batch): rows of similar length together, the longest first."""
    order = sorted(range(len(rows)), key=lambda row: _length(rows[row]), reverse=True)
    with Progress(len(rows), *shown) as progress:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            yield members, batch_of([rows[row] for row in members], pad_token_id)
            progress.update(len(members))


def _length(row) -> int:
    return len(row["input_ids"]) if isinstance(row, dict) else max(len(text["input_ids"]) for text in row)


def _batch_losses(found, places: list[int]):
    """(loss sums, supervised tokens, matched tokens) of a batch's rows.

    Args:
        found: the `Predictions` of the batch.
        places: of each row the position that predicts its answer's first token.
    """
    import torch
    from torch.nn.functional import cross_entropy

    losses, likeliest = [], []
    for at in range(0, len(found.targets), CHUNK):
        part = slice(at, at + CHUNK)
        logits = found.logits(part)
        losses.append(cross_entropy(logits, found.targets[part], reduction="none").cpu())
        likeliest.append((logits.argmax(dim=1) == found.targets[part]).cpu())
    sums, counts, matched = [0.0] * len(places), [0] * len(places), [0] * len(places)
    if losses:
        learned = found.learned.rows, found.learned.positions
        figures = torch.cat(losses).tolist(), torch.cat(likeliest).tolist()
        for row, position, loss, is_likeliest in zip(*learned, *figures, strict=True):
            sums[row] += loss
            counts[row] += 1
            if is_likeliest and position == places[row] + matched[row]:
                matched[row] += 1
    return sums, counts, matched
