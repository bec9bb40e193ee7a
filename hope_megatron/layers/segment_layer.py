"""A layer of ARMT (arXiv 2407.04841): attention inside segments, and an associative memory that carries over from one to the next.

Each segment of L tokens is followed by M memory tokens, which pass through all layers as its last tokens do. In a layer

    x <- x + read(x)                    what the memory holds of earlier segments
    x <- x + Attention(norm(x))         within the segment, from position 0; then the CMS
    memory <- write(memory, x)          by the memory tokens of a full segment, at the layer's output

The segments are the only sequential part. `LanguageModel` puts the memory tokens behind the text, all together, and takes
them away again; here each segment gets its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hope_megatron.config.model import ModelConfig
from hope_megatron.layers.attention_mixer import AttentionState
from hope_megatron.layers.block import HopeLayer, HopeLayerSubmodules
from hope_megatron.layers.context_parallel import context_parallel_size
from hope_megatron.layers.continuum_mlp import FastLevels
from hope_megatron.layers.linear import column_parallel, enter_parallel_region, zeros
from hope_megatron.layers.parameters import normal
from hope_megatron.ops.associative import AssociativeState, num_features, read, write
from hope_megatron.ops.precision import wide


class SegmentState(NamedTuple):
    """A layer's streams: the memory of this rank's heads, and the keys and values of the segment that is not full yet."""

    memory: AssociativeState
    attention: AttentionState
    """Its position counts from the segment's start."""


class AssociativeMemory(MegatronModule):
    """Reads and writes with tokens x [T, B, D]. Heads are split over tensor-parallel ranks; values are D / H wide, so that what the
    heads read makes up x again."""

    def __init__(self, config: TransformerConfig, model: ModelConfig):
        super().__init__(config)
        self.num_heads = model.num_heads // parallel_state.get_tensor_model_parallel_world_size()
        self.key_size, self.value_size = model.associative_key_size, model.hidden_size // model.num_heads
        keys = model.num_heads * self.key_size
        self.query = column_parallel(model.hidden_size, keys, config, normal(model.hidden_init_std))
        self.key = column_parallel(model.hidden_size, keys, config, normal(model.hidden_init_std))
        # nothing is written at first: a fresh layer is attention within segments
        self.value = column_parallel(model.hidden_size, model.hidden_size, config, zeros)
        self.rate = column_parallel(model.hidden_size, model.num_heads, config, zeros, bias_init=zeros, role="vector")

    def init_state(self, batch_size: int) -> AssociativeState:
        """Empty."""
        weight, heads, width = self.query.weight, self.num_heads, num_features(self.key_size)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return AssociativeState(
            weight.new_zeros(batch_size, heads, self.value_size, width, dtype=dtype),
            weight.new_zeros(batch_size, heads, width, dtype=dtype),
        )

    def read(self, x: Tensor, state: AssociativeState) -> Tensor:
        """What tokens find, [T, B, D]."""
        q = self._heads(self.query(enter_parallel_region(x, self.config))[0])
        y = read(q, state).flatten(2).transpose(0, 1).to(x.dtype)
        return gather_from_tensor_model_parallel_region(y)

    def write(self, x: Tensor, state: AssociativeState) -> AssociativeState:
        """The state after the memory tokens x [M, B, D] of a segment."""
        x = enter_parallel_region(x, self.config)
        rate, bias = self.rate(x)
        beta = torch.sigmoid(wide(rate) + wide(bias)).transpose(0, 1)
        return write(self._heads(self.key(x)[0]), self._heads(self.value(x)[0]), beta, state)

    def _heads(self, x: Tensor) -> Tensor:
        """[T, B, H w] -> [B, T, H, w], in float32."""
        return wide(x).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)


class SegmentLayer(HopeLayer):
    """As a HopeLayer of attention, for text tokens and, behind them all, the memory tokens of every segment that they fill."""

    def __init__(
        self, config: TransformerConfig, submodules: HopeLayerSubmodules, model: ModelConfig, layer_number: int
    ):
        super().__init__(config, submodules, model, layer_number)
        if config.sequence_parallel or context_parallel_size() > 1:
            raise ValueError(
                "attention.segment_tokens: a segment reads what the one before has written, so that tokens are not "
                "split over ranks; set parallel.sequence_parallel=false and context_parallel=1"
            )
        assert model.attention.segment_tokens is not None
        self.segment, self.num_memory = model.attention.segment_tokens, model.attention.memory_tokens
        self.associative = AssociativeMemory(config, model)

    def init_state(self, batch_size: int) -> SegmentState:
        """The state of `batch_size` new streams."""
        return SegmentState(self.associative.init_state(batch_size), self.mixer.init_state(batch_size))

    def forward(
        self,
        x: Tensor,
        state: SegmentState | None = None,
        documents: Tensor | None = None,
        fast: FastLevels | None = None,
    ) -> tuple[Tensor, SegmentState]:
        """x [T + n M, B, D]: the text, then the memory tokens of the n segments that end in it."""
        if documents is not None:
            raise ValueError("attention.segment_tokens: segments do not begin anew at documents; read each alone")
        memory, inside = state if state is not None else self.init_state(x.size(1))
        num_full = (inside.position + x.size(0)) // (self.segment + self.num_memory)
        text, tokens = x.split([x.size(0) - num_full * self.num_memory, num_full * self.num_memory])
        first = self.segment - inside.position  # where the first segment ends in this piece
        ends = [min(end, text.size(0)) for end in range(first, text.size(0) + self.segment, self.segment)]
        read_text, read_memory, start = [], [], 0
        for number, end in enumerate(ends):
            piece = text[start:end]
            if full := number < num_full:
                piece = torch.cat([piece, tokens[number * self.num_memory : (number + 1) * self.num_memory]])
            y, inside = self._read(piece, SegmentState(memory, inside), fast)
            read_text.append(y[: end - start])
            if full:
                read_memory.append(y[end - start :])
                memory, inside = self.associative.write(read_memory[-1], memory), self.mixer.init_state(x.size(1))
            start = end
        return torch.cat(read_text + read_memory), SegmentState(memory, inside)

    def _read(self, x: Tensor, state: SegmentState, fast: FastLevels | None) -> tuple[Tensor, AttentionState]:
        """Tokens of one segment, [T, B, D]."""
        x = x + self.associative.read(x, state.memory)
        y, inside = self.mixer(self.norm(x), state.attention)
        return self.mlp(x + y, fast), inside
