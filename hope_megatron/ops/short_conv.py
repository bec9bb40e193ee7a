"""Causal depthwise convolution of a few taps and the SiLU after it, with its state explicit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.regions import region
from hope_megatron.runtime.step_parts import implementation


def short_conv(
    x: Tensor, weight: Tensor, tail: Tensor | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """silu(y) with y_t = sum_j weight[:, j] x_{t - (w - 1) + j}: the last tap is the present token.

    Args:
        x: [B, T, N].
        weight: [N, w].
        tail: the last w - 1 inputs before x, [B, w - 1, N]; None starts with zeros.
        documents: number of the document of every token, [B, T]; taps do not reach into another one. Not with a tail.

    Returns:
        silu(y) [B, T, N], and the tail for what comes next [B, w - 1, N].
    """
    width = weight.size(1)
    if tail is None:
        tail = x.new_zeros(x.size(0), width - 1, x.size(2))
    tail = tail.to(x.dtype)
    # a copy of its own: a view would keep everything it is a view of alive, as long as the state lives
    end = x[:, -(width - 1) :].clone() if x.size(1) >= width - 1 else torch.cat([tail, x], 1)[:, x.size(1) :].clone()
    return implementation("short_conv")(x, weight, tail, documents), end if width > 1 else tail


@region(backward_kernels=4)
def convolved(x: Tensor, weight: Tensor, tail: Tensor, documents: Tensor | None) -> Tensor:
    """The first result of `short_conv`, from a tail."""
    width, T = weight.size(1), x.size(1)
    padded = torch.cat([tail, x], 1)
    taps = [padded[:, j : j + T] * weight[:, j] for j in range(width)]
    if documents is not None:
        before = torch.cat([documents.new_full((x.size(0), width - 1), -1), documents], 1)
        taps = [tap * (before[:, j : j + T] == documents).unsqueeze(-1) for j, tap in enumerate(taps)]
    return F.silu(sum(taps))
