"""The layers of a HOPE model in pure PyTorch, on one device. The memory operator is the one that trained the model.

Parameters have the names and shapes of the Megatron-Core layers. This file travels with an exported model, so it imports nothing
but PyTorch and the operator; what people construct by hand is in the files beside it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hope_megatron.ops.memory.operator import memory_chunked
from hope_megatron.ops.memory.rule import MemoryRule, channel_share, pick
from hope_megatron.ops.memory.types import Bank, MemoryParams, MemoryState, RateLogits, map_params
from hope_megatron.ops.short_conv import short_conv


def architecture(values: dict[str, Any]) -> SimpleNamespace:
    """The architecture as the layers read it. values: a ModelConfig as a dict."""
    model = SimpleNamespace(**values)
    model.memory, model.attention = SimpleNamespace(**model.memory), SimpleNamespace(**model.attention)
    model.cms = SimpleNamespace(**model.cms)
    model.head_dim = model.head_size or model.hidden_size // model.num_heads
    mup = getattr(model, "mup", None)
    model.width_multiplier = model.hidden_size / mup["base_width"] if mup else 1.0
    model.hidden_init_std = model.init_std / math.sqrt(model.width_multiplier)
    model.output_init_std = model.hidden_init_std / math.sqrt(2 * model.num_layers)
    return model


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for a model in float64."""
    return torch.promote_types(dtype, torch.float32)


def linear(in_size: int, out_size: int, std: float, parts: int = 1, bias: bool = False) -> nn.Linear:
    """y = x W^T + b; `std` is that of new weights. parts: matrices of equal size that stand one above the other in W."""
    layer = nn.Linear(in_size, out_size, bias=bias)
    layer.init_std = std
    layer.optim_fused_parts = (out_size // parts,) * parts if parts > 1 else ()
    return layer


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, in float32 at least."""

    def __init__(self, size: int, epsilon: float, initial: float = 1.0) -> None:
        super().__init__()
        self.epsilon, self.initial = epsilon, initial
        self.weight = nn.Parameter(torch.full((size,), initial))

    def reset(self) -> None:
        """Initial value."""
        nn.init.constant_(self.weight, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.epsilon).to(x.dtype)


class MemoryWeights(nn.Module):
    """The learned initial states of a layer's memories, stacked by head and memory."""

    def __init__(self, heads: int, d: int, h: int, memory: SimpleNamespace) -> None:
        super().__init__()
        vector = memory.adaptive_key + memory.adaptive_value + getattr(memory, "adaptive_query", False)
        scalar = memory.adaptive_eta + memory.adaptive_alpha
        shapes = {"mem_out": (1, d, d)} if memory.num_layers == 1 else {"mem_in": (1, h, d), "mem_out": (1, d, h)}
        if memory.num_layers == 2 and vector:
            shapes |= {"vector_in": (vector, h, d), "vector_out": (vector, d, h)}
        if memory.num_layers == 2 and scalar:
            shapes |= {"scalar_in": (scalar, h, d), "scalar_out": (scalar, 1, h)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(heads, *shape)))
        self.optim_roles = {name: "matrix" if shape[1] > 1 else "vector" for name, shape in shapes.items()}
        self.optim_no_decay = True
        self.input_std, self.output_std = memory.input_scale / math.sqrt(d), memory.output_scale

    def reset(self) -> None:
        """Initial values: self-memories begin as identities (or as zero)."""
        for name, weight in self.named_parameters():
            std = self.input_std if name.endswith("_in") else self.output_std if name == "mem_out" else 0.0
            nn.init.normal_(weight, std=std)

    def forward(self) -> MemoryParams:
        """As the operator takes them."""
        return MemoryParams(*(self._bank(name) for name in ("mem", "vector", "scalar")))  # type: ignore[arg-type]

    def _bank(self, name: str) -> Bank | None:
        w_out = getattr(self, f"{name}_out", None)
        return None if w_out is None else Bank(getattr(self, f"{name}_in", None), w_out)


class MemoryMixer(nn.Module):
    """x [B, T, D] -> y of the same shape, and the state of the streams."""

    def __init__(self, model: SimpleNamespace) -> None:
        super().__init__()
        self.operator = memory_chunked
        memory = model.memory
        self.heads, self.d = model.num_heads, model.head_dim
        width = self.heads * self.d
        self.rule = pick(MemoryRule, memory)
        self.initial_rates = _initial_rates(memory)
        self.retnet = memory.decay == "retnet"
        self.rate_names = tuple(name for name, (kind, _) in self.initial_rates.items() if kind == "data")
        constants = (name for name, (kind, _) in self.initial_rates.items() if kind == "constant")
        self.constants = nn.ParameterDict({name: nn.Parameter(torch.zeros(self.heads)) for name in constants})
        self.qkv = linear(model.hidden_size, 3 * width, model.hidden_init_std, parts=3)
        self.rate_shape = (self.heads, self.d) if self.rule.rates_of == "channel" else (self.heads,)
        num_rates = len(self.rate_names) * math.prod(self.rate_shape)
        self.rates = nn.Linear(model.hidden_size, num_rates) if num_rates else None
        if self.rates is not None:
            self.rates.optim_roles = {"weight": "vector"}
        self.optim_roles = {"conv": "vector"}
        self.conv = nn.Parameter(torch.zeros(3 * width, memory.conv_width)) if memory.conv_width > 1 else None
        self.memories = MemoryWeights(self.heads, self.d, memory.hidden_size or self.d, memory)
        gated = memory.output_gate == "silu"
        self.gate = linear(model.hidden_size, width, model.hidden_init_std) if gated else None
        self.head_norm = RMSNorm(self.d, model.norm_epsilon)
        self.output = linear(width, model.hidden_size, model.output_init_std)

    def reset(self) -> None:
        """Initial values of what is not a layer of its own. Rates do not depend on the token at first."""
        if self.conv is not None:
            nn.init.normal_(self.conv, std=1 / math.sqrt(self.conv.size(1)))
        for name, value in self.constants.items():
            nn.init.constant_(value, self.initial_rates[name][1])
        if self.rates is not None:
            nn.init.zeros_(self.rates.weight)
            for name, part in zip(self.rate_names, self.rates.bias.chunk(len(self.rate_names))):
                nn.init.constant_(part, self.initial_rates[name][1])

    def forward(self, x: Tensor, state: tuple[Any, Any] | None, position: int | Tensor) -> tuple[Tensor, Any]:
        """See the class docstring. position: tokens read before; per row [B] only where T is 1."""
        batch_size, num_tokens = x.shape[:2]
        tail, memory = state if state is not None else (None, None)
        memory = None if memory is None else self._standing_at(memory, position)
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, tail = short_conv(qkv, self.conv, tail)
        else:
            qkv = F.silu(qkv)
        q, k, v = qkv.view(batch_size, num_tokens, 3, self.heads, self.d).unbind(2)
        if "correction" in self.constants:
            q = q - self.constants["correction"][:, None].to(q.dtype) * k
        y, memory = self.operator(q, k, v, self._rate_logits(x), self.memories(), self.rule, memory)
        y = self.head_norm(y).flatten(2)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return self.output(y), (tail, memory)

    def _standing_at(self, state: MemoryState, position: int | Tensor) -> MemoryState:
        """The state as the operator takes it. Rows at positions of their own: each begins its chunks where they begin for it,
        and the operator, told that it stands inside a chunk, leaves that as it is."""
        if isinstance(position, int):
            return state._replace(position=position)

        def start(chunk: int, now: MemoryParams, before: MemoryParams) -> MemoryParams:
            begins = position.to(now.mem.w_out.device) % chunk == 0
            return map_params(lambda w, old: torch.where(begins.view(-1, *[1] * (w.dim() - 1)), w, old), now, before)

        own = start(self.rule.self_chunk, state.now, state.start)
        main = start(self.rule.chunk_tokens, state.now, state.start)
        return state._replace(start=own._replace(mem=main.mem), position=1)

    def _rate_logits(self, x: Tensor) -> RateLogits:
        """[B, T, H] (or [B, T, H, d] of channels) in float32 at least, for each rate that exists."""
        found: dict[str, Tensor] = {}
        if self.rates is not None:
            dtype = wide(x.dtype)
            logits = F.linear(x, self.rates.weight).to(dtype) + self.rates.bias.to(dtype)
            found = dict(zip(self.rate_names, logits.unflatten(-1, (-1, *self.rate_shape)).unbind(2)))
        for name, value in self.constants.items():
            found[name] = value.to(wide(value.dtype)).expand(*x.shape[:2], -1)
        if self.retnet:
            alpha = 1 - 2.0 ** (-5.0 - torch.arange(self.heads, device=x.device))
            found["alpha"] = torch.logit(alpha.to(wide(x.dtype))).expand(*x.shape[:2], -1)
        return RateLogits(found.get("eta"), found.get("alpha"), found.get("theta"))


def _initial_rates(memory: SimpleNamespace) -> dict[str, tuple[str, float]]:
    """Kind (data, constant, or another that has no parameters) and initial logit of each rate; the correction by its value."""
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    of_channels = getattr(memory, "rates_of", "head") == "channel"  # exports of earlier versions have no such key
    kept = channel_share(memory.alpha_init) if of_channels else memory.alpha_init
    found = {
        "eta": (memory.eta, logit(memory.eta_init)),
        "alpha": (memory.decay, logit(kept)),
        "theta": (memory.momentum, logit(memory.momentum_init / memory.momentum_max)),
    }
    if (correction := getattr(memory, "query_correction", None)) is not None:
        found["correction"] = ("constant", correction)
    return found


class Attention(nn.Module):
    """Causal softmax attention with rotary embeddings; the state holds rotated keys and values, the newest last."""

    def __init__(self, model: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.d, self.window = model.num_heads, model.head_dim, model.attention.window_tokens
        self.groups, self.base = model.attention.num_kv_heads or model.num_heads, model.attention.rope_base
        width = (self.heads + 2 * self.groups) * self.d
        # exports of earlier versions have neither key
        self.linear_qkv = linear(
            model.hidden_size, width, model.hidden_init_std, bias=getattr(model.attention, "qkv_bias", False)
        )
        has_norms = getattr(model.attention, "qk_norm", False)
        self.q_layernorm = RMSNorm(self.d, model.norm_epsilon) if has_norms else None
        self.k_layernorm = RMSNorm(self.d, model.norm_epsilon) if has_norms else None
        self.linear_proj = linear(self.heads * self.d, model.hidden_size, model.output_init_std)

    def reset(self) -> None:
        """Initial value of the biases."""
        if self.linear_qkv.bias is not None:
            nn.init.zeros_(self.linear_qkv.bias)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None, position: int | Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, D]; state: keys and values [B, groups, S, d]. A row has as many as it has read, zeros stand before them."""
        num_tokens = x.size(1)
        # Megatron-Core's layout: each group's queries, its key and its value stand together
        qkv = self.linear_qkv(x).unflatten(-1, (self.groups, -1, self.d))  # [B, T, groups, heads / groups + 2, d]
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = (self._rotate(heads, position).transpose(1, 2) for heads in (q, k))
        v = v.transpose(1, 2)
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._mask(num_tokens, k.size(2), position, x.device),
            enable_gqa=self.heads != self.groups,
        )
        kept = slice(-self.window if self.window else None, None)
        return self.linear_proj(y.transpose(1, 2).flatten(2)), (k[:, :, kept], v[:, :, kept])

    def _mask(self, num_tokens: int, num_keys: int, position: int | Tensor, device: torch.device) -> Tensor:
        """Which of the keys each token sees: [T, S], or [B, 1, 1, S] for rows at positions of their own."""
        columns = torch.arange(num_keys, device=device)
        rows = columns[-num_tokens:, None]
        mask = columns <= rows
        if self.window is not None:
            mask &= columns > rows - self.window
        first = (
            num_keys - num_tokens - torch.as_tensor(position, device=device)
        )  # of the keys that are no zeros in front
        return mask & (columns >= first) if first.dim() == 0 else mask & (columns >= first[:, None, None, None])

    def _rotate(self, x: Tensor, position: int | Tensor) -> Tensor:
        """Rotary embedding of [B, T, heads, d], halves paired."""
        dtype = wide(x.dtype)
        exponents = torch.arange(0, self.d, 2, device=x.device, dtype=dtype) / self.d
        before = torch.as_tensor(position, device=x.device).view(-1, 1)
        positions = (before + torch.arange(x.size(1), device=x.device)).to(dtype)  # [B or 1, T]
        angles = (positions[..., None] * self.base**-exponents).repeat(1, 1, 2)[:, :, None]  # [B or 1, T, 1, d]
        first, second = x.chunk(2, -1)
        return x * angles.cos().to(x.dtype) + torch.cat((-second, first), -1) * angles.sin().to(x.dtype)


class AttentionMixer(nn.Module):
    """Holds the attention under the name that checkpoints use."""

    def __init__(self, model: SimpleNamespace) -> None:
        super().__init__()
        self.attention = Attention(model)

    def forward(self, x: Tensor, state: Any, position: int | Tensor) -> tuple[Tensor, Any]:
        """See Attention."""
        return self.attention(x, state, position)


class CMSLevel(nn.Module):
    """x + MLP(norm(x)), static: the clock inside the context is hope_megatron's, its learned rate is kept beside."""

    def __init__(self, model: SimpleNamespace, level: dict[str, Any]) -> None:
        super().__init__()
        hidden_size, kind = level["hidden_size"], level.get("inner_rate_kind", "constant")
        self.activation = model.cms.activation
        blocks = 2 if self.activation == "swiglu" else 1
        self.norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        self.up = linear(model.hidden_size, blocks * hidden_size, model.hidden_init_std, parts=blocks)
        self.update_period_steps = level.get("update_period_steps", 1)
        changes = level.get("update_period_changes", ())
        self.update_period_changes = tuple((change["from_step"], change["period"]) for change in changes)
        self.down = linear(hidden_size, model.hidden_size, model.output_init_std)
        ticks = level.get("inner_chunk_tokens") is not None and level.get("inner_rate", 0.0) > 0
        size = {"constant": 0, "learned": 1, "per_channel": hidden_size}[kind]
        self.log_rate = nn.Parameter(torch.zeros(size)) if ticks and size else None

    def reset(self) -> None:
        """Initial value of the rate's factor: 1."""
        if self.log_rate is not None:
            nn.init.zeros_(self.log_rate)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D]."""
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """MLP(norm(x))."""
        hidden = self.up(self.norm(x))
        if self.activation == "swiglu":
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.silu(hidden) if self.activation == "silu" else F.gelu(hidden)
        return self.down(hidden)


class ContinuumMLP(nn.Module):
    """The continuum memory system: a chain of levels, or levels side by side."""

    def __init__(self, model: SimpleNamespace) -> None:
        super().__init__()
        self.levels = nn.ModuleList(CMSLevel(model, level) for level in model.cms.levels)
        independent = getattr(model.cms, "connection", "sequential") == "independent"
        self.join = nn.Parameter(torch.ones(len(self.levels), model.hidden_size)) if independent else None

    def reset(self) -> None:
        """Initial weights of levels side by side."""
        if self.join is not None:
            nn.init.ones_(self.join)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D]."""
        if self.join is not None:
            return x + sum(weight * level.branch(x) for weight, level in zip(self.join, self.levels))
        for level in self.levels:
            x = level(x)
        return x


class HopeLayer(nn.Module):
    """x + Mixer(norm(x)), then the continuum memory system."""

    def __init__(self, model: SimpleNamespace, mixer: str) -> None:
        super().__init__()
        self.norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        if getattr(model.attention, "segment_tokens", None):
            raise ValueError("attention.segment_tokens (ARMT) is computed by hope_megatron alone; leave it out")
        self.mixer = MemoryMixer(model) if mixer == "memory" else AttentionMixer(model)
        self.mlp = ContinuumMLP(model)

    def forward(self, x: Tensor, state: Any, position: int | Tensor) -> tuple[Tensor, Any]:
        """x [B, T, D]; the mixer's state, and how many tokens were read before."""
        y, state = self.mixer(self.norm(x), state, position)
        return self.mlp(x + y), state
