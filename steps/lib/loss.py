"""The training loss: cross entropy at the learned positions, by the fastest way that is exact.

The flat way: rows without padding, what they have in common once (see `flat_batch`), logits where they count.
The short way: padded rows, logits where they count. A row of 60 tokens has often 2 that are learned. Computing the
    vocabulary's logits (49,152 wide for SmolLM2) for the other 58 is most of a plain forward pass's last layer, and all
    of it is thrown away. So we take the decoder's hidden states, pick the learned positions and flatten them to 2-D: on
    3-D slices the head becomes a batched product with copied weights.
The plain way: the model's own logits at all positions. An encoder-decoder model's labels are all learned, and it makes
    the decoder's inputs from the labels itself.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from steps.lib.adapters import is_prompt_learning
from steps.lib.conversation import IGNORED
from steps.lib.flat_batch import flat_attention_in, flatten

log = logging.getLogger("temper")

# Logits of one position by two ways, their mean difference as a share of their spread. bfloat16 has 8 bits of
# mantissa: equal maths differs by 1 to 2%. A row that sees another one's tokens differs by far more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
TOLERANCE_16_BIT = 5e-2
TOLERANCE_8_BIT = 0.3  # what a row gives depends on the others: outliers are kept by column (0.15 for the same rows)


@dataclasses.dataclass
class Predictions:
    """A model's predictions of a batch's learned tokens.

    Args:
        head: makes logits of `states`.
        states: (learned tokens, width), row after row.
        targets: (learned tokens,) what was to be predicted.
        learned: (rows, positions) whether the token that a position predicts is learned.
    """

    head: Callable
    states: torch.Tensor
    targets: torch.Tensor
    learned: torch.Tensor

    def logits(self, part=slice(None)):
        """(learned tokens, vocabulary) float32, of all or of a part."""
        return self.head(self.states[part]).float()

    def losses(self):
        """Cross entropy of each learned token, float32."""
        return cross_entropy(self.logits(), self.targets, reduction="none")

    def sum_and_count(self):
        """(sum of the cross entropies: 0-dim, how many)."""
        return cross_entropy(self.logits(), self.targets, reduction="sum"), len(self.targets)


class SupervisedLoss:
    """Sum of the cross entropy over a batch's learned tokens, and how many there are, by the fastest exact way.

    Args:
        share: whether rows may share what they have in common. A row's figures then depend, in their last digits, on
            the rows beside it.
    """

    def __init__(self, share: bool = True):
        self.share = share
        self.way = None  # not known before the first batch

    def __call__(self, model, batch):
        """Args: a model (PEFT or not) and a batch with input_ids, attention_mask and labels as `collate` makes it.

        Returns:
            (loss sum: 0-dim float32 tensor with gradient, learned tokens: int)
        """
        return self.predictions(model, batch).sum_and_count()

    def sequence_logps(self, model, batch, pairs: bool = False):
        """Log-probability of each row's learned tokens, summed: (rows,) float32 with gradient.

        `pairs`: the batch is that of `collate_pairs`.
        """
        found = self.predictions(model, batch, pairs)
        logps = -found.losses()
        return logps.new_zeros(len(found.learned)).index_add(0, found.learned.nonzero()[:, 0], logps)

    def predictions(self, model, batch, pairs: bool = False) -> Predictions:
        """What the model predicts at a batch's learned positions, and what was to be predicted."""
        if self.way is None:
            self.way = fastest_way(model, batch, pairs, self.share)
        return self.way(model, batch, pairs)


# --- which way -----------------------------------------------------------------------------------


def fastest_way(model, batch: dict, pairs: bool = False, share: bool = True) -> Callable:
    """The first of flat, short and plain way that predicts what the model itself does; why not is logged, once.

    To be sure, the way is tried on some rows of the batch, without dropout.
    """
    few = _some_rows(batch, pairs)
    with torch.no_grad(), _evaluating(model):
        obstacle = _head_obstacle(model, few)
        if obstacle is None:
            flat = flat_way if share else unshared_way
            flat_obstacle = _flat_obstacle(model) or _difference(flat, model, few, pairs)
            if flat_obstacle is None:
                return flat
            log.info("loss: rows are padded and share nothing: %s", flat_obstacle)
        obstacle = obstacle or _difference(short_way, model, few, pairs)
    if obstacle is None:
        return short_way
    log.info("loss: logits at all positions: %s", obstacle)
    return plain_way


def _some_rows(batch: dict, pairs: bool) -> dict:
    rows = len(batch["input_ids"])
    wanted = [0, 1, rows // 2, rows // 2 + 1] if pairs and rows > 2 else range(min(rows, 4))
    return {name: batch[name][list(wanted)] for name in ("input_ids", "attention_mask", "labels")}


@contextlib.contextmanager
def _evaluating(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _head_obstacle(model, batch) -> str | None:
    """Why the decoder and the head cannot be called one after the other by hand."""
    name, base = type(_unwrapped(model)).__name__, _unwrapped(model)
    has_parts = base.base_model is not base and base.get_output_embeddings() is not None
    if is_prompt_learning(model) or base.config.is_encoder_decoder or not has_parts:
        return f"no separate decoder and head in {name}"
    return None if _head_is_all_there_is(model, batch) else f"the head does more than one product in {name}"


def _head_is_all_there_is(model, batch) -> bool:
    """Whether the decoder's output goes to the head as it is, and the head's output is the logits.

    To the bit, in one forward pass: caps and scales of logits show in a loss only where these are large.
    """
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


def _flat_obstacle(model) -> str | None:
    """What in a model's attention is known not to go with rows that lie one after the other."""
    base = _unwrapped(model)
    config, name = base.config.get_text_config(), type(base).__name__
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if not base._supports_attention_backend:
        return f"{name} has an attention of its own"
    if kinds:
        return f"{name} has layers of {', '.join(sorted(kinds))}"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{name} caps its attention's logits"
    if any(getattr(part, "gradient_checkpointing", False) for part in base.modules()):
        return "gradient checkpointing runs layers again"
    return None


def _difference(way: Callable, model, batch, pairs: bool) -> str | None:
    """How a way's logits differ from the model's own, if by more than rounding."""
    found, expected = (any_way(model, batch, pairs) for any_way in (way, plain_way))
    order = found.targets.equal(expected.targets)
    logits, wanted = found.logits(), expected.logits()
    share = ((logits - wanted).abs().mean() / wanted.std()).item() if order and len(wanted) else 0.0
    if order and share <= _tolerance(_unwrapped(model)):
        return None
    return f"the logits of {type(_unwrapped(model)).__name__} would differ by {share:.2g} of their spread"


def _tolerance(base) -> float:
    if getattr(base, "is_loaded_in_8bit", False):
        return TOLERANCE_8_BIT
    return TOLERANCE.get(base.dtype, TOLERANCE_16_BIT)


# --- the ways ------------------------------------------------------------------------------------


def flat_way(model, batch, pairs: bool = False) -> Predictions:
    """One row without padding, common tokens once, logits at learned positions only."""
    return _flat(model, batch, pairs, share=_shares(model))


def unshared_way(model, batch, pairs: bool = False) -> Predictions:
    """The flat way, every token of every row computed."""
    return _flat(model, batch, pairs, share=False)


def _flat(model, batch, pairs: bool, share: bool) -> Predictions:
    base, learned = _unwrapped(model), batch["labels"][:, 1:] != IGNORED
    flat = flatten(batch, learned, pairs=pairs, share=share)
    with flat_attention_in(base) as usual:
        inputs = {"input_ids": flat.input_ids, "position_ids": flat.position_ids}
        hidden = base.base_model(**inputs, use_cache=False, flat=flat, plain=usual == "eager")[0]
    states = hidden[0].index_select(0, flat.predicting)
    return Predictions(base.get_output_embeddings(), states, batch["labels"][:, 1:][learned], learned)


def tokens_computed(way: Callable | None, model, batch, pairs: bool = False) -> int:
    """How many tokens go through a model's layers by a way (None: Trainer's): padding and shared ones count as such."""
    if way in (flat_way, unshared_way):
        learned = batch["labels"][:, 1:] != IGNORED
        return flatten(batch, learned, pairs=pairs, share=way is flat_way and _shares(model)).input_ids.numel()
    return batch["input_ids"].numel() + (batch["labels"].numel() if model.config.is_encoder_decoder else 0)


def _shares(model) -> bool:
    return not (model.training and _has_dropout(_unwrapped(model)))


def _has_dropout(base) -> bool:
    """Whether a training's forward pass draws random numbers: then no two rows share a state."""
    layers = (part.p for part in base.modules() if isinstance(part, torch.nn.Dropout))
    return any(layers) or bool(getattr(base.config.get_text_config(), "attention_dropout", 0.0))


def short_way(model, batch, pairs: bool = False) -> Predictions:  # noqa: ARG001 - as the flat way
    """Padded rows, logits at learned positions only."""
    base, learned = _unwrapped(model), batch["labels"][:, 1:] != IGNORED
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    hidden = base.base_model(**inputs, use_cache=False)[0]
    states = hidden[:, :-1][learned]
    return Predictions(base.get_output_embeddings(), states, batch["labels"][:, 1:][learned], learned)


def plain_way(model, batch, pairs: bool = False) -> Predictions:  # noqa: ARG001 - as the flat way
    """The model's own logits at all positions."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if model.config.is_encoder_decoder:
        inputs["labels"] = batch["labels"]  # from which the model makes the decoder's inputs, shifted as it was trained
    logits, targets = model(**inputs, use_cache=False).logits, targets_of(model, batch)
    learned = targets != IGNORED
    if not model.config.is_encoder_decoder:
        logits = logits[:, -targets.shape[1] - 1 : -1]  # prompt methods put virtual tokens in front
    return Predictions(lambda part: part, logits[learned], targets[learned], learned)


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
