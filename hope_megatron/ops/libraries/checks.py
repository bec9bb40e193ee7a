"""Libraries held against PyTorch on the device at hand, with small tensors, before a run takes them.

Each function takes a type of device, and says what is wrong, or None. Differences are relative to the largest number of a tensor.
PyTorch computes in float32 or more; a library's bf16 result may differ by its roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hope_megatron.ops.libraries import apex, causal_conv1d, flex, pytorch
from hope_megatron.ops.short_conv import convolved

_LARGEST = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
"""Largest relative difference by the dtype that the library computes in."""


def norm_of_apex(device: str) -> str | None:
    """Outputs and both gradients, in bf16 and float32, of a hidden width and a head's."""
    for dtype, width in ((torch.bfloat16, 256), (torch.float32, 64)):
        inputs = [_random(device, dtype, *shape) for shape in ((3, 5, width), (width,))]
        sides = [lambda x, w, norm=norm: norm(x, w, 1e-5) for norm in (apex.rms_norm, pytorch.rms_norm)]
        if (wrong := _differ(_with_gradients(sides[0], inputs), _in_full(sides[1], inputs), dtype)) is not None:
            return wrong
    return None


def convolution_of_causal_conv1d(device: str) -> str | None:
    """Outputs and gradients, after a tail and over documents."""
    x, weight, tail = (_random(device, torch.bfloat16, *shape) for shape in ((2, 20, 24), (24, 4), (2, 3, 24)))
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 20], device=device)
    for inputs, rest in (([x, weight, tail], (None,)), ([x, weight], (torch.zeros_like(tail), documents))):
        sides = [
            lambda *given, f=f, rest=rest: f(*given, *(r.to(given[0].dtype) if _is_float(r) else r for r in rest))
            for f in (causal_conv1d.convolved, convolved.function)
        ]
        found, expected = _with_gradients(sides[0], inputs), _in_full(sides[1], inputs)
        if (wrong := _differ(found, expected, torch.bfloat16)) is not None:
            return wrong
    return None


def attention_of_flex(device: str) -> str | None:
    """Outputs and gradients under a window and over documents, with shared keys; forward alone on CPUs, which have no backward."""
    documents = torch.tensor([[0] * 70 + [1] * 90, [2] * 160], device=device)
    inputs = [_random(device, torch.float32, 2, heads, 160, 32) for heads in (4, 2, 2)]
    for rest in ((40, None), (None, documents), (40, documents)):
        found, expected = (
            _with_gradients(lambda *given, f=f, rest=rest: f(*given, *rest), inputs, forward_only=device == "cpu")
            for f in (flex.attention, pytorch.attention)
        )
        if (wrong := _differ(found, expected, torch.bfloat16)) is not None:  # TF32 rounds less
            return wrong
    return None


def clipping_of_apex(device: str) -> str | None:
    """The norm, a norm that is not finite, and scaling."""
    tensors = [_random(device, torch.float32, *shape) for shape in ((70_000,), (3, 5), (1,))]
    copies = [tensor.clone() for tensor in tensors]
    found, expected = apex.CLIPPING.norm(tensors), pytorch.CLIPPING.norm(copies)
    apex.CLIPPING.scale(tensors, 0.25)
    pytorch.CLIPPING.scale(copies, 0.25)
    if (wrong := _differ([found, *tensors], [expected, *copies], torch.float32)) is not None:
        return wrong
    tensors[1][0, 0] = torch.nan
    return None if not torch.isfinite(apex.CLIPPING.norm(tensors)) else "wrong here: the norm of a NaN is finite"


def adam_of_apex(device: str) -> str | None:
    """The third update, and the moments after it."""
    return adam(apex.adam_update, device)


def adam(update: Callable[..., Tensor], device: str) -> str | None:
    """The same of any adapter."""
    sides = []
    for one in (update, pytorch.adam_update):
        m1, v = (torch.zeros(70_001, device=device) for _ in range(2))
        for number in (1, 2, 3):
            made = one(_random(device, torch.float32, number, 70_001)[0], m1, v, (0.9, 0.95), 1e-8, number)
        sides.append([made, m1, v])
    return _differ(sides[0], sides[1], torch.float32)


def weight_gradient_of_apex(device: str) -> str | None:
    """A bf16 product added to a float32 sum, twice."""
    x, d_y = (_random(device, torch.bfloat16, 32, width) for width in (24, 16))
    found = _random(device, torch.float32, 16, 24)
    expected = found + 2 * d_y.double().t().matmul(x.double())
    for _ in range(2):
        apex.add_weight_gradient(x, d_y, found)
    return _differ([found], [expected], torch.float32)


def _random(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _in_full(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    return _with_gradients(function, [x.float() for x in inputs])


def _with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *, forward_only: bool = False
) -> list[Tensor]:
    """The result, and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_(not forward_only) for x in inputs]
    y = function(*leaves)
    if forward_only:
        return [y]
    d_y = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, d_y)]


def _differ(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        if not torch.isfinite(mine).all():
            return "wrong here: it gives values that are not finite"
        error = (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        worst = max(worst, float(error.detach()))
    return None if worst <= _LARGEST[dtype] else f"wrong here: off from PyTorch by {worst:.1e} of the largest number"
