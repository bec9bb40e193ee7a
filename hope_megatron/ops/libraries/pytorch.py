"""What PyTorch computes the parts of a step with: the reference of the other adapters, and what serves everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dim, float32 inside, in x's dtype."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


class Clipping(NamedTuple):
    """The norm of many tensors, and their scaling."""

    norm: Callable[[Sequence[Tensor]], Tensor]
    """Root of the sum of all squares, a scalar on their device; 0 of none."""
    scale: Callable[[Sequence[Tensor], float], None]
    """Multiply in place."""


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """See `Clipping`."""
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum().sqrt()


def scale(tensors: Sequence[Tensor], factor: float) -> None:
    """See `Clipping`."""
    torch._foreach_mul_(list(tensors), factor)


CLIPPING = Clipping(norm, scale)


def adam_update(
    grad: Tensor, m1: Tensor, v: Tensor, betas: tuple[float, float], epsilon: float, num_updates: int
) -> Tensor:
    """Adam's update with bias correction, before learning rate, sign and weight decay: m / (sqrt(v) + epsilon).

    Args:
        grad, m1, v: flat and alike; m1 and v are brought up to date in place.
        num_updates: number of this update, from 1.
    """
    beta1, beta2 = betas
    m1.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (v / (1 - beta2**num_updates)).sqrt_().add_(epsilon)
    return (m1 / (1 - beta1**num_updates)).div_(denominator)


def fused_adam_update(
    grad: Tensor, m1: Tensor, v: Tensor, betas: tuple[float, float], epsilon: float, num_updates: int
) -> Tensor:
    """The same by PyTorch's fused AdamW: it steps zeros at a learning rate of -1, which leaves the update."""
    update = torch.zeros_like(grad)
    step = torch.full((), float(num_updates), device=grad.device)
    torch._fused_adamw_(
        [update], [grad], [m1], [v], [], [step], lr=-1.0, beta1=betas[0], beta2=betas[1], weight_decay=0.0,
        eps=epsilon, amsgrad=False, maximize=False,
    )  # fmt: skip
    return update


def add_weight_gradient(x: Tensor, d_y: Tensor, total: Tensor) -> None:
    """total += d_y^T x in total's dtype; x [n, in], d_y [n, out], total [out, in]."""
    total.add_(d_y.t().matmul(x).to(total.dtype))


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Tensor | None = None) -> Tensor:
    """Causal softmax attention over keys that may begin before the queries.

    Args:
        q: [B, heads, T, d].
        k, v: [B, groups, S, d], S >= T; the last T are those of the queries.
        window: keys that a query sees, itself included; None: all.
        documents: number of the document of every token, [B, T]; none sees another. With it S = T.

    Returns:
        [B, heads, T, d].
    """
    mask, causal = _mask(q.size(2), k.size(2), window, documents, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


def needs_mask(T: int, S: int, window: int | None, documents: Tensor | None) -> bool:
    """Whether a kernel's own causal flag does not suffice."""
    return not (T == S and (window is None or window >= S) and documents is None)


def _mask(
    T: int, S: int, window: int | None, documents: Tensor | None, device: torch.device
) -> tuple[Tensor | None, bool]:
    if not needs_mask(T, S, window, documents):
        return None, True
    rows = torch.arange(S - T, S, device=device).unsqueeze(1)
    columns = torch.arange(S, device=device)
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    if documents is not None:
        mask = mask & (documents.unsqueeze(1) == documents.unsqueeze(2)).unsqueeze(1)  # [B, 1, T, T]
    return mask, False
