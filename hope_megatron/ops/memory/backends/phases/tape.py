"""What a segment's backward computes before its loop: the chunks again, all at once, and what their gradients are multiples of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.arithmetic import (
    Products,
    aten,
    d2silu,
    dot,
    dsilu,
    lower_solve_transposed,
)
from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.backends.phases.forward import Stream, Weights, read_memory
from hope_megatron.ops.memory.backends.phases.read import Read, ReadGradients, read_backward
from hope_megatron.ops.memory.backends.phases.tables import Consts, MomentumTables
from hope_megatron.ops.memory.backends.phases.write import (
    Generated,
    Inputs,
    Scratch,
    Written,
    bases,
    generate,
    given,
    learn,
)


class Tape(NamedTuple):
    """A segment of b chunks, computed again."""

    x: Tensor | None  # what the self-memories are applied to, [4, N, b, C, d]
    inputs: Inputs
    generated: Generated | None
    written: Written

    @property
    def kv(self) -> Tensor:
        """Keys and values, [N, b, 2, C, d]; a view."""
        return self.inputs.R[-1, :, :, :2, :, 0]


def record(form: Form, c: Consts | MomentumTables, p: Products, stream: Stream, weights: Weights, A: Tensor) -> Tape:
    """Phase `tape`: what all chunks of the segment wrote, from the weights at their starts."""
    (N, T, d), h = stream.k.shape, weights.out.size(-1)
    b, x, generated = T // form.C, None, None
    scratch = Scratch(form, N, b, d, h, stream.k)
    if form.generates:
        w_in = None if form.writes_in else weights.inner[:4]
        x, base, applied, z_x = bases(form, p, *stream[:4], A[:4], w_in)
        logs = base.new_empty(N, b, 2, form.C)
        inputs, generated = generate(form, c, p, base, applied, weights.out, weights.inner, scratch, logs)
        generated.z_x = generated.z_x if form.writes_in else z_x
    else:
        k, v = (x.unflatten(1, (b, form.C)) for x in (stream.k, stream.v))
        inputs = given(form, c, scratch, k, v, stream.log_rates(form.C))
    return Tape(x, inputs, generated, learn(form, p, inputs, weights.out, weights.inner, scratch))


class Reads(NamedTuple):
    """Gradients of M_mem's two reads."""

    inner: ReadGradients
    out: ReadGradients
    of_inner: tuple[Read, Tensor]  # the read, and the gradient of its y
    of_out: tuple[Read, Tensor]


def read_gradients(
    form: Form, c: Consts | MomentumTables, p: Products, q: Tensor, d_y: Tensor, tape: Tape, weights: Weights
) -> Reads:
    """q, d_y [N, b, C, d]."""
    t = tape.written
    inner, out = read_memory(
        form, c, p, q, tape.kv[:, :, 0].contiguous(), t.keys[-1], t.rows[-1], t.rows_in[-1], tape.inputs.logs, weights
    )
    found = read_backward(p, out, d_y)
    d_hidden = aten.silu_backward(found.x, inner.y)
    return Reads(read_backward(p, inner, d_hidden), found, (inner, d_hidden), (out, d_y))


class Coefficients:
    """What the loop multiplies with, all chunks at once; [n, N, b, ...] throughout."""

    def __init__(self, form: Form, p: Products, tape: Tape, weights: Weights):
        t, x = tape.written, tape.inputs
        self.target_by_sum = form.own and not (form.writes_in or form.scaled)
        self.f_prev, f_end, eta = x.tables.f[..., 1:2], x.tables.f[..., 2:], x.tables.eta
        A, V = weights.out[..., 0, :], weights.out[..., 1, :]
        self.V, self.W = V, t.W
        self.both = torch.cat([A, V], 3)  # [A; V] by rows, [n, N, b, 2 d, h]
        self.to_r = self._pairs(form.dgd_out, t.S, t.keys_end, eta)
        self.reached = _reached(t.rows, f_end)
        self.slope = dsilu(t.z[:, :, :, :2])  # silu' of z_k and z_v
        self.minus_E = None if x.tables.E is None else -x.tables.E
        self.phi_k = t.keys if t.nk is None else t.keys * t.nk
        self.W_in = weights.inner.unsqueeze(2) if not form.writes_in else None
        if form.dgd_out and form.targets and not form.l2:
            self.slope_keys = self.slope.clone()
            if form.unit_keys:
                self.slope_keys[:, :, :, 0] /= t.nk
        if form.targets:
            self._targets(form, t)
        if form.scaled:
            self._scale(form, t)
        self.drive_sums = _drive_sums(
            form.dgd_out, t.rows, t.r, eta, lambda: p.mm(t.keys_prev, V.mT), self._more(form, t, eta)
        )
        if form.writes_in:
            self._input_layer(form, p, tape, weights, f_end, eta)

    def _pairs(self, dgd: bool, S: Tensor | None, keys_end: Tensor, eta: Tensor) -> Tensor:
        """What makes rows (d_r, gamma_prev d_r) of dV^T: -S^-T Gamma_C keys, or -eta Gamma_C keys (and m_C, Theta_C: of dV, dS):
        [.., 2 C, parts h]."""
        once = lower_solve_transposed(S, keys_end).neg_() if dgd else keys_end * -eta
        second = once * self.f_prev if dgd else torch.zeros_like(once)
        return torch.stack([once, second], -2).flatten(-3, -2)

    def _more(self, form: Form, t: Written, eta: Tensor) -> list[Tensor]:
        """What d_r meets for <keys, d_keys> (unit keys; without what normalised steps add) and, where d_e is d_r, for
        <unit target, d_target>."""
        found = []
        if form.unit_keys:
            drive = t.e if t.scale is None else t.e * t.scale
            found.append((t.rows / eta).mul_(2).sub_(drive))
        if self.target_by_sum:
            found.append(torch.zeros_like(t.e))
            torch.mul(self.unit_target, self.factor[form.lead :], out=found[-1][form.lead :])
        return found

    def _targets(self, form: Form, t: Written) -> None:
        """d_target of d_e: -1 / norm, then the part along the unit target goes; -(1 - tanh^2) for scalar memories."""
        lead = form.lead
        self.factor = torch.empty_like(t.norm_target)
        torch.sub(t.target[:lead, ..., :1].square(), 1, out=self.factor[:lead])
        if form.own:
            torch.reciprocal(t.norm_target[lead:], out=self.factor[lead:]).neg_()
            self.unit_target = t.target[lead:] / t.norm_target[lead:]

    def _scale(self, form: Form, t: Written) -> None:
        """d_slope of d_scale, and what e and g_in get of d_slope: slope = <phi_k, keys> + |g_in|^2 / squared."""
        self.phi_keys = dot(self.phi_k, t.keys)
        self.of_slope = torch.where(t.slope > 1, -t.scale.square(), 0)
        if form.writes_in:
            self.of_g = 2 / t.squared
            self.of_e = -self.of_g * dot(t.g_in, t.g_in) / t.squared

    def _input_layer(self, form: Form, p: Products, tape: Tape, weights: Weights, f_end, eta) -> None:
        t, x, n = tape.written, tape.inputs, form.n
        A, V = weights.inner[..., 0, :], weights.inner[..., 1, :]
        self.W_in, self.V_in = A + V, V
        self.both_in = torch.cat([A, V], 3)
        k = x.R[form.lead :, :, :, 0, :, 0]
        once = self._pairs(form.dgd_in, t.S_in, x.k_end[0], eta)
        self.to_r_in = once.expand(n, *once.shape).contiguous()
        self.k = k.contiguous()
        self.reached_in = _reached(t.rows_in, f_end)
        self.drive_sums_in = _drive_sums(form.dgd_in, t.rows_in, t.r_in, eta, lambda: p.mm(self.k * self.f_prev, V.mT))
        self.bend = d2silu(t.z[:, :, :, 0]).mul_(t.delta)


def _reached(rows: Tensor, f_end: Tensor) -> Tensor:
    """Rows as they reach the chunk's end, times -1: in V, and in S. [n, N, b, C, parts o]."""
    return (rows.unsqueeze(-2) * -f_end.unsqueeze(-1)).flatten(-2)


def _drive_sums(dgd: bool, rows, r, eta, held, more: Sequence[Tensor] = ()) -> Tensor:
    """What d_r meets for e_t and f_t: rows / eta and gamma_prev V keys - r; without DGD r and -r; and more."""
    found = rows.new_empty(2 + len(more), *rows.shape)
    for place, x in zip(found[2:], more):
        place.copy_(x)
    if dgd:
        torch.div(rows, eta, out=found[0])
        torch.sub(held(), r, out=found[1])
    else:
        found[0] = r
        torch.neg(r, out=found[1])
    return found


def read_rows(S: Tensor | None, d_rows: Tensor, eta: Tensor) -> Tensor:
    """The part of d_r that reads give."""
    return d_rows * eta if S is None else lower_solve_transposed(S, d_rows)
