"""Bytes per GPU and hours of a run, from its configuration alone.

Weights, gradients and optimizer states are exact up to buffers. Memory states and activations follow what autograd
keeps of the layers as they are (the tests hold them to within a quarter of that); fragmentation, communication buffers
and temporaries come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from hope_megatron.config.accounting import (
    forward_flops,
    in_context_flops,
    memory_banks,
    recompute_flops,
    weight_table,
)
from hope_megatron.config.hardware import Hardware
from hope_megatron.config.model import MemoryConfig, ModelConfig
from hope_megatron.config.optim import OptimConfig
from hope_megatron.config.optimizers import OPTIMIZERS
from hope_megatron.config.run import RunConfig
from hope_megatron.config.training import TrainingConfig
from hope_megatron.ops.memory.rule import why_not_hopes_own

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes per GPU."""

    weights: float
    gradients: float
    optimizer: float
    """Master weights and optimizer states, unless they are offloaded."""
    memory_states: float
    """Chunk-start states of the inner memories, kept for the backward pass."""
    activations: float
    """Everything else that is kept for the backward pass."""
    host: float
    """Bytes in host memory per GPU, under cpu_offload; not part of the total."""

    @property
    def total(self) -> float:
        """All that lies on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.memory_states + self.activations


def footprint(config: RunConfig, world_size: int) -> Footprint:
    """Bytes per GPU of a run on `world_size` GPUs.

    Raises:
        ConfigError: if the world does not divide into the mesh and batch.
    """
    tp, stage, training = config.parallel.tensor_parallel, config.parallel.zero_stage, config.training
    dp = config.replicas(world_size)
    local = sum(w.total / (tp if w.sharded else 1) for w in weight_table(config.model))
    compute = compute_bytes(training)
    # bf16 gradients are accumulated in fp32; ZeRO steps fp32 master weights also in fp32 runs
    gradient = compute + (FP32 if training.precision == "bf16" else 0)
    optimizer = _optimizer_bytes(config.model, config.optim, tp)
    optimizer += FP32 * local * ((stage >= 1) + (training.ema > 0))  # master weights, averaged weights
    optimizer /= dp if stage >= 1 else 1
    states, activations = _kept_for_backward(config)
    return Footprint(
        weights=local * compute / (dp if stage >= 3 else 1),
        gradients=local * gradient / (dp if stage >= 2 else 1),
        optimizer=0.0 if config.parallel.cpu_offload else optimizer,
        memory_states=states,
        activations=activations,
        host=optimizer if config.parallel.cpu_offload else 0.0,
    )


def compute_bytes(training: TrainingConfig) -> int:
    """Bytes of a number in forward and backward."""
    return 2 if training.precision == "bf16" else FP32


def _optimizer_bytes(model: ModelConfig, optim: OptimConfig, tp: int) -> float:
    total, optimizer = 0.0, OPTIMIZERS[optim.name]
    for weight in weight_table(model):
        states = optimizer.matrix_states if weight.matrix else optimizer.vector_states
        states += weight.update_period_steps > 1  # the gradient gathered between two ticks of a slow level
        total += FP32 * states * weight.total / (tp if weight.sharded else 1)
    return total


def _kept_for_backward(config: RunConfig) -> tuple[float, float]:
    """(memory states, activations) in bytes per GPU."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, number = parallel.tensor_parallel, compute_bytes(training)
    tokens = training.micro_batch_size * (training.truncate_tokens or training.seq_length) / parallel.context_parallel
    residual = model.hidden_size / (tp if parallel.sequence_parallel else 1)
    layers = [
        _layer_numbers(model, mixer, training.seq_length, number, tp, residual, training.recompute)
        for mixer in model.mixers
    ]
    states, activations = [sum(column) for column in zip(*layers, strict=True)]
    if training.recompute == "layer":
        # the input of every layer, and one layer at a time in full
        states, activations = (max(column) for column in zip(*layers, strict=True))
        activations += model.num_layers * number * residual
    probabilities = FP32 * model.padded_vocab_size / tp * (2 if model.cms.learns_in_context else 1)
    everywhere = activations + probabilities + _norm_bytes(model, number, residual)
    return tokens * states, tokens * everywhere + _fast_copies(config) / tp


def _fast_copies(config: RunConfig) -> float:
    """Bytes of the fast copies of a micro-batch, over all tensor-parallel ranks: the state of a level, and the weights that
    backward needs once per chunk of the span it reaches."""
    model, training = config.model, config.training
    span, number = training.truncate_tokens or training.seq_length, compute_bytes(training)
    up_parts = 2 if model.cms.activation == "swiglu" else 1
    total = 0.0
    for level in model.cms.levels:
        if level.ticks and level.inner_chunk_tokens:
            weights = model.num_layers * model.hidden_size * (up_parts + 1) * level.hidden_size
            states = 1 + (level.inner_momentum > 0) + (level.inner_chunk_tokens > model.cms.inner_segment_tokens)
            states += 2 * (model.cms.connection == "nested")
            chunks = max(1, span // level.inner_chunk_tokens)
            total += weights * (FP32 * states + number * chunks)
    return training.micro_batch_size * total


def _layer_numbers(
    model: ModelConfig, mixer: str, seq_length: int, number: int, tp: int, residual: float, recompute: str
) -> tuple[float, float]:
    """(memory states, activations) of a layer in bytes per token."""
    H, d = model.num_heads / tp, model.head_dim
    states = 0.0
    activations = _norm_bytes(model, number, residual) + number * H * d  # the input of the output projection
    if mixer == "memory":
        states, memories = _memory_bytes(model, seq_length)
        if recompute != "none":
            states, memories = _bounded(model, seq_length, states, memories)
        states, memories = H * states, H * memories
        streams = 3 * H * d * number * 3  # q, k, v: before the convolution, before and after its activation
        activations += memories + streams + FP32 * H * d  # the head norm's input
    else:
        kv = (model.attention.num_kv_heads or model.num_heads) / tp
        activations += number * d * ((H + 2 * kv) + (H + kv) + H)  # q, k, v; rotated q and k; the output
    for level in model.cms.levels:
        hidden = level.hidden_size / tp * (4 if model.cms.activation == "swiglu" else 2)
        activations += _norm_bytes(model, number, residual) + number * hidden
    return states, activations


def _bounded(model: ModelConfig, seq_length: int, states: float, memories: float) -> tuple[float, float]:
    """Bytes per token when only the weights at segment borders stay, and one segment at a time is recomputed.

    The segment length is `memory.keep_every`, else about that of ops/memory/recompute.py: what makes the two equal.
    """
    periods = max(1.0, seq_length / model.memory.period)
    segment = model.memory.keep_every or max(1.0, (periods * states / memories) ** 0.5)
    segment = min(segment, periods)
    return states / segment, memories * segment / periods


def _norm_bytes(model: ModelConfig, number: int, residual: float) -> float:
    """A norm keeps its input in fp32; the linear layer after it keeps the whole output."""
    return FP32 * residual + number * model.hidden_size


def _memory_bytes(model: ModelConfig, seq_length: int) -> tuple[float, float]:
    """(states, other numbers) in bytes per token and head that autograd keeps of ops/memory/chunk.py.

    The coefficients were fitted to what it keeps over sizes and settings; deviations stay below a fifth.
    """
    memory, d, h = model.memory, model.head_dim, model.memory_hidden
    deep, speeds = memory.num_layers == 2, 1 + (memory.momentum != "none")
    banks = memory_banks(model)
    C = min(memory.chunk_tokens, seq_length)
    memories = sum(bank.memories for bank in banks)
    vector_memories = sum(bank.memories for bank in banks if bank.outputs > 1)
    states = sum(
        bank.memories * (h * (d + bank.outputs) if deep else d * d) / min(bank.chunk_tokens, seq_length)
        for bank in banks
    )
    if _written_out(memory):
        # counted on the tape of ops/memory/backends/manual/forward.py; the last few are columns
        anchor = (4 * d + 6 * h + 2) * memory.keeps_initial
        return FP32 * states, FP32 * (33 * d + 46 * h + 16 * C + 25 + anchor)
    numbers = d + 12 * d * vector_memories + 7 * C * (1 + memory.adaptive)
    if deep:
        numbers += 17 * h * vector_memories + 20 * h * (memories - vector_memories) + 6 * C * memories
    return FP32 * speeds * states, FP32 * numbers * (1.4 if speeds == 2 else 1.0)


def _written_out(memory: MemoryConfig) -> bool:
    """Whether ops/memory/backends/manual trains these memories, with a tape of its own."""
    rates = dict(eta=memory.eta == "data", alpha=memory.decay != "none", theta=memory.momentum != "none")
    return why_not_hopes_own(memory, **rates) is None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run costs on given hardware."""

    flops_per_token: float
    """Forward, backward and recomputation."""
    utilization: float
    """Assumed share of the peak that these FLOPs reach."""
    mfu: float
    """The same without recomputation: model FLOPs utilization."""
    tokens_per_second: float
    hours: float


def estimate(config: RunConfig, world_size: int, hardware: Hardware, utilization: float | None = None) -> Estimate:
    """Time of a run that reaches `utilization` of the hardware's peak (default: the hardware row's assumption).

    Optimizer steps are not counted: M3's Newton-Schulz adds about 2 % at half a million tokens per step.
    """
    share = hardware.utilization if utilization is None else utilization
    seq_length = config.training.seq_length
    model_flops = 3 * forward_flops(config.model, seq_length).total
    model_flops += in_context_flops(config.model, seq_length)
    all_flops = model_flops + recompute_flops(config.model, seq_length, config.training.recompute)
    rate = world_size * hardware.peak_flops * share / all_flops
    return Estimate(
        flops_per_token=all_flops,
        utilization=share,
        mfu=share * model_flops / all_flops,
        tokens_per_second=rate,
        hours=config.training.tokens / rate / 3600,
    )
