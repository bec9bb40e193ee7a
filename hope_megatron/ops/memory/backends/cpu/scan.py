"""The memory operator of backends/manual as compiled code for CPUs: one head of one sequence at a time, in the caches.

PyTorch's operators pass every intermediate of every head through memory, and on small products their calls cost more than
the work. Here a thread takes a head from the first chunk to the last. Nothing of a chunk is kept for backward but its weights
at the start, and those only every few chunks; backward computes a chunk again while it is in the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.cpu.calls import Settings, call_backward, call_forward, why_not_sizes
from hope_megatron.ops.memory.backends.cpu.compiling import NoKernel, library
from hope_megatron.ops.memory.backends.registry import Backend, Case, computes_in_full
from hope_megatron.ops.memory.layout import Group, Weights
from hope_megatron.ops.memory.recompute import segment_periods
from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule, why_not_hopes_own

_KEPT_EVERY_TOKENS = 32
"""Weights are kept no more often: with chunks of a token they would outweigh everything else."""


def why_not(case: Case) -> str | None:
    """See `Backend.why_not`: HOPE's own rule in float32 on a CPU, widths in multiples of 16, and a compiler."""
    if case.device != "cpu":
        return f"it is compiled for CPUs, not for {case.device}"
    if case.dtype != torch.float32:
        return f"it computes in float32, not in {str(case.dtype).removeprefix('torch.')}"
    if (text := computes_in_full(case)) is not None:
        return text
    if not case.plain:
        return "the tensors have no memory that compiled code could read"
    if (text := why_not_sizes(case.d, case.h, case.rule.chunk_tokens)) is not None:
        return text
    eta, alpha, theta = case.rates
    if (text := why_not_hopes_own(case.rule, eta=eta, alpha=alpha, theta=theta)) is not None:
        return text
    try:
        library()
    except NoKernel as reason:
        return str(reason)
    return None


def cpu_scan(
    tensors: list[Tensor | None], rule: MemoryRule, groups: tuple[Group, ...],
    *, compute: MemoryCompute, recompute: bool,
) -> tuple[Tensor, tuple[Group, ...]]:  # fmt: skip
    """See `Backend.scan`; nothing is transposed. recompute: keep weights every segment, else every 32 tokens or every chunk."""
    (B, T, H, d), (group,) = tensors[0].shape, groups
    segment_chunks, h = max(1, _KEPT_EVERY_TOKENS // rule.chunk_tokens), group.now.w_in.size(1)
    if recompute or compute.keep_every:
        segment_chunks = segment_periods(compute.keep_every, T, rule.chunk_tokens, groups)
    settings = Settings(
        sequences=B, heads=H, tokens=T, d=d, h=h, chunk=rule.chunk_tokens,
        segment_chunks=segment_chunks, residual=rule.dot_target == "residual",
        read_skip=rule.read_skip, anchored=group.anchor is not None, writes_in=rule.writes_input, eta_max=rule.eta_max,
    )  # fmt: skip
    anchor = None if group.anchor is None else _pack(group.anchor, B * H)
    y, packed = _CompiledScan.apply(settings, *tensors[:5], _pack(group.now, B * H), anchor)
    now = _unpack(packed, group.now)
    return y, (group._replace(now=now, start=now),)


CPU = Backend("the kernel compiled for this CPU", "cpu", why_not, cpu_scan)


def _pack(w: Weights, N: int) -> Tensor:
    """All weights of a stream in one row: [N, S], in the order of chunk.h."""
    return torch.cat([x.reshape(N, -1) for x in w], 1)


def _unpack(packed: Tensor, like: Weights) -> Weights:
    parts = packed.split([x.numel() // len(packed) for x in like], 1)
    return Weights(*(part.reshape(x.shape) for part, x in zip(parts, like)))


class _CompiledScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: Tensor | None):
        *inputs, w, anchor = (None if x is None else x.contiguous() for x in tensors)
        w, y, kept = w.clone(), torch.empty_like(inputs[0]), None
        if any(ctx.needs_input_grad):
            kept = w.new_empty(settings.segments, *w.shape)
        call_forward(settings, *inputs, anchor, y, w, kept)
        ctx.settings = settings
        ctx.save_for_backward(*inputs, anchor, kept)
        return y, w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_w: Tensor):
        *inputs, anchor, kept = ctx.saved_tensors
        d_inputs = [torch.empty_like(x) for x in inputs]
        d_w = d_w.clone(memory_format=torch.contiguous_format)
        d_anchor = None if anchor is None else torch.zeros_like(anchor)
        call_backward(ctx.settings, *inputs, anchor, kept, d_y.contiguous(), *d_inputs, d_w, d_anchor)
        return None, *d_inputs, d_w, d_anchor
