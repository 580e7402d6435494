"""The test loss: how surprised a model is by the reference answers, row by row."""

import dataclasses
import logging
from collections.abc import Sequence

from steps.lib.batches import collate
from steps.lib.conversation import IGNORED
from steps.lib.loss import plain_logits, short_way_is_exact, targets_of
from steps.lib.progress import Progress

log = logging.getLogger("temper")

CHUNK = 1024  # positions whose logits are held at once: 200 MB in float32 for a vocabulary of 49,152


@dataclasses.dataclass
class RowLosses:
    """Per row: cross entropy in nats, summed over its supervised tokens, and how many those are.

    `favourites`: the watched token that the model finds likeliest as the first of the answer; None without any watched,
    and where a row's first answer token is not supervised.
    """

    sums: list[float]
    tokens: list[int]
    favourites: list[int | None]

    @property
    def loss(self) -> float:
        """Mean per token over the whole split, every token counted once whatever its batch."""
        return sum(self.sums) / sum(self.tokens)


def row_losses(model, rows: list[dict], batch_size: int, pad_token_id: int, watched: Sequence[int] = ()) -> RowLosses:
    """Loss of each row (`input_ids`, `labels` with -100 where not supervised, `prompt_length`: see tokenize_splits).

    Rows of similar length share a batch. Logits are computed at supervised positions only, where the model's head is a
    plain product; this is checked against the model's own forward pass on the first batch.
    """
    import torch

    result = RowLosses([0.0] * len(rows), [0] * len(rows), [None] * len(rows))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]), reverse=True)
    forward, in_decoder = None, model.config.is_encoder_decoder
    with torch.inference_mode(), Progress(len(rows), "test loss", "rows") as progress:
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            batch = collate([rows[row] for row in members], pad_token_id)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            forward = forward or _forward(model, batch)
            targets = targets_of(model, batch)
            # What predicts the answer's first token: the decoder's first position, or that of the prompt's last token.
            places = [0 if in_decoder else rows[row]["prompt_length"] - 1 for row in members]
            figures_of_rows = _batch_losses(forward, targets, batch, places, list(watched))
            for row, *figures in zip(members, *figures_of_rows, strict=True):
                result.sums[row], result.tokens[row], result.favourites[row] = figures
            progress.update(len(members))
    return result


def _batch_losses(forward, targets, batch, places: list[int], watched: list[int]):
    """(loss sums, supervised tokens, favourite tokens) of a batch's rows; their answers are predicted from `places`."""
    import torch
    from torch.nn.functional import cross_entropy

    supervised = targets != IGNORED
    logits_at, wanted = forward(batch, supervised), targets[supervised]
    losses, looks = [], []
    for at in range(0, len(wanted), CHUNK):
        logits = logits_at(slice(at, at + CHUNK)).float()
        losses.append(cross_entropy(logits, wanted[at : at + CHUNK], reduction="none").cpu())
        looks.append(logits[:, watched].cpu())
    sums, favourites = [0.0] * len(targets), [None] * len(targets)
    if losses:
        positions = supervised.nonzero().tolist()
        for (row, position), loss, look in zip(positions, torch.cat(losses).tolist(), torch.cat(looks), strict=True):
            sums[row] += loss
            if watched and position == places[row]:
                favourites[row] = watched[int(look.argmax())]
    return sums, supervised.sum(dim=1).tolist(), favourites


def _forward(model, batch):
    """The way to this model's logits: the short one if it gives what the model gives, else the plain one."""
    first = {name: value[:2] for name, value in batch.items()}
    return _short_forward(model) if short_way_is_exact(model, first) else _plain_forward(model)


def _short_forward(model):
    def forward(batch, supervised):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        picked = hidden[:, :-1][supervised]  # 2-D: on a 3-D slice the head would be a batched product, and slow
        return lambda part: model.get_output_embeddings()(picked[part])

    return forward


def _plain_forward(model):
    def forward(batch, _supervised):
        logits, _, _ = plain_logits(model, batch)
        return lambda part: logits[part]

    return forward
