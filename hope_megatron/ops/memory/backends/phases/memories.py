"""Memories in a loop over chunks as one function of autograd: forward keeps chunk starts, backward goes segment by segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.arithmetic import Products
from hope_megatron.ops.memory.backends.phases.backward import Gradients, Outside, SegmentBackward
from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.backends.phases.forward import Kept, Stream, Weights, again, loop, read_memory
from hope_megatron.ops.memory.backends.phases.plan import Plan
from hope_megatron.ops.memory.backends.phases.tables import tables_of


class Memories(torch.autograd.Function):
    """(form, plan, q, k, v, eta, alpha, theta, V, w_in, A, A_in) -> (y, k, v, logs, V, V_in) after the last chunk.

    q [N, T, d] unit, None without M_mem. k, v, eta, alpha, theta: see `Stream`. V (with momentum V and S) [n, N, parts, d, h],
    A [n, N, d, h]; w_in: the same of the input layers where they are written, [n, N, parts, h, d] (and A_in their A), else W2,
    [n, N, h, d]. y [N, T, d] or None; k, v [N, T, d] and logs [N, b, 2, C] as the self-memories made them, None without; V_in
    None where W2 is not written.
    """

    @staticmethod
    def forward(ctx: Any, form: Form, plan: Plan, q, k, v, eta, alpha, theta, V, w_in, A, A_in):
        stream, p, c = Stream(k, v, eta, alpha, theta), Products(form.low), tables_of(form, k)
        weights = Weights(form, V, w_in, A, A_in, k.size(1) // form.C)
        passed = loop(form, c, p, stream, weights, A)
        y, made = None, (None, None, None)
        if form.mem:
            keys, _, logs = passed.inputs
            q4 = q.unflatten(1, (-1, form.C))
            y = read_memory(form, c, p, q4, keys, None, passed.rows, passed.rows_in, logs, weights)[1].y.flatten(1, 2)
        elif form.generates:
            made = (passed.inputs[0].flatten(1, 2), passed.inputs[1].flatten(1, 2), passed.inputs[2])
        ctx.form, ctx.plan = form, plan
        kept = weights.kept(plan.keep_every)
        ctx.save_for_backward(q, *stream, w_in if not form.writes_in else None, A, A_in, *kept)
        end = lambda x: None if x is None else x.squeeze(2).transpose(2, 3).contiguous()  # noqa: E731
        return y, *made, end(weights.out_end), end(weights.inner_end)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y, d_k, d_v, d_logs, d_V, d_V_in):
        form, plan, C = ctx.form, ctx.plan, ctx.form.C
        q, k, v, eta, alpha, theta, w_in, A, A_in, *kept = ctx.saved_tensors
        stream, p, c, b = Stream(k, v, eta, alpha, theta), Products(form.low), tables_of(form, k), k.size(1) // C
        cut = lambda x, s: None if x is None else x.unflatten(1, (-1, C))[:, s].contiguous()  # noqa: E731
        found: list[Gradients] = []
        for first in reversed(range(0, b, plan.segment)):
            chunks = slice(first, min(first + plan.segment, b))
            part = stream.chunks(C, chunks.start, chunks.stop)
            weights = again(form, c, p, part, w_in, A, A_in, Kept(*kept), plan.keep_every, first)
            made = (cut(d_k, chunks), cut(d_v, chunks), None if d_logs is None else d_logs[:, chunks])
            outside = Outside(cut(d_y, chunks), *made, d_V, d_V_in)
            found.append(SegmentBackward(form, c, p, part, cut(q, chunks), weights, A).run(outside))
            d_V, d_V_in = found[-1].V, found[-1].V_in if form.writes_in else None
        return None, None, *_joined(form, found[::-1])


def _joined(form: Form, found: list[Gradients]) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `forward` from those of the segments, in the order of the stream."""
    whole = lambda parts: None if parts[0] is None else torch.cat(parts, 1).flatten(1, 2)  # noqa: E731
    inputs = [whole(parts) for parts in zip(*(g[:6] for g in found))]
    total = lambda parts: parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)  # noqa: E731
    d_A = total([g.A for g in found])
    if form.writes_in:
        return *inputs, found[0].V, found[0].V_in, d_A, total([g.A_in for g in found])
    return *inputs, found[0].V, total([g.V_in for g in found]), d_A, None
