"""A chunk of HOPE's own memories: forward, and what backward needs of it (scan.py says for which rule).

Shapes: N = B H. Memories are stacked memory-major, in the order mem, k, v, eta, alpha: [5 N, ...], so that the vector memories
([3 N, ...]), the scalar ones ([2 N, ...]) and single memories are slices. README.md has the notation and the formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.inner import EPSILON
from hope_megatron.ops.memory.layout import Weights
from hope_megatron.ops.memory.rule import MemoryRule
from hope_megatron.ops.memory.tables import decay_matrix, unit_lower_inverse


class Tape(NamedTuple):
    """Everything a chunk computed. "Rows" are erase and drive together: W_C = gamma_C W_0 - sum_s Gamma_Cs rows_s keys_s^T.

    Where output layers alone are written, what is marked "in" is None, and grams and inverse begin with those of the keys.
    """

    w: Weights  # at the chunk's start
    x: Tensor  # q, x_k, x_v, x_k, x_k: what each memory is applied to first, [5 N, C, d]
    z_x: Tensor  # its pre-activations, [5 N, C, h]
    phi_x: Tensor  # silu of those of all but mem, [4 N, C, h]
    kv: Tensor  # unit keys, then unit values, [2 N, C, d]
    kv_scale: Tensor  # 1 / norm of what they were made of, [2 N, C, 1]
    eta: Tensor  # [N, C, 1]
    log_alpha: Tensor  # [N, C]
    gamma: Tensor  # [N, C, 1]
    Gamma: Tensor  # [N, C, C]
    gamma_prev: Tensor  # [N, C, 1]
    Gamma_prev: Tensor  # strictly lower, [N, C, C]
    k_n: Tensor  # keys, once per memory: [5 N, C, d]
    v_n: Tensor  # values, once per memory
    z_k: Tensor  # pre-activations of the keys, [5 N, C, h]
    z_v: Tensor  # and of the values
    phi_v: Tensor  # silu(z_v)
    keys: Tensor  # unit(silu(z_k)), [5 N, C, h]
    keys_scale: Tensor  # [5 N, C, 1]
    target: Tensor  # unit own targets of the vector memories, [3 N, C, d]
    target_scale: Tensor  # [3 N, C, 1]
    error: Tensor  # [3 N, C, d]
    error_scalar: Tensor  # [2 N, C, 1]
    delta: Tensor | None  # in: errors carried to the hidden layer, [5 N, C, h]
    drive: Tensor | None  # in: delta silu'(z_k), [5 N, C, h]
    held: Tensor  # W_0 keys of the vector memories, [3 N, C, d]
    held_scalar: Tensor  # [2 N, C, 1]
    grams: Tensor  # of k, then of the keys of the five output layers, [6 N, C, C]
    inverse: Tensor  # of the triangular systems, [6 N, C, C]
    rows_in: Tensor | None  # in: [5 N, C, h]
    rows_vector: Tensor  # [3 N, C, d]
    rows_scalar: Tensor  # [2 N, C, 1]
    scores: Tensor | None = None  # in: q k^T, [N, C, C]
    hidden: Tensor | None = None  # pre-activation of the read, [N, C, h]
    phi_q: Tensor | None = None  # its silu
    scores_out: Tensor | None = None  # phi_q keys^T, [N, C, C]
    held_q: Tensor | None = None  # W_0 phi_q, [N, C, d]
    # What the learned initial state A answers where W_0 answers z_k, held, held_scalar, z_x of q and held_q: with an anchor only.
    initial_in: Tensor | None = None
    initial_vector: Tensor | None = None
    initial_scalar: Tensor | None = None
    initial_x: Tensor | None = None
    initial_q: Tensor | None = None


def write(q, x_k, x_v, eta_logit, alpha_logit, w: Weights, anchor: Weights | None, rule: MemoryRule) -> Tape:
    """What a chunk writes. Arguments as of `_ManualScan`, of one chunk. anchor: what retention forgets towards, None: zero."""
    N, C, _ = q.shape
    x = torch.cat([q, x_k, x_v, x_k, x_k])
    z_x = torch.bmm(x, w.w_in.mT)
    phi_x = F.silu(z_x[N:])
    kv = torch.baddbmm(x[N : 3 * N], phi_x[: 2 * N], w.w_vector[N:].mT)
    kv_scale = inverse_norm(kv)
    kv.mul_(kv_scale)
    rates = torch.bmm(phi_x[2 * N :], w.w_scalar.mT).view(2, N, C)
    eta = torch.sigmoid_(rates[0] + eta_logit).mul_(rule.eta_max).unsqueeze(-1)
    log_alpha = F.logsigmoid(rates[1] + alpha_logit)
    decay = _decay(log_alpha)

    k, v = kv[:N], kv[N:]
    k_n, v_n = repeat(k, 5), repeat(v, 5)
    z_k, z_v = torch.bmm(k_n, w.w_in.mT), torch.bmm(v_n, w.w_in.mT)
    keys, phi_v = F.silu(z_k), F.silu(z_v)
    keys_scale = inverse_norm(keys)
    keys.mul_(keys_scale)
    error, error_scalar, target, target_scale = _errors(k, v_n[: 3 * N], phi_v, w, rule)
    delta = drive = None
    writes_in = rule.written_layers == "all"
    if writes_in:
        delta = torch.empty_like(keys)
        torch.bmm(error, w.w_vector, out=delta[: 3 * N])
        torch.mul(error_scalar, w.w_scalar, out=delta[3 * N :])
        drive = torch.ops.aten.silu_backward(delta, z_k)
    held, held_scalar = torch.bmm(keys[: 3 * N], w.w_vector.mT), torch.bmm(keys[3 * N :], w.w_scalar.mT)
    initial = (None, None, None)
    if anchor is not None:
        inputs = (k_n if writes_in else None, keys[: 3 * N], keys[3 * N :])
        initial = tuple(None if x is None else torch.bmm(x, a.mT) for x, a in zip(inputs, anchor))
    gradients = (drive, error, error_scalar)
    grams, inverse, rows = _solve(k, keys, eta, *decay[2:], gradients, (z_k, held, held_scalar), initial)
    tape = Tape(
        w, x, z_x, phi_x, kv, kv_scale, eta, log_alpha, *decay, k_n, v_n, z_k, z_v, phi_v, keys, keys_scale,
        target, target_scale, error, error_scalar, delta, drive, held, held_scalar, grams, inverse, *rows,
    )  # fmt: skip
    return tape._replace(initial_in=initial[0], initial_vector=initial[1], initial_scalar=initial[2])


def _decay(log_alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gamma [N, C, 1], Gamma [N, C, C], and both a token back: gamma_prev, Gamma_prev."""
    total = log_alpha.cumsum(-1)
    gamma, Gamma = total.exp(), decay_matrix(total)
    gamma_prev, Gamma_prev = F.pad(gamma[:, :-1], (1, 0), value=1.0), F.pad(Gamma[:, :-1], (0, 0, 1, 0))
    return gamma.unsqueeze(-1), Gamma, gamma_prev.unsqueeze(-1), Gamma_prev


def _errors(k: Tensor, v_n: Tensor, phi_v: Tensor, w: Weights, rule: MemoryRule):
    """e of the vector [3 N, C, d] and scalar memories [2 N, C, 1], and the unit targets with their 1 / norm."""
    N = k.size(0)
    target = torch.baddbmm(v_n, phi_v[: 3 * N], w.w_vector.mT)
    scale = inverse_norm(target)
    target.mul_(scale)
    error = (k - by_head(target, N)).flatten(0, 1) if rule.dot_target == "residual" else -target
    return error, torch.bmm(phi_v[3 * N :], w.w_scalar.mT).tanh_().neg_(), target, scale


def _solve(k: Tensor, keys: Tensor, eta: Tensor, gamma_prev: Tensor, Gamma_prev: Tensor, gradients, held, initial):
    """Grams, inverses, and the rows of the three kinds of layer:
    (I + L)^-1 eta (gradient + gamma_prev held + (1 - gamma_prev) initial). Of an input layer without a gradient: none."""
    N, C, _ = k.shape
    if gradients[0] is None:
        grams = torch.bmm(keys, keys.mT)
    else:
        grams = keys.new_empty(6 * N, C, C)
        torch.bmm(k, k.mT, out=grams[:N])
        torch.bmm(keys, keys.mT, out=grams[N:])
    inverse = unit_lower_inverse((by_head(grams, N) * (eta * Gamma_prev)).flatten(0, 1))
    erase_gamma, erase_lost = eta * gamma_prev, eta * (1 - gamma_prev)
    rows: list[Tensor | None] = []
    for own, g, h, a in zip(inverses(inverse, N), gradients, held, initial):
        if own is None:
            rows.append(None)
            continue
        right = (by_head(g, N) * eta).addcmul_(by_head(h, N), erase_gamma)
        if a is not None:
            right.addcmul_(by_head(a, N), erase_lost)
        rows.append(torch.bmm(own, right.flatten(0, 1)))
    return grams, inverse, rows


def inverses(inverse: Tensor, N: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """[6 N, C, C] -> those of the input layers (one per head, repeated), of the vector and of the scalar output layers.
    [5 N, C, C]: input layers are not written."""
    out = inverse[-5 * N :]
    return repeat(inverse[:N], 5) if len(inverse) > len(out) else None, out[: 3 * N], out[3 * N :]


def read(tape: Tape, anchor: Weights | None, rule: MemoryRule) -> tuple[Tensor, Tape]:
    """y_t = M_t(q_t) [N, C, d], and the tape with what its backward needs."""
    N = tape.eta.size(0)
    q, k, gamma = tape.x[:N], tape.kv[:N], tape.gamma
    scores = initial_x = initial_q = None
    hidden = tape.z_x[:N]
    if tape.rows_in is not None:
        scores = torch.bmm(q, k.mT)
        hidden = (gamma * hidden).baddbmm_(tape.Gamma * scores, tape.rows_in[:N], alpha=-1)
        if anchor is not None:
            initial_x = torch.bmm(q, anchor.w_in[:N].mT)
            hidden.addcmul_(initial_x, 1 - gamma)
    phi_q = F.silu(hidden)
    scores_out = torch.bmm(phi_q, tape.keys[:N].mT)
    held_q = torch.bmm(phi_q, tape.w.w_vector[:N].mT)
    y = torch.addcmul(q, gamma, held_q) if rule.read_skip else gamma * held_q
    y.baddbmm_(tape.Gamma * scores_out, tape.rows_vector[:N], alpha=-1)
    if anchor is not None:
        initial_q = torch.bmm(phi_q, anchor.w_vector[:N].mT)
        y.addcmul_(initial_q, 1 - gamma)
    tape = tape._replace(scores=scores, hidden=hidden, phi_q=phi_q, scores_out=scores_out, held_q=held_q)
    return y, tape._replace(initial_x=initial_x, initial_q=initial_q)


def end(tape: Tape, anchor: Weights | None) -> Weights:
    """The weights after the chunk's last token."""
    N = tape.eta.size(0)
    gamma_end, Gamma_end = tape.gamma[:, -1:], tape.Gamma[:, -1, :, None]
    rows = (tape.rows_in, tape.rows_vector, tape.rows_scalar)
    keys = (tape.k_n, tape.keys[: 3 * N], tape.keys[3 * N :])
    found = []
    for w, own, key, initial in zip(tape.w, rows, keys, anchor or (None, None, None)):
        if own is None:
            found.append(w)
            continue
        reached = (by_head(own, N) * Gamma_end).flatten(0, 1)
        kept = (by_head(w, N) * gamma_end).flatten(0, 1)
        if initial is not None:
            by_head(kept, N).addcmul_(by_head(initial, N), 1 - gamma_end)
        found.append(kept.baddbmm_(reached.mT, key, alpha=-1))
    return Weights(*found)


def by_head(x: Tensor, N: int) -> Tensor:
    """[n N, ...] -> [n, N, ...]."""
    return x.view(-1, N, *x.shape[1:])


def repeat(x: Tensor, n: int) -> Tensor:
    """[N, ...] -> [n N, ...]."""
    return x.expand(n, *x.shape).reshape(-1, *x.shape[1:])


def inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| along the last dim, as `unit` has it: [..., 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(EPSILON**2).rsqrt_()
