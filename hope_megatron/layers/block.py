"""One layer of the decoder, assembled from a ModuleSpec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hope_megatron.config.model import ModelConfig
from hope_megatron.layers.continuum_mlp import FastLevels
from hope_megatron.layers.norm import RMSNorm


@dataclass
class HopeLayerSubmodules:
    """What a layer is made of."""

    mixer: ModuleSpec | type
    mlp: ModuleSpec | type


class HopeLayer(MegatronModule):
    """x + Mixer(norm(x)), then the continuum memory system, each level with its own norm and residual."""

    def __init__(
        self, config: TransformerConfig, submodules: HopeLayerSubmodules, model: ModelConfig, layer_number: int
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.norm = RMSNorm(
            model.hidden_size, model.norm_epsilon, sum_over_tp=config.sequence_parallel, dtype=config.params_dtype
        )
        self.mixer = build_module(submodules.mixer, config=config, model=model, layer_number=layer_number)
        self.mlp = build_module(submodules.mlp, config=config, model=model)

    def init_state(self, batch_size: int) -> Any:
        """The mixer's state for `batch_size` new streams."""
        return self.mixer.init_state(batch_size)

    def forward(
        self, x: Tensor, state: Any = None, documents: Tensor | None = None, fast: FastLevels | None = None
    ) -> tuple[Tensor, Any]:
        """x [T, B, D], or [T/tp, B, D] under sequence parallelism; documents as for the mixers, [B, T]; `fast` as for
        ContinuumMLP."""
        y, state = self.mixer(self.norm(x), state, documents)
        return self.mlp(x + y, fast), state
