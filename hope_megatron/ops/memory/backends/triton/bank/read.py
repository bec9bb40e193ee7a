"""M_mem's read where both layers are written: one program per chunk and stream.

z = A2 q + gamma V2 q - (Gamma . q k^T) rows_in     phi = silu(z)     y = A phi + gamma V phi - (Gamma . phi keys^T) rows
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.launching import kernel
from hope_megatron.ops.memory.backends.triton.system import decay


@triton.jit
def answer(
    x, V_at, A_at, keys_at, u_at, HEADS, gamma, reach,
    C: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a layer, V^T [X, Y], written along the chunk, makes of x [C, X]: [C, Y]. reach: Gamma eta."""
    y = p.mm(x, p.load(V_at, X, Y), PRECISION)
    if CAUSAL:
        scores = p.mm(x, p.columns(keys_at, HEADS * X, C, X), PRECISION) * reach
        y = y * gamma[:, None] - p.mm(scores, p.rows(u_at, HEADS * Y, C, Y), PRECISION)
    if ANCHORED:
        y += p.mm(x, p.load(A_at, X, Y), PRECISION)
    return y


@triton.jit
def answer_backward(
    d_y, x, V_at, A_at, keys_at, u_at, HEADS, gamma, reach,
    C: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of x [C, X], and rho = <d_y, y - A x> [C]."""
    d_x = p.mm(d_y, p.load_t(V_at, X, Y), PRECISION)
    rho = gamma * 0.0
    if CAUSAL:
        d_x = d_x * gamma[:, None]
        d_scores = -p.mm(d_y, p.columns(u_at, HEADS * Y, C, Y), PRECISION) * reach
        scores = p.mm(x, p.columns(keys_at, HEADS * X, C, X), PRECISION)
        rho = tl.sum(d_x * x, 1) + tl.sum(d_scores * scores, 1)
        d_x += p.mm(d_scores, p.rows(keys_at, HEADS * X, C, X), PRECISION)
    if ANCHORED:
        d_x += p.mm(d_y, p.load_t(A_at, X, Y), PRECISION)
    return d_x, rho


@triton.jit
def features_of_queries(
    q_at, V_at, A_at, keys_at, u_at, log_eta_at, log_alpha_at, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries [C, d], their z and phi [C, h]; gamma [C] and reach [C, C] of the chunk."""
    total = tl.cumsum(p.each(log_alpha_at, HEADS, C), 0)
    eta = p.exp(p.each(log_eta_at, HEADS, C), PRECISION)
    gamma, reach = p.exp(total, PRECISION), decay(total, total, False, PRECISION, C) * eta[None, :]
    q = p.rows(q_at, HEADS * D, C, D)
    z = answer(q, V_at, A_at, keys_at, u_at, HEADS, gamma, reach, C, D, H, ANCHORED, CAUSAL, PRECISION)
    return q, z, p.operand(p.silu(z, PRECISION), PRECISION), gamma, reach


@kernel
def moving_read(
    q_in, k, keys, u_in, u, log_eta, log_alpha,  # [B, T, H, d], d, h, h, d; [B, T, H]
    states_in, anchor_in, states, anchor,  # V2^T, V^T at chunk starts [N, chunks + 1, d, h], [N, chunks + 1, h, d]; A2^T, A^T
    y_out,
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, state, fixed = p.place(i, n, T, HEADS, C), (n * (chunks + 1) + i) * D * H, n * D * H
    q, _, phi, gamma, reach = features_of_queries(
        q_in + at * D, states_in + state, anchor_in + fixed, k + at * D, u_in + at * H, log_eta + at, log_alpha + at, HEADS,
        C, D, H, ANCHORED, CAUSAL, PRECISION,
    )  # fmt: skip
    y = answer(
        phi, states + state, anchor + fixed, keys + at * H, u + at * D, HEADS, gamma, reach,
        C, H, D, ANCHORED, CAUSAL, PRECISION,
    )  # fmt: skip
    if SKIP:
        y += q
    p.store_rows(y_out + at * D, y, HEADS * D, C, D)


@kernel
def moving_read_backward(
    d_y_in, q_in, k, keys, u_in, u, log_eta, log_alpha, states_in, anchor_in, states, anchor,
    phi_out, d_z_out, d_q_out,  # features of queries and gradients of their pre-activations [B, T, H, h]; of queries [B, T, H, d]
    d_log_alpha_out,  # what the read adds to it, [B, T, H]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a read gives to its query. What it gives to what was written: fixed/read.py, once for each layer."""
    i, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, state, fixed = p.place(i, n, T, HEADS, C), (n * (chunks + 1) + i) * D * H, n * D * H
    q, z, phi, gamma, reach = features_of_queries(
        q_in + at * D, states_in + state, anchor_in + fixed, k + at * D, u_in + at * H, log_eta + at, log_alpha + at, HEADS,
        C, D, H, ANCHORED, CAUSAL, PRECISION,
    )  # fmt: skip
    p.store_rows(phi_out + at * H, phi, HEADS * H, C, H)
    d_phi, rho = answer_backward(
        p.rows(d_y_in + at * D, HEADS * D, C, D), phi, states + state, anchor + fixed, keys + at * H, u + at * D,
        HEADS, gamma, reach, C, H, D, ANCHORED, CAUSAL, PRECISION,
    )  # fmt: skip
    d_z = p.operand(d_phi * p.dsilu(z, PRECISION), PRECISION)
    p.store_rows(d_z_out + at * H, d_z, HEADS * H, C, H)
    d_q, rho_in = answer_backward(
        d_z, q, states_in + state, anchor_in + fixed, k + at * D, u_in + at * H,
        HEADS, gamma, reach, C, D, H, ANCHORED, CAUSAL, PRECISION,
    )  # fmt: skip
    if SKIP:
        d_q += p.rows(d_y_in + at * D, HEADS * D, C, D)
    p.store_rows(d_q_out + at * D, d_q, HEADS * D, C, D)
    p.store_each(d_log_alpha_out + at, tl.cumsum(rho + rho_in, 0, reverse=True), HEADS, C)
