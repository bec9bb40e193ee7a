"""Causal depthwise convolution of a few taps, with its state explicit."""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = sum_j weight[:, j] x_{t - (w - 1) + j}: the last tap is the present token.

    Args:
        x: [B, T, N].
        weight: [N, w].
        tail: the last w - 1 inputs before x, [B, w - 1, N]; None starts with zeros.

    Returns:
        y [B, T, N], and the tail for what comes next [B, w - 1, N].
    """
    width, T = weight.size(1), x.size(1)
    if tail is None:
        tail = x.new_zeros(x.size(0), width - 1, x.size(2))
    padded = torch.cat([tail.to(x.dtype), x], 1)
    y = sum(padded[:, j : j + T] * weight[:, j] for j in range(width))
    return y, padded[:, T:]
