"""What the chains' gradients mean for values, keys and rates: all chunks at once, one program per chunk and stream.

With e = <d_r, u>, f = <d_r, target - base> and rho = <d_y, y - A phi_q> of every token, all from homogeneity of the system:
    d log eta_t = e_t        d log alpha_t = sum_{j >= t} (rho_j - e_j) + sum_{j > t} (e_j + f_j) + <dV_C, V_C>
(`ERASED`: the second sum from t on too; without DGD: no second sum.)
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
    store_each,
    store_rows,
)
from hope_megatron.ops.memory.backends.triton.launching import kernel
from hope_megatron.ops.memory.backends.triton.system import decay, decay_t


@kernel
def value_gradients(
    v_in, d_r_in, target_in, target_scale_in,
    w_in, anchor, states,
    d_target_out, d_z_out, d_v_out,  # [B, T, H, d], [B, T, H, h], [B, T, H, d]
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, UNIT_TARGET: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target = unit(v + W silu(W2 v)), own targets only."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, valid = place(i, n, T, HEADS, CHUNK)
    d_target = -load_rows(d_r_in + at * D, HEADS * D, valid, C, D).to(tl.float32)
    if UNIT_TARGET:
        target = load_rows(target_in + at * D, HEADS * D, valid, C, D).to(tl.float32)
        scale = load_each(target_scale_in + at, HEADS, valid, 0.0, C)
        d_target = (d_target - target * tl.sum(target * d_target, 1)[:, None]) * scale[:, None]
    store_rows(d_target_out + at * D, d_target, HEADS * D, valid, C, D)
    W = load(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, D, H)
    if ANCHORED:
        W += load(anchor + n * D * H, D, H)
    d_phi = mm(d_target, W, PRECISION)
    if TWO_LAYERS:
        z = mm(load_rows(v_in + at * D, HEADS * D, valid, C, D), load_t(w_in + n * H * D, H, D), PRECISION)
        d_z = operand(d_phi * dsilu(z, PRECISION), PRECISION)
        store_rows(d_z_out + at * H, d_z, HEADS * H, valid, C, H)
        d_phi = mm(d_z, load(w_in + n * H * D, H, D), PRECISION) + d_target
    store_rows(d_v_out + at * D, d_phi, HEADS * D, valid, C, D)


@kernel
def key_gradients(
    k_in, keys_in, u_in, base_in, target_in, probe_in, log_eta_in, log_alpha_in,
    d_r_in, d_keys_in, rho_in,
    w_in, anchor, states, d_states,
    d_z_out, d_k_out, d_log_eta_out, d_log_alpha_out,  # [B, T, H, h], [B, T, H, d], [B, T, H] twice
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, UNIT: tl.constexpr, DGD: tl.constexpr, ERASED: tl.constexpr, L2: tl.constexpr,
    OWN: tl.constexpr, RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """r = k + A keys + probe V keys - target, its system, and V_C = gamma_C V - (Gamma_C rows)^T keys."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, valid = place(i, n, T, HEADS, CHUNK)
    log_alpha = load_each(log_alpha_in + at, HEADS, valid, 0.0, C)
    eta = exp(load_each(log_eta_in + at, HEADS, valid, float("-inf"), C), PRECISION)
    total = tl.cumsum(log_alpha, 0)
    end = tl.sum(log_alpha, 0)
    since = total if ERASED else total - log_alpha
    state = (n.to(tl.int64) * (chunks + 1) + i) * D * H
    u = load_rows(u_in + at * D, HEADS * D, valid, C, D)
    d_r = load_rows(d_r_in + at * D, HEADS * D, valid, C, D)

    d_V = load(d_states + state + D * H, D, H)
    ends = tl.sum(tl.sum(d_V * load(states + state + D * H, D, H), 1), 0)
    e = tl.sum(d_r.to(tl.float32) * u.to(tl.float32), 1)
    store_each(d_log_eta_out + at, e, HEADS, valid, C)
    now = -e
    if CAUSAL:
        now += load_each(rho_in + at, HEADS, valid, 0.0, C)
    if DGD:
        missed = -load_rows(base_in + at * D, HEADS * D, valid, C, D).to(tl.float32)
        if OWN:
            missed += load_rows(target_in + at * D, HEADS * D, valid, C, D)
        before = e + tl.sum(missed * d_r, 1)
        now += before
    d_log_alpha = tl.cumsum(now, 0, reverse=True) + ends
    if DGD and not ERASED:
        d_log_alpha -= before
    store_each(d_log_alpha_out + at, d_log_alpha, HEADS, valid, C)

    d_keys = load_rows(d_keys_in + at * H, HEADS * H, valid, C, H).to(tl.float32)
    d_keys -= mm(u * (eta * exp(end - total, PRECISION))[:, None], d_V, PRECISION)
    keys = load_rows(keys_in + at * H, HEADS * H, valid, C, H)
    if DGD or L2:
        probe = load_each(probe_in + at, HEADS, valid, 0.0, C)
        d_keys += mm(d_r * probe[:, None], load(states + state, D, H), PRECISION)
        if ANCHORED:
            d_keys += mm(d_r, load(anchor + n * D * H, D, H), PRECISION)
    if DGD:  # both sides of the gram of keys
        u_t = load_rows_t(u_in + at * D, HEADS * D, valid, C, D)
        d_gram = mm(d_r, u_t, PRECISION) * decay(since, total, True, PRECISION, C) * eta[None, :]
        d_r_t = load_rows_t(d_r_in + at * D, HEADS * D, valid, C, D)
        d_gram += mm(u, d_r_t, PRECISION) * decay_t(since, total, True, PRECISION, C) * eta[:, None]
        d_keys -= mm(d_gram, keys, PRECISION)

    d_k = d_keys
    if TWO_LAYERS:
        z = mm(load_rows(k_in + at * D, HEADS * D, valid, C, D), load_t(w_in + n * H * D, H, D), PRECISION)
        if UNIT:
            scale = inverse_norm(silu(z, PRECISION), 1, PRECISION)
            d_keys = (d_keys - keys * tl.sum(keys * d_keys, 1)[:, None]) * scale[:, None]
        d_z = operand(d_keys * dsilu(z, PRECISION), PRECISION)
        store_rows(d_z_out + at * H, d_z, HEADS * H, valid, C, H)
        d_k = mm(d_z, load(w_in + n * H * D, H, D), PRECISION)
    if RESIDUAL:
        d_k += d_r
    store_rows(d_k_out + at * D, d_k, HEADS * D, valid, C, D)
