"""The test loss: how surprised a model is by the reference answers, row by row."""

import dataclasses
from collections.abc import Sequence

from steps.lib.batches import collate
from steps.lib.loss import SupervisedLoss
from steps.lib.preferences import collate_answers
from steps.lib.progress import Progress

CHUNK = 1024  # positions whose logits are held at once: 200 MB in float32 for a vocabulary of 49,152


@dataclasses.dataclass
class RowLosses:
    """Per row: cross entropy in nats, summed over its supervised tokens, and how many those are.

    `matched`: how many tokens of the answer, from the first on, are supervised and what the model finds likeliest.
    `favourites`: the watched token that the model finds likeliest as the first of the answer; None without any watched,
    and where a row's first answer token is not supervised.
    """

    sums: list[float]
    tokens: list[int]
    matched: list[int]
    favourites: list[int | None]

    @property
    def loss(self) -> float:
        """Mean per token over the whole split, every token counted once whatever its batch."""
        return sum(self.sums) / sum(self.tokens)


def row_losses(model, rows: list[dict], batch_size: int, pad_token_id: int, watched: Sequence[int] = ()) -> RowLosses:
    """Loss of each row (`input_ids`, `labels` with -100 where not supervised, `prompt_length`: see tokenize_splits).

    Rows of similar length share a batch, and what its rows begin with is computed once; see `loss.SupervisedLoss`.
    """
    import torch

    result = RowLosses([0.0] * len(rows), [0] * len(rows), [0] * len(rows), [None] * len(rows))
    loss, in_decoder = SupervisedLoss(), model.config.is_encoder_decoder
    for members, batch in _in_batches(model, rows, batch_size, collate, pad_token_id, ("test loss", "rows")):
        # What predicts the answer's first token: the decoder's first position, or that of the prompt's last token.
        places = [0 if in_decoder else rows[row]["prompt_length"] - 1 for row in members]
        with torch.inference_mode():
            figures_of_rows = _batch_losses(loss.predictions(model, batch), places, list(watched))
        for row, *figures in zip(members, *figures_of_rows, strict=True):
            result.sums[row], result.tokens[row], result.matched[row], result.favourites[row] = figures
    return result


def pair_logps(model, rows: list[dict], batch_size: int, pad_token_id: int) -> list[tuple[float, float]]:
    """Log-probability of each preference pair's chosen and of its rejected answer; their prompt is computed once.

    `batch_size`: in texts, of which a pair has two.
    """
    import torch

    result, loss = [(0.0, 0.0)] * len(rows), SupervisedLoss()
    pairs = max(1, batch_size // 2)
    for members, batch in _in_batches(model, rows, pairs, collate_answers, pad_token_id, ("preferences", "pairs")):
        with torch.inference_mode():
            sums, *_ = _batch_losses(loss.predictions(model, batch, pairs=True), [0] * (2 * len(members)), [])
        for row, chosen, rejected in zip(members, sums[: len(members)], sums[len(members) :], strict=True):
            result[row] = -chosen, -rejected
    return result


def _in_batches(model, rows, batch_size, collated, pad_token_id, shown):
    """(which rows, their batch on the model's device): rows of similar length together, the longest first."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]), reverse=True)
    with Progress(len(rows), *shown) as progress:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = collated([rows[row] for row in members], pad_token_id)
            yield members, {name: value.to(model.device) for name, value in batch.items()}
            progress.update(len(members))


def _batch_losses(found, places: list[int], watched: list[int]):
    """(loss sums, supervised tokens, matched tokens, favourite tokens) of a batch's rows.

    Args:
        found: the `Predictions` of the batch.
        places: of each row the position that predicts its answer's first token.
    """
    import torch
    from torch.nn.functional import cross_entropy

    losses, likeliest, looks = [], [], []
    for at in range(0, len(found.targets), CHUNK):
        part = slice(at, at + CHUNK)
        logits = found.logits(part)
        losses.append(cross_entropy(logits, found.targets[part], reduction="none").cpu())
        likeliest.append((logits.argmax(dim=1) == found.targets[part]).cpu())
        looks.append(logits[:, watched].cpu())
    rows = len(found.learned)
    sums, matched, favourites = [0.0] * rows, [0] * rows, [None] * rows
    if losses:
        positions = found.learned.nonzero().tolist()
        figures = (torch.cat(losses).tolist(), torch.cat(likeliest).tolist(), torch.cat(looks))
        for (row, position), loss, is_likeliest, look in zip(positions, *figures, strict=True):
            sums[row] += loss
            if is_likeliest and position == places[row] + matched[row]:
                matched[row] += 1
            if watched and position == places[row]:
                favourites[row] = watched[int(look.argmax())]
    return sums, found.learned.sum(dim=1).tolist(), matched, favourites
