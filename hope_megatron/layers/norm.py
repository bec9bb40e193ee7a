"""RMSNorm that knows about tensor and sequence parallelism (Megatron-Core's torch norm refuses the latter)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hope_megatron.layers.parameters import constant, declare
from hope_megatron.runtime.step_parts import implementation


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, computed in float32 and returned in x's dtype, by PyTorch or the library
    that was chosen for the run.

    Args:
        size: width of the last dim.
        epsilon: added to the mean square.
        sum_over_tp: tensor-parallel ranks see other tokens (sequence parallelism) or other heads.
        initial: the weight's initial value.
        width_fan_in: muP scales its learning rate.
    """

    def __init__(
        self,
        size: int,
        epsilon: float,
        *,
        sum_over_tp: bool,
        dtype: torch.dtype,
        initial: float = 1.0,
        width_fan_in: bool = False,
    ):
        super().__init__()
        self.epsilon = epsilon
        weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.weight = declare(weight, constant(initial), sum_over_tp=sum_over_tp, width_fan_in=width_fan_in)

    def forward(self, x: Tensor) -> Tensor:
        return implementation("norm")(x, self.weight, self.epsilon)
