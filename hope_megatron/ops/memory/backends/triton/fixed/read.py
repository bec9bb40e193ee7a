"""Rows and reads of a memory with fixed features, and the read's backward: one program per chunk and stream.

    u = Y r    rows = eta u    y = (A + gamma V) phi_q - (Gamma . phi_q keys^T) rows
"""

from __future__ import annotations

import triton.language as tl

from hope_megatron.ops.memory.backends.triton.language import (
    dsilu,
    exp,
    inverse_norm,
    load,
    load_each,
    load_rows,
    load_rows_t,
    load_t,
    mm,
    operand,
    place,
    silu,
    store,
    store_each,
    store_rows,
)
from hope_megatron.ops.memory.backends.triton.launching import kernel
from hope_megatron.ops.memory.backends.triton.system import decay, decay_t


@kernel
def rows(
    keys_in, phi_v_in, inverse_in, base_in, target_in, probe_in,  # as `prepare` left them
    states,  # V at chunk starts, [N, chunks + 1, d, h]
    u_out,  # [B, T, H, d]
    target_out, target_scale_out,  # unit targets and 1 / norm: [B, T, H, d], [B, T, H]
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    DGD: tl.constexpr, PROBE: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0), tl.program_id(1)
    at, valid = place(i, n, T, HEADS, CHUNK)
    V = operand(load_t(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, D, H), PRECISION)
    r = load_rows(base_in + at * D, HEADS * D, valid, C, D).to(tl.float32)
    if OWN:
        target = mm(load_rows(phi_v_in + at * H, HEADS * H, valid, C, H), V, PRECISION)
        target += load_rows(target_in + at * D, HEADS * D, valid, C, D)
        if UNIT_TARGET:
            scale = inverse_norm(target, 1, PRECISION)
            target = target * scale[:, None]
            store_each(target_scale_out + at, scale, HEADS, valid, C)
        store_rows(target_out + at * D, target, HEADS * D, valid, C, D)
        r -= target
    if PROBE:
        held = mm(load_rows(keys_in + at * H, HEADS * H, valid, C, H), V, PRECISION)
        r += held * load_each(probe_in + at, HEADS, valid, 0.0, C)[:, None]
    if DGD:
        r = mm(load_t(inverse_in + (n * chunks + i).to(tl.int64) * C * C, C, C), r, PRECISION)
    store_rows(u_out + at * D, r, HEADS * D, valid, C, D)


@kernel
def read(
    q_in, keys_in, u_in, log_eta_in, log_alpha_in,  # [B, T, H, d or h], [B, T, H]
    w_in, anchor, states,
    y_out,  # [B, T, H, d]
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0), tl.program_id(1)
    at, valid = place(i, n, T, HEADS, CHUNK)
    q = load_rows(q_in + at * D, HEADS * D, valid, C, D)
    phi_q = q
    if TWO_LAYERS:
        phi_q = silu(mm(q, load_t(w_in + n * H * D, H, D), PRECISION), PRECISION)
    phi_q = operand(phi_q, PRECISION)
    y = mm(phi_q, load_t(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, D, H), PRECISION)
    if CAUSAL:
        total = tl.cumsum(load_each(log_alpha_in + at, HEADS, valid, 0.0, C), 0)
        eta = exp(load_each(log_eta_in + at, HEADS, valid, float("-inf"), C), PRECISION)
        scores = mm(phi_q, load_rows_t(keys_in + at * H, HEADS * H, valid, C, H), PRECISION)
        scores = scores * decay(total, total, False, PRECISION, C) * eta[None, :]
        y = y * exp(total, PRECISION)[:, None]
        y -= mm(scores, load_rows(u_in + at * D, HEADS * D, valid, C, D), PRECISION)
    if ANCHORED:
        y += mm(phi_q, load_t(anchor + n * D * H, D, H), PRECISION)
    if SKIP:
        y += q
    store_rows(y_out + at * D, y, HEADS * D, valid, C, D)


@kernel
def read_backward_queries(
    d_y_in, q_in, keys_in, u_in, log_eta_in, log_alpha_in,
    w_in, anchor, states,
    phi_q_out, d_z_out, d_q_out,  # features of queries; gradients of their pre-activations [B, T, H, h] and of them [B, T, H, d]
    rho_out,  # <d_y, y - A phi_q>: the gradient of log gamma through all that decayed, [B, T, H]
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a read gives to its query."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, valid = place(i, n, T, HEADS, CHUNK)
    q = load_rows(q_in + at * D, HEADS * D, valid, C, D)
    phi_q = q
    if TWO_LAYERS:
        z = mm(q, load_t(w_in + n * H * D, H, D), PRECISION)
        phi_q = operand(silu(z, PRECISION), PRECISION)
        store_rows(phi_q_out + at * H, phi_q, HEADS * H, valid, C, H)
    d_y = load_rows(d_y_in + at * D, HEADS * D, valid, C, D)
    V = load(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, D, H)
    if CAUSAL:
        total = tl.cumsum(load_each(log_alpha_in + at, HEADS, valid, 0.0, C), 0)
        eta = exp(load_each(log_eta_in + at, HEADS, valid, float("-inf"), C), PRECISION)
        reach = decay(total, total, False, PRECISION, C) * eta[None, :]
        d_scores = -mm(d_y, load_rows_t(u_in + at * D, HEADS * D, valid, C, D), PRECISION) * reach
        scores = mm(phi_q, load_rows_t(keys_in + at * H, HEADS * H, valid, C, H), PRECISION)
        d_phi = mm(d_y, V, PRECISION) * exp(total, PRECISION)[:, None]
        rho = tl.sum(d_phi * phi_q, 1) + tl.sum(d_scores * scores, 1)
        store_each(rho_out + at, rho, HEADS, valid, C)
        d_phi += mm(d_scores, load_rows(keys_in + at * H, HEADS * H, valid, C, H), PRECISION)
    else:
        d_phi = mm(d_y, V, PRECISION)
    if ANCHORED:
        d_phi += mm(d_y, load(anchor + n * D * H, D, H), PRECISION)
    if TWO_LAYERS:
        d_z = operand(d_phi * dsilu(z, PRECISION), PRECISION)
        store_rows(d_z_out + at * H, d_z, HEADS * H, valid, C, H)
        d_phi = mm(d_z, load(w_in + n * H * D, H, D), PRECISION)
    if SKIP:
        d_phi += d_y
    store_rows(d_q_out + at * D, d_phi, HEADS * D, valid, C, D)


@kernel
def read_backward_writes(
    d_y_in, phi_q_in, keys_in, u_in, log_eta_in, log_alpha_in, inverse_in,
    d_keys_out, d_r_out,  # [B, T, H, h], [B, T, H, d]
    d_states,  # [N, chunks + 1, d, h]
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    DGD: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a read gives to what was written: to keys, to r = Y^-1 u and to V at the chunk's start."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, valid = place(i, n, T, HEADS, CHUNK)
    phi_q = load_rows(phi_q_in + at * H, HEADS * H, valid, C, H)
    total = tl.cumsum(load_each(log_alpha_in + at, HEADS, valid, 0.0, C), 0)
    gamma = exp(total, PRECISION) if CAUSAL else total * 0 + 1
    d_y_t = load_rows_t(d_y_in + at * D, HEADS * D, valid, C, D)
    d_V = mm(d_y_t * gamma[None, :], phi_q, PRECISION)
    store(d_states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, d_V, D, H)
    if CAUSAL:
        eta = exp(load_each(log_eta_in + at, HEADS, valid, float("-inf"), C), PRECISION)
        reach = decay_t(total, total, False, PRECISION, C) * eta[:, None]
        u = load_rows(u_in + at * D, HEADS * D, valid, C, D)
        d_scores_t = mm(u, d_y_t, PRECISION) * reach
        store_rows(d_keys_out + at * H, -mm(d_scores_t, phi_q, PRECISION), HEADS * H, valid, C, H)
        phi_q_t = load_rows_t(phi_q_in + at * H, HEADS * H, valid, C, H)
        scores_t = mm(load_rows(keys_in + at * H, HEADS * H, valid, C, H), phi_q_t, PRECISION) * reach
        d_u = -mm(scores_t, load_rows(d_y_in + at * D, HEADS * D, valid, C, D), PRECISION)
        if DGD:
            d_u = mm(load(inverse_in + (n * chunks + i).to(tl.int64) * C * C, C, C), d_u, PRECISION)
        store_rows(d_r_out + at * D, d_u, HEADS * D, valid, C, D)
    else:
        store_rows(d_keys_out + at * H, tl.zeros([C, H], tl.float32), HEADS * H, valid, C, H)
        store_rows(d_r_out + at * D, tl.zeros([C, D], tl.float32), HEADS * D, valid, C, D)
