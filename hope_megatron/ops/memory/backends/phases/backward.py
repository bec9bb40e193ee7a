"""Backward of memories that stand in a loop over chunks, for a segment of chunks: tape (tape.py), loop, gradients.

`d_x` is the gradient of x. Rows that are multiplied with weights come in pairs (y, y'), for [A | V]: (d_r, gamma_prev d_r) for
what r = .. + A keys + gamma_prev V keys contributes, (y, y) for products with W = A + V. What a chunk hands on to V is then one
product: all its rows with what they met.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.arithmetic import Products, aten, dot, dsilu
from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.backends.phases.forward import Stream, Weights
from hope_megatron.ops.memory.backends.phases.momentum import Layer, rate_gradients
from hope_megatron.ops.memory.backends.phases.tables import Consts, MomentumTables, Tables
from hope_megatron.ops.memory.backends.phases.tape import Coefficients, read_gradients, read_rows, record


class Outside(NamedTuple):
    """Gradients that come to a segment of b chunks from outside."""

    y: Tensor | None  # [N, b, C, d]
    k: Tensor | None  # of the generated keys and values, [N, b, C, d]
    v: Tensor | None
    logs: Tensor | None  # of the generated log-rates, [N, b, 2, C]
    V: Tensor  # of what changes, after the last chunk, [n, N, parts, d, h]
    V_in: Tensor | None  # [n, N, parts, h, d]


class Gradients(NamedTuple):
    """Gradients of a segment."""

    q: Tensor | None  # [N, b, C, d]
    k: Tensor  # of x_k, or of keys; [N, b, C, d]
    v: Tensor
    eta: Tensor  # of logits, or of log-rates; [N, b, C]
    alpha: Tensor
    theta: Tensor | None
    V: Tensor  # of what changes, before the first chunk
    V_in: Tensor  # of W2, where it is not written
    A: Tensor
    A_in: Tensor | None


class SegmentBackward:
    """`run` is called once. Everything that a chunk of the loop leaves for the gradients is a slice of a tensor over chunks."""

    def __init__(
        self,
        form: Form,
        c: Consts | MomentumTables,
        p: Products,
        stream: Stream,
        q: Tensor | None,
        weights: Weights,
        A: Tensor,
    ):
        self.form, self.c, self.p, self.weights = form, c, p, weights
        self.tape = record(form, c, p, stream, weights, A)
        self.co = Coefficients(form, p, self.tape, weights)
        self.q = q

    def run(self, outside: Outside) -> Gradients:
        """Gradients of what the segment was given."""
        self._rooms(outside)
        self.d_q = None if outside.y is None else self._reads(outside.y)
        if self.form.generates:
            self._rates_from_outside(outside)
        for i in reversed(range(self.b)):
            self._chunk(slice(i, i + 1), i)
        return self._gradients()

    # ------------------------------------------------------------ before the loop

    def _rooms(self, outside: Outside) -> None:
        form, t, w, co = self.form, self.tape.written, self.weights, self.co
        n, N, self.b, C, d = t.rows.shape
        h, new, zeros = w.out.size(-1), t.rows.new_empty, t.rows.new_zeros
        self.N, self.h, self.d = N, h, d
        # rows: pairs of d_r, of d_e (l2), of d_target, then what W1 was given for keys, values and rates
        sizes = {"r": 2 * C, "e": 2 * C * form.l2, "target": 2 * C * (form.targets > 0), "raw": C * form.generates}
        stops = list(itertools.accumulate(sizes.values()))
        self.place = {name: slice(stop - size, stop) for (name, size), stop in zip(sizes.items(), stops)}
        self.pairs = slice(0 if form.dgd_out else 2 * C, self.place["raw"].start)
        self.rows = zeros(n, N, self.b, stops[-1], d)
        pair = lambda x, name: x[..., self.place[name], :].unflatten(-2, (C, 2))  # noqa: E731
        self.pair = {name: pair(self.rows, name) for name in ("r", "e", "target") if sizes[name]}
        self.met = zeros(n, N, self.b, stops[-1], h)
        if form.dgd_out:
            pair(self.met, "r")[..., 1, :] = t.keys
        if form.l2:
            pair(self.met, "e")[..., 1, :] = t.keys if t.nk is None else t.keys * t.nk
        if form.targets:
            pair(self.met, "target")[..., 1, :] = t.phi_v
        # [sym | -Gamma_C rows] and [keys; dV (and dS)]: what keys get from the system and from the end of the chunk is one product
        after = C + d * form.parts
        self.left, self.right = zeros(n, N, self.b, C, after), new(n, N, self.b, after, h)
        self.left[..., C:], self.right[..., :C, :] = co.reached, t.keys
        self.right[:, :, -1, C:] = outside.V.flatten(2, 3)
        self.d_kv_parts = zeros(
            2 * n + 1, N, self.b, 2 * C, d
        )  # of errors and targets; of z and the input layer; from outside
        if outside.k is not None:
            self.d_kv_parts[2 * n] = torch.cat([outside.k, outside.v], 2)
        self.d_z = zeros(n, N, self.b, 2 * C, h)
        self.before, self.before_in = new(n, N, 1, d * form.parts, h), None  # dV before the first chunk
        self.kept_V = torch.cat([co.V[:, :, 1:], w.out_end[..., 0, :]], 2)
        if form.writes_in:
            self.pair_in = zeros(n, N, self.b, C, 2, h)
            after = C + h * form.parts
            self.left_in, self.right_in = zeros(n, N, self.b, C, after), new(n, N, self.b, after, d)
            self.left_in[..., C:], self.right_in[..., :C, :] = co.reached_in, co.k
            self.right_in[:, :, -1, C:] = outside.V_in.flatten(2, 3)
            self.d_delta, self.before_in = new(n, N, self.b, C, h), new(n, N, 1, h * form.parts, d)
            self.kv = self.tape.kv.flatten(2, 3).expand(n, N, self.b, 2 * C, d).contiguous()
            self.kept_V_in = torch.cat([co.V_in[:, :, 1:], w.inner_end[..., 0, :]], 2)
        if form.generates:
            self._generation_rooms()
        self.read_keys = self.read_V = self.read_V_in = None

    def _rates_from_outside(self, outside: Outside) -> None:
        """Gradients of log-rates that do not come from the loop, [b, 2 C, N]."""
        if outside.logs is None:
            given = torch.stack([torch.zeros_like(self.rho), self.rho @ self.c.onward.mT], 2)
        else:
            given = outside.logs
        self.d_logs = given.permute(1, 2, 3, 0).reshape(self.b, 2 * self.form.C, self.N).contiguous()

    def _generation_rooms(self) -> None:
        form, g, C, N, n = self.form, self.tape.generated, self.form.C, self.N, self.form.n
        # raw rows are kept unscaled: d_raw = scale rows
        self.scale = g.raw.new_empty(4, N, self.b, C, 1)
        torch.neg(torch.expm1(self.tape.inputs.logs).permute(2, 0, 1, 3).unsqueeze(-1), out=self.scale[:2])
        torch.reciprocal(g.norm.squeeze(-2).permute(2, 0, 1, 3, 4), out=self.scale[2:])
        torch.mul(g.phi_x, self.scale, out=self.met[:4, ..., self.place["raw"], :])
        # sums for the rates, token by token [., N]: <dV, V>, e, f of every memory, of the input layers first
        sets = 1 + form.writes_in
        self.of_sums = self.c.rates(n).repeat(1, sets)
        self.num_input_sums = (n + 2 * n * C) * form.writes_in
        self.sums = g.raw.new_empty(self.num_input_sums + n + len(self.co.drive_sums) * n * C, N)
        if form.writes_in:
            self.d_z_x, self.slope_x = g.raw.new_empty(4, N, self.b, C, self.h), dsilu(g.z_x) * self.scale

    def _reads(self, d_y: Tensor) -> Tensor:
        """What M_mem's reads give, into the rooms of the last memory; returns d_q."""
        form, t, tape, p = self.form, self.tape.written, self.tape, self.p
        found = read_gradients(form, self.c, p, self.q, d_y, tape, self.weights)
        self.found = found
        eta, f_prev, C = tape.inputs.tables.eta, self.co.f_prev, form.C
        S = None if t.S is None else t.S[-1]
        for pair, system, d_rows in (
            (self.pair["r"][-1], S, found.out.rows),
            (self.pair_in[-1], t.S_in, found.inner.rows),
        ):
            pair[..., 0, :] = read_rows(system, d_rows, eta)
            if system is not None:
                torch.mul(pair[..., 0, :], f_prev, out=pair[..., 1, :])
        self.d_kv_parts[-1, :, :, :C] += found.inner.keys
        self.read_keys = torch.zeros_like(self.d_features_like())
        self.read_keys[-1, :, :, :C] = found.out.keys
        rooms = []
        for last, like in ((found.out, self.kept_V), (found.inner, self.kept_V_in)):
            room = like.new_zeros(*like.shape[:3], form.parts, *like.shape[3:])
            for part, x in zip(room[-1].unbind(2), (last.V, last.S)):
                part.copy_(x)
            rooms.append(room)
        self.read_V, self.read_V_in = rooms
        self.rho = found.out.rho + found.inner.rho
        return found.inner.x

    def d_features_like(self) -> Tensor:
        """Of the shape of the product that d_keys is the first part of."""
        C, n = self.form.C, self.form.n
        length = (self.pairs.stop - self.pairs.start) // 2 if self.form.dgd_out else C
        return self.rows.new_empty(n, self.N, self.b, length, self.h)

    # ------------------------------------------------------------ the loop

    def _chunk(self, at: slice, i: int) -> None:
        form, co, C = self.form, self.co, self.form.C
        dV = self.right[:, :, at, C:]
        self._from_end(self.pair["r"][:, :, at], co.to_r[:, :, at], dV)
        d_e, d_g, d_slope = self.pair["r"][:, :, at, :, 0], None, None
        if form.writes_in:
            self._from_end(self.pair_in[:, :, at], co.to_r_in[:, :, at], self.right_in[:, :, at, C:])
            d_g = self.pair_in[:, :, at, :, 0]
        if form.scaled:
            d_e, d_g, d_slope = self._scaled(at, d_e, d_g)
        sums = self._sums(at, dV)
        d_e = self._errors(at, d_e, d_g)
        d_features = self._targets(at, d_e, sums)
        self._features(at, d_features, d_g, d_slope, sums)
        self._keys_and_values(at)
        if form.generates:
            self._generated(at, i)
        self._carry(at, i, dV)

    def _from_end(self, pair: Tensor, to_r: Tensor, carry: Tensor) -> None:
        """What rows get from the chunk's end: from dV, and from dS."""
        parts = self.form.parts
        for to_part, part in zip(to_r.chunk(parts, -1), carry.chunk(parts, -2)):
            self.p.add(pair.flatten(3, 4), to_part, part.mT)

    def _scaled(self, at: slice, d_drive: Tensor, d_drive_in: Tensor | None):
        """drive = scale e, scale = 1 / max(1, slope): gradients of e, of g_in and of the slope."""
        t, co = self.tape.written, self.co
        e, scale = t.e[:, :, at], t.scale[:, :, at]
        d_scale = dot(d_drive, e)
        if d_drive_in is not None:
            d_scale = d_scale + dot(d_drive_in, t.g_in[:, :, at])
        d_slope, d_e = d_scale * co.of_slope[:, :, at], d_drive * scale
        if d_drive_in is None:
            return d_e, None, d_slope
        d_e.addcmul_(e, d_slope * co.of_e[:, :, at])
        d_g = torch.addcmul(d_drive_in * scale, t.g_in[:, :, at], d_slope * co.of_g[:, :, at])
        return d_e, d_g, d_slope

    def _sums(self, at: slice, dV: Tensor) -> Tensor:
        """Sums of d_r over outputs for rates and projections, token by token: [2.., n, N, 1, C, 1]. Those for generated rates,
        with <dV, V>, also into the room that their product reads."""
        n, N, C = self.form.n, self.N, self.form.C
        d_r = self.pair["r"][:, :, at, :, 0]
        if not self.form.generates:
            return (d_r * self.co.drive_sums[:, :, :, at]).sum(-1, keepdim=True)
        own = self.sums[self.num_input_sums :]
        found = own[n:].view(-1, n, C, 1, N).permute(0, 1, 4, 3, 2)
        torch.sum(d_r * self.co.drive_sums[:, :, :, at], -1, out=found)
        _ends(dV, self.kept_V[:, :, at], own[:n])
        if self.form.writes_in:
            d_weights, inner = self.right_in[:, :, at, C:], self.sums[: self.num_input_sums]
            of_inner = inner[n:].view(2, n, C, 1, N).permute(0, 1, 4, 3, 2)
            torch.sum(self.pair_in[:, :, at, :, 0] * self.co.drive_sums_in[:, :, :, at], -1, out=of_inner)
            _ends(d_weights, self.kept_V_in[:, :, at], inner[:n])
        return found.unsqueeze(-1)

    def _errors(self, at: slice, d_e: Tensor, d_g: Tensor | None) -> Tensor:
        """g_in = silu'(z_k) (e W), and e begins with k."""
        form, n, C = self.form, self.form.n, self.form.C
        d_k = self.d_kv_parts[:n, :, at, :C]
        if form.writes_in:
            d_delta = torch.mul(d_g, self.co.slope[:, :, at, 0], out=self.d_delta[:, :, at])
            d_e = self.p.mm(d_delta, self.co.W[:, :, at].mT, d_e, out=d_k if form.residual else None)
        elif form.residual:
            d_k.copy_(d_e)
        if form.l2:
            self.pair["e"][:, :, at] = d_e.unsqueeze(-2)
        return d_e

    def _targets(self, at: slice, d_e: Tensor, sums: Tensor) -> Tensor | None:
        """Targets, and what all pairs give to the features that their weights were applied to."""
        form, co, n, C, lead = self.form, self.co, self.form.n, self.form.C, self.form.lead
        d_v = self.d_kv_parts[lead:n, :, at, C:]
        if form.targets:
            pair = self.pair["target"][: form.targets, :, at]
            factor = co.factor[:, :, at].unsqueeze(-2)
            torch.mul(d_e[: form.targets].unsqueeze(-2).expand_as(pair), factor, out=pair)
        if form.own:
            d_target, unit = pair[lead:], co.unit_target[:, :, at]
            along = sums[-1, lead:] if co.target_by_sum else dot(unit, d_target[..., 0, :])
            d_target.addcmul_(unit.unsqueeze(-2), along.unsqueeze(-1), value=-1)
            d_v.copy_(d_target[..., 0, :])
        else:
            torch.neg(d_e[lead:], out=d_v)
        if self.pairs.start == self.pairs.stop:
            return None
        rows = self.rows[:, :, at, self.pairs].unflatten(-2, (-1, 2)).flatten(-2)
        base = self.read_keys[:, :, at] if form.dgd_out and self.read_keys is not None else None
        return self.p.mm(rows, co.both[:, :, at], base)

    def _features(self, at: slice, d_features: Tensor | None, d_g: Tensor | None, d_slope: Tensor | None, sums) -> None:
        """keys, phi_k and phi_v, down to z. d_features: of keys (DGD), of phi_k (l2), of phi_v (targets), one after another."""
        form, t, co, C = self.form, self.tape.written, self.co, self.form.C
        keys, d_z = t.keys[:, :, at], self.d_z[:, :, at]
        d_keys = self._keys(at, d_features)
        along = sums[2] if form.unit_keys else None
        if d_slope is not None:
            d_keys.addcmul_(co.phi_k[:, :, at], d_slope)
            along = along if along is None else torch.addcmul(along, d_slope, co.phi_keys[:, :, at])
        if form.unit_keys:
            d_keys.addcmul_(keys, along, value=-1)
        if form.dgd_out and form.targets and not form.l2:  # both at once
            torch.mul(d_features.unflatten(3, (2, C)), co.slope_keys[:, :, at], out=d_z.unflatten(3, (2, C)))
        else:
            d_phi = d_keys / t.nk[:, :, at] if form.unit_keys else d_keys
            if form.l2:
                d_phi = d_phi + d_features[..., C * form.dgd_out :, :][..., :C, :]
            if d_slope is not None:
                d_phi.addcmul_(keys, d_slope)
            torch.mul(d_phi, co.slope[:, :, at, 0], out=d_z[..., :C, :])
            if form.targets:
                torch.mul(d_features[..., -C:, :], co.slope[:, :, at, 1], out=d_z[..., C:, :])
        if form.writes_in:
            d_z[..., :C, :].addcmul_(d_g, co.bend[:, :, at])

    def _keys(self, at: slice, d_features: Tensor | None) -> Tensor:
        """What keys get from r, from the systems and from the end of the chunk. Also fills the input layer's system."""
        form, p, t, n, C = self.form, self.p, self.tape.written, self.form.n, self.form.C
        systems = [(form.dgd_out, self.pair["r"], t.rows, self.left)]
        if form.writes_in:
            systems.append((form.dgd_in, self.pair_in, t.rows_in, self.left_in))
        systems = [system[1:] for system in systems if system[0]]
        if systems:
            products = t.rows.new_empty(len(systems), n, self.N, 1, C, C)
            for product, (pair, rows, _) in zip(products, systems):
                p.mm(pair[:, :, at, :, 0], rows[:, :, at].mT, out=product)
            products.mul_(self.co.minus_E[:, at])
            for product, (_, _, left) in zip(products, systems):
                torch.add(product, product.mT, out=left[:, :, at, :, :C])
        if not form.dgd_out:
            return p.mm(
                self.left[:, :, at], self.right[:, :, at], None if self.read_keys is None else self.read_keys[:, :, at]
            )
        d_keys = d_features[..., :C, :]
        p.add(d_keys, self.left[:, :, at], self.right[:, :, at])
        return d_keys

    def _keys_and_values(self, at: slice) -> None:
        """z = W2 [k; v], and what else of the input layer k is in."""
        form, p, co, n, C = self.form, self.p, self.co, self.form.n, self.form.C
        found = self.d_kv_parts[n : 2 * n, :, at]
        p.mm(self.d_z[:, :, at], co.W_in[:, :, at if form.writes_in else slice(None)], out=found)
        if form.writes_in:
            if form.dgd_in:
                p.add(found[..., :C, :], self.pair_in[:, :, at].flatten(-2), co.both_in[:, :, at])
            p.add(found[..., :C, :], self.left_in[:, :, at], self.right_in[:, :, at])

    def _generated(self, at: slice, i: int) -> None:
        """unit and sigmoids: what M_k, M_v, M_eta and M_alpha gave, unscaled, into the raw rows."""
        form, C, N = self.form, self.form.C, self.N
        d_kv = self.d_kv_parts[form.lead :, :, at].sum(0).unflatten(2, (2, C))
        kv = self.tape.kv[:, at]
        raw = self.rows[:, :, at, self.place["raw"]]
        torch.addcmul(d_kv, kv, dot(kv, d_kv), value=-1, out=raw[2:4].permute(1, 2, 0, 3, 4))
        found = torch.addmm(self.d_logs[i], self.of_sums, self.sums[: self.of_sums.size(1)])
        raw[:2, :, 0, :, 0] = found.view(2, C, N).mT

    def _carry(self, at: slice, i: int, dV: Tensor) -> None:
        """dV before the chunk: what is kept of the one after it, what reads give, and all rows with what they met."""
        form, p, t, C = self.form, self.p, self.tape.written, self.form.C
        tables = self.tape.inputs.tables.at(i)
        out = self.right[:, :, i - 1 : i, C:] if i else self.before
        out = _kept(dV, tables, None if self.read_V is None else self.read_V[:, :, at], out)
        p.add(out, self.rows[:, :, at].mT, self.met[:, :, at])
        if not form.writes_in:
            return
        p.add(out, t.e[:, :, at].mT, self.d_delta[:, :, at])
        out = self.right_in[:, :, i - 1 : i, C:] if i else self.before_in
        read = None if self.read_V_in is None else self.read_V_in[:, :, at]
        out = _kept(self.right_in[:, :, at, C:], tables, read, out)
        if form.dgd_in:
            p.add(out, self.pair_in[:, :, at, :, 1].mT, self.co.k[:, :, at])
        p.add(out, self.d_z[:, :, at].mT, self.kv[:, :, at])
        if form.generates:
            raw = self.rows[:4, :, at, self.place["raw"]]
            d_z_x = self.d_z_x[:, :, at]
            torch.mul(p.mm(raw, self.co.W[:4, :, at]), self.slope_x[:, :, at], out=d_z_x)
            p.add(out[:4], d_z_x.mT, self.tape.x[:, :, at])

    # ------------------------------------------------------------ after the loop

    def _gradients(self) -> Gradients:
        form, p, t, co, C, n = self.form, self.p, self.tape.written, self.co, self.form.C, self.form.n
        d_A = torch.zeros_like(co.V)
        if form.dgd_out:
            p.add(d_A, self.pair["r"][..., 0, :].mT, t.keys)
        if form.l2:
            p.add(d_A, self.pair["e"][..., 0, :].mT, self.met[..., self.place["e"], :].unflatten(-2, (C, 2))[..., 1, :])
        if form.targets:
            p.add(d_A, self.pair["target"][..., 0, :].mT, t.phi_v)
        kv = self.kv if form.writes_in else self.tape.kv.flatten(2, 3).expand(n, -1, -1, -1, -1).contiguous()
        d_W_in = p.mm(self.d_z.mT, kv)
        if form.writes_in:
            p.add(d_A, t.e.mT, self.d_delta)
            if form.dgd_in:
                p.add(d_W_in, self.pair_in[..., 0, :].mT, co.k)
        if form.mem:
            d_A[-1] += self.found.out.A
            d_W_in[-1] += self.found.inner.A
        if form.generates:
            inputs = self._generated_inputs(d_A, d_W_in)
        else:
            d_k, d_v = self.d_kv_parts.sum(0).split(C, 2)
            inputs = (d_k, d_v, *self._rates())
        parts = lambda x: x.squeeze(2).unflatten(2, (form.parts, -1))  # noqa: E731
        d_A, d_W_in, V = d_A.sum(2), d_W_in.sum(2), parts(self.before)
        if form.writes_in:
            return Gradients(self.d_q, *inputs, V, parts(self.before_in), d_A, d_W_in)
        return Gradients(self.d_q, *inputs, V, d_W_in, d_A, None)

    def _generated_inputs(self, d_A: Tensor, d_W_in: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x_k, x_v and logits; adds to those of A and of W2."""
        form, p, g = self.form, self.p, self.tape.generated
        raw = self.rows[:4, ..., self.place["raw"], :] * self.scale
        p.add(d_A[:4], raw.mT, g.phi_x)
        if form.writes_in:
            d_z_x = self.d_z_x
        else:
            d_z_x = aten.silu_backward(p.mm(raw, self.weights.out[:4].sum(-2)), g.z_x)
        p.add(d_W_in[:4], d_z_x.mT, self.tape.x)
        W_in = self.co.W_in[:4].expand(4, self.N, self.b, self.h, self.d)
        d_x = p.mm(d_z_x, W_in if form.writes_in else W_in.contiguous())
        d_x[2:] += raw[2:]
        return d_x[:3].sum(0), d_x[3], raw[0, ..., 0], raw[1, ..., 0], None

    def _rates(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of log-rates that came from outside, for M_mem alone: all chunks at once."""
        C, t = self.form.C, self.tape.written
        if self.form.momentum:
            carries = self.right[-1, ..., C:, :].chunk(2, -2), self.right_in[-1, ..., C:, :].chunk(2, -2)
            layers = (
                Layer(*self.found.of_out, *carries[0], self.pair["r"][-1, ..., 0, :], t.r[-1]),
                Layer(*self.found.of_inner, *carries[1], self.pair_in[-1, ..., 0, :], t.r_in[-1]),
            )
            return rate_gradients(self.c, self.tape.inputs.logs, layers).unbind(2)
        sums = (self.pair["r"][..., 0, :] * self.co.drive_sums[:2]).sum((1, -1))
        e, f = sums + (self.pair_in[..., 0, :] * self.co.drive_sums_in).sum((1, -1))
        ends = (self.right[..., C:, :] * self.kept_V).sum((0, -2, -1))
        ends = ends + (self.right_in[..., C:, :] * self.kept_V_in).sum((0, -2, -1))
        return e, f @ self.c.later.mT + self.rho @ self.c.onward.mT - e + ends.unsqueeze(-1), None


def _kept(d_after: Tensor, tables: Tables, read: Tensor | None, out: Tensor) -> Tensor:
    """What dV (and dS) before a chunk are of those after it, and what reads give; returns the dV of `out`."""
    parts = tables.end.size(-1)
    d_after, out = (x.unflatten(-2, (parts, -1)) for x in (d_after, out))
    if read is None:
        torch.mul(d_after, tables.kept_by_row, out=out)
    else:
        torch.addcmul(read, d_after, tables.kept_by_row, out=out)
    if tables.m0_end is not None:
        out[..., 1, :, :].addcmul_(d_after[..., 0, :, :], tables.m0_end)
    return out[..., 0, :, :]


def _ends(d_weights: Tensor, kept: Tensor, out: Tensor) -> None:
    """<dV, V> after a chunk, of every memory: out [n, N]."""
    one_row = d_weights.reshape(out.numel(), 1, -1)
    torch.bmm(one_row, kept.view(out.numel(), -1, 1), out=out.view(-1, 1, 1))
