"""M_mem where a stream changes both of its layers, as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.triton.bank import launch as bank
from hope_megatron.ops.memory.backends.triton.bank import read
from hope_megatron.ops.memory.backends.triton.bank.launch import Layers, Made, Setting, System
from hope_megatron.ops.memory.backends.triton.fixed.read import read_backward_writes
from hope_megatron.ops.memory.backends.triton.launching import launch
from hope_megatron.ops.memory.backends.triton.sizes import Sizes, starts_of
from hope_megatron.ops.memory.backends.triton.sums import outer_sum


def _read_backward(
    d_y,
    q,
    made: Made,
    t: bank.Tape,
    system: System,
    starts: Layers,
    anchor: Layers,
    d_starts: Layers,
    s: Setting,
    z: Sizes,
    read_as,
):
    """Gradients that reads give: of q; to r, keys and r_in; of k and log alpha; of A2 and A. Fills `d_starts` but the last."""
    causal, _ = read_as
    like, dtype = made.k, s.scratch
    phi, d_z, d_q, d_log_alpha = (
        z.rows(z.h, like, dtype),
        z.rows(z.h, like, dtype),
        torch.empty_like(q),
        torch.empty_like(made.log_alpha),
    )
    launch(
        read.moving_read_backward, z.grid, d_y, q, made.k, t.keys, t.u_in, t.u, made.log_eta, made.log_alpha,
        starts.w_in, anchor.w_in, starts.vector, anchor.vector, phi, d_z, d_q, d_log_alpha, *z.counts, **z.tile,
        ANCHORED=s.anchored, CAUSAL=causal, SKIP=read_as[1], PRECISION=s.precision,
    )  # fmt: skip
    d_keys, d_r, d_k, d_r_in = (z.rows(width, like) for width in (z.h, z.d, z.d, z.h))
    tile_in = z.tile | dict(D=z.h, H=z.d)
    for grad, x, keys, u, inverse, d_keys_out, d_r_out, d_states, sizes, dgd in (
        (d_y, phi, t.keys, t.u, t.inverse, d_keys, d_r, d_starts.vector, z.tile, s.dgd),
        (d_z, q, made.k, t.u_in, system.inverse_in, d_k, d_r_in, d_starts.w_in, tile_in, s.dgd_in),
    ):
        launch(
            read_backward_writes, z.grid, grad, x, keys, u, made.log_eta, made.log_alpha, inverse, d_keys_out, d_r_out, d_states,
            *z.counts, **sizes, DGD=dgd, CAUSAL=causal, PRECISION=s.precision,
        )  # fmt: skip
    sums = (None, None)
    if s.anchored:
        sums = outer_sum((q, d_z), precision=s.precision), outer_sum((phi, d_y), precision=s.precision)
    return d_q, (d_r, d_keys, d_r_in), d_k, d_log_alpha, sums


class _MovingMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Setting, read_as: tuple[bool, bool], begins, *tensors: Tensor):
        q, made, first, anchor = tensors[0], Made(*tensors[1:5]), Layers(*tensors[5:8]), Layers(*tensors[8:])
        z = Sizes.of(q, first.vector.size(-2), s.rows)
        system = bank.system_of(made, s, z)
        starts = Layers(*(starts_of(w, z.chunks) for w in first))
        bank.chain(made, made, made[2:], made.k, system, starts, anchor, begins, s, z)
        t = bank.tape(made, starts, anchor, system, s, z)
        y = torch.empty_like(q)
        launch(
            read.moving_read, z.grid, q, made.k, t.keys, t.u_in, t.u, made.log_eta, made.log_alpha,
            starts.w_in, anchor.w_in, starts.vector, anchor.vector, y, *z.counts, **z.tile,
            ANCHORED=s.anchored, CAUSAL=read_as[0], SKIP=read_as[1], PRECISION=s.precision,
        )  # fmt: skip
        ctx.s, ctx.read_as, ctx.begins = s, read_as, begins
        ctx.save_for_backward(q, *made, *anchor, *starts)
        return y, *(w[:, -1].clone() for w in starts[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor, *grads: Tensor):
        s, begins, saved = ctx.s, ctx.begins, ctx.saved_tensors
        q, made, anchor, starts = saved[0], Made(*saved[1:5]), Layers(*saved[5:8]), Layers(*saved[8:])
        z = Sizes.of(q, starts.vector.size(-2), s.rows)
        system = bank.system_of(made, s, z)
        t = bank.tape(made, starts, anchor, system, s, z)
        d_starts = Layers(*map(torch.empty_like, starts))
        d_q, reads, d_k, d_log_alpha, sums = _read_backward(
            d_y.contiguous(), q, made, t, system, starts, anchor, d_starts, s, z, ctx.read_as
        )
        for d, end in zip(d_starts, grads):
            d[:, -1] = end
        d_made = Made(d_k, torch.zeros_like(made.v), torch.zeros_like(made.log_eta), d_log_alpha)
        found, d_first, _, _ = bank.chain_backward(
            made, made.k, made.k, made, made[2:], t, system, starts, anchor, reads, d_made, d_starts, begins, s, z, added=True
        )  # fmt: skip
        d_in, d_a = bank.weight_sums(made, made.k, made, t, found, None, s)
        d_anchor = (d_in + sums[0].unsqueeze(1), d_a + sums[1].unsqueeze(1)) if s.anchored else (None, None)
        return None, None, None, d_q, *d_made, d_first.w_in, d_first.vector, None, *d_anchor, None


def moving_memory(
    s: Setting, q: Tensor, made: Made, first: Layers, anchor: Layers, *, causal: bool, skip: bool, begins=None
):
    """Write and read M_mem along a piece of a stream.

    Args:
        q: unit queries [B, T, H, d], contiguous.
        made: what is written, at which rates.
        first, anchor, begins: as for `self_memories`, of one memory.
        causal, skip: whether reads see what the chunk wrote so far; whether y includes q.

    Returns:
        y [B, T, H, d]; V2 and V after the last token.
    """
    y, *ends = _MovingMemory.apply(s, (causal, skip), begins, q, *made, *first, *anchor)
    return y, ends
