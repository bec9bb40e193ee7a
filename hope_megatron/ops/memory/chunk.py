"""The chunk form of the memory operator: every rule, any length, under autograd.

Inside a chunk all inner gradients are taken at the chunk's first state, so a chunk is a handful of matrix products and one
triangular system per key set; the loop over chunks is the only sequential part. README.md derives the form; it is exact.

Shapes, beside those of types.py: N = B H flattened. Memories that share their chunk borders form a group of n = nv vector
and ns scalar memories, stacked memory-major in the batch dim of every product: [N n, C, .].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.channels import channel_chunk
from hope_megatron.ops.memory.inner import dsilu, loss_gradient, row_softmax, squared_norm, step_scale, unit
from hope_megatron.ops.memory.layout import Group, Weights
from hope_megatron.ops.memory.rule import MemoryRule
from hope_megatron.ops.memory.tables import ChunkTables, chunk_tables, delta_inverse, gram
from hope_megatron.ops.memory.types import RateLogits


def chunk_scan(tensors, rule: MemoryRule, groups: tuple[Group, ...], position: int) -> tuple[Tensor, tuple[Group, ...]]:
    """The loop over periods.

    Args:
        tensors: q, x_k, x_v [N, T, d] and the logits of eta, alpha, theta [N, T] or None; any T of at least 1.
        position: of the first token in its stream.

    Returns:
        y [N, T, d], and the groups after the last token.
    """
    outputs = []
    for piece in _pieces(tensors, position, rule.period):
        y, groups = _period(*piece, rule, groups, position)
        position += y.size(1)
        outputs.append(y)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], groups


def _pieces(tensors: list[Tensor | None], position: int, chunk: int) -> list[tuple[Tensor | None, ...]]:
    """Cut [N, T, ...] tensors at chunk borders, for a piece that begins at stream position `position`.

    One split per tensor: its backward is one concatenation, where slices would each make a full-length zero tensor.
    """
    T, first = tensors[0].size(1), chunk - position % chunk
    lengths = [T] if first >= T else [first] + [chunk] * ((T - first) // chunk)
    lengths += [T - sum(lengths)] * (sum(lengths) < T)
    if len(lengths) == 1:
        return [tuple(tensors)]
    return list(zip(*([None] * len(lengths) if x is None else x.split(lengths, 1) for x in tensors)))


class _Inputs(NamedTuple):
    """What the self-memories make of a piece of the stream: unit keys and values [N, C, d], rates [N, C]."""

    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor | None
    log_theta: Tensor | None


def _period(q, x_k, x_v, eta, alpha, theta, rule: MemoryRule, groups: tuple[Group, ...], position: int):
    """Write and read along (the rest of) one period, the longer of the two chunk lengths. Returns y [N, C, d] and the groups."""
    if len(groups) == 1:
        group = groups[0].at(position, rule.chunk_tokens)
        if rule.rates_of == "channel":
            y, group = channel_chunk(q, x_k, x_v, RateLogits(eta, alpha), rule, group)
            return y, (group,)
        inputs = _generate(x_k, x_v, eta, alpha, theta, rule, group)
        write = _Write(inputs, rule, group)
        return write.read(_query(q, rule, group)), (write.end(),)

    own, main = groups
    generated, queries, at = [], [], position
    for q_piece, *piece in _pieces([q, x_k, x_v, eta, alpha, theta], position, rule.self_chunk):
        own = own.at(at, rule.self_chunk)
        inputs = _generate(*piece, rule, own)
        queries.append(_query(q_piece, rule, own))
        own, at = _Write(inputs, rule, own).end(), at + inputs.k.size(1)
        generated.append(inputs)
    inputs = [None if xs[0] is None else torch.cat(xs, 1) for xs in zip(*generated)]
    outputs, at = [], position
    for q_piece, *piece in _pieces([torch.cat(queries, 1), *inputs], position, rule.chunk_tokens):
        main = main.at(at, rule.chunk_tokens)
        write = _Write(_Inputs(*piece), rule, main)
        outputs.append(write.read(q_piece))
        main, at = write.end(), at + q_piece.size(1)
    return torch.cat(outputs, 1), (own, main)


def _generate(x_k, x_v, eta, alpha, theta, rule: MemoryRule, group: Group) -> _Inputs:
    """Keys, values and rates of a chunk, by the memories at its start (eqs. 86-87)."""
    k, v = x_k, x_v
    if rule.adaptive_key:
        k = x_k + group.layers_of("k", x_k)
    if rule.adaptive_value:
        v = x_v + group.layers_of("v", x_v)
    if rule.adaptive_eta and eta is not None:
        eta = eta + group.layers_of("eta", x_k).squeeze(-1)
    if rule.adaptive_alpha and alpha is not None:
        alpha = alpha + group.layers_of("alpha", x_k).squeeze(-1)
    return _Inputs(
        k=unit(k),
        v=unit(v) if rule.normalize_values else v,
        eta=k.new_full(k.shape[:2], rule.eta_max) if eta is None else rule.eta_max * torch.sigmoid(eta),
        log_alpha=None if alpha is None else F.logsigmoid(alpha),
        log_theta=None if theta is None else F.logsigmoid(theta) + math.log(rule.momentum_max),
    )


def _query(q: Tensor, rule: MemoryRule, group: Group) -> Tensor:
    """Unit queries of a chunk [N, C, d], by their memory at its start where there is one."""
    return unit(q + group.layers_of("q", q) if rule.adaptive_query else q)


class _Write:
    """What one chunk (or the part of one that a cut leaves) writes into a group of memories."""

    def __init__(self, inputs: _Inputs, rule: MemoryRule, group: Group):
        self.rule, self.group = rule, group
        self.seen = group = group if rule.weights == "sum" else _with_softmax(group, rule)
        self.tables = chunk_tables(inputs.eta, inputs.log_alpha, inputs.log_theta, decay_erased=rule.decay_erased)
        n, two_layers = group.n, rule.num_layers == 2
        k_n = _repeat(inputs.k, n)  # [N n, C, d]
        phi, z = k_n, None
        if two_layers:
            z = torch.bmm(k_n, group.start.w_in.mT)  # [N n, C, h]
            phi = F.silu(z)

        e_vector, e_scalar = _errors(inputs.k, inputs.v, phi, rule, group)
        dgd_in, dgd_out = rule.writes_input and rule.dgd_layers != "none", rule.output_uses_dgd
        keys = unit(phi) if two_layers and rule.dgd_layers == "all" else phi
        inverse_in, inverse_out = self._inverses(inputs.k, keys if two_layers else None, dgd_in, dgd_out)
        delta = _hidden_errors(e_vector, e_scalar, z, group) if rule.writes_input else None
        if rule.normalizes_steps:
            squared = group.stack(*(None if e is None else squared_norm(e) for e in (e_vector, e_scalar)))
            scale = step_scale(phi, keys, delta, squared)
            e_vector, e_scalar = (None if e is None else s * e for s, e in zip(group.cut(scale), (e_vector, e_scalar)))
            delta = None if delta is None else scale * delta
        keys_vector, keys_scalar = group.cut(keys)
        inverse_vector, inverse_scalar = (None, None) if inverse_out is None else group.cut(inverse_out)
        self.vector = self._layer("w_vector", keys_vector, e_vector, inverse_vector, group.nv)
        self.scalar = self._layer("w_scalar", keys_scalar, e_scalar, inverse_scalar, group.ns)
        held = z if group.now is group.start else None
        self.input = self._layer("w_in", k_n, delta, inverse_in, n, held)

    def _inverses(
        self, k: Tensor, keys: Tensor | None, dgd_in: bool, dgd_out: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Triangular inverses of the input layers (one per head, repeated) and of the output layers, where there is DGD.

        keys: of the output layers, [N n, C, h]; None: k itself.
        """
        n, C = self.group.n, k.size(1)
        if not dgd_out or keys is None:
            one = _repeat(delta_inverse(gram(k), self.tables), n) if dgd_in or dgd_out else None
            return (one if dgd_in else None), (one if dgd_out else None)
        own = gram(keys).unflatten(0, (-1, n))
        if not dgd_in:
            return None, delta_inverse(own, self.tables).flatten(0, 1)
        inverses = delta_inverse(torch.cat([gram(k).unsqueeze(1), own], 1), self.tables)  # one solve, [N, 1 + n, C, C]
        first, rest = inverses.split([1, n], 1)
        return first.expand(-1, n, C, C).reshape(-1, C, C), rest.reshape(-1, C, C)

    def _layer(
        self, name: str, keys, gradient, inverse: Tensor | None, n: int, held: Tensor | None = None
    ) -> _Layer | None:
        if gradient is None:
            return None
        now, speed, anchor = (
            tree and getattr(tree, name) for tree in (self.group.now, self.group.speed, self.group.anchor)
        )
        return _Layer.solve(keys, gradient, now, speed, anchor, inverse, self.tables.repeat(n), held)

    def read(self, q: Tensor) -> Tensor:
        """M_mem(q_t): at every token as written so far (dual form), or at the chunk's start. q [N, C, d] unit."""
        group = self.seen
        skip = self.rule.read_skip and group.start.w_in is not None
        if self.rule.read == "chunk_start":
            y = group.layers_of("mem", q)
        elif self.rule.weights == "softmax":
            hidden = q if self.input is None else F.silu(self.input.read_mapped(q, self.rule))
            y = self.vector.read_mapped(hidden, self.rule)
        else:
            if self.input is None:
                hidden = group.features_of("mem", q, group.now)
            else:
                hidden = F.silu(self.input.first_of(group.n, self.tables).read(q))
            y = self.vector.first_of(group.nv, self.tables).read(hidden)
        return q + y if skip else y

    def end(self) -> Group:
        """The group after the chunk's last token."""
        group = self.group
        names = ("w_in", "w_vector", "w_scalar")
        found = [
            layer.end() if layer else (getattr(group.now, name), group.speed and getattr(group.speed, name))
            for name, layer in zip(names, (self.input, self.vector, self.scalar))
        ]
        weights, speeds = zip(*found)
        return group._replace(now=Weights(*weights), speed=None if group.speed is None else Weights(*speeds))


def _with_softmax(group: Group, rule: MemoryRule) -> Group:
    """The group whose chunk starts with the weights that it answers with; what adds up stays in `now`."""
    return group._replace(start=Weights(*(None if w is None else row_softmax(w, rule) for w in group.start)))


def _errors(k: Tensor, v: Tensor, phi: Tensor, rule: MemoryRule, group: Group) -> tuple[Tensor | None, Tensor | None]:
    """e = d loss / d output at the chunk's first state: [N nv, C, d] and [N ns, C, 1].

    The target is a constant of the inner problem but not of the outer one: nothing is detached.
    """
    start, skip = group.start, group.start.w_in is not None
    phi_vector, phi_scalar = group.cut(phi)
    own_vector = own_scalar = None
    if rule.own_targets or group.ns:
        own = _repeat(v, group.n)
        own_vector, own_scalar = group.cut(F.silu(torch.bmm(own, start.w_in.mT)) if skip else own)
    vector = scalar = None
    if phi_vector is not None:
        k_n, target = _repeat(k, group.nv), _repeat(v, group.nv)
        if rule.own_targets:
            written = torch.bmm(own_vector, start.w_vector.mT)
            target = target + written if skip else written
            target = unit(target) if rule.normalize_targets else target
        if rule.predicts:
            prediction = torch.bmm(phi_vector, start.w_vector.mT)
            vector = loss_gradient((k_n + prediction if skip else prediction) - target, rule)
        else:
            vector = k_n - target if skip and rule.dot_target == "residual" else -target
    if phi_scalar is not None:
        target = torch.bmm(own_scalar, start.w_scalar.mT)
        target = torch.tanh(target) if rule.normalize_targets else target
        scalar = -target
        if rule.predicts:
            scalar = loss_gradient(torch.bmm(phi_scalar, start.w_scalar.mT) - target, rule)
    return vector, scalar


def _hidden_errors(e_vector: Tensor | None, e_scalar: Tensor | None, z: Tensor, group: Group) -> Tensor:
    """d loss / d z at the chunk's first state, [N n, C, h]."""
    carried = group.stack(
        None if e_vector is None else torch.bmm(e_vector, group.start.w_vector),
        None if e_scalar is None else e_scalar * group.start.w_scalar,
    )
    return carried * dsilu(z)


class _Layer(NamedTuple):
    """Writes of a chunk into one layer: W_t = gamma_t W_0 + m_t0 S_0 - sum_s (Gamma_ts erase_s + m_ts drive_s) keys_s^T.

    With an anchor A, (1 - gamma_t) A besides.
    Without momentum m = Gamma, and `drive` holds erase + drive together. Leading dim [N n].
    """

    keys: Tensor  # [N n, C, x]
    drive: Tensor  # eta g, [N n, C, o]
    erase: Tensor | None  # beta W_{t-1} k_t under DGD and momentum
    w: Tensor  # W_0, [N n, o, x]
    s: Tensor | None  # S_0
    anchor: Tensor | None  # A
    tables: ChunkTables

    @classmethod
    def solve(
        cls, keys, gradient, w, s, anchor, inverse: Tensor | None, tables: ChunkTables, held: Tensor | None
    ) -> _Layer:
        """Solve for the rows. gradient: g; inverse: None without DGD; held: keys W_0^T if it is known already."""
        drive = tables.eta * gradient
        if inverse is None:
            return cls(keys, drive, None, w, s, anchor, tables)
        held = tables.erase_gamma_prev * (torch.bmm(keys, w.mT) if held is None else held)
        if anchor is not None:
            held = held + (tables.erase - tables.erase_gamma_prev) * torch.bmm(keys, anchor.mT)
        if tables.momentum is None:
            return cls(keys, torch.bmm(inverse, held + drive), None, w, s, anchor, tables)
        moving = tables.momentum.m0_prev * torch.bmm(keys, s.mT)
        moving = moving - torch.bmm(tables.momentum.m_prev * gram(keys), drive)
        return cls(keys, drive, torch.bmm(inverse, held + tables.erase * moving), w, s, anchor, tables)

    def first_of(self, n: int, tables: ChunkTables) -> _Layer:
        """The first memory of a stack of n, with tables that are not repeated."""
        if n == 1:
            return self
        pick = lambda x: None if x is None else x.unflatten(0, (-1, n)).select(1, 0)  # noqa: E731
        return _Layer(*(pick(x) for x in self[:6]), tables)

    def read(self, x: Tensor) -> Tensor:
        """W_t x_t for every token of the chunk: [N, C, x] -> [N, C, o]."""
        tables, scores = self.tables, torch.bmm(x, self.keys.mT)
        y = tables.gamma * torch.bmm(x, self.w.mT)
        if self.anchor is not None:
            y = y + (1 - tables.gamma) * torch.bmm(x, self.anchor.mT)
        if tables.momentum is None:
            return y - torch.bmm(tables.Gamma * scores, self.drive)
        y = y + tables.momentum.m0 * torch.bmm(x, self.s.mT) - torch.bmm(tables.momentum.m * scores, self.drive)
        return y if self.erase is None else y - torch.bmm(tables.Gamma * scores, self.erase)

    def read_mapped(self, x: Tensor, rule: MemoryRule) -> Tensor:
        """The same where weights are a function of what adds up: every token's sums stand in memory, [N, C, o, x]."""
        t, m = self.tables, self.tables.momentum
        written = (self.drive.unsqueeze(-1) * self.keys.unsqueeze(-2)).flatten(2)  # [N, C, o x]
        sums = t.gamma.unsqueeze(-1) * self.w.unsqueeze(1)
        if self.anchor is not None:
            sums = sums + (1 - t.gamma.unsqueeze(-1)) * self.anchor.unsqueeze(1)
        if m is not None:
            sums = sums + m.m0.unsqueeze(-1) * self.s.unsqueeze(1)
        sums = sums - torch.bmm(t.Gamma if m is None else m.m, written).view_as(sums)
        weights = row_softmax(sums, rule).flatten(0, 1)
        return torch.bmm(weights, x.flatten(0, 1).unsqueeze(-1)).view(*x.shape[:2], -1)

    def end(self) -> tuple[Tensor, Tensor | None]:
        """Weights and momentum after the chunk's last token."""
        tables, kept = self.tables, self.tables.gamma_end * self.w
        if self.anchor is not None:
            kept = kept + (1 - tables.gamma_end) * self.anchor
        if tables.momentum is None:
            return kept - torch.bmm((tables.Gamma_end * self.drive).mT, self.keys), None
        m = tables.momentum
        rows = m.m_end * self.drive if self.erase is None else m.m_end * self.drive + tables.Gamma_end * self.erase
        w = kept + m.m0_end * self.s - torch.bmm(rows.mT, self.keys)
        return w, m.theta_all * self.s - torch.bmm((m.theta_end * self.drive).mT, self.keys)


def _repeat(x: Tensor, n: int) -> Tensor:
    """[N, ...] -> [N n, ...], each entry n times in a row."""
    return x if n == 1 else x.unsqueeze(1).expand(-1, n, *x.shape[1:]).reshape(-1, *x.shape[1:])
