"""The training loss: cross entropy at the learned positions, and logits only there.

A row of 60 tokens has often 2 that are learned. Computing the vocabulary's logits (49,152 wide for
SmolLM2) for the other 58 is most of a plain forward pass's last layer, and all of it is thrown
away. So we take the decoder's hidden states, pick the learned positions and flatten them to 2-D:
on 3-D slices the head becomes a batched product with copied weights.
"""

import logging

from steps.lib.adapters import is_prompt_learning
from steps.lib.conversation import IGNORED

log = logging.getLogger("temper")

CHECK_TOLERANCE = 2e-2  # relative; bfloat16 has 8 bits of mantissa, so equal maths differs by up to 1%


class SupervisedLoss:
    """Sum of the cross entropy over a batch's learned tokens, and how many there are.

    Uses the short way (logits at learned positions only) when the model has a decoder and a plain
    head, and proves on the first batch that it equals the model's own loss; otherwise the plain way,
    and says so once.
    """

    def __init__(self):
        self.short_way: bool | None = None  # not known before the first batch

    def __call__(self, model, batch):
        """Args: a causal LM (PEFT or not) and a batch with input_ids, attention_mask, labels, each (rows, length).

        Returns:
            (loss sum: 0-dim float32 tensor with gradient, learned tokens: int)
        """
        return (short_loss if self.takes_short_way(model, batch) else plain_loss)(model, batch)

    def sequence_logps(self, model, batch):
        """Log-probability of each row's learned tokens, summed: (rows,) float32 with gradient."""
        from torch.nn.functional import cross_entropy

        logits_of = short_logits if self.takes_short_way(model, batch) else plain_logits
        logits, targets, learned = logits_of(model, batch)
        logps = -cross_entropy(logits, targets, reduction="none")
        return logps.new_zeros(len(learned)).index_add(0, learned.nonzero()[:, 0], logps)

    def takes_short_way(self, model, batch) -> bool:
        """Decided on the first batch, and kept."""
        if self.short_way is None:
            self.short_way = self._check(model, batch)
        return self.short_way

    def _check(self, model, batch) -> bool:
        import torch

        if not _has_plain_head(model):
            log.info(
                "loss: plain way (logits at all positions): no separate decoder and head in %s", type(model).__name__
            )
            return False
        few = {name: batch[name][:2] for name in ("input_ids", "attention_mask", "labels")}
        was_training = model.training
        model.eval()  # no dropout: both ways must see the same network
        with torch.no_grad():
            short, plain = short_loss(model, few)[0].item(), plain_loss(model, few)[0].item()
        model.train(was_training)
        if abs(short - plain) <= CHECK_TOLERANCE * max(1.0, abs(plain)):
            return True
        log.info("loss: plain way: the head does more than one product here (%.4f is not %.4f)", short, plain)
        return False


def short_loss(model, batch):
    """Loss sum and count with logits at learned positions only."""
    return _loss(*short_logits(model, batch))


def plain_loss(model, batch):
    """The same from the model's own logits at all positions."""
    return _loss(*plain_logits(model, batch))


def _loss(logits, targets, _learned):
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, targets, reduction="sum"), len(targets)


def short_logits(model, batch):
    """(float32 logits at the learned positions, their tokens, which positions those are: (rows, length - 1))."""
    base = _unwrapped(model)
    decoder, head = base.base_model, base.get_output_embeddings()
    hidden = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORED
    return head(hidden[:, :-1][learned]).float(), targets[learned], learned


def plain_logits(model, batch):
    """The same from the model's own logits at all positions."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORED
    logits = logits[:, -targets.shape[1] - 1 : -1]  # prompt methods put virtual tokens in front
    return logits[learned].float(), targets[learned], learned


def _unwrapped(model):
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_plain_head(model) -> bool:
    """Whether calling decoder and head by hand goes through everything the model's forward does."""
    if is_prompt_learning(model):
        return False
    base = _unwrapped(model)
    prefix = getattr(base, "base_model_prefix", "")
    has_decoder = bool(prefix) and hasattr(base, prefix)
    return has_decoder and base.get_output_embeddings() is not None and not base.config.is_encoder_decoder
