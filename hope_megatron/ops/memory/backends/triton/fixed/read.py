"""Rows and reads of a memory with fixed features, and the read's backward: one program per chunk and stream.

u = Y r    y = (A + gamma V) phi_q - (Gamma . phi_q keys^T) (eta u)
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.launching import kernel
from hope_megatron.ops.memory.backends.triton.system import decay, decay_t


@triton.jit
def through_input_layer(
    d_phi, z, w_at, d_z_at, HEADS, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The gradient of x [C, d] in phi = silu(z) [C, h] with z = W2 x; that of z is stored."""
    d_z = p.operand(d_phi * p.dsilu(z, PRECISION), PRECISION)
    p.store_rows(d_z_at, d_z, HEADS * H, C, H)
    return p.mm(d_z, p.load_t(w_at, D, H), PRECISION)


@kernel
def solve(
    keys_in, phi_v_in, inverse_in, base_in, target_in, probe_in,  # as `prepare` left them
    states,  # V^T at chunk starts, [N, chunks + 1, h, d]
    u_out,  # [B, T, H, d]
    target_out, target_scale_out,  # unit targets and 1 / norm: [B, T, H, d], [B, T, H]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    DGD: tl.constexpr, PROBE: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0), tl.program_id(1)
    at = p.place(i, n, T, HEADS, C)
    V = p.operand(p.load(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, H, D), PRECISION)
    r = p.rows(base_in + at * D, HEADS * D, C, D).to(tl.float32)
    if OWN:
        target = p.rows(target_in + at * D, HEADS * D, C, D).to(tl.float32)
        target = p.add_mm(target, p.rows(phi_v_in + at * H, HEADS * H, C, H), V, PRECISION)
        if UNIT_TARGET:
            scale = p.inverse_norm(target, PRECISION)
            target = target * scale[:, None]
            p.store_each(target_scale_out + at, scale, HEADS, C)
        p.store_rows(target_out + at * D, target, HEADS * D, C, D)
        r -= target
    if PROBE:
        held = p.mm(p.rows(keys_in + at * H, HEADS * H, C, H), V, PRECISION)
        r += held * p.each(probe_in + at, HEADS, C)[:, None]
    if DGD:
        r = p.mm(p.load(inverse_in + (n * chunks + i).to(tl.int64) * C * C, C, C), r, PRECISION)
    p.store_rows(u_out + at * D, r, HEADS * D, C, D)


@kernel
def read(
    q_in, keys_in, u_in, log_eta, log_alpha,  # [B, T, H, d or h], [B, T, H]
    w_in, anchor, states,
    y_out,  # [B, T, H, d]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0), tl.program_id(1)
    at, fixed = p.place(i, n, T, HEADS, C), n.to(tl.int64) * D * H
    q = p.rows(q_in + at * D, HEADS * D, C, D)
    phi_q = q
    if TWO_LAYERS:
        phi_q = p.silu(p.mm(q, p.load(w_in + fixed, D, H), PRECISION), PRECISION)
    phi_q = p.operand(phi_q, PRECISION)
    y = p.mm(phi_q, p.load(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, H, D), PRECISION)
    if CAUSAL:
        total = tl.cumsum(p.each(log_alpha + at, HEADS, C), 0)
        eta = p.exp(p.each(log_eta + at, HEADS, C), PRECISION)
        scores = p.mm(phi_q, p.columns(keys_in + at * H, HEADS * H, C, H), PRECISION)
        scores = scores * decay(total, total, False, PRECISION, C) * eta[None, :]
        y = p.add_mm(y * p.exp(total, PRECISION)[:, None], -scores, p.rows(u_in + at * D, HEADS * D, C, D), PRECISION)
    if ANCHORED:
        y = p.add_mm(y, phi_q, p.load(anchor + fixed, H, D), PRECISION)
    if SKIP:
        y += q
    p.store_rows(y_out + at * D, y, HEADS * D, C, D)


@kernel
def read_backward_queries(
    d_y_in, q_in, keys_in, u_in, log_eta, log_alpha,
    w_in, anchor, states,
    phi_q_out, d_z_out, d_q_out,  # features of queries; gradients of their pre-activations [B, T, H, h] and of them [B, T, H, d]
    d_log_alpha_out,  # what the read gives to log alpha, [B, T, H]: rho = <d_y, y - A phi_q> of this and later tokens
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a read gives to its query."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, fixed = p.place(i, n, T, HEADS, C), n.to(tl.int64) * D * H
    phi_q = p.rows(q_in + at * D, HEADS * D, C, D)
    if TWO_LAYERS:
        phi_q = p.silu(p.mm(phi_q, p.load(w_in + fixed, D, H), PRECISION), PRECISION)
        p.store_rows(phi_q_out + at * H, phi_q, HEADS * H, C, H)
    phi_q = p.operand(phi_q, PRECISION)
    d_y = p.rows(d_y_in + at * D, HEADS * D, C, D)
    d_phi = p.mm(d_y, p.load_t(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, H, D), PRECISION)
    if CAUSAL:
        total = tl.cumsum(p.each(log_alpha + at, HEADS, C), 0)
        eta = p.exp(p.each(log_eta + at, HEADS, C), PRECISION)
        d_phi = d_phi * p.exp(total, PRECISION)[:, None]
        d_scores = p.mm(d_y, p.columns(u_in + at * D, HEADS * D, C, D), PRECISION)
        d_scores = -d_scores * decay(total, total, False, PRECISION, C) * eta[None, :]
        scores = p.mm(phi_q, p.columns(keys_in + at * H, HEADS * H, C, H), PRECISION)
        rho = tl.sum(d_phi * phi_q, 1) + tl.sum(d_scores * scores, 1)
        p.store_each(d_log_alpha_out + at, tl.cumsum(rho, 0, reverse=True), HEADS, C)
        d_phi = p.add_mm(d_phi, d_scores, p.rows(keys_in + at * H, HEADS * H, C, H), PRECISION)
    else:
        p.store_each(d_log_alpha_out + at, tl.zeros([C], tl.float32), HEADS, C)
    if ANCHORED:
        d_phi = p.add_mm(d_phi, d_y, p.load_t(anchor + fixed, H, D), PRECISION)
    if TWO_LAYERS:
        z = p.mm(p.rows(q_in + at * D, HEADS * D, C, D), p.load(w_in + fixed, D, H), PRECISION)
        d_phi = through_input_layer(d_phi, z, w_in + fixed, d_z_out + at * H, HEADS, C, D, H, PRECISION)
    if SKIP:
        d_phi += p.rows(d_y_in + at * D, HEADS * D, C, D)
    p.store_rows(d_q_out + at * D, d_phi, HEADS * D, C, D)


@kernel
def read_backward_writes(
    d_y_in, phi_q_in, keys_in, u_in, log_eta, log_alpha, inverse_in,
    d_keys_out, d_r_out,  # [B, T, H, h], [B, T, H, d]
    d_states,  # [N, chunks + 1, h, d]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    DGD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a read gives to what was written: to keys, to r = Y^-1 u and to V at the chunk's start."""
    i, n = tl.program_id(0), tl.program_id(1)
    at = p.place(i, n, T, HEADS, C)
    total = tl.cumsum(p.each(log_alpha + at, HEADS, C), 0)
    d_y = p.rows(d_y_in + at * D, HEADS * D, C, D)
    phi_q_t = p.columns(phi_q_in + at * H, HEADS * H, C, H)
    state = d_states + (n.to(tl.int64) * (chunks + 1) + i) * D * H
    if CAUSAL:
        p.store(state, p.mm(phi_q_t, d_y * p.exp(total, PRECISION)[:, None], PRECISION), H, D)
        eta = p.exp(p.each(log_eta + at, HEADS, C), PRECISION)
        reach = decay_t(total, total, False, PRECISION, C) * -eta[:, None]
        scores = p.mm(p.rows(keys_in + at * H, HEADS * H, C, H), phi_q_t, PRECISION) * reach
        d_u = p.mm(scores, d_y, PRECISION)
        if DGD:
            d_u = p.mm(p.load_t(inverse_in + (n * chunks + i).to(tl.int64) * C * C, C, C), d_u, PRECISION)
        p.store_rows(d_r_out + at * D, d_u, HEADS * D, C, D)
        u = p.rows(u_in + at * D, HEADS * D, C, D)
        d_scores = p.mm(u, p.columns(d_y_in + at * D, HEADS * D, C, D), PRECISION) * reach
        p.store_rows(
            d_keys_out + at * H, p.mm(d_scores, p.rows(phi_q_in + at * H, HEADS * H, C, H), PRECISION), HEADS * H, C, H
        )
    else:
        p.store(state, p.mm(phi_q_t, d_y, PRECISION), H, D)
        p.store_rows(d_keys_out + at * H, tl.zeros([C, H], tl.float32), HEADS * H, C, H)
        p.store_rows(d_r_out + at * D, tl.zeros([C, D], tl.float32), HEADS * D, C, D)
