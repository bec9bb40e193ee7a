"""The self-memories M_k, M_v, M_eta, M_alpha as one differentiable function: from inputs to keys, values and rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.triton.bank import backward as back
from hope_megatron.ops.memory.backends.triton.bank import launch as bank
from hope_megatron.ops.memory.backends.triton.bank.launch import Layers, Made, Setting
from hope_megatron.ops.memory.backends.triton.launching import launch
from hope_megatron.ops.memory.backends.triton.sizes import Sizes, starts_of


class _SelfMemories(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Setting, begins, *tensors: Tensor):
        x, first, anchor = tensors[:4], Layers(*tensors[4:7]), Layers(*tensors[7:])
        z = Sizes.of(x[0], first.vector.size(-2), s.rows)
        made, norms = Made(*map(torch.empty_like, x)), tuple(map(torch.empty_like, x[2:]))
        w_in = starts_of(first.w_in, z.chunks) if s.moving else first.w_in
        starts = Layers(w_in, starts_of(first.vector, z.chunks), starts_of(first.scalar, z.chunks))
        phi_x = x[0] if s.moving else bank.input_features(x[0], x[1], starts, anchor, s, z, slope=False)[0]
        bank.chain(x, made, norms, phi_x, bank.chain_scratch(made, s, z), starts, anchor, begins, s, z)
        ctx.s, ctx.begins = s, begins
        ctx.save_for_backward(*x, *anchor, *made, *norms, *starts)
        changed = starts[0 if s.moving else 1 :]
        return *made, *(w[:, -1].clone() for w in changed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        s, begins, saved = ctx.s, ctx.begins, ctx.saved_tensors
        x, anchor, made, norms = saved[:4], Layers(*saved[4:7]), Made(*saved[7:11]), saved[11:13]
        starts = Layers(*saved[13:])
        z = Sizes.of(x[0], starts.vector.size(-2), s.rows)
        phi_x, slope_x = bank.input_features(x[0], x[1], starts, anchor, s, z, slope=True)
        system = bank.system_of(made, s, z)
        t = bank.tape(made, starts, anchor, system, s, z)

        d_made = Made(*(g.float().clone(memory_format=torch.contiguous_format) for g in grads[:4]))
        changed = starts[0 if s.moving else 1 :]
        d_changed = [torch.empty_like(w) for w in changed]
        for d, end in zip(d_changed, grads[4:]):
            d[:, -1] = end
        d_starts = Layers(*d_changed) if s.moving else Layers(d_changed[0][:0], *d_changed)
        found, d_first, d_raw, d_a_scalar = bank.chain_backward(
            x, phi_x, slope_x, made, norms, t, system, starts, anchor, None, d_made, d_starts, begins, s, z, added=False
        )
        d_x_k, d_x_v = torch.empty_like(x[0]), torch.empty_like(x[1])
        launch(
            back.input_gradients, z.grid, x[0], x[1], slope_x, found.d_z_x, *d_raw,
            starts.w_in, anchor.w_in, starts.vector, anchor.vector, starts.scalar, anchor.scalar, d_x_k, d_x_v,
            *z.counts, z.plane, **z.tile, KEY=s.key, VALUE=s.value, ETA=s.eta, ALPHA=s.alpha, NV=s.num_vector, NS=s.num_scalar,
            MOVING=s.moving, ANCHORED=s.anchored, PRECISION=s.precision,
        )  # fmt: skip
        d_in, d_a_vector = bank.weight_sums(x, phi_x, made, t, found, d_raw, s)
        d_w_in, d_a_in = (d_first.w_in, d_in) if s.moving else (d_in, None)
        d_anchor = (d_a_in, d_a_vector, d_a_scalar) if s.anchored else (None, None, None)
        return None, None, d_x_k, d_x_v, d_raw[2], d_raw[3], d_w_in, d_first.vector, d_first.scalar, *d_anchor


def self_memories(s: Setting, x: list[Tensor], first: Layers, anchor: Layers, begins: Tensor | None = None):
    """Make keys, values and rates along a piece of a stream, and write the memories that make them.

    Args:
        x: x_k, x_v [B, T, H, d]; logits of eta and alpha [B, T, H], or log rates where no memory makes them. Contiguous.
        first: the weights at the start; V = W - A of output layers (moving: of both).
        anchor: A; not anchored: anything.
        begins: where streams start anew from `first`, [N, chunks + 1] int8, the last column 0; None: nowhere.

    Returns:
        `Made`; the changed layers after the last token: `Layers` without w_in if not moving.
    """
    found = _SelfMemories.apply(s, begins, *x, *first, *anchor)
    return Made(*found[:4]), found[4:]
