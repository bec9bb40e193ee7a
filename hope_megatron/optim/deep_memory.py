"""Momentum as an MLP (Nested Learning, arXiv 2512.24695, eq. 50): one memory per matrix, two weights of that matrix' shape.

    m(u) = normalize(silu(u (B + b)^T)) c                 u: [m, n] rows of the gradient, or its columns if these are fewer
    u = G / ||G||_F sqrt(m)                               so that rows have norm one on average
    L2(m; u) = 1/2 ||m(u) + u||^2 / m                     or <m(u), u> / m ("dot")

**Choices**, since the paper leaves model and loss open and its target 1 has the shape of no weight: the values are the direction of
descent, -u, and the hidden width is m, so that the trained weights b, c [m, n] are as large as the matrix. B is fixed, a basis of
cosines (DCT-IV, entries of order one): the same on every machine without a seed. Both weights decay towards zero, B + b towards B.
Hidden rows are normalised: one step of L2 on c is stable for rates up to 2 then, whatever the gradients; rates go to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

OBJECTIVES = ("l2", "dot")


def unit(grad: Tensor) -> Tensor:
    """Frobenius norm one per matrix, summed in float64, where small squares are not zero; zero stays zero."""
    norm = torch.linalg.vector_norm(grad, dim=(-2, -1), keepdim=True, dtype=torch.float64).clamp_min(1e-30)
    return grad / norm.to(grad.dtype)


def learn_and_read(
    inner: Tensor, outer: Tensor, grad: Tensor, *, rate: float, decay: float, objective: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One inner step on the gradient, then the answer to it: (b, c, m(u)), all of the shape of `grad` [..., M, N]."""
    if grad.shape[-2] > grad.shape[-1]:
        flipped = learn_and_read(inner.mT, outer.mT, grad.mT, rate=rate, decay=decay, objective=objective)
        return flipped[0].mT, flipped[1].mT, flipped[2].mT
    rows = grad.shape[-2]
    keys = unit(grad) * math.sqrt(rows)
    with torch.enable_grad():
        weights = (inner.detach().requires_grad_(), outer.detach().requires_grad_())
        values = read(*weights, keys)
        losses = (values + keys).square() / 2 if objective == "l2" else values * keys
        slopes = torch.autograd.grad(losses.sum() / rows, weights)
    inner, outer = (decay * weight.detach() - rate * slope for weight, slope in zip(weights, slopes))
    return inner, outer, read(inner, outer, keys)


def read(inner: Tensor, outer: Tensor, keys: Tensor) -> Tensor:
    """m(u): [..., m, n] -> [..., m, n], m <= n."""
    hidden = functional.silu(keys @ (inner + _basis(keys)).mT)
    return functional.normalize(hidden, dim=-1) @ outer


def _basis(keys: Tensor) -> Tensor:
    """B [m, n]: the first m cosines of DCT-IV times sqrt(2)."""
    rows, cols = (torch.arange(size, device=keys.device, dtype=torch.float64) + 0.5 for size in keys.shape[-2:])
    return (math.sqrt(2) * torch.cos(math.pi / len(cols) * rows[:, None] * cols)).to(keys.dtype)
