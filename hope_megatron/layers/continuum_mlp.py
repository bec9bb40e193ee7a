"""The continuum memory system (eqs. 70-74): a chain of residual MLPs, each with a clock of its own.

On this clock (optimizer steps) a level differs from an ordinary MLP only by the tag `update_period_steps` on its
parameters, which the optimizer obeys.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hope_megatron.config.model import CMSLevelConfig, ModelConfig
from hope_megatron.layers.linear import column_parallel, enter_parallel_region, row_parallel
from hope_megatron.layers.norm import RMSNorm
from hope_megatron.layers.parameters import normal


class CMSLevel(MegatronModule):
    """x + MLP(norm(x)); hidden features are split over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, level: CMSLevelConfig):
        super().__init__(config)
        self.activation = model.cms.activation
        blocks = 2 if self.activation == "swiglu" else 1
        self.norm = RMSNorm(
            model.hidden_size, model.norm_epsilon, sum_over_tp=config.sequence_parallel, dtype=config.params_dtype
        )
        self.up = column_parallel(
            model.hidden_size,
            blocks * level.hidden_size,
            config,
            normal(model.hidden_init_std),
            blocks=blocks,
            fused_apart=True,
        )
        self.down = row_parallel(
            level.hidden_size,
            model.hidden_size,
            config,
            normal(model.hidden_init_std / math.sqrt(2 * model.num_layers)),
        )
        for parameter in self.parameters():
            parameter.update_period_steps = level.update_period_steps

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(enter_parallel_region(self.norm(x), self.config))[0]
        if self.activation == "swiglu":
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.silu(hidden) if self.activation == "silu" else F.gelu(hidden)
        return x + self.down(hidden)[0]


class ContinuumMLP(MegatronModule):
    """The chain of levels, fastest first (eq. 70)."""

    def __init__(self, config: TransformerConfig, model: ModelConfig):
        super().__init__(config)
        self.levels = nn.ModuleList(CMSLevel(config, model, level) for level in model.cms.levels)

    def forward(self, x: Tensor) -> Tensor:
        for level in self.levels:
            x = level(x)
        return x
