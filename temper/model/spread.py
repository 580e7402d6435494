"""Models of which each process holds a part of the weights, by PyTorch's `fully_shard` (FSDP2).

Each layer's weights are gathered for its own forward and backward pass alone. transformers spreads a model as it loads
it, so no process ever holds all of it.
"""

import copy
from pathlib import Path

from temper.errors import UserError


def is_spread(model) -> bool:
    """Whether each process holds a part of the model's weights."""
    return bool(getattr(model, "_is_fsdp_managed_module", False))


def local(tensor):
    """What of a tensor is in this process: its part, if it is spread."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_copy(module):
    """A copy of a layer with all its weights, also if they are spread. All processes must call this."""
    from torch.distributed.tensor import DTensor
    from torch.nn import Parameter

    weights = {id(weight): weight for weight in module.parameters() if isinstance(weight, DTensor)}
    whole = {key: Parameter(weight.full_tensor(), weight.requires_grad) for key, weight in weights.items()}
    return copy.deepcopy(module, whole)


def refuse_tied(model) -> None:
    """Refuse to train a spread model's embeddings where its head shares them.

    transformers (5.23) gives the head a copy of its own, which is gathered for each forward pass and never trained.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embeddings.weight:
        raise UserError(
            f"config: 'train.fsdp' with adapter=full: this {type(model).__name__} shares its embeddings with its head, "
            "which cannot be trained where the model is spread: choose adapter=lora, or leave train.fsdp out"
        )


def load_weights(model, folder: Path):
    """Fill a spread model from a folder's weights, one tensor at a time: each process takes its part.

    Returns:
        the names of tensors that are missing, and of those that the model does not have, as `load_state_dict` does.
    """
    import torch
    from safetensors import safe_open
    from torch.nn.modules.module import _IncompatibleKeys

    from temper.model.loading import weight_files

    own, unknown = model.state_dict(), []
    missing = dict.fromkeys(own)
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            for name in tensors.keys():  # noqa: SIM118
                if name not in own:
                    unknown.append(name)
                    continue
                own[name].copy_(_as_spread(tensors.get_tensor(name), own[name]))
                del missing[name]
    return _IncompatibleKeys(list(missing), unknown)


def _as_spread(whole, like):
    """The part of a whole tensor that this process has of another one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def own_state(_optimizer, state: dict) -> dict:
    """An optimizer's state dict with this process's parts of the states of spread weights, for `joined_state`."""
    return _of_each(state, lambda value, _number: local(value))


def joined_state(optimizer, state: dict) -> dict:
    """The state dict that `own_state` made this of."""
    from torch.distributed.tensor import DTensor

    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def joined(value, number):
        weight = weights[number]
        if not isinstance(weight, DTensor) or getattr(value, "shape", None) != weight.to_local().shape:
            return value
        mesh, places = weight.device_mesh, weight.placements
        return DTensor.from_local(value, mesh, places, shape=weight.shape, stride=weight.stride())

    return _of_each(state, joined)


def _of_each(state: dict, change) -> dict:
    """A state dict with `change(value, number of its weight)` for each value."""
    changed = {
        number: {name: change(value, number) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}
