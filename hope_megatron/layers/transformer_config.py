"""Our configuration in Megatron-Core's words."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from hope_megatron.config.model import ModelConfig
from hope_megatron.config.parallel import ParallelConfig


def megatron_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-Core's TransformerConfig for its linear, embedding and attention layers.

    Weights are filled by `initialize_parameters`, not by Megatron (whose draws depend on construction order). Fusions that need
    CUDA extensions or torch.compile are off; they would change speed, not results.
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.attention.num_kv_heads or model.num_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.cms.levels[0].hidden_size,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=model.attention.qkv_bias,
        qk_layernorm=model.attention.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
    )
