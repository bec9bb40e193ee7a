"""The read of a memory that descends, and its backward: one program per chunk and stream.

z = gamma W2 q + m0 S2 q - (m . q k^T) drive_in    phi_q = silu(z)    y = gamma W phi_q + m0 S phi_q - (m . phi_q phi^T) drive
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.launching import kernel


@triton.jit
def answered(
    x, keys_at, drive_at, V_at, S_at, m_at, gamma, m0, HEADS,
    C: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a layer [x, y], written along the chunk, makes of x [C, X]."""
    y = p.mm(x, p.load(V_at, X, Y), PRECISION) * gamma[:, None]
    if MOMENTUM:
        y += p.mm(x, p.load(S_at, X, Y), PRECISION) * m0[:, None]
    scores = p.mm(x, p.columns(keys_at, HEADS * X, C, X), PRECISION) * p.load(m_at, C, C)
    return y - p.mm(scores, p.rows(drive_at, HEADS * Y, C, Y), PRECISION)


@triton.jit
def answered_backward(
    d_y, x, keys_at, drive_at, V_at, S_at, m_at, gamma, m0, HEADS,
    C: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x [C, X], of m [C, C], of gamma and m0 [C]."""
    back = p.mm(d_y, p.load_t(V_at, X, Y), PRECISION)
    d_x, d_gamma, d_m0 = back * gamma[:, None], tl.sum(back * x, 1), gamma * 0.0
    if MOMENTUM:
        back = p.mm(d_y, p.load_t(S_at, X, Y), PRECISION)
        d_x, d_m0 = d_x + back * m0[:, None], tl.sum(back * x, 1)
    d_scores = -p.mm(d_y, p.columns(drive_at, HEADS * Y, C, Y), PRECISION)
    d_m = d_scores * p.mm(x, p.columns(keys_at, HEADS * X, C, X), PRECISION)
    d_x += p.mm(d_scores * p.load(m_at, C, C), p.rows(keys_at, HEADS * X, C, X), PRECISION)
    return d_x, d_m, d_gamma, d_m0


@kernel
def descent_read(
    q, k, phi, drive, drive_in, m, gamma, m0,  # [B, T, H, .]; [N, chunks, C, C], [N, chunks, C] twice
    states, speeds, states_in, speeds_in,
    y,
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOMENTUM: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, chunk, now = p.place(i, n, T, HEADS, C), n * chunks + i, (n * (chunks + 1) + i) * D * H
    decayed, moved, m_at = p.each(gamma + chunk * C, 1, C), p.each(m0 + chunk * C, 1, C), m + chunk * C * C
    x = p.rows(q + at * D, HEADS * D, C, D)
    z = answered(
        x, k + at * D, drive_in + at * H, states_in + now, speeds_in + now, m_at, decayed, moved, HEADS,
        C, D, H, MOMENTUM, PRECISION,
    )  # fmt: skip
    found = answered(
        p.silu(z, PRECISION), phi + at * H, drive + at * D, states + now, speeds + now, m_at, decayed, moved, HEADS,
        C, H, D, MOMENTUM, PRECISION,
    )  # fmt: skip
    if SKIP:
        found += x
    p.store_rows(y + at * D, found, HEADS * D, C, D)


@kernel
def descent_read_backward(
    d_y, q, k, phi, drive, drive_in, m, gamma, m0,
    states, speeds, states_in, speeds_in,
    phi_q, d_z, d_q,  # out: features of queries, gradients of z [B, T, H, h] and of q
    d_m, d_gamma, d_m0,  # out: as m, gamma, m0
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOMENTUM: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a read gives to its query and to the tables."""
    i, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, chunk, now = p.place(i, n, T, HEADS, C), n * chunks + i, (n * (chunks + 1) + i) * D * H
    decayed, moved, m_at = p.each(gamma + chunk * C, 1, C), p.each(m0 + chunk * C, 1, C), m + chunk * C * C
    x, d = p.rows(q + at * D, HEADS * D, C, D), p.rows(d_y + at * D, HEADS * D, C, D)
    z = answered(
        x, k + at * D, drive_in + at * H, states_in + now, speeds_in + now, m_at, decayed, moved, HEADS,
        C, D, H, MOMENTUM, PRECISION,
    )  # fmt: skip
    features = p.silu(z, PRECISION)
    p.store_rows(phi_q + at * H, features, HEADS * H, C, H)
    d_features, of_m, of_gamma, of_m0 = answered_backward(
        d, features, phi + at * H, drive + at * D, states + now, speeds + now, m_at, decayed, moved, HEADS,
        C, H, D, MOMENTUM, PRECISION,
    )  # fmt: skip
    d_features = d_features * p.dsilu(z, PRECISION)
    p.store_rows(d_z + at * H, d_features, HEADS * H, C, H)
    d_x, more_m, more_gamma, more_m0 = answered_backward(
        d_features, x, k + at * D, drive_in + at * H, states_in + now, speeds_in + now, m_at, decayed, moved, HEADS,
        C, D, H, MOMENTUM, PRECISION,
    )  # fmt: skip
    if SKIP:
        d_x += d
    p.store_rows(d_q + at * D, d_x, HEADS * D, C, D)
    p.store(d_m + chunk * C * C, of_m + more_m, C, C)
    p.store_each(d_gamma + chunk * C, of_gamma + more_gamma, 1, C)
    p.store_each(d_m0 + chunk * C, of_m0 + more_m0, 1, C)


@kernel
def descent_read_backward_writes(
    d_y, x, keys, drive, m, gamma, m0,  # of one layer [x, y]: [B, T, H, Y], [B, T, H, X] twice, [B, T, H, Y]
    d_keys, d_drive,  # out, [B, T, H, X] and [B, T, H, Y]
    d_states, d_speeds,  # out, of all but the last, [N, chunks + 1, X, Y]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a read gives to what was written, with X = H and Y = D."""
    i, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, chunk, now = p.place(i, n, T, HEADS, C), n * chunks + i, (n * (chunks + 1) + i) * D * H
    d, x_t, m_t = (
        p.rows(d_y + at * D, HEADS * D, C, D),
        p.columns(x + at * H, HEADS * H, C, H),
        p.load_t(m + chunk * C * C, C, C),
    )
    p.store(d_states + now, p.mm(x_t, d * p.each(gamma + chunk * C, 1, C)[:, None], PRECISION), H, D)
    if MOMENTUM:
        p.store(d_speeds + now, p.mm(x_t, d * p.each(m0 + chunk * C, 1, C)[:, None], PRECISION), H, D)
    scores = p.mm(p.rows(keys + at * H, HEADS * H, C, H), x_t, PRECISION) * m_t
    p.store_rows(d_drive + at * D, -p.mm(scores, d, PRECISION), HEADS * D, C, D)
    d_scores = p.mm(p.rows(drive + at * D, HEADS * D, C, D), p.columns(d_y + at * D, HEADS * D, C, D), PRECISION) * m_t
    p.store_rows(d_keys + at * H, -p.mm(d_scores, p.rows(x + at * H, HEADS * H, C, H), PRECISION), HEADS * H, C, H)
