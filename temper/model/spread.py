"""Models of which each process holds a part of the weights, by PyTorch's `fully_shard` (FSDP2).

Each layer's weights are gathered for its own forward and backward pass alone. transformers spreads a model as it loads
it, so no process ever holds all of it.
"""

import copy


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
