"""A HOPE model for transformers: pure PyTorch, one device, the recurrent state as the cache.

The memory operator is the one that trained the model. `generate()` needs constant memory at any length where all mixers
are memories; attention mixers keep their keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from hope_megatron.ops.memory.operator import memory_chunked
from hope_megatron.ops.memory.rule import MemoryRule, pick
from hope_megatron.ops.memory.types import Bank, MemoryParams, RateLogits
from hope_megatron.ops.short_conv import short_conv

from .configuration_hope import HopeConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.epsilon).to(x.dtype)


class MemoryWeights(nn.Module):
    """The learned initial states of a layer's memories, stacked by head and memory."""

    def __init__(self, heads: int, d: int, h: int, memory: SimpleNamespace) -> None:
        super().__init__()
        vector, scalar = memory.adaptive_key + memory.adaptive_value, memory.adaptive_eta + memory.adaptive_alpha
        shapes = {"mem_out": (1, d, d)} if memory.num_layers == 1 else {"mem_in": (1, h, d), "mem_out": (1, d, h)}
        if memory.num_layers == 2 and vector:
            shapes |= {"vector_in": (vector, h, d), "vector_out": (vector, d, h)}
        if memory.num_layers == 2 and scalar:
            shapes |= {"scalar_in": (scalar, h, d), "scalar_out": (scalar, 1, h)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(heads, *shape)))

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
        memory = model.memory
        self.heads, self.d = model.num_heads, model.head_dim
        width = self.heads * self.d
        self.rule = pick(MemoryRule, memory)
        settings = {"alpha": memory.decay, "theta": memory.momentum}
        self.rate_names = ("eta", *(name for name, kind in settings.items() if kind == "data"))
        constants = (name for name, kind in settings.items() if kind == "constant")
        self.constants = nn.ParameterDict({name: nn.Parameter(torch.zeros(self.heads)) for name in constants})
        self.qkv = nn.Linear(model.hidden_size, 3 * width, bias=False)
        self.rates = nn.Linear(model.hidden_size, len(self.rate_names) * self.heads)
        self.conv = nn.Parameter(torch.zeros(3 * width, memory.conv_width)) if memory.conv_width > 1 else None
        self.memories = MemoryWeights(self.heads, self.d, memory.hidden_size or self.d, memory)
        self.gate = nn.Linear(model.hidden_size, width, bias=False) if memory.output_gate == "silu" else None
        self.head_norm = RMSNorm(self.d, model.norm_epsilon)
        self.output = nn.Linear(width, model.hidden_size, bias=False)

    def forward(self, x: Tensor, state: tuple[Any, Any] | None) -> tuple[Tensor, tuple[Any, Any]]:
        batch_size, num_tokens = x.shape[:2]
        tail, memory = state if state is not None else (None, None)
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, tail = short_conv(qkv, self.conv, tail)
        else:
            qkv = F.silu(qkv)
        q, k, v = qkv.view(batch_size, num_tokens, 3, self.heads, self.d).unbind(2)
        y, memory = memory_chunked(q, k, v, self._rate_logits(x), self.memories(), self.rule, memory)
        y = self.head_norm(y).flatten(2)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return self.output(y), (tail, memory)

    def _rate_logits(self, x: Tensor) -> RateLogits:
        """[B, T, H] in float32 for each rate that exists."""
        logits = F.linear(x, self.rates.weight).float() + self.rates.bias.float()
        found = dict(zip(self.rate_names, logits.unflatten(-1, (-1, self.heads)).unbind(2)))
        for name, value in self.constants.items():
            found[name] = value.float().expand(*x.shape[:2], -1)
        return RateLogits(found["eta"], found.get("alpha"), found.get("theta"))


class Attention(nn.Module):
    """Causal softmax attention with rotary embeddings; the state holds rotated keys, values and the position."""

    def __init__(self, model: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.d, self.window = model.num_heads, model.head_dim, model.attention.window_tokens
        self.groups, self.base = model.attention.num_kv_heads or model.num_heads, model.attention.rope_base
        self.linear_qkv = nn.Linear(model.hidden_size, (self.heads + 2 * self.groups) * self.d, bias=False)
        self.linear_proj = nn.Linear(self.heads * self.d, model.hidden_size, bias=False)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor, int] | None) -> tuple[Tensor, Any]:
        past, num_tokens = state[2] if state is not None else 0, x.size(1)
        # Megatron-Core's layout: each group's queries, its key and its value stand together
        qkv = self.linear_qkv(x).unflatten(-1, (self.groups, -1, self.d))  # [B, T, groups, heads / groups + 2, d]
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        q, k, v = (self._rotate(q, past).transpose(1, 2), self._rotate(k, past).transpose(1, 2), v.transpose(1, 2))
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        columns = torch.arange(k.size(2), device=x.device)
        rows = columns[-num_tokens:, None]
        mask = columns <= rows
        if self.window is not None:
            mask &= columns > rows - self.window
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.groups)
        kept = slice(-self.window if self.window else None, None)
        return self.linear_proj(y.transpose(1, 2).flatten(2)), (k[:, :, kept], v[:, :, kept], past + num_tokens)

    def _rotate(self, x: Tensor, past: int) -> Tensor:
        """Rotary embedding of [B, T, heads, d], halves paired."""
        exponents = torch.arange(0, self.d, 2, device=x.device).float() / self.d
        positions = torch.arange(past, past + x.size(1), device=x.device).float()
        angles = torch.outer(positions, self.base**-exponents).repeat(1, 2)[:, None]  # [T, 1, d]
        first, second = x.chunk(2, -1)
        return x * angles.cos().to(x.dtype) + torch.cat((-second, first), -1) * angles.sin().to(x.dtype)


class AttentionMixer(nn.Module):
    """Holds the attention under the name that checkpoints use."""

    def __init__(self, model: SimpleNamespace) -> None:
        super().__init__()
        self.attention = Attention(model)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.attention(x, state)


class CMSLevel(nn.Module):
    """x + MLP(norm(x)), static: the clock inside the context is hope_megatron's, its learned rate is kept beside."""

    def __init__(self, model: SimpleNamespace, level: dict[str, Any]) -> None:
        super().__init__()
        hidden_size, kind = level["hidden_size"], level.get("inner_rate_kind", "constant")
        self.activation = model.cms.activation
        blocks = 2 if self.activation == "swiglu" else 1
        self.norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        self.up = nn.Linear(model.hidden_size, blocks * hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, model.hidden_size, bias=False)
        ticks = level.get("inner_chunk_tokens") is not None and level.get("inner_rate", 0.0) > 0
        size = {"constant": 0, "learned": 1, "per_channel": hidden_size}[kind]
        self.log_rate = nn.Parameter(torch.zeros(size)) if ticks and size else None

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, x: Tensor) -> Tensor:
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
        self.mixer = MemoryMixer(model) if mixer == "memory" else AttentionMixer(model)
        self.mlp = ContinuumMLP(model)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.norm(x), state)
        return self.mlp(x + y), state


@dataclass
class HopeOutput(ModelOutput):
    """loss (with labels), logits [B, T, vocab_size], and the state after the last token, one entry per layer."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: tuple[Any, ...] | None = None


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """A HOPE language model."""

    config_class = HopeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _is_stateful = True  # a state cannot be rolled back, as assisted decoding would want

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        model = SimpleNamespace(**config.architecture)
        model.memory, model.attention = SimpleNamespace(**model.memory), SimpleNamespace(**model.attention)
        model.cms = SimpleNamespace(**model.cms)
        model.head_dim = model.head_size or model.hidden_size // model.num_heads
        rows = -(-model.vocab_size // model.vocab_multiple) * model.vocab_multiple
        mixers = (model.layer_pattern[i % len(model.layer_pattern)] for i in range(model.num_layers))
        self.embedding = nn.Embedding(rows, model.hidden_size)
        self.layers = nn.ModuleList(HopeLayer(model, mixer) for mixer in mixers)
        self.norm = RMSNorm(model.hidden_size, model.norm_epsilon)
        self.head = None if model.tie_embeddings else nn.Linear(model.hidden_size, rows, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from files; a fresh model is made by hope_megatron."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> None:
        """None: a tied head has no parameter of its own."""
        return

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        state: tuple[Any, ...] | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> HopeOutput:
        """Read a piece of each stream.

        Args:
            input_ids: [B, T].
            labels: [B, T], input_ids again; -100 is not counted. Position t is predicted from the tokens before it.
            state: `state` of an earlier output of the same streams; None begins new ones.
            attention_mask: must be all ones: a memory reads every token it is given, so prompts of different lengths
                cannot be padded into one batch.
            use_cache: False leaves the state out of the result.
            logits_to_keep: compute the logits of this many last tokens only; 0 means all.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "padded batches are not supported: a memory reads every token; batch prompts of one length"
            )
        x = self.embedding(input_ids)
        states = []
        for layer, layer_state in zip(self.layers, state if state is not None else [None] * len(self.layers)):
            x, layer_state = layer(x, layer_state)
            states.append(layer_state)
        x = self.norm(x[:, -logits_to_keep:] if logits_to_keep else x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = F.linear(x, weight).float()[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return HopeOutput(loss=loss, logits=logits, state=None if use_cache is False else tuple(states))

    # -- generate() ----------------------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; beams are refused, because they would mix up the states of their streams."""
        config = kwargs.get("generation_config") or self.generation_config
        if (kwargs.get("num_beams") or config.num_beams or 1) > 1:
            raise ValueError("beam search is not supported with a recurrent state; use num_beams=1")
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The prompt at first, then the last token with the state."""
        if state is None:
            return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}
        return {"input_ids": input_ids[:, -1:], "state": state, "logits_to_keep": 1}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """No key-value cache: the state travels as a model keyword."""

    def _update_model_kwargs_for_generation(
        self, outputs: HopeOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return {**model_kwargs, "state": outputs.state}
