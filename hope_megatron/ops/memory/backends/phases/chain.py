"""M_mem where its input layer stays as it is, or where it has none: features depend on no state, so the loop is short.

One memory, N = B H streams, b chunks of C tokens; keys kappa and features phi_k, phi_q, phi_v are known for all chunks. With
V = W - A every rule says (c: of normalised steps, or 1 / alpha where retention scales what is erased; terms in brackets are
there where the rule has them)

    r = c (base + [W phi_k] - target) + [A kappa + gamma_prev V kappa]        base: [k] - [v, where targets are not own]
    rows = S^-1 r under DGD, else eta r                                       V_C = gamma_C V - rows^T (Gamma_C kappa)

so that with K3 = S^-T (Gamma_C kappa), or eta Gamma_C kappa, and x = [c phi_k] + [gamma_prev kappa], r = r_0 + V x - [c target],

    V_C = V M + Z + [target^T (c K3)]        M = gamma_C - x^T K3        Z = -r_0^T K3

Without own targets the loop is one product a chunk. With them target = unit(v + W phi_v), five operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.arithmetic import (
    EXACT,
    Products,
    aten,
    dot,
    length,
    lower_solve,
    lower_solve_transposed,
)
from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.backends.phases.read import Read, read, read_backward
from hope_megatron.ops.memory.backends.phases.tables import Consts, Tables, tables_of


class Prepared(NamedTuple):
    """Phase `prepare`: all that depends on no changing weights. [N, b, ...]."""

    x: Tensor  # k, v, q: [.., 3, C, d]
    z: Tensor | None  # their pre-activations, [.., 3, C, h]
    phi: Tensor  # features [.., 3, C, h]; without an input layer x itself
    nk: Tensor | None
    keys: Tensor
    keys_prev: Tensor
    keys_end: Tensor
    tables: Tables
    A: Tensor  # [.., d, h]
    scale: Tensor | None  # c, [.., C, 1]
    slope: Tensor | None
    of_V: Tensor | None  # x above, [.., C, h]; None: r does not depend on V
    S: Tensor | None
    K3: Tensor
    r0: Tensor  # [.., C, d]
    target0: Tensor | None  # v + A phi_v
    M: Tensor  # [.., h, h]
    Z: Tensor  # [.., d, h]


def prepare(form: Form, c: Consts, p: Products, q, k, v, logs, w_in: Tensor | None, A: Tensor) -> Prepared:
    """q, k, v [N, b, C, d]; logs [N, b, 2, C]; w_in [N, h, d] or None; A [N, d, h]."""
    N, b, C, d = q.shape
    h = A.size(-1)
    x, z, nk = torch.stack([k, v, q], 2), None, None
    if w_in is None:
        phi = x
    else:
        z = p.mm(x.view(N, b * 3 * C, d), w_in.mT).view(N, b, 3, C, h)
        phi = F.silu(z)
    tables, phi_k, factors = c.write(logs), phi[:, :, 0], None
    factors = tables.f.unsqueeze(-1)
    if form.unit_keys:
        nk = length(phi_k)
        factors = factors / nk.unsqueeze(-1)
    keys, keys_prev, keys_end = (phi_k.unsqueeze(-2) * factors).unbind(-2)
    A_b = A.unsqueeze(1).expand(N, b, d, h).contiguous()
    scale = slope = None
    if form.scaled:
        slope = dot(phi_k, keys)
        scale = slope.clamp(min=1.0).reciprocal()
    elif form.erased:  # rows (1 / (alpha eta) + ...) = A kappa + gamma_prev V kappa + e / alpha
        scale = torch.exp(-logs[:, :, 1]).unsqueeze(-1)
    S = torch.addcmul(tables.D, EXACT.mm(keys, keys.mT), tables.E) if form.dgd_out else None
    K3 = keys_end * tables.eta if S is None else lower_solve_transposed(S, keys_end)
    r0, of_V, target0 = _right_side(form, p, x, phi, keys, keys_prev, A_b, scale)
    M = (tables.end.unsqueeze(-1) * torch.eye(h, dtype=q.dtype, device=q.device)).contiguous()
    if of_V is not None:
        p.add(M, of_V.mT, K3, alpha=-1)
    Z = p.mm(r0.mT, K3).neg_()
    return Prepared(x, z, phi, nk, keys, keys_prev, keys_end, tables, A_b, scale, slope, of_V, S, K3, r0, target0, M, Z)


def _right_side(
    form: Form, p: Products, x, phi, keys, keys_prev, A, scale
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """r_0, what V is applied to in r, and what own targets have of v and A."""
    k, v = x[:, :, 0], x[:, :, 1]
    base = k if form.residual else torch.zeros_like(k)
    base = base if form.own else base - v
    of_V = None
    if form.l2:
        base, of_V = p.mm(phi[:, :, 0].contiguous(), A.mT, base), phi[:, :, 0]
    if scale is not None:
        base, of_V = base * scale, None if of_V is None else of_V * scale
    if form.dgd_out:
        base, of_V = p.mm(keys, A.mT, base), keys_prev if of_V is None else of_V + keys_prev
    target0 = p.mm(phi[:, :, 1].contiguous(), A.mT, v) if form.own else None
    return base, of_V, target0


class Chain(torch.autograd.Function):
    """(form, plan, q, k, v, logs, V, w_in, A) -> (y, V) after the last chunk.

    q, k, v, y [N, b, C, d]; logs [N, b, 2, C] log-rates; w_in [N, h, d] or None; V, A [N, d, h].
    """

    @staticmethod
    def forward(ctx: Any, form: Form, plan, q, k, v, logs, V, w_in, A):
        p, c = Products(form.low), tables_of(form, q)
        ready = prepare(form, c, p, q, k, v, logs, w_in, A)
        starts, end = advance(form, p, ready, V)
        y = _written(form, c, p, ready, starts, logs).read.y
        ctx.form, ctx.plan = form, plan
        ctx.save_for_backward(q, k, v, logs, w_in, A, starts[:, :: plan.keep_every].contiguous(), end)
        return y, end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y, d_V):
        form, plan = ctx.form, ctx.plan
        q, k, v, logs, w_in, A, kept, end = ctx.saved_tensors
        p, c = Products(form.low), tables_of(form, q)
        b, inputs, weights = q.size(1), [], []
        for first in reversed(range(0, b, plan.segment)):
            chunks = slice(first, min(first + plan.segment, b))
            part = [x[:, chunks].contiguous() for x in (q, k, v, logs)]
            ready = prepare(form, c, p, *part, w_in, A)
            starts = _again(form, p, ready, kept, plan.keep_every, first)
            segment = _SegmentBackward(form, c, p, ready, part[3], starts, end, w_in, d_y[:, chunks].contiguous(), d_V)
            *d_inputs, d_V, d_w_in, d_A = segment.run()
            inputs.append(d_inputs)
            weights.append((d_w_in, d_A))
            end = starts[:, 0]
        joined = [torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*reversed(inputs))]
        d_w_in, d_A = (None if parts[0] is None else sum(parts[1:], parts[0]) for parts in zip(*weights))
        return None, None, *joined, d_V, d_w_in, d_A


def advance(form: Form, p: Products, ready: Prepared, V: Tensor) -> tuple[Tensor, Tensor]:
    """Phase `chain`: V at the start of every chunk [N, b, d, h], and after the last one [N, d, h]."""
    (N, b, d, h), C = ready.Z.shape, form.C
    room, end = V.new_empty(N, b, d, h + C * form.own), V.new_empty(N, d, h)  # [V | target^T]
    starts = room[..., :h]
    starts[:, 0], starts[:, 1:], end[:] = V, ready.Z[:, :-1], ready.Z[:, -1]
    moves, target = ready.M, None
    if form.own:
        moves = torch.cat([ready.M, ready.K3 if ready.scale is None else ready.K3 * ready.scale], 2)
        target = ready.target0.clone()
        phi_v = ready.phi[:, :, 1]
    for i in range(b):
        if form.own:
            p.add(target[:, i], phi_v[:, i], starts[:, i].mT)
            torch.div(target[:, i], length(target[:, i]), out=room[:, i, :, h:].mT)
        p.add(starts[:, i + 1] if i + 1 < b else end, room[:, i], moves[:, i])
    return starts.contiguous() if form.own else starts, end


def _again(form: Form, p: Products, ready: Prepared, kept: Tensor, every: int, first: int) -> Tensor:
    """V at the start of every chunk of a segment that begins with chunk `first`, a kept one: [N, b, d, h]."""
    N, b, begin = ready.Z.size(0), ready.Z.size(1), first // every
    if every == 1:
        return kept[:, begin : begin + b].contiguous()
    found = []
    for m, chunks in ((b // every, every), (1, b % every)):
        if m and chunks:
            at = len(found) * (b // every)
            span = slice(at * every, at * every + m * chunks)
            alone = Prepared(*(_apart(x, span, m) for x in ready))
            starts, _ = advance(form, p, alone, kept[:, begin + at : begin + at + m].flatten(0, 1))
            found.append(starts.unflatten(0, (N, m)).flatten(1, 2))
    return torch.cat(found, 1)


def _apart(x, span: slice, m: int):
    """[N, b, ...] -> [N m, chunks, ...]: as if each of m runs of chunks were a stream of its own."""
    if x is None:
        return None
    if isinstance(x, Tables):
        return x  # `advance` has no use for them
    return x[:, span].unflatten(1, (m, -1)).flatten(0, 1)


class _Written(NamedTuple):
    """What chunks wrote, from the weights at their starts, all at once."""

    target: Tensor | None  # unit own targets
    norm: Tensor | None
    r: Tensor
    rows: Tensor
    read: Read


def _written(form: Form, c: Consts, p: Products, ready: Prepared, V: Tensor, logs: Tensor) -> _Written:
    """Phase `read`: rows, then y."""
    r, target, norm = ready.r0, None, None
    if ready.of_V is not None:
        r = p.mm(ready.of_V, V.mT, r)
    if form.own:
        target = p.mm(ready.phi[:, :, 1], V.mT, ready.target0)
        norm = length(target)
        target = target / norm
        r = r - (target if ready.scale is None else target * ready.scale)
    rows = r * ready.tables.eta if ready.S is None else lower_solve(ready.S, r)
    return _Written(target, norm, r, rows, read(p, ready.phi[:, :, 2], ready.keys, rows, V, ready.A, *c.read(logs)))


class _SegmentBackward:
    """Phases `chain` and `gradients` of a segment. `run` is called once."""

    def __init__(self, form: Form, c, p: Products, ready: Prepared, logs, V, end, w_in, d_y, d_V):
        self.form, self.c, self.p, self.ready, self.V, self.end, self.w_in = form, c, p, ready, V, end, w_in
        self.t = _written(form, c, p, ready, V, logs)
        self.found = read_backward(p, self.t.read, d_y)
        self.d_V = d_V

    def run(self) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, logs, V, w_in and A."""
        ready, found = self.ready, self.found
        if ready.S is None:
            self.d_r = found.rows * ready.tables.eta
        else:
            self.d_r = lower_solve_transposed(ready.S, found.rows)
        carry, d_target, d_V = self._chain()
        self.p.add(self.d_r, ready.K3, carry.mT, alpha=-1)
        d_phi_k, d_e, d_A, d_scale = self._keys(carry)
        d_x, d_w_in = self._features(d_phi_k, d_e, d_target, d_A)
        d_logs = self._rates(carry, d_scale)
        return d_x[:, :, 2], d_x[:, :, 0], d_x[:, :, 1], d_logs, d_V, d_w_in, d_A.sum(1)

    def _chain(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Last chunk first: dV after every chunk, gradients of own targets before they are unit, and dV before the first."""
        form, p, ready, t, found = self.form, self.p, self.ready, self.t, self.found
        (N, b, d, h), C = self.V.shape, form.C
        given = found.V if ready.of_V is None else p.mm(self.d_r.mT, ready.of_V, found.V)
        room = found.V.new_empty(N, b, d, h + C * form.own)  # [dV | d_target^T]
        carry, first = room[..., :h], given[:, 0].contiguous()
        carry[:, :-1], carry[:, -1] = given[:, 1:], self.d_V
        moves = ready.M.mT.contiguous()
        if form.own:
            moves = torch.cat([moves, ready.phi[:, :, 1]], 2)
            to_target = 1 / t.norm if ready.scale is None else ready.scale / t.norm
            base, of_carry = self.d_r * -to_target, ready.K3 * to_target
        for i in reversed(range(b)):
            if form.own:
                p.add(base[:, i], of_carry[:, i], carry[:, i].mT)
                target = t.target[:, i]
                torch.addcmul(base[:, i], target, dot(target, base[:, i]), value=-1, out=room[:, i, :, h:].mT)
            p.add(carry[:, i - 1] if i else first, room[:, i], moves[:, i])
        return carry.contiguous(), room[..., h:].mT.contiguous() if form.own else None, first

    def _keys(self, carry: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """r, the system, the end of the chunk and the read, down to the features of keys: d_phi_k, d_e, d_A, d_scale."""
        form, p, ready, t, found = self.form, self.p, self.ready, self.t, self.found
        d_r, d_keys, d_A = self.d_r, found.keys, found.A
        f_prev, f_end = ready.tables.f[..., 1:2], ready.tables.f[..., 2:3]
        p.add(d_keys, t.rows * f_end, carry, alpha=-1)
        if form.dgd_out:
            system = p.mm(d_r, t.rows.mT).mul_(ready.tables.E)
            p.add(d_keys, system + system.mT, ready.keys, alpha=-1)
            p.add(d_keys, d_r, ready.A)
            p.add(d_keys, d_r * f_prev, self.V)
            p.add(d_A, d_r.mT, ready.keys)
        d_e, d_scale, d_slope, phi_k = d_r, None, None, ready.phi[:, :, 0]
        if ready.scale is not None:
            d_e = d_r * ready.scale
            d_scale = dot(d_r, self._error())
        if form.scaled:
            d_slope = torch.where(ready.slope > 1, -ready.scale.square() * d_scale, 0)
            d_keys.addcmul_(phi_k, d_slope)
        if form.unit_keys:
            d_phi_k = d_keys.addcmul_(ready.keys, dot(ready.keys, d_keys), value=-1) / ready.nk
        else:
            d_phi_k = d_keys
        if d_slope is not None:
            d_phi_k.addcmul_(ready.keys, d_slope)
        if form.l2:
            p.add(d_phi_k, d_e, ready.A + self.V)
            p.add(d_A, d_e.mT, phi_k)
        return d_phi_k, d_e, d_A, d_scale

    def _error(self) -> Tensor:
        """e, which r has times the scale."""
        form, ready, t = self.form, self.ready, self.t
        drive = t.r
        if form.dgd_out:
            drive = drive - self.p.mm(ready.keys_prev, self.V.mT, self.p.mm(ready.keys, ready.A.mT))
        return drive / ready.scale

    def _features(self, d_phi_k, d_e, d_target, d_A) -> tuple[Tensor, Tensor | None]:
        """Gradients of k, v and q [N, b, 3, C, d], and of the input layer; adds own targets' to d_A."""
        form, p, ready = self.form, self.p, self.ready
        d_phi = torch.empty_like(ready.phi)
        d_phi[:, :, 0], d_phi[:, :, 2] = d_phi_k, self.found.x
        if form.own:
            p.mm(d_target, ready.A + self.V, out=d_phi[:, :, 1])
            p.add(d_A, d_target.mT, ready.phi[:, :, 1])
        else:
            d_phi[:, :, 1] = 0
        d_x, d_w_in = d_phi, None
        if self.w_in is not None:
            N, b, _, C, d = ready.x.shape
            d_z = aten.silu_backward(d_phi, ready.z).view(N, b * 3 * C, -1)
            d_w_in = p.mm(d_z.mT, ready.x.view(N, -1, d))
            d_x = p.mm(d_z, self.w_in).view(N, b, 3, C, d)
        if form.residual:
            d_x[:, :, 0] += d_e
        if form.own:
            d_x[:, :, 1] += d_target
        else:
            d_x[:, :, 1] -= d_e
        return d_x, d_w_in

    def _rates(self, carry: Tensor, d_scale: Tensor | None) -> Tensor:
        """Gradients of log-rates [N, b, 2, C], by the sums of README.md, "In phases"."""
        form, c, ready, t, d_r = self.form, self.c, self.ready, self.t, self.d_r
        by_rate = 1 / ready.tables.eta.squeeze(-1) if ready.S is None else ready.tables.D.diagonal(dim1=-2, dim2=-1)
        e = (d_r * t.rows).sum(-1) * by_rate
        f = -e
        if form.dgd_out:
            f = (d_r * (self.p.mm(ready.keys_prev, self.V.mT) - t.r)).sum(-1)
        ends = (carry * torch.cat([self.V[:, 1:], self.end.unsqueeze(1)], 1)).sum((-2, -1))
        d_alpha = f @ c.later.mT + self.found.rho @ c.onward.mT - e + ends.unsqueeze(-1)
        if form.erased:
            d_alpha = d_alpha + e - (d_scale * ready.scale).squeeze(-1)
        return torch.stack([e, d_alpha], 2)
