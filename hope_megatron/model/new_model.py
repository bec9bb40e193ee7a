"""From a configuration to a model with its initial weights."""

from __future__ import annotations

import torch

from hope_megatron.config.model import ModelConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.layers.parameters import initialize_parameters
from hope_megatron.layers.transformer_config import megatron_config
from hope_megatron.model.language_model import LanguageModel


def build_model(
    config: ModelConfig,
    parallel: ParallelConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 1234,
    recompute: str = "none",
    offload: bool = False,
) -> LanguageModel:
    """Build this rank's shard, on the CPU; `init_distributed` comes first.

    The full model's initial weights depend on `seed` and the configuration alone, not on the tensor-parallel size.
    """
    model = LanguageModel(
        megatron_config(config, parallel or ParallelConfig(), dtype), config, recompute=recompute, offload=offload
    )
    initialize_parameters(model, seed)
    return model
