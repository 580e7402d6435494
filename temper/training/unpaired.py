"""Preference optimization on single answers, each of which is desirable or not: the rows, and the loss on them.

Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", 2024. Names and formulas are those of
trl.KTOTrainer with log-probabilities of the reference that were computed before training.

How far the model has moved from the reference is estimated from mismatched texts: a row's prompt, and the answer of
another row. TRL takes the row before in the same batch, which ties its rows to one order for all epochs. Here the other
row is chosen once among all rows of the split: so the reference's log-probabilities of mismatched texts can be computed
once for all runs, every epoch may shuffle, and a batch of short rows does not pass for the whole split.
"""

import dataclasses
import hashlib

from temper.data.batches import Batch, tensor_on
from temper.data.columns import IGNORED, answer_start
from temper.training.preferences import chosen_of, rejected_of

REFERENCE, KL_REFERENCE, KL_ROW = "ref_logps", "ref_KL_logps", "KL_row"  # columns of the reference, as TRL names them


def unpaired(split) -> list[dict]:
    """A split's rows as single answers: `id`, `input_ids`, `labels` (of the last answer alone), `label`.

    Args:
        split: rows with a column `label`, or pairs, whose chosen answer is desirable and whose rejected one is not.
    """
    if "label" in split.column_names:
        return [{"id": row["id"], **chosen_of(row), "label": row["label"], "start": _start(row)} for row in split]
    return [
        {"id": row["id"], **answer_of(row), "label": label, "start": _start(row)}
        for row in split
        for answer_of, label in ((chosen_of, True), (rejected_of, False))
    ]


def _start(row: dict) -> int:
    return answer_start(row["input_ids"], row["prompt_length"])


def mismatched(rows: list[dict]) -> list[int]:
    """Of each row of `unpaired` the row whose answer is put after its prompt, with another prompt if there is one.

    Rows in the order of a hash of their prompts; each gets the answer of the one that is half of them away. So rows of
    one prompt stand together and get answers to others, unless they are more than half of all, and every answer is
    used once.
    """
    order = sorted(range(len(rows)), key=lambda number: (_prompt_hash(rows[number]), number))
    half = len(rows) // 2
    found = [0] * len(rows)
    for place, number in enumerate(order):
        found[number] = order[(place + half) % len(order)]
    return found


def _prompt(row: dict) -> list[int]:
    return row["input_ids"][: row["start"]] if row["start"] else row["input_ids"]


def _prompt_hash(row: dict) -> bytes:
    return hashlib.sha256(repr(_prompt(row)).encode()).digest()


def of_one_prompt(rows: list[dict], others: list[int]) -> int:
    """How many rows get an answer to their own prompt."""
    return sum(_prompt(row) == _prompt(rows[other]) for row, other in zip(rows, others, strict=True))


def with_answers_of(rows: list[dict], others: list[int]) -> list[dict]:
    """The mismatched texts: `input_ids`, `labels`. None is longer than the longest row, which the model can read."""
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    return [_mismatch(row, rows[other], longest) for row, other in zip(rows, others, strict=True)]


def _mismatch(row: dict, other: dict, longest: int) -> dict:
    if not row["start"]:  # an encoder-decoder: the labels are the answer
        return {"input_ids": row["input_ids"], "labels": other["labels"]}
    ids = row["input_ids"][: row["start"]] + other["input_ids"][other["start"] :]
    labels = [IGNORED] * row["start"] + other["labels"][other["start"] :]
    return {"input_ids": ids[:longest], "labels": labels[:longest]}


def with_references(split, figures):
    """A split's single answers with the reference's figures of them, as a dataset: `id`, `input_ids`, `labels`,
    `label`, `ref_logps`, and the mismatched texts as `KL_input_ids`, `KL_labels`, `ref_KL_logps`.

    Args:
        split: rows with a column `label`, or pairs.
        figures: what reference_logprobs wrote of them.

    Returns:
        None where the figures are of other rows.
    """
    from datasets import Dataset

    rows = unpaired(split)
    if not {REFERENCE, KL_REFERENCE, KL_ROW} <= set(figures.column_names):
        return None
    if [row["id"] for row in rows] != list(figures["id"]):
        return None
    texts = with_answers_of(rows, figures[KL_ROW][:])
    columns = {name: [row[name] for row in rows] for name in ("id", "input_ids", "labels", "label")}
    columns |= {f"KL_{name}": [text[name] for text in texts] for name in ("input_ids", "labels")}
    columns |= {name: figures[name][:] for name in (REFERENCE, KL_REFERENCE)}
    return Dataset.from_dict(columns)


def imbalance(labels: list[bool], method: dict) -> str | None:
    """A note where the desirable answers, with their weight, are not 1 to 4/3 of the undesirable ones, as is advised.

    Args:
        method: the config section.
    """
    good, bad = sum(labels), len(labels) - sum(labels)
    if not good or not bad:
        return f"all {len(labels)} answers are {'' if good else 'un'}desirable: KTO learns from both kinds"
    share = good * method["desirable_weight"] / (bad * method["undesirable_weight"])
    if 0.995 <= share <= 1.34:
        return None
    better = bad * method["undesirable_weight"] / good
    return (
        f"{good} desirable and {bad} undesirable answers weigh {share:.3g} to 1, and the authors of KTO advise 1 to "
        f"1.33: method.desirable_weight from {better:.3g} to {better * 4 / 3:.3g} gives that"
    )


def mismatched_batch(batch: Batch) -> Batch:
    """The mismatched texts of a batch's rows."""
    texts = [{"input_ids": row["KL_input_ids"], "labels": row["KL_labels"]} for row in batch.rows]
    return dataclasses.replace(batch, rows=texts)


@dataclasses.dataclass
class KtoLoss:
    """The loss of each answer, from how much likelier the model finds it than the reference does.

    Larger values of `beta` keep the model closer to the reference. `desirable_weight` and `undesirable_weight` weigh
    the two kinds, for where there are more of one.
    """

    beta: float
    desirable_weight: float
    undesirable_weight: float
    nll_weight = 0.0
    batch_of = staticmethod(Batch)

    def __call__(self, gains, kl_gains, desirable):
        """Args, all (rows,): log-probability of each answer and (mismatched) less the reference's; which are desirable.

        Returns:
            (losses: (rows,) with gradient, figures: name -> the values that it is the mean of)
        """
        import torch

        kl = kl_gains.detach().mean().clamp(min=0)
        sign = torch.where(desirable, 1.0, -1.0)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        losses = weight * (1 - torch.sigmoid(self.beta * sign * (gains - kl)))
        rewards = self.beta * gains.detach()
        return losses, {"rewards/chosen": rewards[desirable], "rewards/rejected": rewards[~desirable], "kl": kl[None]}


def ratios(batch: Batch, logps, kl_logps):
    """(gains, gains of the mismatched texts, which rows are desirable): the arguments of `KtoLoss`."""
    device = logps.device
    of_rows, of_mismatched = (
        tensor_on(device, [row[name] for row in batch.rows], "float32") for name in (REFERENCE, KL_REFERENCE)
    )
    desirable = tensor_on(device, [row["label"] for row in batch.rows], "bool")
    return logps - of_rows, kl_logps - of_mismatched, desirable
