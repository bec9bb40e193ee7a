"""The continuum memory system (eqs. 70-74): residual MLPs, each with a clock of its own, or two.

On the outer clock (optimizer steps) a level differs from an ordinary MLP only by the tag `update_period_steps` on its
parameters, which the optimizer obeys. On the inner clock (tokens) it is given fast copies of its matrices, one per context,
at each call; who makes them is `inner_update.py` and `model/in_context.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hope_megatron.config.model import CMSLevelConfig, ModelConfig
from hope_megatron.layers.linear import (
    column_parallel,
    enter_parallel_region,
    leave_parallel_region,
    linear_per_context,
    ones,
    row_parallel,
    zeros,
)
from hope_megatron.layers.norm import RMSNorm
from hope_megatron.layers.parameters import declare, normal
from hope_megatron.ops.regions import region


@region(backward_kernels=1)
def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, of [..., 2 h] that holds both side by side -> [..., h]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class FastWeights(NamedTuple):
    """A level's two matrices, one copy per context: this rank's shard, laid out as the layer's own."""

    up: Tensor  # [B, (2 if swiglu) h, D]
    down: Tensor  # [B, D, h]


FastLevels = tuple[FastWeights | None, ...]
"""Of one layer, by level; None for a level that is static."""


class CMSLevel(MegatronModule):
    """x + MLP(norm(x)); hidden features are split over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, level: CMSLevelConfig):
        super().__init__(config)
        self.activation = model.cms.activation
        self.blocks = 2 if self.activation == "swiglu" else 1
        self.norm = RMSNorm(
            model.hidden_size, model.norm_epsilon, sum_over_tp=config.sequence_parallel, dtype=config.params_dtype
        )
        self.up = column_parallel(
            model.hidden_size,
            self.blocks * level.hidden_size,
            config,
            normal(model.hidden_init_std),
            blocks=self.blocks,
            fused_apart=True,
        )
        self.down = row_parallel(
            level.hidden_size,
            model.hidden_size,
            config,
            normal(model.hidden_init_std / math.sqrt(2 * model.num_layers)),
        )
        self.log_rate = _log_rate(level, config.params_dtype)
        for parameter in self.parameters():
            parameter.update_period_steps, parameter.update_period_changes = level.clock.first, level.clock.changes

    def forward(self, x: Tensor, fast: FastWeights | None = None) -> Tensor:
        """x [T, B, D] or its sequence shard; `fast` takes the place of the level's matrices."""
        return x + self.branch(x, fast)

    def branch(self, x: Tensor, fast: FastWeights | None = None) -> Tensor:
        """MLP(norm(x))."""
        x = enter_parallel_region(self.norm(x), self.config)
        hidden = self.up(x)[0] if fast is None else linear_per_context(x, fast.up)
        if self.activation == "swiglu":
            hidden = swiglu(hidden)
        else:
            hidden = F.silu(hidden) if self.activation == "silu" else F.gelu(hidden)
        if fast is None:
            return self.down(hidden)[0]
        return leave_parallel_region(linear_per_context(hidden, fast.down), self.config)

    def rate_factors(self) -> tuple[Tensor, Tensor] | None:
        """What the level has learnt about its inner rate, to be multiplied with steps of `up` and `down`; None if nothing."""
        if self.log_rate is None:
            return None
        factor = self.log_rate.exp()
        if factor.numel() == 1:
            return factor, factor
        return factor.repeat(self.blocks).unsqueeze(1), factor  # a hidden channel is a row of up, a column of down


def _log_rate(level: CMSLevelConfig, dtype: torch.dtype) -> nn.Parameter | None:
    """Log of the learned factor of a level's inner rate: [1], or this rank's channels."""
    if not level.ticks or level.inner_rate_kind == "constant":
        return None
    tp = parallel_state.get_tensor_model_parallel_world_size()
    if level.inner_rate_kind == "learned":
        # each rank sees the steps of its own shard
        return declare(nn.Parameter(torch.empty(1, dtype=dtype)), zeros, sum_over_tp=tp > 1)
    return declare(nn.Parameter(torch.empty(level.hidden_size // tp, dtype=dtype)), zeros, shard_dim=0)


class ContinuumMLP(MegatronModule):
    """The levels, fastest first (eq. 70): a chain, or side by side (eq. 74)."""

    def __init__(self, config: TransformerConfig, model: ModelConfig):
        super().__init__(config)
        self.levels = nn.ModuleList(CMSLevel(config, model, level) for level in model.cms.levels)
        for number, (module, level) in enumerate(zip(self.levels, model.cms.levels), 1):
            for parameter in module.parameters():
                parameter.adaptive_level = number if level.update_period_adaptive else 0
        self.join = None
        if model.cms.connection == "independent":
            weight = nn.Parameter(torch.empty(len(self.levels), model.hidden_size, dtype=config.params_dtype))
            self.join = declare(weight, ones, sum_over_tp=config.sequence_parallel)

    def forward(self, x: Tensor, fast: FastLevels | None = None) -> Tensor:
        """x [T, B, D] or its sequence shard.

        Args:
            fast: weights that take the place of the levels' own, where a level has learnt in context.
        """
        fast = fast or (None,) * len(self.levels)
        if self.join is not None:
            branches = (level.branch(x, weights) for level, weights in zip(self.levels, fast, strict=True))
            return x + sum(weight * y for weight, y in zip(self.join, branches, strict=True))
        for level, weights in zip(self.levels, fast, strict=True):
            x = level(x, weights)
        return x
