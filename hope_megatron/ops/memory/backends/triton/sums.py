"""Sums of outer products over the tokens of a stream: gradients of weights that no chunk changes."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.launching import kernel, launch


@kernel
def _outer(
    a0, b0, a1, b1, a2, b2, a3, b3,  # [B, T, H, P] and [B, T, H, Q]
    out,  # [splits, N, P, Q]
    T, HEADS, span,  # span: tokens of a split, a multiple of C
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split, n = tl.program_id(0), tl.program_id(1)
    found = tl.zeros([P, Q], tl.float32)
    for t in tl.range(split * span, tl.minimum(T, (split + 1) * span), C):
        at = ((n // HEADS).to(tl.int64) * T + t) * HEADS + n % HEADS
        left = p.columns(a0 + at * P, HEADS * P, C, P)
        found = p.add_mm(found, left, p.rows(b0 + at * Q, HEADS * Q, C, Q), PRECISION)
        if PAIRS > 1:
            left = p.columns(a1 + at * P, HEADS * P, C, P)
            found = p.add_mm(found, left, p.rows(b1 + at * Q, HEADS * Q, C, Q), PRECISION)
        if PAIRS > 2:
            left = p.columns(a2 + at * P, HEADS * P, C, P)
            found = p.add_mm(found, left, p.rows(b2 + at * Q, HEADS * Q, C, Q), PRECISION)
        if PAIRS > 3:
            left = p.columns(a3 + at * P, HEADS * P, C, P)
            found = p.add_mm(found, left, p.rows(b3 + at * Q, HEADS * Q, C, Q), PRECISION)
    p.store(out + (split.to(tl.int64) * tl.num_programs(1) + n) * P * Q, found, P, Q)


def outer_sum(*pairs: tuple[Tensor, Tensor], precision: str) -> Tensor:
    """sum_t a_t b_t^T over one to four pairs of [B, T, H, P] and [B, T, H, Q]: [B H, P, Q] in float32.

    T is a multiple of 16. Tokens are split among programs and the parts added up in a fixed order: the same bits every time.
    """
    (B, T, H, P), Q = pairs[0][0].shape, pairs[0][1].size(-1)
    block = min(64, T & -T)  # tokens of one product
    splits = max(1, min(8, T // (2 * block)))
    span = -(-T // (splits * block)) * block
    out = pairs[0][0].new_empty(splits, B * H, P, Q, dtype=torch.float32)
    operands = [x for pair in pairs for x in pair]
    operands += operands[:2] * (4 - len(pairs))
    sizes = dict(C=block, P=P, Q=Q, PAIRS=len(pairs), PRECISION=precision)
    launch(_outer, (splits, B * H), *operands, out, T, H, span, **sizes)
    return out.sum(0) if splits > 1 else out[0]
