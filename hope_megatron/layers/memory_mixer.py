"""The recurrent mixer: projections, short convolution, self-modifying memories, output projection.

HOPE, Titans, TTT, DeltaNet and RetNet are settings of `MemoryConfig`. Heads are split over tensor-parallel ranks, and over
context-parallel ranks once more for as long as they need all tokens of a sequence; nothing inside the memories crosses ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from hope_megatron.config.model import MemoryConfig, ModelConfig
from hope_megatron.layers.context_parallel import context_parallel_size, heads_to_tokens, own_heads, tokens_to_heads
from hope_megatron.layers.linear import column_parallel, enter_parallel_region, row_parallel, zeros
from hope_megatron.layers.norm import RMSNorm
from hope_megatron.layers.parameters import constant, declare, normal, rows
from hope_megatron.ops.memory import (
    Bank,
    MemoryParams,
    MemoryState,
    RateLogits,
    initial_state,
    memory_chunked,
    memory_packed,
)
from hope_megatron.ops.memory.types import map_params
from hope_megatron.ops.precision import wide
from hope_megatron.ops.short_conv import short_conv


class MemoryMixerState(NamedTuple):
    """State of one layer's streams: the last inputs of the convolution and the memories of this rank's heads."""

    conv: Tensor | None  # [B, w - 1, 3 H d]
    memory: MemoryState


class MemoryMixer(MegatronModule):
    """x [T, B, D] (or its sequence shard) -> y of the same shape, and the state of the streams.

    Under context parallelism x is this rank's slice of the tokens, and the state that of this rank's share of the heads.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, layer_number: int):
        super().__init__(config)
        memory = model.memory
        self.memory_config, self.rule, self.compute = memory, memory.rule, memory.compute
        self.head_dim, self.layer_number = model.head_dim, layer_number
        self.recompute_memory = False
        self.observer: Callable[..., None] | None = None  # sees what the memories are given, for measurements
        self.num_heads = model.num_heads // parallel_state.get_tensor_model_parallel_world_size()  # of this rank
        self.first_head = self.num_heads * parallel_state.get_tensor_model_parallel_rank()
        width, dtype = model.num_heads * model.head_dim, config.params_dtype

        self.qkv = column_parallel(
            model.hidden_size, 3 * width, config, normal(model.hidden_init_std), blocks=3, fused_apart=True
        )
        self.rate_names, self.rates = tuple(rates := data_rates(memory)), None
        if rates:
            self.rates = column_parallel(
                model.hidden_size,
                len(rates) * model.num_heads * (model.head_dim if self.rule.rates_of == "channel" else 1),
                config,
                zeros,
                blocks=len(rates),
                bias_init=rows(list(rates.values())),
                role="vector",
            )
        self.constants = nn.ParameterDict(
            {
                name: declare(nn.Parameter(torch.empty(self.num_heads, dtype=dtype)), constant(value), shard_dim=0)
                for name, value in head_constants(memory).items()
            }
        )
        self.conv = None
        if memory.conv_width > 1:
            weight = nn.Parameter(torch.empty(3 * self.num_heads * self.head_dim, memory.conv_width, dtype=dtype))
            self.conv = declare(weight, normal(1 / math.sqrt(memory.conv_width)), shard_dim=0, stride=3)
        self.memories = MemoryWeights(model, self.num_heads, dtype)
        self.gate = None
        if memory.output_gate == "silu":
            self.gate = column_parallel(model.hidden_size, width, config, normal(model.hidden_init_std))
        tp = parallel_state.get_tensor_model_parallel_world_size()
        self.head_norm = RMSNorm(self.head_dim, model.norm_epsilon, sum_over_tp=tp > 1, dtype=dtype)
        self.output = row_parallel(
            width, model.hidden_size, config, normal(model.hidden_init_std / math.sqrt(2 * model.num_layers))
        )

    def init_state(self, batch_size: int) -> MemoryMixerState:
        """The state of `batch_size` new streams."""
        uses_momentum = self.memory_config.momentum != "none"
        params = self._own_memories()
        dtype = torch.promote_types(params.mem.w_out.dtype, torch.float32)
        memory = initial_state(params, batch_size, momentum=uses_momentum, dtype=dtype)
        if self.conv is None:
            return MemoryMixerState(None, memory)
        conv = self._own_conv()
        tail = conv.new_zeros(batch_size, conv.size(1) - 1, conv.size(0))
        return MemoryMixerState(tail, memory)

    def forward(
        self, x: Tensor, state: MemoryMixerState | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, MemoryMixerState | None]:
        """See the class docstring. Without a state, streams begin here.

        documents: number of the document of every token, [B, T]; each begins anew. Then there is no state, in or out.
        """
        x = enter_parallel_region(x, self.config)
        B = x.size(1)
        qkv = tokens_to_heads(self.qkv(x)[0].unflatten(-1, (3, self.num_heads, self.head_dim)), 3)  # [T, B, 3, H, d]
        T, heads = qkv.size(0), qkv.size(3)
        qkv = qkv.flatten(2).transpose(0, 1)
        tail = None
        if self.conv is not None:
            qkv, tail = short_conv(qkv, self._own_conv(), state.conv if state else None, documents)
        else:
            qkv = F.silu(qkv)
        q, k, v = qkv.view(B, T, 3, heads, self.head_dim).unbind(2)
        if "correction" in self.constants:
            q = q - own_heads(self.constants["correction"])[:, None].to(q.dtype) * k
        inputs = (q, k, v, self._rate_logits(x), self._own_memories(), self.rule)
        before = state.memory if state else None
        how: dict[str, Any] = dict(compute=self.compute, recompute=self.recompute_memory)
        if self.observer is not None:
            self.observer(*inputs, before)
        if documents is not None:
            y, end = memory_packed(*inputs, documents, **how), None
        else:
            y, memory = memory_chunked(*inputs, before, **how)
            end = MemoryMixerState(tail, memory)
        y = heads_to_tokens(self.head_norm(y).transpose(0, 1), 2).flatten(2)
        if self.gate is not None:
            y = y * F.silu(self.gate(x)[0])
        return self.output(y)[0], end

    def _own_memories(self) -> MemoryParams:
        """The initial states of this rank's heads."""
        return map_params(own_heads, self.memories())

    def _own_conv(self) -> Tensor:
        """Taps [3 H d, w] of this rank's heads."""
        assert self.conv is not None
        return own_heads(self.conv.unflatten(0, (3, self.num_heads, self.head_dim)), 1).flatten(0, 2)

    def _rate_logits(self, x: Tensor) -> RateLogits:
        """[T, B, D] -> logits [B, T, H] in float32, or [B, T, H, d] of channels; those of this rank's heads."""
        T, B = x.size(0) * context_parallel_size(), x.size(1)
        found: dict[str, Tensor] = {}
        if self.rates is not None:
            logits, bias = self.rates(x)
            each = (self.head_dim,) if self.rule.rates_of == "channel" else ()
            logits = tokens_to_heads((wide(logits) + wide(bias)).unflatten(-1, (-1, self.num_heads, *each)), 3)
            found = dict(zip(self.rate_names, logits.transpose(0, 1).unbind(2)))
        for name, value in self.constants.items():
            found[name] = own_heads(wide(value)).expand(B, T, -1)
        if self.memory_config.decay == "retnet":
            head = torch.arange(self.num_heads, device=x.device) + self.first_head
            alpha = 1 - 2.0 ** (-5.0 - own_heads(head))
            found["alpha"] = torch.logit(alpha).expand(B, T, -1)
        return RateLogits(found.get("eta"), found.get("alpha"), found.get("theta"))


def data_rates(memory: MemoryConfig) -> dict[str, float]:
    """Rates that depend on the token, with their initial logits."""
    rates = {}
    if memory.eta == "data":
        rates["eta"] = _logit(memory.eta_init)
    if memory.decay == "data":
        rates["alpha"] = memory.alpha_logit
    if memory.momentum == "data":
        rates["theta"] = _logit(memory.momentum_init / memory.momentum_max)
    return rates


def head_constants(memory: MemoryConfig) -> dict[str, float]:
    """What is learned for each head, whatever the token, by its initial value: rates as logits, and the correction."""
    found = {}
    if memory.decay == "constant":
        found["alpha"] = _logit(memory.alpha_init)
    if memory.momentum == "constant":
        found["theta"] = _logit(memory.momentum_init / memory.momentum_max)
    if memory.query_correction is not None:
        found["correction"] = memory.query_correction
    return found


class MemoryWeights(nn.Module):
    """The learned initial states W_0 of a rank's memories: stacks of matrices, one per head and memory."""

    def __init__(self, model: ModelConfig, num_heads: int, dtype: torch.dtype):
        super().__init__()
        memory, self.num_heads = model.memory, num_heads
        d, h = model.head_dim, model.memory_hidden
        self.d, self.dtype = d, dtype
        if memory.num_layers == 1:
            self._stack("mem_out", 1, d, d, std=memory.output_scale)
            return
        input_std = memory.input_scale / math.sqrt(d)
        self._stack("mem_in", 1, h, d, std=input_std)
        self._stack("mem_out", 1, d, h, std=memory.output_scale)
        # the self-memories begin as identities (or as zero), so that a new block is exactly static
        for name, count, outputs in (
            ("vector", memory.num_vector, d),
            ("scalar", memory.num_scalar, 1),
        ):
            if count:
                self._stack(f"{name}_in", count, h, d, std=input_std)
                self._stack(f"{name}_out", count, outputs, h, std=0.0)

    def _stack(self, name: str, count: int, out_size: int, in_size: int, *, std: float) -> None:
        weight = nn.Parameter(torch.empty(self.num_heads, count, out_size, in_size, dtype=self.dtype))
        matrix = out_size > 1
        declare(weight, normal(std), shard_dim=0, role="matrix" if matrix else "vector", weight_decay=False)
        self.register_parameter(name, weight)

    def forward(self) -> MemoryParams:
        """As the operator takes them."""
        bank = lambda name: Bank(getattr(self, f"{name}_in", None), getattr(self, f"{name}_out"))  # noqa: E731
        return MemoryParams(
            bank("mem"),
            bank("vector") if hasattr(self, "vector_out") else None,
            bank("scalar") if hasattr(self, "scalar_out") else None,
        )


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
