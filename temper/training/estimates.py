"""Estimates before training: memory of parameters, gradients, optimizer and activations, and FLOPs.

Activations and FLOPs are measured, not computed by a formula per architecture: one small real batch goes forward and
backward, torch counts the operations, and the sizes of the tensors that autograd keeps are added. Both grow with the
number of tokens that go through the layers. (Attention grows with its square, which matters little for rows below some
thousand tokens.) That number is counted on batches of the first epoch, because the shared prefix depends on the batch.
"""

import dataclasses
from typing import Any

from temper import units
from temper.model.spread import local

# Heap memory per byte of activations: their sizes differ between batches, which leaves holes. Measured in float32 over
# 25 to 63 steps: 1.4 to 1.6. Returning memory to the system after each step saves nothing.
HEAP = 1.5
PROBE_ROWS = 2
SAMPLED_BATCHES = 32  # batches of the first epoch whose tokens are counted
# Bytes of optimizer state per trained parameter, by parts of the name; otherwise two float32 moments.
STATE_BYTES = {"sgd": 0, "adafactor": 0, "8bit": 2, "adagrad": 4, "lion": 4, "rmsprop": 4}
TWO_MOMENTS = 8


@dataclasses.dataclass
class Estimate:
    """Bytes, and the floating-point operations of an optimizer step over average rows."""

    program: int  # before it loaded the model
    parameters: int
    gradients: int
    optimizer: int
    activations: int  # of the largest batch
    flops_per_step: float

    @property
    def peak(self) -> int:
        """The sum, which is reached at the end of a backward pass."""
        return self.program + self.parameters + self.gradients + self.optimizer + self.activations

    def facts(self) -> dict[str, int]:
        """For training.json and MLflow."""
        return {
            "parameter_memory_bytes": self.parameters,
            "estimated_peak_memory_bytes": self.peak,
            "flops_per_step": round(self.flops_per_step),
        }

    def text(self) -> str:
        """One line for the log."""
        parts = {
            "program": self.program,
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
        }
        named = " + ".join(f"{name} {units.size(size)}" for name, size in parts.items())
        return f"estimate: {units.size(self.peak)} ({named}), {self.flops_per_step / 1e9:,.1f} GFLOP a step"


def estimate(trainer, lengths: list[int], program: int) -> Estimate:
    """Send a small batch through the trainer's model, and scale its costs.

    Args:
        trainer: a TemperTrainer, before training; afterwards its model has no gradients, as before.
        lengths: tokens of each training row.
        program: bytes that the process had before it loaded the model.
    """
    from temper.training.arguments import steps_per_epoch

    args = trainer.args
    typical = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2 :][:PROBE_ROWS]
    batch = trainer.data_collator([trainer.train_dataset[row] for row in typical])
    flops, kept = _probe(trainer, batch)
    of_epoch, most = _tokens_to_compute(trainer, lengths)
    tokens = trainer.tokens_computed(typical)
    trained = [local(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad]
    return Estimate(
        program=program,
        parameters=_bytes(map(local, trainer.model.parameters())) + _gathered(trainer.model),
        gradients=_bytes(trained),
        optimizer=sum(parameter.numel() for parameter in trained) * _state_bytes(args.optim),
        activations=round(kept / tokens * most * (HEAP if args.device.type == "cpu" else 1)),
        flops_per_step=flops / tokens * of_epoch / steps_per_epoch(len(lengths), args),
    )


def _tokens_to_compute(trainer, lengths: list[int]) -> tuple[float, int]:
    """Tokens that go through the layers: (in the first epoch, from a sample of its batches; in its largest batch)."""
    order, size = list(trainer.sampler), trainer.args.train_batch_size
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    longest = max(batches, key=lambda rows: sum(lengths[row] for row in rows))
    seen = [trainer.tokens_computed(rows) for rows in batches[:: -(-len(batches) // SAMPLED_BATCHES)]]
    return sum(seen) / len(seen) * len(batches), max(*seen, trainer.tokens_computed(longest))


def _gathered(model) -> int:
    """Bytes of weights that are gathered at a time in a model that is spread: of two layers, and of what is in none."""
    from torch.distributed.fsdp import FSDPModule

    groups: list[Any] = [part for part in model.modules() if isinstance(part, FSDPModule)]
    within = [sum(weight.numel() * weight.element_size() for weight in part.parameters()) for part in groups]
    if not groups:
        return 0
    outer, layers = max(within), [size for size in within if size < max(within)]
    return outer - sum(layers) + 2 * max(layers, default=0)


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_bytes(optim) -> int:
    name = str(getattr(optim, "value", optim))
    return next((size for part, size in STATE_BYTES.items() if part in name), TWO_MOMENTS)


def _probe(trainer, batch) -> tuple[int, int]:
    """(FLOPs of forward and backward, bytes that autograd keeps for the backward pass)."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.utils.flop_counter import FlopCounterMode

    model = trainer.model
    weights: set[int] = set()
    kept: dict[int, int] = {}

    def see(parameters):
        weights.update(local(parameter).untyped_storage().data_ptr() for parameter in parameters)

    def see_gathered(module, _inputs):
        see(module.parameters(recurse=False))

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        trainer.compute_loss(model, batch)  # the first call also chooses how to compute the loss
    with FlopCounterMode(display=False) as counter:
        see(model.parameters())
        with (
            register_module_forward_pre_hook(see_gathered),  # a spread model's weights, for their layer
            saved_tensors_hooks(keep, lambda tensor: tensor),
            trainer.compute_loss_context_manager(),
        ):
            loss = trainer.compute_loss(model, batch)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops(), sum(kept.values())
