"""What chunks write into memories: one chunk inside the loop, or all chunks of a segment at once for the backward.

Shapes: n memories (form.py), N = B H, b chunks, C tokens, d head width, h hidden width. Weights at chunk starts come as [A | V],
A the state that retention goes towards and V = W - A, with momentum as [A | V | S]: w_out [n, N, b, d, 1 + parts, h]; w_in
[n, N, b, h, 1 + parts, d] where W2 is written, else W2 itself [n, N, h, d]. README.md, "In phases", has the formulas under
these names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.arithmetic import EXACT, Products, aten, dot, length, lower_solve
from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.backends.phases.tables import SMALLEST_LOG_RATE, Consts, Tables
from hope_megatron.ops.memory.inner import EPSILON


@dataclass
class Inputs:
    """Keys, values and rates of chunks, with what follows from them alone."""

    R: Tensor
    """[lead + n, N, b, slots, C, copies, d]: once per memory, behind `lead` slots of zeros that stand for keys and values of
    scalar memories. Slots: k, v; where W2 is written, two copies of each, then (k, gamma_prev k) and (gamma_prev k, Gamma_C k)."""
    logs: Tensor
    """Log-rates [N, b, 2, C]: of eta / eta_max, of alpha."""
    tables: Tables
    k_end: Tensor | None
    """Where W2 is written: keys as they reach the chunk's end, [n, N, b, C, parts d]."""

    def at(self, i: int) -> Inputs:
        """Those of one chunk."""
        k_end = None if self.k_end is None else self.k_end[:, :, i : i + 1]
        return Inputs(self.R[:, :, i : i + 1], self.logs[:, i : i + 1], self.tables.at(i), k_end)


@dataclass
class Generated:
    """How the self-memories made keys, values and rates."""

    raw: Tensor  # logits of eta and alpha (column 0), M_k(x), M_v(x): [4, N, b, C, d]
    norm: Tensor  # of the last two, [N, b, 2, C, 1, 1]
    z_x: Tensor | None  # pre-activations of x, where W2 is written, [4, N, b, C, h]
    phi_x: Tensor  # their SiLU


@dataclass
class Written:
    """What chunks write, and what backward needs of how."""

    z: Tensor  # pre-activations of k, v and, where W2 is written, A2 k + gamma_prev V2 k; [n, N, b, slots, C, h]
    nk: Tensor | None  # norms of the features of keys, where keys are unit
    keys: Tensor  # [n, N, b, C, h]
    keys_prev: Tensor  # gamma_prev keys
    keys_end: Tensor  # keys as they reach the chunk's end, Gamma_C keys, [n, N, b, C, parts h]
    phi_v: Tensor  # [n, N, b, C, h]
    target: Tensor | None  # own ones before they are made unit (tanh of scalar ones): [targets, N, b, C, d]
    norm_target: Tensor | None  # and their norms, 1 for scalar ones
    e: Tensor  # errors [n, N, b, C, d]
    W: Tensor | None  # A + V, where it is needed
    delta: Tensor | None  # e W
    g_in: Tensor | None  # silu'(z_k) delta
    scale: Tensor | None  # of normalised steps, [n, N, b, C, 1]
    slope: Tensor | None  # and what it is the reciprocal of, before it is bounded
    squared: Tensor | None  # |e|^2 + epsilon^2
    S: Tensor | None  # [n, N, b, C, C]
    r: Tensor  # right-hand side, S rows = r; without DGD rows = eta r
    rows: Tensor  # [n, N, b, C, d]
    S_in: Tensor | None  # [N, b, C, C]
    r_in: Tensor | None
    rows_in: Tensor | None  # [n, N, b, C, h]


class Scratch:
    """Tensors that `generate` and `learn` fill: allocated once for a loop."""

    def __init__(self, form: Form, N: int, b: int, d: int, h: int, like: Tensor):
        n, C = form.n, form.C
        self.R = like.new_empty(form.lead + n, N, b, 4 if form.writes_in else 2, C, 1 + form.writes_in, d)
        self.R[: form.lead] = 0
        self.Phi = like.new_empty(n, N, b, 2, C, 2 + form.parts, h)
        self.norm_target = like.new_empty(form.targets, N, b, C, 1)
        self.norm_target[: form.lead] = 1


def bases(form: Form, p: Products, x_k, x_v, eta, alpha, A, w_in):
    """Before any loop: what W1 adds to (column 0: logits; x), what it is applied to, and x's pre-activations.

    x_k, x_v [N, T, d]; eta, alpha [N, T]; A [4, N, d, h]; w_in [4, N, h, d], None where W2 is written.
    Returns x [4, N, b, C, d], base of the same shape, features (or x twice, for [A2 | V2]), pre-activations or None.
    """
    N, T, d = x_k.shape
    x, base = torch.stack([x_k, x_k, x_k, x_v]), x_k.new_zeros(4, N, T, d)
    base[0, ..., 0], base[1, ..., 0], base[2:] = eta, alpha, x[2:]
    by_chunk = lambda y: y.unflatten(2, (-1, form.C))  # noqa: E731
    if form.writes_in:
        x = by_chunk(x)
        return x, by_chunk(base), torch.cat([x, x], -1), None
    z_x = p.mm(x, w_in.mT)
    phi_x = F.silu(z_x)
    p.add(base, phi_x, A.mT)
    return by_chunk(x), by_chunk(base), by_chunk(phi_x), by_chunk(z_x)


def generate(
    form: Form, c: Consts, p: Products, base, applied, w_out, w_in, scratch: Scratch, logs
) -> tuple[Inputs, Generated]:
    """Keys, values and rates by the self-memories at the start of b chunks. base and applied: from `bases`, of these chunks; base
    is added to in place. logs: where log-rates go, [N, b, 2, C]."""
    (_, N, b, C, d), n, R, z_x, phi_x = base.shape, form.n, scratch.R, None, applied
    if form.writes_in:
        z_x = p.mm(applied, w_in[:4].flatten(-2).mT)
        twice = z_x.new_empty(4, N, b, C, 2, z_x.size(-1))
        aten.silu.out(z_x.unsqueeze(-2).expand_as(twice), out=twice)
        p.add(base, twice.flatten(-2), w_out[:4].flatten(-2).mT)
        phi_x = twice[..., 0, :]
    else:
        p.add(base, applied, w_out[:4, ..., 1, :].mT)
    raw = base[2:].permute(1, 2, 0, 3, 4).unsqueeze(-2)  # [N, b, 2, C, 1, d]
    norm = length(raw)
    torch.div(raw.expand(n, N, b, 2, C, R.size(-2), d), norm, out=R[form.lead :, :, :, :2])
    aten.softplus.out(base[:2, ..., 0].permute(1, 2, 0, 3), -1.0, 80.0, out=logs)  # log sigmoid
    inputs = complete(form, c, R, logs.clamp_(min=SMALLEST_LOG_RATE))
    return inputs, Generated(base, norm, z_x, phi_x)


def given(form: Form, c: Consts, scratch: Scratch, k: Tensor, v: Tensor, logs: Tensor) -> Inputs:
    """Keys and values [N, b, C, d] and log-rates [N, b, 2 (3 with momentum), C] that come from outside."""
    for slot, x in enumerate((k, v)):
        scratch.R[form.lead :, :, :, slot] = x.unsqueeze(-2)
    return complete(form, c, scratch.R, logs)


def complete(form: Form, c: Consts, R: Tensor, logs: Tensor) -> Inputs:
    """The tables, and what is left of R."""
    tables, k_end = c.write(logs), None
    if form.writes_in:
        window = (
            tables.f[..., :3].unfold(-1, 2, 1).transpose(2, 3).unsqueeze(-1)
        )  # (1, gamma_prev), (gamma_prev, Gamma_C)
        keys = R[form.lead :, :, :, :1]
        torch.mul(keys.expand(*keys.shape[:3], 2, *keys.shape[4:]), window, out=R[form.lead :, :, :, 2:])
        k_end = R[form.lead :, :, :, 3, :, 1]
        if form.momentum:
            k_end = (keys[:, :, :, 0, :, :1] * tables.f[..., 2:].unsqueeze(-1)).flatten(-2)
    return Inputs(R, logs, tables, k_end)


def learn(form: Form, p: Products, x: Inputs, w_out: Tensor, w_in: Tensor, scratch: Scratch) -> Written:
    """What the memories write of keys, values and rates, at the weights of their chunks' starts."""
    n, N, b, d, _, h = w_out.shape
    C, Phi, t, both = form.C, scratch.Phi, x.tables, w_out[..., :2, :].flatten(-2).mT  # both [n, N, b, 2 h, d]
    if form.writes_in:
        z = p.mm(x.R[form.lead :, :, :, :3].flatten(-2).flatten(3, 4), w_in[..., :2, :].flatten(-2).mT).unflatten(
            3, (3, C)
        )
    else:
        z = p.mm(x.R[form.lead :].view(n * N, b * 2 * C, d), w_in.mT).view(n, N, b, 2, C, h)
    aten.silu.out(z[:, :, :, :2].unsqueeze(-2).expand_as(Phi), out=Phi)
    key, value, nk = Phi[:, :, :, 0], Phi[:, :, :, 1], None
    factors = t.f.unsqueeze(-1)
    if form.unit_keys:
        nk = length(key[..., 0, :])
        factors = factors / nk.unsqueeze(-1)
    keys, keys_prev, keys_end = key.mul_(factors)[..., 0, :], key[..., 1, :], key[..., 2:, :].flatten(-2)
    W = w_out[..., :2, :].sum(-2) if form.writes_in or form.l2 else None
    target, e = _errors(form, p, x, keys, nk, value[..., :2, :].flatten(-2), both, W, scratch.norm_target)
    delta = g_in = scale = slope = squared = None
    if form.writes_in:
        delta = p.mm(e, W)
        g_in = aten.silu_backward(delta, z[:, :, :, 0])
    drive, drive_in = e, g_in
    if form.scaled:
        scale, slope, squared = _scale(keys, nk, e, g_in)
        drive, drive_in = scale * e, None if g_in is None else scale * g_in
    S = S_in = r_in = rows_in = None
    if form.dgd_out:
        S = torch.addcmul(t.D, EXACT.mm(keys, keys.mT), t.E)
        r = p.mm(key[..., :2, :].flatten(-2), both, drive)
        rows = lower_solve(S, r)
    else:
        r, rows = drive, drive * t.eta
    if form.writes_in:
        S_in, r_in, rows_in = _input_rows(form, x, z, drive_in)
    return Written(
        z, nk, keys, keys_prev, keys_end, value[..., 0, :], target, scratch.norm_target, e, W, delta, g_in, scale, slope,
        squared, S, r, rows, S_in, r_in, rows_in,
    )  # fmt: skip


def _errors(form: Form, p: Products, x: Inputs, keys, nk, values, both, W, norm) -> tuple[Tensor | None, Tensor]:
    """Own targets before they are made unit, and e: k (where it is residual) + W phi_k (l2) - target."""
    lead, m, slots = form.lead, form.targets, x.R[: form.n, ..., -1, :]  # zeros for scalar memories
    k, v = slots[:, :, :, 0], slots[:, :, :, 1]
    base = k if form.residual else torch.zeros_like(k[:1, :1, :1])
    target = None
    if m:
        target = p.mm(values[:m], both[:m], v[:m])
        if form.own:
            length(target[lead:], out=norm[lead:])
        target[:lead].tanh_()
    if form.own:
        e = torch.addcdiv(base, target, norm, value=-1)
    else:
        e = torch.sub(base, v)
        if lead:
            e[:lead] = -target
    if not form.l2:
        return target, e
    if nk is None:
        return target, p.mm(keys, W.mT, e)
    return target, e.addcmul_(p.mm(keys, W.mT), nk)


def _scale(keys, nk, e, g_in) -> tuple[Tensor, Tensor, Tensor]:
    """`inner.step_scale`, the curvature that it bounds, and |e|^2 + epsilon^2."""
    slope, squared = dot(keys, keys), dot(e, e) + EPSILON**2
    slope = slope if nk is None else slope * nk
    if g_in is not None:
        slope = slope + dot(g_in, g_in) / squared
    return slope.clamp(min=1.0).reciprocal(), slope, squared


def _input_rows(form: Form, x: Inputs, z, drive_in) -> tuple[Tensor | None, Tensor, Tensor]:
    """The system, the right-hand side and the rows of the input layers. Keys are k, the same for all memories."""
    t = x.tables
    if not form.dgd_in:
        return None, drive_in, drive_in * t.eta
    k = x.R[form.lead, :, :, 0, :, 0]
    S_in = torch.addcmul(t.D, EXACT.mm(k, k.mT), t.E)
    r_in = drive_in + z[:, :, :, 2]
    return S_in, r_in, lower_solve(S_in, r_in)
