"""Preference optimization on pairs: pairs as batches, and the losses on them.

`PreferenceLoss`: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
2023.
`OrpoLoss`: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", 2024.
`SimpoLoss`: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward", 2024.
Names and formulas are those of trl.DPOTrainer with log-probabilities of the reference that were computed before
training, of trl.experimental.orpo.ORPOTrainer, and of trl.experimental.cpo.CPOTrainer with loss_type "simpo".
"""

import dataclasses
from collections.abc import Callable

from temper.data.batches import Batch, count_learned, tensor_on
from temper.data.columns import IGNORED, answer_start

REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")
FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
NLL = "nll_loss"  # cross entropy of the chosen text, per token
FIGURES_OF = {  # method -> figures of its training and validation beside the loss
    "dpo": FIGURES,
    "orpo": (*FIGURES, NLL),
    "simpo": (*FIGURES, NLL),  # the last one with cpo_alpha
    "kto": tuple(name for name in FIGURES if name != "rewards/accuracies") + ("kl",),
}


def answer_only(ids: list[int], labels: list[int], prompt_length: int) -> dict:
    """A row in which only the last answer counts, because both answers of a pair share everything before it."""
    start = answer_start(ids, prompt_length)
    return {"input_ids": ids, "labels": [IGNORED] * start + list(labels[start:])}


def chosen_of(row: dict) -> dict:
    """The prompt with the chosen answer."""
    return answer_only(row["input_ids"], row["labels"], row["prompt_length"])


def rejected_of(row: dict) -> dict:
    """The prompt with the rejected answer."""
    return answer_only(row["rejected_input_ids"], row["rejected_labels"], row["prompt_length"])


def pairs_batch(rows: list[dict], pad_token_id: int) -> Batch:
    """One batch of twice as many rows: first all chosen answers, then all rejected ones.

    Each has the reference's log-probability of it as `reference`, if there is a reference.
    """
    answers = [
        {**answer_of(row), **({"reference": row[name]} if name in row else {})}
        for answer_of, name in zip((chosen_of, rejected_of), REFERENCES, strict=True)
        for row in rows
    ]
    return Batch(answers, pad_token_id)


def fully_learned_batch(rows: list[dict], pad_token_id: int) -> Batch:
    """The same without a reference, for a loss that learns the chosen text as well: all that fine-tuning learns of it.

    Of that, the places in `labels` from `answer_from` on are the last answer.
    """
    starts = [answer_start(row["input_ids"], row["prompt_length"]) for row in rows]
    chosen = [
        {"input_ids": row["input_ids"], "labels": row["labels"], "answer_from": start}
        for row, start in zip(rows, starts, strict=True)
    ]
    return Batch(chosen + [rejected_of(row) for row in rows], pad_token_id)


def with_references(split, figures):
    """A split's pairs with the reference's figures of them, as datasets; None where these are of other rows."""
    from datasets import concatenate_datasets

    if not {"id", *REFERENCES} <= set(figures.column_names) or list(split["id"]) != list(figures["id"]):
        return None
    return concatenate_datasets([split, figures.select_columns(list(REFERENCES))], axis=1)


@dataclasses.dataclass
class PreferenceLoss:
    """The loss of each pair, from the log-probabilities of its two answers under model and reference."""

    beta: float
    loss_type: str
    label_smoothing: float = 0.0
    nll_weight = 0.0
    batch_of = staticmethod(pairs_batch)

    def __call__(self, logps, batch: Batch):
        """Args: log-probability of each row of the batch (chosen first), and the batch of `pairs_batch`.

        Returns:
            (losses: (pairs,) with gradient, figures: name -> (pairs,) without)
        """
        references = tensor_on(logps.device, [row["reference"] for row in batch.rows], "float32")
        (chosen, rejected), (chosen_ratio, rejected_ratio) = logps.chunk(2), (logps - references).chunk(2)
        if self.loss_type == "ipo":  # mean per token: the squared loss would grow with the answers' lengths
            chosen_length, rejected_length = answer_lengths(batch, logps.device).chunk(2)
            losses = (chosen_ratio / chosen_length - rejected_ratio / rejected_length - 1 / (2 * self.beta)) ** 2
        else:
            losses = self._of_margin(self.beta * (chosen_ratio - rejected_ratio))
        return losses, figures_of(self.beta, chosen_ratio, rejected_ratio, chosen, rejected)

    def _of_margin(self, margin):
        from torch.nn.functional import logsigmoid, relu

        if self.loss_type == "hinge":
            return relu(1 - margin)
        wrong = self.label_smoothing if self.loss_type == "robust" else 0.0
        return (wrong * logsigmoid(-margin) - (1 - wrong) * logsigmoid(margin)) / (1 - 2 * wrong)


@dataclasses.dataclass
class OrpoLoss:
    """ORPO: the chosen text is learned as in fine-tuning, and `beta` weighs its answer's odds over the rejected one.

    The paper calls `beta` lambda. Which tokens of the chosen text are learned is `prompt.loss_on`, as in fine-tuning;
    TRL learns all of them.
    """

    beta: float
    nll_weight = 1.0
    batch_of = staticmethod(fully_learned_batch)

    def __call__(self, logps, batch: Batch):
        """Args and returns as of `PreferenceLoss`; the log-probability of an answer is its mean over tokens here."""
        from torch.nn.functional import logsigmoid

        chosen, rejected = (logps / answer_lengths(batch, logps.device)).chunk(2)
        log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return -self.beta * logsigmoid(log_odds), figures_of(self.beta, chosen, rejected, chosen, rejected)


@dataclasses.dataclass
class SimpoLoss:
    """SimPO: the chosen answer's mean log-probability, times `beta`, is to exceed the rejected one's by `simpo_gamma`.

    `cpo_alpha` weighs the cross entropy of the chosen answer beside that (CPO-SimPO); 0: SimPO itself.
    """

    beta: float
    simpo_gamma: float
    cpo_alpha: float = 0.0
    batch_of = staticmethod(pairs_batch)

    @property
    def nll_weight(self) -> float:
        return self.cpo_alpha

    def __call__(self, logps, batch: Batch):
        """Args and returns as of `PreferenceLoss`; the log-probability of an answer is its mean over tokens here."""
        from torch.nn.functional import logsigmoid

        chosen, rejected = (logps / answer_lengths(batch, logps.device)).chunk(2)
        losses = -logsigmoid(self.beta * (chosen - rejected) - self.simpo_gamma)
        return losses, figures_of(self.beta, chosen, rejected, chosen, rejected)


PairLoss = PreferenceLoss | OrpoLoss | SimpoLoss
# method -> its loss, of the config section `method`
PAIR_LOSSES: dict[str, Callable[[dict], PairLoss]] = {
    "dpo": lambda method: PreferenceLoss(method["beta"], method["loss_type"], method["label_smoothing"]),
    "orpo": lambda method: OrpoLoss(method["beta"]),
    "simpo": lambda method: SimpoLoss(method["beta"], method["simpo_gamma"], method["cpo_alpha"]),
}


def _log1mexp(logp):
    """log(1 - exp(x)) for x up to 0, by the form that is exact at each."""
    import torch

    # An answer that is certain has log-probability 0, where this is infinite and its gradient no number.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return torch.where(logp < -0.6931471805599453, torch.log1p(-torch.exp(logp)), torch.log(-torch.expm1(logp)))


def answer_lengths(batch: Batch, device):
    """(rows,) how many tokens of each row's last answer count; at least 1."""
    counts = [max(1, count_learned(row["labels"][row.get("answer_from", 0) :])) for row in batch.rows]
    return tensor_on(device, counts)


def answers_and_rest(found, batch: Batch):
    """(log-probability of each row's last answer: (rows,), cross entropy of each token learned of the chosen texts).

    Args:
        found: the `Predictions` of a batch of pairs.
    """
    losses, rows = found.losses(), found.learned.rows
    # In a causal model a place of the labels is predicted before it; in a decoder all that is learned is the answer.
    in_answer = [
        position >= batch.rows[row].get("answer_from", 0) - 1
        for row, position in zip(rows, found.learned.positions, strict=True)
    ]
    counted = losses * tensor_on(losses.device, in_answer, "float32")
    logps = -losses.new_zeros(len(batch)).index_add(0, tensor_on(losses.device, rows), counted)
    chosen = sum(row < len(batch) // 2 for row in rows)  # they come first
    return logps, losses[:chosen]


def figures_of(beta: float, chosen_gain, rejected_gain, chosen, rejected) -> dict:
    """Name -> (pairs,) figure of each pair: `beta` times what an answer gained is its reward."""
    good, bad = beta * chosen_gain.detach(), beta * rejected_gain.detach()
    return {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/accuracies": (good > bad).float(),
        "rewards/margins": good - bad,
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
    }
