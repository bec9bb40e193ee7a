"""Rows and reads of a memory with fixed features, and the read's backward: one program per chunk and stream.

u = Y r    y = (A + gamma V) phi_q - (Gamma . phi_q keys^T) (eta u)
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton.language import (
    add_mm,
    columns,
    dsilu,
    each,
    exp,
    inverse_norm,
    load,
    load_t,
    mm,
    operand,
    place,
    rows,
    silu,
    store,
    store_each,
    store_rows,
)
from hope_megatron.ops.memory.backends.triton.launching import kernel
from hope_megatron.ops.memory.backends.triton.system import decay, decay_t


@triton.jit
def through_input_layer(
    d_phi, z, w_at, d_z_at, HEADS, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The gradient of x [C, d] in phi = silu(z) [C, h] with z = W2 x; that of z is stored."""
    d_z = operand(d_phi * dsilu(z, PRECISION), PRECISION)
    store_rows(d_z_at, d_z, HEADS * H, C, H)
    return mm(d_z, load_t(w_at, D, H), PRECISION)


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
    at = place(i, n, T, HEADS, C)
    V = operand(load(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, H, D), PRECISION)
    r = rows(base_in + at * D, HEADS * D, C, D).to(tl.float32)
    if OWN:
        target = rows(target_in + at * D, HEADS * D, C, D).to(tl.float32)
        target = add_mm(target, rows(phi_v_in + at * H, HEADS * H, C, H), V, PRECISION)
        if UNIT_TARGET:
            scale = inverse_norm(target, PRECISION)
            target = target * scale[:, None]
            store_each(target_scale_out + at, scale, HEADS, C)
        store_rows(target_out + at * D, target, HEADS * D, C, D)
        r -= target
    if PROBE:
        held = mm(rows(keys_in + at * H, HEADS * H, C, H), V, PRECISION)
        r += held * each(probe_in + at, HEADS, C)[:, None]
    if DGD:
        r = mm(load(inverse_in + (n * chunks + i).to(tl.int64) * C * C, C, C), r, PRECISION)
    store_rows(u_out + at * D, r, HEADS * D, C, D)


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
    at, fixed = place(i, n, T, HEADS, C), n.to(tl.int64) * D * H
    q = rows(q_in + at * D, HEADS * D, C, D)
    phi_q = q
    if TWO_LAYERS:
        phi_q = silu(mm(q, load(w_in + fixed, D, H), PRECISION), PRECISION)
    phi_q = operand(phi_q, PRECISION)
    y = mm(phi_q, load(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, H, D), PRECISION)
    if CAUSAL:
        total = tl.cumsum(each(log_alpha + at, HEADS, C), 0)
        eta = exp(each(log_eta + at, HEADS, C), PRECISION)
        scores = mm(phi_q, columns(keys_in + at * H, HEADS * H, C, H), PRECISION)
        scores = scores * decay(total, total, False, PRECISION, C) * eta[None, :]
        y = add_mm(y * exp(total, PRECISION)[:, None], -scores, rows(u_in + at * D, HEADS * D, C, D), PRECISION)
    if ANCHORED:
        y = add_mm(y, phi_q, load(anchor + fixed, H, D), PRECISION)
    if SKIP:
        y += q
    store_rows(y_out + at * D, y, HEADS * D, C, D)


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
    at, fixed = place(i, n, T, HEADS, C), n.to(tl.int64) * D * H
    phi_q = rows(q_in + at * D, HEADS * D, C, D)
    if TWO_LAYERS:
        phi_q = silu(mm(phi_q, load(w_in + fixed, D, H), PRECISION), PRECISION)
        store_rows(phi_q_out + at * H, phi_q, HEADS * H, C, H)
    phi_q = operand(phi_q, PRECISION)
    d_y = rows(d_y_in + at * D, HEADS * D, C, D)
    d_phi = mm(d_y, load_t(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, H, D), PRECISION)
    if CAUSAL:
        total = tl.cumsum(each(log_alpha + at, HEADS, C), 0)
        eta = exp(each(log_eta + at, HEADS, C), PRECISION)
        d_phi = d_phi * exp(total, PRECISION)[:, None]
        d_scores = mm(d_y, columns(u_in + at * D, HEADS * D, C, D), PRECISION)
        d_scores = -d_scores * decay(total, total, False, PRECISION, C) * eta[None, :]
        scores = mm(phi_q, columns(keys_in + at * H, HEADS * H, C, H), PRECISION)
        rho = tl.sum(d_phi * phi_q, 1) + tl.sum(d_scores * scores, 1)
        store_each(d_log_alpha_out + at, tl.cumsum(rho, 0, reverse=True), HEADS, C)
        d_phi = add_mm(d_phi, d_scores, rows(keys_in + at * H, HEADS * H, C, H), PRECISION)
    else:
        store_each(d_log_alpha_out + at, tl.zeros([C], tl.float32), HEADS, C)
    if ANCHORED:
        d_phi = add_mm(d_phi, d_y, load_t(anchor + fixed, H, D), PRECISION)
    if TWO_LAYERS:
        z = mm(rows(q_in + at * D, HEADS * D, C, D), load(w_in + fixed, D, H), PRECISION)
        d_phi = through_input_layer(d_phi, z, w_in + fixed, d_z_out + at * H, HEADS, C, D, H, PRECISION)
    if SKIP:
        d_phi += rows(d_y_in + at * D, HEADS * D, C, D)
    store_rows(d_q_out + at * D, d_phi, HEADS * D, C, D)


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
    at = place(i, n, T, HEADS, C)
    total = tl.cumsum(each(log_alpha + at, HEADS, C), 0)
    d_y = rows(d_y_in + at * D, HEADS * D, C, D)
    phi_q_t = columns(phi_q_in + at * H, HEADS * H, C, H)
    state = d_states + (n.to(tl.int64) * (chunks + 1) + i) * D * H
    if CAUSAL:
        store(state, mm(phi_q_t, d_y * exp(total, PRECISION)[:, None], PRECISION), H, D)
        eta = exp(each(log_eta + at, HEADS, C), PRECISION)
        reach = decay_t(total, total, False, PRECISION, C) * -eta[:, None]
        scores = mm(rows(keys_in + at * H, HEADS * H, C, H), phi_q_t, PRECISION) * reach
        d_u = mm(scores, d_y, PRECISION)
        if DGD:
            d_u = mm(load_t(inverse_in + (n * chunks + i).to(tl.int64) * C * C, C, C), d_u, PRECISION)
        store_rows(d_r_out + at * D, d_u, HEADS * D, C, D)
        u = rows(u_in + at * D, HEADS * D, C, D)
        d_scores = mm(u, columns(d_y_in + at * D, HEADS * D, C, D), PRECISION) * reach
        store_rows(
            d_keys_out + at * H, mm(d_scores, rows(phi_q_in + at * H, HEADS * H, C, H), PRECISION), HEADS * H, C, H
        )
    else:
        store(state, mm(phi_q_t, d_y, PRECISION), H, D)
        store_rows(d_keys_out + at * H, tl.zeros([C, H], tl.float32), HEADS * H, C, H)
        store_rows(d_r_out + at * D, tl.zeros([C, D], tl.float32), HEADS * D, C, D)
