"""Layers of a frozen base that give the same results in fewer passes over memory.

LoRA: PEFT casts the layer's input to the adapter's float32, separately for q, k and v, and multiplies in float32. On a
CPU that is a fifth as fast as bfloat16, and takes a third of a training step. Here the two small matrices are rounded
to the input's precision instead, as in automatic mixed precision. The matrices, their gradients' sums and the optimizer
stay float32.

RMS norm: with a frozen weight, its gradient needs six passes; autograd takes some twenty, over float32 copies.
"""

import functools
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from temper.model.spread import whole_copy


class _AddLowRank(torch.autograd.Function):
    """``output + scaling * input @ A.T @ B.T``, saving the input once, in its own precision."""

    @staticmethod
    def forward(ctx, output, inputs, a, b, scaling):
        ctx.scaling, ctx.dtype = scaling, a.dtype
        a, b = a.to(output.dtype), (b * scaling).to(output.dtype)  # in mixed precision not that of the input
        flat = inputs.reshape(-1, inputs.shape[-1]).to(output.dtype)
        inner = flat @ a.t()
        ctx.save_for_backward(flat, a, b, inner)
        return torch.addmm(output.reshape(-1, output.shape[-1]), inner, b.t()).view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        inputs, a, b, inner = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_inner = flat @ b
        of_a = (of_inner.t() @ inputs).to(ctx.dtype)
        of_b = (flat.t() @ inner).to(ctx.dtype) * ctx.scaling
        of_inputs = (of_inner @ a).view(*gradient.shape[:-1], -1) if ctx.needs_input_grad[1] else None
        return gradient, of_inputs, of_a, of_b, None


class _RMSNorm(torch.autograd.Function):
    """``weight * (x / rms(x))`` with the casts of transformers' LlamaRMSNorm: bit-identical output in bfloat16."""

    @staticmethod
    def forward(ctx, inputs, weight, epsilon):
        full = inputs.float()
        norm = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        scale = norm.square_().div_(inputs.shape[-1]).add_(epsilon).rsqrt_()
        normed = (full * scale).to(inputs.dtype)
        ctx.save_for_backward(normed, weight, scale)
        return weight * normed

    @staticmethod
    def backward(ctx, gradient):
        normed, weight, scale = ctx.saved_tensors
        gradient, full = (gradient * weight).float(), normed.float()
        along = torch.linalg.vecdot(gradient, full).unsqueeze(-1).div_(-full.shape[-1])
        return torch.addcmul(gradient, full, along).mul_(scale).to(normed.dtype), None, None


def use_fast_layers(model) -> tuple[int, int]:
    """Make a model's LoRA layers and frozen RMS norms compute as above; returns the number of each."""
    return _use_fast_lora(model), _use_fast_norms(model)


def _use_fast_norms(model) -> int:
    """The norms whose own forward pass gives the same on random numbers (Gemma's adds one to its weight)."""
    norms = [part for part in model.modules() if type(part).__name__.endswith("RMSNorm") and _is_usual_norm(part)]
    for norm in norms:
        norm.forward = functools.partial(_norm_forward, norm)
    return len(norms)


def _norm_forward(norm, inputs):
    return _RMSNorm.apply(inputs, norm.weight, norm.variance_epsilon)


def _is_usual_norm(norm) -> bool:
    if not hasattr(norm, "variance_epsilon") or norm.weight.requires_grad or isinstance(norm, FSDPModule):
        return False
    norm = whole_copy(norm)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, len(norm.weight), generator=generator).to(norm.weight)
    with torch.no_grad():
        return torch.allclose(norm(inputs), _norm_forward(norm, inputs), rtol=1e-6)


def _use_fast_lora(model) -> int:
    """Whether a layer does just this. Others (DoRA, a bias in the adapter, hooks) keep PEFT's forward pass."""
    from peft.tuners.lora.layer import Linear, LoraLayer

    layers = [part for part in model.modules() if isinstance(part, LoraLayer) and _is_plain(part, Linear)]
    for layer in layers:
        module: Any = layer  # to a type checker, PEFT's class is not a torch.nn.Module
        module.forward = functools.partial(_forward, module, module.forward)
    return len(layers)


def _is_plain(layer, linear: type) -> bool:
    names = list(layer.lora_A)
    of_bitsandbytes = type(layer).__module__ == "peft.tuners.lora.bnb"
    if not (type(layer) is linear or of_bitsandbytes) or len(names) != 1:
        return False
    products = layer.lora_A[names[0]], layer.lora_B[names[0]]
    if names[0] in layer.lora_variant or products[1].bias is not None:
        return False
    return all(type(part) is torch.nn.Linear and not _has_hooks(part) for part in products)


def _has_hooks(module) -> bool:
    """Whether a module has hooks, which run besides its `forward`."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _forward(layer, original, inputs, *arguments, **keywords):
    if arguments or keywords or layer.disable_adapters or layer.merged:
        return original(inputs, *arguments, **keywords)
    (name,) = layer.lora_A
    dropped = layer.lora_dropout[name](inputs)
    weights = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _AddLowRank.apply(layer.base_layer(inputs), dropped, *weights, layer.scaling[name])
