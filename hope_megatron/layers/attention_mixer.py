"""Softmax attention: Megatron-Core's SelfAttention with rotary embeddings, and a key-value state as explicit as a memory's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hope_megatron.config.model import ModelConfig
from hope_megatron.layers.context_parallel import context_parallel_size, heads_to_tokens, tokens_to_heads
from hope_megatron.layers.linear import zeros
from hope_megatron.layers.norm import RMSNorm
from hope_megatron.layers.parameters import declare, normal
from hope_megatron.ops.rotary import RotaryTable, rotate
from hope_megatron.runtime.step_parts import implementation


class AttentionState(NamedTuple):
    """Keys (after rotation) and values seen so far by this rank's heads, and how many tokens went by."""

    k: Tensor  # [S, B, groups, d]
    v: Tensor  # [S, B, groups, d]
    position: int


class StreamingAttention(MegatronModule):
    """Causal scaled-dot-product attention over past and present keys, all rotated: SelfAttention's `core_attention`.

    Megatron-Core's call has no room for a state, so the mixer sets `past` and `documents` before it
    and takes `present` after it.
    """

    rotary: RotaryTable

    def __init__(self, config: TransformerConfig, **kwargs):
        super().__init__(config)
        self.window: int | None = None
        self.documents: Tensor | None = None
        self.past: AttentionState | None = None
        self.present: AttentionState | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        """query [T, B, heads, d], key and value [T, B, groups, d] -> [T, B, heads * d].

        Under context parallelism T is this rank's slice, and the state that of its share of the heads.
        """
        query, key, value = (tokens_to_heads(part, 2) for part in (query, key, value))
        past, T = self.past, query.size(0)
        first = past.position if past is not None else 0
        cos, sin = self.rotary.rows(first, T, query)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past is not None:
            key, value = torch.cat([past.k, key]), torch.cat([past.v, value])
        kept = slice(-min(self.window, key.size(0)) if self.window else None, None)
        self.present = AttentionState(key[kept], value[kept], first + T)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, T, d]
        y = implementation("attention")(q, k, v, self.window, self.documents)
        return heads_to_tokens(y.permute(2, 0, 1, 3), 2).flatten(2)


class HeadNorm(RMSNorm):
    """RMSNorm over the channels of a head, as Megatron-Core's SelfAttention builds it; all heads share the weight."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float):
        super().__init__(hidden_size, eps, sum_over_tp=True, dtype=config.params_dtype)


class AttentionMixer(MegatronModule):
    """x [T, B, D] (or its sequence shard) -> y of the same shape, and the key-value state of the streams."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, layer_number: int):
        super().__init__(config)
        norm = HeadNorm if model.attention.qk_norm else None
        submodules = SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=StreamingAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        )
        self.attention = SelfAttention(config, submodules, layer_number, attn_mask_type=AttnMaskType.causal)
        self.attention.core_attention.window = model.attention.window_tokens
        output_std = model.hidden_init_std / math.sqrt(2 * model.num_layers)
        for weight, std, dim in (
            (self.attention.linear_qkv.weight, model.hidden_init_std, 0),
            (self.attention.linear_proj.weight, output_std, 1),
        ):
            declare(weight, normal(std), shard_dim=dim, role="matrix", weight_decay=True, width_fan_in=True)
        if model.attention.qkv_bias:
            declare(self.attention.linear_qkv.bias, zeros, shard_dim=0)
        self.attention.core_attention.rotary = shared_rotary_table(config, model)
        groups = model.attention.num_kv_heads or model.num_heads
        self.num_groups = groups // parallel_state.get_tensor_model_parallel_world_size() // context_parallel_size()
        self.head_dim = model.head_dim

    def init_state(self, batch_size: int) -> AttentionState:
        """The state of `batch_size` new streams: nothing seen."""
        weight = self.attention.linear_qkv.weight
        empty = weight.new_zeros(0, batch_size, self.num_groups, self.head_dim)
        return AttentionState(empty, empty, 0)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        """See the class docstring. Without a state, streams begin here.

        documents: number of the document of every token, [B, T]; none sees another. Then there is no state, in or out.
        """
        core = self.attention.core_attention
        core.past, core.documents = state, documents
        # StreamingAttention rotates, and makes its own mask where there is one
        y, _ = self.attention(x, attention_mask=None)
        present, core.past, core.present, core.documents = core.present, None, None, None
        return y, present if documents is None else None


def shared_rotary_table(config: TransformerConfig, model: ModelConfig) -> RotaryTable:
    """The table of a model's layers: they share the configuration, and it keeps the table."""
    table = getattr(config, "rotary_table", None)
    if table is None:
        table = config.rotary_table = RotaryTable(model.head_dim, model.attention.rope_base)
    return table
