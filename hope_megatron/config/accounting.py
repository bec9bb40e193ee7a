"""Closed forms: parameters and FLOPs of a model, from its configuration alone.

Symbols: D model width, H heads, d head width, h memory hidden width, C tokens of a chunk, n memories of a bank. One
multiply-add is 2 FLOPs. The tests hold parameter counts against the built model, and the memory's FLOPs against those
that PyTorch counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from hope_megatron.config.model import ModelConfig

Part = Literal["embedding", "projections", "convolutions", "gates", "memories", "cms", "norms", "head"]


class Weight(NamedTuple):
    """A kind of parameter tensor in the model."""

    part: Part
    name: str
    size: int
    """Numbers in one copy."""
    copies: int = 1
    """How often the model has it."""
    matmul: bool = True
    """Whether every token is multiplied with it once. Memories are counted apart."""
    sharded: bool = True
    """Split over tensor-parallel ranks."""
    matrix: bool = True
    """Updated by the matrix optimizer, as opposed to AdamW."""
    update_period_steps: int = 1
    """At first; it may change over the run."""
    gathers: bool = False
    """Whether gradients are ever gathered between two updates."""

    @property
    def total(self) -> int:
        """Numbers in all copies."""
        return self.size * self.copies


def weight_table(model: ModelConfig) -> list[Weight]:
    """Every parameter of the model, one row per kind of tensor."""
    D, layers = model.hidden_size, model.num_layers
    up_parts = 2 if model.cms.activation == "swiglu" else 1
    rows = [Weight("embedding", "embedding", model.padded_vocab_size * D, matmul=False, matrix=False)]
    rows += _memory_weights(model, model.mixers.count("memory"))
    rows += _attention_weights(model, model.mixers.count("attention"))
    rows.append(Weight("norms", "mixer norm", D, layers, matmul=False, sharded=False, matrix=False))
    for i, level in enumerate(model.cms.levels):
        period, h, gathers = level.update_period_steps, level.hidden_size, level.gathers
        rows += [
            Weight("norms", f"cms level {i} norm", D, layers, False, False, False, period, gathers),
            Weight("cms", f"cms level {i} up", D * up_parts * h, layers, update_period_steps=period, gathers=gathers),
            Weight("cms", f"cms level {i} down", h * D, layers, update_period_steps=period, gathers=gathers),
        ]
        if level.ticks and level.inner_rate_kind != "constant":
            per_channel = level.inner_rate_kind == "per_channel"
            size = h if per_channel else 1
            rows.append(
                Weight("gates", f"cms level {i} inner rate", size, layers, False, per_channel, False, period, gathers)
            )
    if model.cms.connection == "independent":
        rows.append(Weight("gates", "cms join", len(model.cms.levels) * D, layers, False, False, False))
    if model.attention.segment_tokens:
        rows += _segment_weights(model, layers)
    rows.append(Weight("norms", "final norm", D, matmul=False, sharded=False, matrix=False))
    if not model.tie_embeddings:
        rows.append(Weight("head", "head", model.padded_vocab_size * D, matrix=False))
    return rows


def _memory_weights(model: ModelConfig, layers: int) -> list[Weight]:
    if layers == 0:
        return []
    memory, D, H, d, h = model.memory, model.hidden_size, model.num_heads, model.head_dim, model.memory_hidden
    rates = (memory.eta == "data") + (memory.decay == "data") + (memory.momentum == "data")
    rates *= d if memory.rates_of == "channel" else 1
    constants = (memory.decay == "constant") + (memory.momentum == "constant") + (memory.query_correction is not None)
    rows = [
        Weight("projections", "qkv", D * 3 * H * d, layers),
        Weight("projections", "mixer output", H * d * D, layers),
        Weight("gates", "rates", D * rates * H, layers, matrix=False),
        Weight("gates", "rate biases", (rates + constants) * H, layers, matmul=False, matrix=False),
        Weight("norms", "head norm", d, layers, matmul=False, sharded=False, matrix=False),
    ]
    if memory.conv_width > 1:
        rows.append(Weight("convolutions", "convolution", 3 * H * d * memory.conv_width, layers, matrix=False))
    if memory.output_gate != "none":
        rows.append(Weight("gates", "output gate", D * H * d, layers))
    for bank in memory_banks(model):
        inner = h * d if memory.num_layers == 2 else 0
        outer = bank.outputs * (h if memory.num_layers == 2 else d)
        if inner:
            rows.append(Weight("memories", f"{bank.name}, input", H * bank.memories * inner, layers, matmul=False))
        # the output layer of a scalar memory is one row, no matrix
        output = Weight("memories", f"{bank.name}, output", H * bank.memories * outer, layers, matmul=False)
        rows.append(output._replace(matrix=bank.outputs > 1))
    return rows


def _attention_weights(model: ModelConfig, layers: int) -> list[Weight]:
    if layers == 0:
        return []
    D, H, d = model.hidden_size, model.num_heads, model.head_dim
    kv = model.attention.num_kv_heads or H
    rows = [
        Weight("projections", "attention qkv", D * (H + 2 * kv) * d, layers),
        Weight("projections", "attention output", H * d * D, layers),
    ]
    if model.attention.qkv_bias:
        rows.append(Weight("projections", "attention bias", (H + 2 * kv) * d, layers, matmul=False, matrix=False))
    if model.attention.qk_norm:
        rows.append(Weight("norms", "query and key norms", 2 * d, layers, matmul=False, sharded=False, matrix=False))
    return rows


def _segment_weights(model: ModelConfig, layers: int) -> list[Weight]:
    """Of ARMT: memory tokens alone are multiplied with what makes keys, values and rates, which `_segment_flops` counts."""
    D, H, keys = model.hidden_size, model.num_heads, model.num_heads * model.associative_key_size
    return [
        Weight("embedding", "memory tokens", model.attention.memory_tokens * D, 1, False, False, False),
        Weight("projections", "associative queries", D * keys, layers),
        Weight("projections", "associative keys", D * keys, layers, matmul=False),
        Weight("projections", "associative values", D * D, layers, matmul=False),
        Weight("gates", "associative rates", D * H, layers, matmul=False, matrix=False),
        Weight("gates", "associative rate biases", H, layers, matmul=False, matrix=False),
    ]


class MemoryBank(NamedTuple):
    """Memories of equal shape in a head."""

    name: str
    memories: int
    outputs: int
    """Width of what a memory returns: d, or 1 for the scalar memories of the rates."""
    chunk_tokens: int


def memory_banks(model: ModelConfig) -> list[MemoryBank]:
    """The banks that exist: M_mem, then (M_k, M_v, M_q), then (M_eta, M_alpha)."""
    m, d = model.memory, model.head_dim
    banks = [
        MemoryBank("main memory", 1, d, m.chunk_tokens),
        MemoryBank("projection memories", m.num_vector, d, m.self_chunk),
        MemoryBank("rate memories", m.num_scalar, 1, m.self_chunk),
    ]
    return [bank for bank in banks if bank.memories]


def parameters_by_part(model: ModelConfig) -> dict[Part, int]:
    """Parameters of each part, in the order of the forward pass; parts that do not exist are left out."""
    counts: dict[Part, int] = {}
    for weight in weight_table(model):
        counts[weight.part] = counts.get(weight.part, 0) + weight.total
    return counts


def num_parameters(model: ModelConfig) -> int:
    """All parameters; tied embeddings count once."""
    return sum(parameters_by_part(model).values())


def num_non_embedding(model: ModelConfig) -> int:
    """Parameters without the embedding and the output head."""
    return sum(count for part, count in parameters_by_part(model).items() if part not in ("embedding", "head"))


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs per token of one forward pass, by what they are spent on."""

    outer: float
    """Projections, convolutions, gates, CMS and output head."""
    attention: float
    """Scores and weighted values of softmax attention."""
    memory_reads: float
    """Inner memory: keys, values and rates from the self-memories, and the output from M_mem."""
    memory_solve: float
    """Inner memory: the triangular systems of Delta Gradient Descent."""
    memory_writes: float
    """Inner memory: targets, inner gradients and state updates."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def memory(self) -> float:
        """Everything the inner memories do."""
        return self.memory_reads + self.memory_solve + self.memory_writes


def forward_flops(model: ModelConfig, seq_length: int) -> TokenFlops:
    """FLOPs per token of the forward pass. A backward pass costs twice as much: one product per operand.

    Matrix products only. Chunk-by-chunk products are counted in full, as they are executed; causal attention as the
    half that flash attention computes.
    """
    head = 0 if not model.tie_embeddings else model.padded_vocab_size * model.hidden_size
    outer = head + sum(weight.total for weight in weight_table(model) if weight.matmul)
    reads, solve, writes = memory_macs(model, seq_length)
    heads_of_memory = model.num_heads * model.mixers.count("memory")
    context = (seq_length + 1) / 2
    window = model.attention.window_tokens
    if window is not None and window < seq_length:
        context = window - window * (window - 1) / (2 * seq_length)
    if model.attention.segment_tokens:
        return _segment_flops(model, seq_length)
    return TokenFlops(
        outer=2.0 * outer,
        attention=2.0 * model.mixers.count("attention") * 2 * model.num_heads * model.head_dim * context,
        memory_reads=2.0 * heads_of_memory * reads,
        memory_solve=2.0 * heads_of_memory * solve,
        memory_writes=2.0 * heads_of_memory * writes,
    )


def _segment_flops(model: ModelConfig, seq_length: int) -> TokenFlops:
    """Of ARMT: memory tokens pass through the layers with the text. Windows inside segments are counted as whole segments."""
    L, M = model.attention.segment_tokens or 1, model.attention.memory_tokens
    D, H, keys = model.hidden_size, model.num_heads, model.num_heads * model.associative_key_size
    full, rest = divmod(seq_length, L)
    extra = full * M / seq_length  # memory tokens per token
    head = model.padded_vocab_size * D
    weights = [row for row in weight_table(model) if row.matmul]
    layers = sum(row.total for row in weights if row.part != "head")
    pairs = full * (L + M) * (L + M + 1) / 2 + rest * (rest + 1) / 2
    held = 6 * model.associative_key_size * (D + H)  # z and A against the features of a token, in all heads
    return TokenFlops(
        outer=2.0 * (layers * (1 + extra) + head),
        attention=2.0 * model.num_layers * 2 * H * model.head_dim * pairs / seq_length,
        memory_reads=2.0 * model.num_layers * held * (1 + extra),
        memory_solve=0.0,
        memory_writes=2.0 * model.num_layers * extra * (D * (keys + D + H) + 2 * held),
    )


def in_context_flops(model: ModelConfig, seq_length: int) -> float:
    """FLOPs per token of the inner gradients (eq. 71): a backward pass through the chunk, beside the outer one. 0 without
    inner clocks. The update itself is one multiply-add per weight and chunk, and is not counted."""
    return 2 * forward_flops(model, seq_length).total if model.cms.learns_in_context else 0.0


def recompute_flops(model: ModelConfig, seq_length: int, recompute: str) -> float:
    """FLOPs per token of what backward runs again: the memories, and with "layer" the layers around them too."""
    if recompute == "none":
        return 0.0
    flops = forward_flops(model, seq_length)
    if recompute == "memory":
        return flops.memory
    return flops.total - 2.0 * model.padded_vocab_size * model.hidden_size + flops.memory


def memory_macs(model: ModelConfig, seq_length: int) -> tuple[float, float, float]:
    """Multiply-adds per token and head of one layer's inner memories: reads, solves, writes.

    Follows ops/memory/chunk.py product by product, for whole chunks. A triangular solve against the identity counts C^3 / 2
    per chunk.
    """
    memory, d, h = model.memory, model.head_dim, model.memory_hidden
    deep, momentum, anchored = memory.num_layers == 2, memory.momentum != "none", memory.keeps_initial
    writes_in = memory.writes_input
    hidden = h if deep else d  # fan-in of the output layer
    banks = memory_banks(model)

    reads = 0.0
    for bank in banks:
        if bank.name == "main memory" and memory.read == "causal":
            reads += _causal_read_macs(model, min(bank.chunk_tokens, seq_length))
        else:
            reads += bank.memories * (d * h * deep + hidden * bank.outputs)

    solve = writes = 0.0
    for group in _groups_by_chunk(banks):
        C = min(group[0].chunk_tokens, seq_length)
        vectors = sum(bank.memories for bank in group if bank.outputs > 1)
        scalars = sum(bank.memories for bank in group if bank.outputs == 1)
        n = vectors + scalars

        # inner gradients, at the chunk's start
        output_layers = hidden * (vectors * d + scalars)
        writes += n * d * h * deep  # z = W_in k
        writes += n * d * h * deep if memory.own_targets or scalars else 0  # targets M(v)
        writes += output_layers if memory.own_targets else hidden * scalars
        writes += output_layers if memory.predicts else 0
        writes += vectors * d * h * writes_in  # W_out^T e

        # the systems of Delta Gradient Descent: one for the keys k, one for the features of every memory
        dgd_in, dgd_out = memory.dgd_layers != "none", memory.dgd_layers == "all"
        if dgd_in and (writes_in or not deep):
            solve += C * d + C * C / 2
        if dgd_out and deep:
            solve += n * (C * h + C * C / 2)
        solve += C * C + C if momentum else 0  # its decay table

        # every layer of every memory: how many, fan-in, fan-out, under Delta Gradient Descent?, is W k known (as z)?
        layers = [(vectors, d, d, dgd_in, False)]
        if deep:
            layers = [(vectors, h, d, dgd_out, False), (scalars, h, 1, dgd_out, False)]
            layers += [(n, d, h, dgd_in, True)] * writes_in
        for count, fan_in, fan_out, dgd, known in layers:
            weight = count * fan_in * fan_out
            writes += weight * (1 + momentum)  # the state after the chunk
            if dgd:
                solve += count * C * fan_out + weight * (not known)  # inverse times right-hand side, W k for all keys
                solve += weight * anchored  # and the initial W k
                solve += weight + count * C * (fan_in + fan_out) if momentum else 0
    return reads, solve, writes


def _groups_by_chunk(banks: list[MemoryBank]) -> list[list[MemoryBank]]:
    """Memories with the same chunk borders are written together; M_mem apart from the others if theirs differ."""
    main, own = banks[:1], banks[1:]
    if not own or own[0].chunk_tokens == main[0].chunk_tokens:
        return [banks]
    return [own, main]


def _causal_read_macs(model: ModelConfig, C: int) -> float:
    """The dual form: M_t(q_t) for every token of a chunk, without a state per token."""
    memory, d, h = model.memory, model.head_dim, model.memory_hidden
    momentum, macs = memory.momentum != "none", 0.0
    layers = [(d, h, memory.dgd_layers != "none"), (h, d, memory.dgd_layers == "all")]
    if memory.num_layers == 1:
        layers = [(d, d, memory.dgd_layers != "none")]
    elif memory.written_layers == "output":
        layers, macs = layers[1:], d * h
    if memory.weights == "softmax":  # every token's weights are built
        return sum((C + 1) * fan_in * fan_out for fan_in, fan_out, _ in layers)
    for fan_in, fan_out, dgd in layers:
        passes = 1 + (momentum and dgd)
        macs += fan_in * fan_out * (1 + momentum + memory.keeps_initial) + C * fan_in + passes * C * fan_out
    return macs
