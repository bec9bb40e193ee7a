"""The chunk form of HOPE's own memories with its backward written out.

The same numbers as chunk.py for one rule (`why_not`): five two-layer memories with common chunk borders, DGD on all layers, own
targets, no momentum. Autograd's tape of such a chunk is some 800 small operators; written out it is less than half, the triangular
inverse is reused where autograd would solve again, and backward can recompute a chunk without building a graph.

forward.py has a chunk's forward and what it keeps, backward.py its backward. backends/cpu/ has the same lines in C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.manual.backward import ChunkBackward
from hope_megatron.ops.memory.backends.manual.forward import Tape, end, read, write
from hope_megatron.ops.memory.backends.registry import Backend, Case, computes_in_full
from hope_megatron.ops.memory.inner import unit
from hope_megatron.ops.memory.layout import Group, Weights
from hope_megatron.ops.memory.recompute import segment_periods
from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule, why_not_hopes_own


def why_not(case: Case) -> str | None:
    """See `Backend.why_not`."""
    eta, alpha, theta = case.rates
    if (text := computes_in_full(case)) is not None:
        return text
    return why_not_hopes_own(case.rule, eta=eta, alpha=alpha, theta=theta)


def manual_scan(
    tensors: list[Tensor | None], rule: MemoryRule, groups: tuple[Group, ...],
    *, compute: MemoryCompute, recompute: bool,
) -> tuple[Tensor, tuple[Group, ...]]:  # fmt: skip
    """See `Backend.scan`. recompute: keep weights at segment borders only, else everything that backward needs."""
    (B, T, H, _), (group,) = tensors[0].shape, groups
    rows = [x.transpose(1, 2).flatten(0, 1) for x in tensors[:5]]
    segment_chunks = segment_periods(compute.keep_every, T, rule.chunk_tokens, groups) if recompute else None
    anchor = (None, None, None) if group.anchor is None else _memory_major(group.anchor, B * H)
    y, *weights = _ManualScan.apply(
        rule, segment_chunks, unit(rows[0]), *rows[1:], *_memory_major(group.now, B * H), *anchor
    )
    now = _head_major(Weights(*weights), B * H)
    return y.unflatten(0, (B, H)).transpose(1, 2), (group._replace(now=now, start=now),)


MANUAL = Backend("the backward written out (PyTorch)", "torch", why_not, manual_scan)


def _memory_major(w: Weights, N: int) -> Weights:
    """[N n, ...] -> [n N, ...]."""
    return Weights(*(x.unflatten(0, (N, -1)).transpose(0, 1).reshape(x.shape) for x in w))


def _head_major(w: Weights, N: int) -> Weights:
    """The inverse of `_memory_major`."""
    return Weights(*(x.unflatten(0, (-1, N)).transpose(0, 1).reshape(x.shape) for x in w))


class _ManualScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule, segment_chunks, q, x_k, x_v, eta, alpha, w_in, w_vector, w_scalar, *anchors):
        w, anchor, keeps = Weights(w_in, w_vector, w_scalar), _anchor(anchors), any(ctx.needs_input_grad)
        outputs: list[Tensor] = []
        kept: list[
            Tensor | None
        ] = []  # weights at segment borders if chunks are recomputed, else the tape of every chunk
        for i, x in enumerate(_chunks([q, x_k, x_v, eta, alpha], rule.chunk_tokens)):
            if keeps and segment_chunks is not None and i % segment_chunks == 0:
                kept += w
            y, tape = read(write(*x, w, anchor, rule), anchor, rule)
            w = end(tape, anchor)
            outputs.append(y)
            if keeps and segment_chunks is None:
                kept += _flatten(tape)
        ctx.rule, ctx.segment_chunks = rule, segment_chunks
        ctx.save_for_backward(q, x_k, x_v, eta, alpha, *anchors, *kept)
        return torch.cat(outputs, 1), *w

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor, *d_weights: Tensor):
        rule, d_w = ctx.rule, Weights(*d_weights)
        saved = ctx.saved_tensors  # once: under activation checkpointing every look unpacks anew
        inputs, d_ys = _chunks(saved[:5], rule.chunk_tokens), d_y.split(rule.chunk_tokens, 1)
        anchor, kept, segment = _anchor(saved[5:8]), saved[8:], ctx.segment_chunks or len(inputs)
        d_anchor = None if anchor is None else Weights(*map(torch.zeros_like, anchor))
        gradients = []
        for first in reversed(range(0, len(inputs), segment)):
            chunks = range(first, min(first + segment, len(inputs)))
            if ctx.segment_chunks is None:
                tapes = _unflatten(kept)
            else:
                w = Weights(*kept[3 * (first // segment) :][:3])
                tapes = _tapes([inputs[i] for i in chunks], w, anchor, rule)
            for i in reversed(chunks):
                d_inputs, d_w = ChunkBackward(tapes.pop(), anchor, d_anchor, rule).run(d_ys[i], d_w)
                gradients.append(d_inputs)
        joined = [torch.cat(column, 1) for column in zip(*reversed(gradients))]
        return None, None, *joined, *d_w, *(d_anchor or (None, None, None))


def _anchor(tensors) -> Weights | None:
    return None if tensors[0] is None else Weights(*tensors)


def _chunks(tensors, chunk: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(chunk, 1) for x in tensors)))


def _flatten(tape: Tape) -> list[Tensor | None]:
    return [*tape.w, *tape[1:]]


def _unflatten(tensors: tuple[Tensor | None, ...]) -> list[Tape]:
    size = len(Tape._fields) + len(Weights._fields) - 1
    starts = range(0, len(tensors), size)
    return [Tape(Weights(*tensors[i : i + 3]), *tensors[i + 3 : i + size]) for i in starts]


def _tapes(inputs: list[tuple[Tensor, ...]], w: Weights, anchor: Weights | None, rule: MemoryRule) -> list[Tape]:
    """Run a segment again for what its backward needs."""
    tapes: list[Tape] = []
    for x in inputs:
        w = end(tapes[-1], anchor) if tapes else w
        tapes.append(read(write(*x, w, anchor, rule), anchor, rule)[1])
    return tapes
