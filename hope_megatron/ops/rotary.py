"""Rotary position embeddings (arXiv 2104.09864), halves paired: dim i turns with dim i + d / 2."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.ops.regions import region

_FEWEST_ROWS = 4096
"""Rows of a new table, so that the usual lengths never make it grow: half a megabyte at a head width of 64."""


class RotaryTable:
    """Cosines and sines of all positions up to a length that grows as needed, computed once for all layers of a model.

    Args:
        dim: head width.
        base: of the frequencies, base^(-2i / dim).
    """

    def __init__(self, dim: int, base: float) -> None:
        self.dim, self.base = dim, base
        self._made: tuple[Tensor, Tensor] | None = None

    def rows(self, first: int, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions first to first + length - 1, each [length, 1, 1, dim] in the dtype and on the device of
        `like`."""
        made, end = self._made, first + length
        if made is None or made[0].size(0) < end or made[0].dtype != like.dtype or made[0].device != like.device:
            made = self._made = self._make(max(_FEWEST_ROWS, 1 << (end - 1).bit_length()), like)
        cos, sin = made
        return cos[first:end], sin[first:end]

    def _make(self, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        # frequencies and angles in float32 whatever the model computes in
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=like.device) / self.dim
        angles = torch.outer(torch.arange(size, dtype=torch.float32, device=like.device), 1.0 / self.base**exponents)
        angles = torch.cat((angles, angles), dim=-1)[:, None, None, :]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


@region(backward_kernels=1)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [T, B, heads, d] by the angles of its positions; cos, sin [T, 1, 1, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
