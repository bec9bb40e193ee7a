"""The chunk form in bounded memory: forward keeps the weights at segment borders only, backward recomputes segment by segment.

A segment is a few periods of the chunk form. What autograd would keep of every chunk (features, inverses, rows, weights) then
lives for one segment at a time. Gradients are those of the plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hope_megatron.ops.memory.layout import Group, Weights
from hope_megatron.ops.memory.rule import MemoryRule

Scan = Callable[..., tuple[Tensor, tuple[Group, ...]]]
"""(tensors [N, T, ...], rule, groups, position) -> y [N, T, d], groups."""

# Floats that autograd keeps per chunk, memory and head, counted on two-layer memories with DGD on all layers: about this many
# [C, h] and [C, C] tensors. A rough figure suffices: the segment length goes with its root.
_KEPT_ROWS, _KEPT_SQUARES = 14, 4


def segment_periods(keep_every: int | None, num_tokens: int, period: int, groups: tuple[Group, ...]) -> int:
    """Periods per segment: `MemoryCompute.keep_every`, or what minimises kept weights plus one segment's activations."""
    if keep_every is not None:
        return keep_every
    state = activations = 0
    for group in groups:
        w = group.now.w_in if group.now.w_in is not None else group.now.w_vector
        h = w.size(-2)
        state += sum(x[: group.n].numel() for x in group.now if x is not None)
        activations += group.n * (_KEPT_ROWS * period * h + _KEPT_SQUARES * period * period)
    periods = math.sqrt(max(1, num_tokens / period) * state / activations)
    return max(1, round(periods))


def recomputed_scan(
    scan: Scan,
    tensors: list[Tensor | None],
    rule: MemoryRule,
    groups: tuple[Group, ...],
    position: int,
    segment_tokens: int,
) -> tuple[Tensor, tuple[Group, ...]]:
    """`scan`, with at most one segment of activations alive. `position` must be at a border of the period."""
    weights = _flatten(groups)
    y, *end = _RecomputedScan.apply(scan, rule, groups, position, segment_tokens, len(tensors), *tensors, *weights)
    return y, _rebuild(end, groups)


class _RecomputedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scan: Scan, rule, groups, position, segment_tokens, num_inputs, *arguments: Tensor | None):
        inputs, weights = arguments[:num_inputs], list(arguments[num_inputs:])
        kept, outputs = [], []
        at = position
        for piece in _segments(inputs, segment_tokens):
            kept += weights
            y, end = scan(piece, rule, _rebuild(weights, groups), at)
            at += y.size(1)
            weights = _flatten(end)
            outputs.append(y)
        ctx.save_for_backward(*inputs, *kept)
        ctx.scan, ctx.rule, ctx.template = scan, rule, _shape_of(groups)
        ctx.position, ctx.segment_tokens, ctx.num_inputs = position, segment_tokens, num_inputs
        return torch.cat(outputs, 1), *weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *grad_weights: Tensor):
        saved, n = ctx.saved_tensors, ctx.num_inputs
        pieces = _segments(saved[:n], ctx.segment_tokens)
        kept, per_segment = saved[n:], (len(saved) - n) // len(pieces)
        grad_pieces = grad_y.split([next(x for x in piece if x is not None).size(1) for piece in pieces], 1)
        gradients: list[tuple[Tensor | None, ...]] = []
        grads_end = list(grad_weights)
        for i in reversed(range(len(pieces))):
            weights = kept[i * per_segment : (i + 1) * per_segment]
            leaves = [None if x is None else x.detach().requires_grad_() for x in (*pieces[i], *weights)]
            with torch.enable_grad():
                at = ctx.position + i * ctx.segment_tokens
                y, end = ctx.scan(leaves[:n], ctx.rule, _rebuild(leaves[n:], ctx.template), at)
            present = [x for x in leaves if x is not None]
            found = iter(
                torch.autograd.grad([y, *_flatten(end)], present, [grad_pieces[i], *grads_end], allow_unused=True)
            )
            grads = [None if x is None else next(found) for x in leaves]
            gradients.append(tuple(grads[:n]))
            grads_end = [torch.zeros_like(w) if g is None else g for g, w in zip(grads[n:], weights)]
        joined = [_join(column) for column in zip(*reversed(gradients))]
        return None, None, None, None, None, None, *joined, *grads_end


def _segments(tensors, segment_tokens: int) -> list[tuple[Tensor | None, ...]]:
    cuts = [None if x is None else x.split(segment_tokens, 1) for x in tensors]
    count = len(next(c for c in cuts if c is not None))
    return [tuple(None if c is None else c[i] for c in cuts) for i in range(count)]


def _join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts, 1)


def _flatten(groups: tuple[Group, ...]) -> list[Tensor]:
    """The tensors of groups at a border, where `start` will be replaced by `now`."""
    trees = [tree for group in groups for tree in (group.now, group.speed, group.anchor) if tree is not None]
    return [x for tree in trees for x in tree if x is not None]


def _rebuild(tensors: list[Tensor], groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Groups like `groups` with the weights of `_flatten`."""
    values = iter(tensors)

    def weights(like: Weights | None) -> Weights | None:
        return None if like is None else Weights(*(None if x is None else next(values) for x in like))

    rebuilt = []
    for group in groups:
        now = weights(group.now)
        speed, anchor = weights(group.speed), weights(group.anchor)
        rebuilt.append(group._replace(now=now, start=now, speed=speed, anchor=anchor))
    return tuple(rebuilt)


def _shape_of(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The structure of groups without their tensors, so that keeping it keeps no memory."""
    mark = lambda tree: None if tree is None else Weights(*(None if x is None else True for x in tree))  # noqa: E731
    return tuple(
        g._replace(now=mark(g.now), start=mark(g.now), speed=mark(g.speed), anchor=mark(g.anchor)) for g in groups
    )
