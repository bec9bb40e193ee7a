"""The memory operator of fused.py as compiled code for CPUs: one head of one sequence at a time, in the caches.

PyTorch's operators pass every intermediate of every head through memory, and on small products their calls cost more than
the work. Here a thread takes a head from the first chunk to the last. Nothing of a chunk is kept for backward but its weights
at the start, and those only every few chunks; backward computes a chunk again while it is in the caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hope_megatron.ops.memory.bounded import default_segment_tokens
from hope_megatron.ops.memory.layout import Group, Weights
from hope_megatron.ops.memory.native.build import library
from hope_megatron.ops.memory.types import MemoryRule

_LANES = 16
"""Widths are multiples of this: what the kernel's vectors and tables need."""

_KEPT_EVERY_TOKENS = 32
"""Weights are kept no more often: with chunks of a token they would outweigh everything else."""


class _Shape(ctypes.Structure):
    """`Shape` of chunk.h."""

    _fields_ = (
        *[
            (name, ctypes.c_int32)
            for name in ("sequences", "heads", "tokens", "d", "h", "chunk", "segment_chunks", "threads")
        ],
        *[(name, ctypes.c_int32) for name in ("residual", "read_skip", "anchored", "writes_in")],
        ("eta_max", ctypes.c_float),
    )


def fits(tensors: list[Tensor], group: Group) -> bool:
    """Whether the kernel can take these: float32 on the CPU, widths in multiples of 16, and a kernel to be had."""
    q, w_in = tensors[0], group.now.w_in
    plain = q.device.type == "cpu" and q.dtype == torch.float32 and type(q) in (Tensor, torch.nn.Parameter)
    return plain and not any(width % _LANES for width in w_in.shape[1:]) and library() is not None


def native_scan(
    tensors: list[Tensor], rule: MemoryRule, group: Group, *, recompute: bool, segment_tokens: int | None
) -> tuple[Tensor, Group]:
    """As `fused_scan`, on tensors as memory_chunked takes them: nothing is transposed.

    Args:
        tensors: q, x_k, x_v [B, T, H, d], logits of eta and alpha [B, T, H]; T a multiple of the chunk.
        recompute: keep weights every segment, else every 32 tokens or every chunk.
        segment_tokens: see chunk.py.

    Returns:
        y [B, T, H, d], and the group after the last token.
    """
    B, T, H, _ = tensors[0].shape
    tokens = _KEPT_EVERY_TOKENS
    if recompute:
        tokens = segment_tokens or default_segment_tokens(T, rule.chunk_tokens, (group,))
    segment_chunks = max(1, tokens // rule.chunk_tokens)
    anchor = None if group.anchor is None else _pack(group.anchor, B * H)
    packed = _pack(group.now, B * H)
    y, packed = _NativeScan.apply(rule, segment_chunks, group.now.w_in.shape[1], *tensors, packed, anchor)
    now = _unpack(packed, group.now)
    return y, group._replace(now=now, start=now)


def _pack(w: Weights, N: int) -> Tensor:
    """All weights of a stream in one row: [N, S], in the order of chunk.h."""
    return torch.cat([x.reshape(N, -1) for x in w], 1)


def _unpack(packed: Tensor, like: Weights) -> Weights:
    parts = packed.split([x.numel() // len(packed) for x in like], 1)
    return Weights(*(part.reshape(x.shape) for part, x in zip(parts, like)))


class _NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: MemoryRule, segment_chunks: int, h: int, *tensors: Tensor | None):
        *inputs, w, anchor = (None if x is None else x.contiguous() for x in tensors)
        (B, T, H, d), kept = inputs[0].shape, None
        shape = _Shape(
            B, H, T, d, h, rule.chunk_tokens, segment_chunks, 1,
            rule.dot_target == "residual", rule.read_skip, anchor is not None, rule.written_layers == "all", rule.eta_max,
        )  # fmt: skip
        w, y = w.clone(), torch.empty_like(inputs[0])
        if any(ctx.needs_input_grad):
            kept = w.new_empty(-(-T // (rule.chunk_tokens * segment_chunks)), *w.shape)
        _call(library().hope_memory_forward, shape, [*inputs, anchor, y, w, kept])
        ctx.shape = shape
        ctx.save_for_backward(*inputs, anchor, kept)
        return y, w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor, d_w: Tensor):
        *inputs, anchor, kept = ctx.saved_tensors
        d_inputs = [torch.empty_like(x) for x in inputs]
        d_w = d_w.clone(memory_format=torch.contiguous_format)
        d_anchor = None if anchor is None else torch.zeros_like(anchor)
        found = [*inputs, anchor, kept, d_y.contiguous(), *d_inputs, d_w, d_anchor]
        _call(library().hope_memory_backward, ctx.shape, found)
        return None, None, None, *d_inputs, d_w, d_anchor


def _call(function: Callable[..., None], shape: _Shape, tensors: list[Tensor | None]) -> None:
    """Run on as many threads as PyTorch has: the kernel resolves OpenMP to the runtime that PyTorch brought along."""
    shape.threads = torch.get_num_threads()
    function(ctypes.byref(shape), *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors))
