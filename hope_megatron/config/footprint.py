"""Bytes per GPU and hours of a run, from its configuration alone.

Weights, gradients and optimizer states are exact up to buffers. Activations follow what a GPU keeps for backward, and what it needs
beside that in the backward pass of one layer; tests hold the sum to rehearsals, memories in PyTorch's operators to a quarter of
what autograd keeps. Fragmentation and the buffers of communication come on top.
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
TRITON_KEPT_BYTES, TRITON_STATE_BYTES = 37, 33
"""What a memory mixer in Triton kernels keeps for backward, per token and channel of its heads; and the weights at chunk starts,
where memories are as wide as chunks are long. Rehearsed with heads and memories of 64 and 128, at chunks of 64."""
TRITON_BESIDE_BYTES = 345
"""What its backward pass needs beside that."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes per GPU."""

    weights: float
    """Parameters as the forward pass reads them."""
    gradients: float
    """Their float32 sums; from stage 2 on bf16 ones too."""
    optimizer: float
    """Master weights and optimizer states, unless they are offloaded."""
    memory_states: float
    """Chunk-start states of the inner memories, kept for the backward pass."""
    activations: float
    """Everything else that is kept for the backward pass, or needed in it."""
    memory_kernels: float
    """What the memories' Triton kernels need in the backward pass of a layer."""
    host: float
    """Bytes in host memory per GPU, under cpu_offload and offload_activations; not part of the total."""

    @property
    def total(self) -> float:
        """All that lies on the GPU."""
        return (
            self.weights + self.gradients + self.optimizer + self.memory_states + self.activations + self.memory_kernels
        )


def footprint(config: RunConfig, world_size: int, *, on_gpu: bool = True) -> Footprint:
    """Bytes per GPU of a run on `world_size` GPUs; or CPUs, which have no Triton.

    Raises:
        ConfigError: if the world does not divide into the mesh and batch.
    """
    tp, stage, training = config.parallel.tensor_parallel, config.parallel.zero_stage, config.training
    dp = config.replicas(world_size)
    local = sum(w.total / (tp if w.sharded else 1) for w in weight_table(config.model))
    compute = compute_bytes(training)
    # bf16 gradients are added up in fp32, and dropped then at stage 1; ZeRO steps fp32 master weights also in fp32 runs
    gradient = FP32 + (compute if training.precision == "bf16" and stage > 1 else 0)
    optimizer = _optimizer_bytes(config.model, config.optim, tp)
    optimizer += FP32 * local * ((stage >= 1) + (training.ema > 0))  # master weights, averaged weights
    optimizer /= dp if stage >= 1 else 1
    states, activations, kernels = _kept_for_backward(config, on_gpu)
    return Footprint(
        weights=local * compute / (dp if stage >= 3 else 1),
        gradients=local * gradient / (dp if stage >= 2 else 1),
        optimizer=0.0 if config.parallel.cpu_offload else optimizer,
        memory_states=states,
        activations=activations,
        memory_kernels=kernels,
        host=(optimizer if config.parallel.cpu_offload else 0.0)
        + (layer_input_bytes(config) if training.offload_activations else 0.0),
    )


def layer_input_bytes(config: RunConfig) -> float:
    """The inputs of all layers of a micro-batch on one rank, which recomputation keeps."""
    model, parallel, training = config.model, config.parallel, config.training
    residual = model.hidden_size / (parallel.tensor_parallel if parallel.sequence_parallel else 1)
    tokens = training.micro_batch_size * (training.truncate_tokens or training.seq_length) / parallel.context_parallel
    return tokens * model.num_layers * compute_bytes(training) * residual


def compute_bytes(training: TrainingConfig) -> int:
    """Bytes of a number in forward and backward."""
    return 2 if training.precision == "bf16" else FP32


def _optimizer_bytes(model: ModelConfig, optim: OptimConfig, tp: int) -> float:
    total, optimizer = 0.0, OPTIMIZERS[optim.name]
    for weight in weight_table(model):
        states = optimizer.matrix_states if weight.matrix else optimizer.vector_states
        states += weight.gathers  # the gradient gathered between two ticks of a slow level
        total += FP32 * states * weight.total / (tp if weight.sharded else 1)
    return total


def _kept_for_backward(config: RunConfig, on_gpu: bool) -> tuple[float, float, float]:
    """(memory states, activations, what Triton kernels need) in bytes per GPU."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, number = parallel.tensor_parallel, compute_bytes(training)
    tokens = training.micro_batch_size * (training.truncate_tokens or training.seq_length) / parallel.context_parallel
    tokens *= 1 + model.attention.memory_tokens_per_token
    residual = model.hidden_size / (tp if parallel.sequence_parallel else 1)
    layers = [
        _layer_bytes(model, mixer, training.seq_length, number, tp, residual, training.recompute, on_gpu)
        for mixer in model.mixers
    ]
    all_states, activations, beside = zip(*layers, strict=True)
    if training.recompute == "layer":
        # the input of every layer, and one layer at a time in full
        on_device = 1 if training.offload_activations else model.num_layers
        states, kept = max(all_states), on_device * number * residual
        inside = max(x + y for x, y in zip(activations, beside))
    else:
        states, kept, inside = sum(all_states), sum(activations), max(beside)
    # the logits and their gradient, before backward comes to the layers
    around = 2 * number * model.padded_vocab_size / tp * (2 if model.cms.learns_in_context else 1)
    everywhere = kept + max(around, inside) + _norm_bytes(model, number, residual)
    kernels = max(beside) if "memory" in model.mixers and on_gpu and runs_in_triton(model) else 0.0
    return tokens * states, tokens * (everywhere - kernels) + _fast_copies(config) / tp, tokens * kernels


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


def _layer_bytes(
    model: ModelConfig, mixer: str, seq_length: int, number: int, tp: int, residual: float, recompute: str, on_gpu: bool
) -> tuple[float, float, float]:
    """Of a layer in bytes per token: memory states, activations, and what its backward pass needs beside them."""
    H, d = model.num_heads / tp, model.head_dim
    states, widest = 0.0, max(level.hidden_size for level in model.cms.levels) / tp
    beside = number * (2 * widest * (2 if model.cms.activation == "swiglu" else 1) / 2 + 3 * model.hidden_size)
    activations = _norm_bytes(model, number, residual)
    if mixer == "memory" and on_gpu and runs_in_triton(model):
        activations += (
            (TRITON_KEPT_BYTES + TRITON_STATE_BYTES * model.memory_hidden / model.memory.chunk_tokens) * H * d
        )
        beside = TRITON_BESIDE_BYTES * H * d
    elif mixer == "memory":
        states, memories = _memory_bytes(model, seq_length)
        if recompute != "none":
            states, memories = _bounded(model, seq_length, states, memories)
        states, memories = H * states, H * memories
        streams = 3 * H * d * number * 3  # q, k, v: before the convolution, before and after its activation
        # the input of the output projection, and in float32 that of the head norm
        activations += memories + streams + (number + FP32) * H * d
    else:
        kv = (model.attention.num_kv_heads or model.num_heads) / tp
        activations += (
            number * d * ((H + 2 * kv) + (H + kv) + H) + FP32 * H
        )  # q, k, v; rotated q and k; the output; its sums
    for level in model.cms.levels:
        hidden = level.hidden_size / tp * (3 if model.cms.activation == "swiglu" else 2)
        activations += _norm_bytes(model, number, residual) + number * hidden
    return states, activations, beside


def runs_in_triton(model: ModelConfig) -> bool:
    """Whether GPUs run these memories in Triton kernels whose bytes were rehearsed."""
    memory = model.memory
    return _written_out(memory) and memory.kernel in ("auto", "triton") and memory.momentum == "none"


def _bounded(model: ModelConfig, seq_length: int, states: float, memories: float) -> tuple[float, float]:
    """Bytes per token when only the weights at segment borders stay, and one segment at a time is recomputed.

    The segment length is `memory.keep_every`, else about that of ops/memory/recompute.py: what makes the two equal.
    """
    periods = max(1.0, seq_length / model.memory.period)
    segment = model.memory.keep_every or max(1.0, (periods * states / memories) ** 0.5)
    segment = min(segment, periods)
    return states / segment, memories * segment / periods


def _norm_bytes(model: ModelConfig, number: int, residual: float) -> float:
    """A norm keeps its input, which is the sum before it; the linear layer after it keeps the whole output."""
    return number * (residual + model.hidden_size)


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
    if memory.weights == "softmax" and memory.read == "causal":  # every token's writes and weights
        numbers += 3 * (2 * d * h if deep else d * d)
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
