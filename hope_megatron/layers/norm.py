"""RMSNorm that knows about tensor and sequence parallelism (Megatron-Core's torch norm refuses the latter)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hope_megatron.layers.linear import ones
from hope_megatron.layers.parameters import declare


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, in float32, returned in x's dtype.

    Args:
        size: width of the last dim.
        epsilon: added to the mean square.
        sum_over_tp: tensor-parallel ranks see other tokens (sequence parallelism) or other heads.
    """

    def __init__(self, size: int, epsilon: float, *, sum_over_tp: bool, dtype: torch.dtype):
        super().__init__()
        self.epsilon = epsilon
        self.weight = declare(nn.Parameter(torch.empty(size, dtype=dtype)), ones, sum_over_tp=sum_over_tp)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon).to(x.dtype)
