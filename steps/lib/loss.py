"""The training loss: cross entropy at the learned positions, and of a causal model logits only there.

A row of 60 tokens has often 2 that are learned. Computing the vocabulary's logits (49,152 wide for
SmolLM2) for the other 58 is most of a plain forward pass's last layer, and all of it is thrown
away. So we take the decoder's hidden states, pick the learned positions and flatten them to 2-D:
on 3-D slices the head becomes a batched product with copied weights.

An encoder-decoder model's labels are all learned, so its own logits are taken as they are; it makes the decoder's
inputs from the labels itself.
"""

import logging

from steps.lib.adapters import is_prompt_learning
from steps.lib.conversation import IGNORED

log = logging.getLogger("temper")

CHECK_TOLERANCE = 2e-2  # relative; bfloat16 has 8 bits of mantissa, so equal maths differs by up to 1%


class SupervisedLoss:
    """Sum of the cross entropy over a batch's learned tokens, and how many there are.

    Uses the short way (logits at learned positions only) when the model has a decoder and a plain
    head, and proves on the first batch that it equals the model's own; otherwise the plain way,
    and says so once.
    """

    def __init__(self):
        self.short_way: bool | None = None  # not known before the first batch

    def __call__(self, model, batch):
        """Args: a model (PEFT or not) and a batch with input_ids, attention_mask and labels as `collate` makes it.

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
            few = {name: batch[name][:2] for name in ("input_ids", "attention_mask", "labels")}
            self.short_way = short_way_is_exact(model, few)
        return self.short_way


def short_way_is_exact(model, batch) -> bool:
    """Whether calling decoder and head by hand gives what the model's own forward does; if not, it is logged why."""
    import torch

    if not _has_decoder_and_head(model):
        log.info("loss: logits at all positions: no separate decoder and head in %s", type(model).__name__)
        return False
    was_training = model.training
    model.eval()  # no dropout: both ways must see the same network
    with torch.no_grad():
        plain_head = _head_is_all_there_is(model, batch)
        short, plain = short_loss(model, batch)[0].item(), plain_loss(model, batch)[0].item()
    model.train(was_training)
    if plain_head and abs(short - plain) <= CHECK_TOLERANCE * max(1.0, abs(plain)):
        return True
    log.info("loss: logits at all positions: the head does more than one product in %s", type(model).__name__)
    return False


def _head_is_all_there_is(model, batch) -> bool:
    """Whether the decoder's output goes to the head as it is, and the head's output is the logits.

    To the bit, in one forward pass: caps and scales of logits show in a loss only where these are large.
    """
    import torch

    base, seen = _unwrapped(model), {}
    hooks = [
        base.base_model.register_forward_hook(lambda _module, _inputs, output: seen.update(hidden=output[0])),
        base.get_output_embeddings().register_forward_hook(
            lambda _module, inputs, output: seen.update(input=inputs[0], output=output)
        ),
    ]
    try:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"hidden", "input", "output"}:
        return False
    return torch.equal(seen["hidden"], seen["input"]) and torch.equal(seen["output"].float(), logits.float())


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
    head, hidden, learned = learned_hidden(model, batch)
    return head(hidden).float(), batch["labels"][:, 1:][learned], learned


def learned_hidden(model, batch):
    """(the head, what the decoder gives it at the learned positions: (positions, width), which positions those are)."""
    base = _unwrapped(model)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    hidden = base.base_model(**inputs, use_cache=False)[0]
    learned = batch["labels"][:, 1:] != IGNORED
    return base.get_output_embeddings(), hidden[:, :-1][learned], learned


def plain_logits(model, batch):
    """The same from the model's own logits at all positions."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if model.config.is_encoder_decoder:
        inputs["labels"] = batch["labels"]  # from which the model makes the decoder's inputs, shifted as it was trained
    logits, targets = model(**inputs, use_cache=False).logits, targets_of(model, batch)
    learned = targets != IGNORED
    if not model.config.is_encoder_decoder:
        logits = logits[:, -targets.shape[1] - 1 : -1]  # prompt methods put virtual tokens in front
    return logits[learned].float(), targets[learned], learned


def targets_of(model, batch):
    """What the logits predict: of a causal model each position's next token, of an encoder-decoder the labels."""
    return batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]


def with_decoder_inputs(model, batch) -> dict:
    """The batch with an encoder-decoder's decoder inputs. Trainer's label smoothing needs them: it hides the labels."""
    if not model.config.is_encoder_decoder:
        return batch
    decoder_inputs = _unwrapped(model).prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return {**batch, "decoder_input_ids": decoder_inputs}


def tokens_of(model, batch) -> int:
    """Real tokens (no padding) that go through the model."""
    tokens = int(batch["attention_mask"].sum())
    if model.config.is_encoder_decoder:
        tokens += int((batch["labels"] != IGNORED).sum())
    return tokens


def _unwrapped(model):
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_decoder_and_head(model) -> bool:
    base = _unwrapped(model)
    if is_prompt_learning(model) or base.config.is_encoder_decoder:
        return False
    return base.base_model is not base and base.get_output_embeddings() is not None
