"""Direct preference optimization: pairs as batches, and the loss on them.

Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023. Names and
formulas are those of trl.DPOTrainer with log-probabilities of the reference that were computed before training.
"""

import dataclasses

from temper.data.batches import Batch, count_learned, tensor_on
from temper.data.columns import IGNORED, answer_start

REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


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

    Each has the reference's log-probability of it as `reference`.
    """
    answers = [
        {**answer_of(row), "reference": row[name]}
        for answer_of, name in zip((chosen_of, rejected_of), REFERENCES, strict=True)
        for row in rows
    ]
    return Batch(answers, pad_token_id)


@dataclasses.dataclass
class PreferenceLoss:
    """The loss of each pair, from the log-probabilities of its two answers under model and reference."""

    beta: float
    loss_type: str
    label_smoothing: float = 0.0

    def __call__(self, logps, batch: Batch):
        """Args: log-probability of each row of the batch (chosen first), and the batch of `pairs_batch`.

        Returns:
            (losses: (pairs,) with gradient, figures: name -> (pairs,) without)
        """
        references = tensor_on(logps.device, [row["reference"] for row in batch.rows], "float32")
        (chosen, rejected), (chosen_ratio, rejected_ratio) = logps.chunk(2), (logps - references).chunk(2)
        if self.loss_type == "ipo":  # mean per token: the squared loss would grow with the answers' lengths
            lengths = [max(1, count_learned(row["labels"])) for row in batch.rows]
            chosen_length, rejected_length = tensor_on(logps.device, lengths).chunk(2)
            losses = (chosen_ratio / chosen_length - rejected_ratio / rejected_length - 1 / (2 * self.beta)) ** 2
        else:
            losses = self._of_margin(self.beta * (chosen_ratio - rejected_ratio))
        return losses, self._figures(chosen, rejected, chosen_ratio, rejected_ratio)

    def _of_margin(self, margin):
        from torch.nn.functional import logsigmoid, relu

        if self.loss_type == "hinge":
            return relu(1 - margin)
        wrong = self.label_smoothing if self.loss_type == "robust" else 0.0
        return (wrong * logsigmoid(-margin) - (1 - wrong) * logsigmoid(margin)) / (1 - 2 * wrong)

    def _figures(self, chosen, rejected, chosen_ratio, rejected_ratio) -> dict:
        good, bad = self.beta * chosen_ratio.detach(), self.beta * rejected_ratio.detach()
        return {
            "rewards/chosen": good,
            "rewards/rejected": bad,
            "rewards/accuracies": (good > bad).float(),
            "rewards/margins": good - bad,
            "logps/chosen": chosen.detach(),
            "logps/rejected": rejected.detach(),
        }


FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
