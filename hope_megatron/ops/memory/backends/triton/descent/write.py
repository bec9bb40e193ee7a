"""A residual memory of two layers that descends on 0.5 |M(k) - v|^2, with or without momentum: the loop over chunks, and its tape.

    z = W2 k    phi = silu(z)    e = k + W phi - v    delta = W^T e    g = silu'(z) . delta
    slope = |phi|^2 + |g|^2 / |e|^2    scale = eta / max(1, slope)    drive = scale e    drive_in = scale g
    W <- gamma_C W + m_C0 S - phi^T (m_C drive)    S <- Theta_C0 S - phi^T (Theta_C drive)    (W2, S2: k and drive_in)
Without momentum m is Gamma and there is no S. The tables come from PyTorch, [N, chunks, ...]; tokens that fill a tile have eta 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.launching import kernel


@triton.jit
def errors(
    k_at, v_at, V_at, w_in_at, row, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """z, phi [C, h], e [C, d], delta [C, h], and max(1, slope) [C] (not SCALED: 1), by W^T [h, d] and W2^T [d, h]."""
    k = p.rows(k_at, row, C, D).to(tl.float32)
    z = p.mm(k, p.load(w_in_at, D, H), PRECISION)
    phi = p.silu(z, PRECISION)
    e = p.add_mm(k - p.rows(v_at, row, C, D), phi, p.load(V_at, H, D), PRECISION)
    delta = p.mm(e, p.load_t(V_at, H, D), PRECISION)
    slope = tl.sum(phi, 1) * 0.0 + 1.0
    if SCALED:
        g = delta * p.dsilu(z, PRECISION)
        slope = tl.maximum(slope, tl.sum(phi * phi, 1) + tl.sum(g * g, 1) / (tl.sum(e * e, 1) + p.SMALL))
    return z, phi, e, delta, slope


@triton.jit
def written(
    x_at, row, drive, V_at, S_at, first_V, first_S, next_V, next_S, reach, reach_speed, kept, moved, kept_speed, anew,
    C: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A layer [x, y] after the chunk, which is keyed by x [C, X] and learns drive [C, Y]."""
    x = p.columns(x_at, row, C, X)
    new = p.load(V_at, X, Y) * kept - p.mm_exact(x, drive * reach[:, None], PRECISION)
    if MOMENTUM:
        S = p.load(S_at, X, Y)
        new += S * moved
        S = S * kept_speed - p.mm_exact(x, drive * reach_speed[:, None], PRECISION)
        if anew:
            S = p.load(first_S, X, Y)
        p.store(next_S, S, X, Y)
    if anew:
        new = p.load(first_V, X, Y)
    p.store(next_V, new, X, Y)


@triton.jit
def over_the_chunk(ends_at):
    """gamma_C, m_C0, Theta_C0."""
    return tl.load(ends_at), tl.load(ends_at + 1), tl.load(ends_at + 2)


@kernel
def descent_chain(
    k, v,  # [B, T, H, d]
    eta, reach, reach_speed, ends,  # eta, m_C, Theta_C [N, chunks, C]; gamma_C, m_C0, Theta_C0 [N, chunks, 3]
    phi,  # scratch, [N, C, h]
    states, speeds,  # W^T and S^T at chunk starts and the end, [N, chunks + 1, h, d]; the first are given
    states_in, speeds_in,  # W2^T and S2^T, [N, chunks + 1, d, h]
    begins,
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    MOMENTUM: tl.constexpr, SCALED: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    first, phi_at, row = n * (chunks + 1) * D * H, phi + n * C * H, HEADS * D
    for i in tl.range(0, chunks, disable_licm=True):  # hoisted addresses would fill the registers
        at, chunk, now = p.place(i, n, T, HEADS, C), n * chunks + i, first + i * D * H
        z, features, e, delta, slope = errors(
            k + at * D, v + at * D, states + now, states_in + now, row, C, D, H, SCALED, PRECISION
        )
        p.store(phi_at, features, C, H)
        scale = p.each(eta + chunk * C, 1, C) / slope
        kept, moved, kept_speed = over_the_chunk(ends + chunk * 3)
        to_end, to_speed = p.each(reach + chunk * C, 1, C), p.each(reach_speed + chunk * C, 1, C)
        anew = False
        if RESETS:
            anew = tl.load(begins + n * (chunks + 1) + i + 1) != 0
        tl.debug_barrier()  # features, stored as rows, are read as columns
        then = now + D * H
        written(
            phi_at, H, e * scale[:, None], states + now, speeds + now, states + first, speeds + first,
            states + then, speeds + then, to_end, to_speed, kept, moved, kept_speed, anew, C, H, D, MOMENTUM, PRECISION,
        )  # fmt: skip
        g = delta * p.dsilu(z, PRECISION)
        written(
            k + at * D, row, g * scale[:, None], states_in + now, speeds_in + now, states_in + first, speeds_in + first,
            states_in + then, speeds_in + then, to_end, to_speed, kept, moved, kept_speed, anew, C, D, H, MOMENTUM, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # the next chunk reads what other threads stored


@kernel
def descent_tape(
    k, v, eta, states, states_in,
    phi, z, delta, e, slope,  # [B, T, H, h] thrice, [B, T, H, d], max(1, slope) [N, chunks, C]
    drive, drive_in,  # [B, T, H, d], [B, T, H, h]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk and stream: what reads and backward need of what was written."""
    i, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, chunk, now = p.place(i, n, T, HEADS, C), n * chunks + i, (n * (chunks + 1) + i) * D * H
    row, row_h = HEADS * D, HEADS * H
    found_z, features, found_e, found_delta, found_slope = errors(
        k + at * D, v + at * D, states + now, states_in + now, row, C, D, H, SCALED, PRECISION
    )
    scale = (p.each(eta + chunk * C, 1, C) / found_slope)[:, None]
    p.store_rows(phi + at * H, features, row_h, C, H)
    p.store_rows(z + at * H, found_z, row_h, C, H)
    p.store_rows(delta + at * H, found_delta, row_h, C, H)
    p.store_rows(e + at * D, found_e, row, C, D)
    p.store_each(slope + chunk * C, found_slope, 1, C)
    p.store_rows(drive + at * D, found_e * scale, row, C, D)
    p.store_rows(drive_in + at * H, found_delta * p.dsilu(found_z, PRECISION) * scale, row_h, C, H)
