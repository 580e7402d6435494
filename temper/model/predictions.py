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
import math
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch.nn.functional import cross_entropy

from temper.data.batches import Batch, Learned, padded_shape, tensor_on
from temper.errors import UserError
from temper.model.adapters import is_prompt_learning
from temper.model.flat_batch import flat_attention_in, flatten
from temper.model.spread import local

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
        learned: whose these are.
    """

    head: Callable
    states: torch.Tensor
    targets: torch.Tensor
    learned: Learned

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
        self.ways: dict[bool, Callable] = {}  # of a model in training and one in evaluation: chosen on its first batch
        self.way: Callable | None = None  # the last one taken
        self.said: set[str] = set()

    def __call__(self, model, batch: Batch):
        """Args: a model (PEFT or not) and a `Batch`.

        Returns:
            (loss sum: 0-dim float32 tensor with gradient, learned tokens: int)
        """
        return self.predictions(model, batch).sum_and_count()

    def sequence_logps(self, model, batch: Batch, answers: int = 1):
        """Log-probability of each row's learned tokens, summed: (rows,) float32 with gradient.

        `answers`: see `flat_batch.flatten`.
        """
        found = self.predictions(model, batch, answers)
        logps = -found.losses()
        return logps.new_zeros(len(batch)).index_add(0, tensor_on(logps.device, found.learned.rows), logps)

    def predictions(self, model, batch: Batch, answers: int = 1) -> Predictions:
        """What the model predicts at a batch's learned positions, and what was to be predicted."""
        self.way = self.choose(model, batch, answers)
        return self.way(model, batch, answers)

    def choose(self, model, batch: Batch, answers: int = 1) -> Callable:
        """The way for a model in training or in evaluation, chosen with the first batch."""
        if model.training not in self.ways:
            self.ways[model.training] = self._fastest_way(model, batch, answers)
        return self.ways[model.training]

    def _fastest_way(self, model, batch: Batch, answers: int) -> Callable:
        way, why = fastest_way(model, batch, answers, self.share)
        if why and why not in self.said:
            self.said.add(why)
            log.info("loss: %s", why)
        return way


# --- which way -----------------------------------------------------------------------------------


def fastest_way(model, batch: Batch, answers: int = 1, share: bool = True) -> tuple[Callable, str | None]:
    """(the first of flat, short and plain way that predicts what the model itself does; why it is not the flat one)

    To be sure, the way is tried on some rows of the batch: without randomness, and for a model in training also in
    training. There a model may do what it does not in evaluation: draw random numbers, or call hooks (NEFTune's noise).
    The flat way shows a module all rows as one. That changes no dropout, which draws for each number by itself, but may
    change anything else that is drawn; so with that rows are padded, where the model sees what it would see anyway.

    Raises:
        UserError: for a model in training whose own loss has more in it than the cross entropy.
    """
    few, answers = _some_rows(batch, answers)
    with torch.no_grad(), _random_state_kept(), _with_effect(model):
        if model.training:
            _refuse_other_loss(model, few)
        obstacle = _head_obstacle(model, few)
        if obstacle is None:
            flat_obstacle = _flat_obstacle(model, few, answers, share)
            if flat_obstacle is None:
                return (flat_way if share and not _draws(model, few, answers) else unshared_way), None
            obstacle = _short_obstacle(model, few, answers)
            if obstacle is None:
                return short_way, f"rows are padded and share nothing: {flat_obstacle}"
    return plain_way, f"logits at all positions: {obstacle}"


def _some_rows(batch: Batch, answers: int) -> tuple[Batch, int]:
    """(a few rows, each with a few of its answers; how many)."""
    rows, kept = len(batch) // answers, min(answers, 3)
    of_each = range(min(rows, 4 if answers == 1 else 2))
    wanted = [answer * rows + row for answer in range(kept) for row in of_each]
    return dataclasses.replace(batch, rows=[batch.rows[row] for row in wanted]), kept


@contextlib.contextmanager
def _evaluating(model):
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def _with_effect(model):
    """Weights that start at zero (LoRA's B) hide what they will do; they are small random ones while the block runs."""
    zeros = [local(weight) for weight in model.parameters() if weight.requires_grad]
    zeros = [weight for weight in zeros if not weight.any()]
    for weight in zeros:
        weight.normal_(std=0.1)
    try:
        yield
    finally:
        for weight in zeros:
            weight.zero_()


@contextlib.contextmanager
def _random_state_kept():
    """Have nothing that is drawn while the block runs change what is drawn after it."""
    python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(of_numpy)


class _WithoutDropout(torch.overrides.TorchFunctionMode):
    """Dropout, of modules, functions and PyTorch's attention, leaves everything while this is entered."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.nn.functional.dropout, torch.dropout):
            return args[0] if args else kwargs["input"]
        if func is torch.nn.functional.scaled_dot_product_attention:
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


def _random_state(device) -> tuple:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    numbers: Any
    _, numbers, place, *_ = numpy.random.get_state()
    return (*(bytes(state.numpy()) for state in states), random.getstate(), bytes(numbers), place)


def _draws(model, batch, answers: int) -> bool:
    """Whether a forward pass draws random numbers (dropout): then no two rows may share a state."""
    device = _unwrapped(model).device
    before = _random_state(device)
    unshared_way(model, batch, answers)
    return _random_state(device) != before


def _refuse_other_loss(model, batch) -> None:
    """Ours is the cross entropy; a model may add to it (how evenly a mixture's experts are used, for instance)."""
    torch.manual_seed(0)
    own = model(**_padded(model, batch), use_cache=False).loss
    torch.manual_seed(0)
    total, count = plain_way(model, batch).sum_and_count()
    if own is None or not count or not torch.isfinite(total):
        return
    ours, precision = (total / count).item(), max(1e-4, 8 * torch.finfo(own.dtype).eps)
    if not abs(own.item() - ours) <= precision * abs(ours):
        name = type(_unwrapped(model)).__name__
        raise UserError(
            f"{name}: its own loss is {own.item():.6g}, the cross entropy of its answers {ours:.6g}: it adds something "
            'that would not be trained here; of a mixture of experts set "output_router_logits": false in config.json'
        )


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
    base, seen = _unwrapped(model), dict[str, Any]()
    hooks = [
        base.base_model.register_forward_hook(lambda _module, _inputs, output: seen.update(hidden=output[0])),
        base.get_output_embeddings().register_forward_hook(
            lambda _module, inputs, output: seen.update(input=inputs[0], output=output)
        ),
    ]
    try:
        logits = model(**_read(_padded(model, batch)), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if seen.keys() != {"hidden", "input", "output"}:
        return False
    return torch.equal(seen["hidden"], seen["input"]) and torch.equal(seen["output"].float(), logits.float())


def _short_obstacle(model, batch, answers: int) -> str | None:
    """Why the short way does not predict what the model does, from the same random numbers."""
    torch.manual_seed(0)
    found = short_way(model, batch, answers)
    torch.manual_seed(0)
    return _difference(model, found, plain_way(model, batch, answers))


def _flat_obstacle(model, batch, answers: int, share: bool) -> str | None:
    """Why the flat way does not predict, from each row by itself, what the model does."""
    known = _known_obstacle(model)
    if known:
        return known
    base, device = _unwrapped(model), _unwrapped(model).device
    flat = flatten(batch, _learned(model, batch), answers=answers, share=share, device=device)
    with _evaluating(model):
        expected = plain_way(model, batch, answers)
    before = _random_state(device)
    with _WithoutDropout():
        states = _flat_states(base, flat)
    if _random_state(device) != before:
        return f"{type(base).__name__} draws random numbers in training, and not for dropout alone"
    found = Predictions(base.get_output_embeddings(), states[flat.predicting], expected.targets, expected.learned)
    return flat.misunderstood(base.config.get_text_config()) or _difference(model, found, expected) or _leak(base, flat)


def _known_obstacle(model) -> str | None:
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


def _leak(base, flat) -> str | None:
    """Whether another text in one row changes a token of the others (a convolution or a state that goes on does)."""
    row = flat.row_of()
    if int(row.max()) == 0:
        return None
    another = (flat.input_ids + 1) % base.config.get_text_config().vocab_size
    other = torch.where(row == 1, another, flat.input_ids)
    with _evaluating(base):
        states, moved = (
            _flat_states(base, dataclasses.replace(flat, input_ids=ids)) for ids in (flat.input_ids, other)
        )
    change = ((moved - states).float().abs().mean(dim=1) / states.float().std())[row[0] != 1].max().item()
    return f"rows of {type(base).__name__} would see each other" if change > _tolerance(base) else None


def _difference(model, found: Predictions, expected: Predictions) -> str | None:
    """How logits differ from the model's own, if by more than rounding."""
    order = found.targets.equal(expected.targets)
    logits, wanted = found.logits(), expected.logits()
    share = ((logits - wanted).abs().mean() / wanted.std()).item() if order and len(wanted) else 0.0
    if order and share <= _tolerance(_unwrapped(model)):
        return None
    return f"the logits of {type(_unwrapped(model)).__name__} would differ by {share:.2g} of their spread"


def _tolerance(base) -> float:
    if getattr(base, "is_loaded_in_8bit", False):
        return TOLERANCE_8_BIT
    mixed = torch.is_autocast_enabled(base.device.type)
    return TOLERANCE_16_BIT if mixed else TOLERANCE.get(base.dtype, TOLERANCE_16_BIT)


# --- the ways ------------------------------------------------------------------------------------


def flat_way(model, batch: Batch, answers: int = 1) -> Predictions:
    """One row without padding, common tokens once, logits at learned positions only."""
    return _flat(model, batch, answers, share=True)


def unshared_way(model, batch: Batch, answers: int = 1) -> Predictions:
    """The flat way, every token of every row computed."""
    return _flat(model, batch, answers, share=False)


def _flat(model, batch: Batch, answers: int, share: bool) -> Predictions:
    base, learned = _unwrapped(model), _learned(model, batch)
    flat = flatten(batch, learned, answers=answers, share=share, device=base.device)
    states = _flat_states(base, flat).index_select(0, flat.predicting)
    return Predictions(base.get_output_embeddings(), states, tensor_on(base.device, learned.targets), learned)


def _flat_states(base, flat):
    """The decoder's output for the tokens of a `FlatBatch`: (tokens, width)."""
    with flat_attention_in(base) as usual:
        inputs = {"input_ids": flat.input_ids, "position_ids": flat.position_ids}
        return base.base_model(**inputs, use_cache=False, flat=flat, plain=usual == "eager")[0][0]


def tokens_computed(way: Callable | None, model, batch: Batch, answers: int = 1) -> int:
    """How many tokens go through a model's layers by a way (None: Trainer's): padding and shared ones count as such."""
    if way in (flat_way, unshared_way):
        return flatten(batch, _learned(model, batch), answers=answers, share=way is flat_way).input_ids.numel()
    sides = ("input_ids", "labels") if model.config.is_encoder_decoder else ("input_ids",)
    return sum(math.prod(padded_shape(batch.rows, side)) for side in sides)


def short_way(model, batch: Batch, answers: int = 1) -> Predictions:  # noqa: ARG001 - as the flat way
    """Padded rows, logits at learned positions only."""
    base, learned = _unwrapped(model), _learned(model, batch)
    hidden = base.base_model(**_read(_padded(model, batch)), use_cache=False)[0]
    states, targets = _at_learned(hidden, learned)
    return Predictions(base.get_output_embeddings(), states, targets, learned)


def plain_way(model, batch: Batch, answers: int = 1) -> Predictions:  # noqa: ARG001 - as the flat way
    """The model's own logits at all positions."""
    padded, learned = _padded(model, batch), _learned(model, batch)
    # An encoder-decoder makes the decoder's inputs of the labels, shifted as it was trained.
    inputs = padded if model.config.is_encoder_decoder else _read(padded)
    logits = model(**inputs, use_cache=False).logits
    logits = logits[:, -padded["labels"].shape[1] :]  # prompt methods put virtual tokens in front
    states, targets = _at_learned(logits, learned)
    return Predictions(lambda part: part, states, targets, learned)


def _padded(model, batch: Batch) -> dict:
    return batch.padded(_unwrapped(model).device)


def _read(padded: dict) -> dict:
    """What a model reads of a padded batch: all but the labels."""
    return {name: padded[name] for name in ("input_ids", "attention_mask")}


def _learned(model, batch: Batch) -> Learned:
    """What the logits predict: of a causal model each position's next token, of an encoder-decoder the labels."""
    return batch.learned(_ahead(model))


def _ahead(model) -> int:
    return 0 if model.config.is_encoder_decoder else 1


def _at_learned(outputs, learned: Learned):
    """(outputs (rows, positions, width) where they predict learned tokens: (learned tokens, width); those tokens)."""
    rows, positions, targets = (tensor_on(outputs.device, numbers) for numbers in learned)
    return outputs[rows, positions], targets


def with_decoder_inputs(model, batch: Batch) -> dict:
    """The padded batch, of an encoder-decoder with its decoder's inputs: Trainer's label smoothing hides the labels."""
    inputs = _padded(model, batch)
    if not model.config.is_encoder_decoder:
        return inputs
    decoder_inputs = _unwrapped(model).prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    return {**inputs, "decoder_input_ids": decoder_inputs}


def tokens_of(model, batch) -> int:
    """Real tokens (no padding) that go through the model."""
    tokens = sum(len(row["input_ids"]) for row in batch.rows)
    if model.config.is_encoder_decoder:
        tokens += batch.learned_count(ahead=_ahead(model))
    return tokens


def _unwrapped(model):
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
