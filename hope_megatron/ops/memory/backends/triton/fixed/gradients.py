"""What the chains' gradients mean for values, keys and rates: all chunks at once, one program per chunk and stream.

With drive = <d_r, u> and lost = drive + <d_r, target - base> of every token, from homogeneity of the system, and rho of the reads:
    d log eta_t = drive_t      d log alpha_t = sum_{j >= t} (rho_j - drive_j) + sum_{j > t} lost_j + <dV_C, V_C>
(`ERASED`: the second sum from t on too; without DGD there is none.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.fixed.read import through_input_layer
from hope_megatron.ops.memory.backends.triton.launching import kernel
from hope_megatron.ops.memory.backends.triton.system import decay, decay_t


@triton.jit
def gram_gradient(d_r_at, u_at, stride, eta, since, total, C: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Minus the gradient of the gram of keys in r = u + (exp(since - total) . gram) eta u, its both sides added up: [C, C]."""
    d = p.mm(p.rows(d_r_at, stride, C, D), p.columns(u_at, stride, C, D), PRECISION)
    d = d * decay(since, total, True, PRECISION, C) * eta[None, :]
    d_t = p.mm(p.rows(u_at, stride, C, D), p.columns(d_r_at, stride, C, D), PRECISION)
    return d + d_t * decay_t(since, total, True, PRECISION, C) * eta[:, None]


@kernel
def value_gradients(
    v_in, d_r_in, target_in, target_scale_in,
    w_in, anchor, states,
    d_target_out, d_z_out, d_v_out,  # [B, T, H, d], [B, T, H, h], [B, T, H, d]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    UNIT_TARGET: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target = unit(v + W silu(W2 v))."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, fixed = p.place(i, n, T, HEADS, C), n.to(tl.int64) * D * H
    d_target = -p.rows(d_r_in + at * D, HEADS * D, C, D).to(tl.float32)
    if UNIT_TARGET:
        d_target = p.unit_backward(
            d_target, p.rows(target_in + at * D, HEADS * D, C, D), p.each(target_scale_in + at, HEADS, C)
        )
    p.store_rows(d_target_out + at * D, d_target, HEADS * D, C, D)
    W = p.load_t(states + (n.to(tl.int64) * (chunks + 1) + i) * D * H, H, D)
    if ANCHORED:
        W += p.load_t(anchor + fixed, H, D)
    z = p.mm(p.rows(v_in + at * D, HEADS * D, C, D), p.load(w_in + fixed, D, H), PRECISION)
    d_z = p.operand(p.mm(d_target, W, PRECISION) * p.dsilu(z, PRECISION), PRECISION)
    p.store_rows(d_z_out + at * H, d_z, HEADS * H, C, H)
    p.store_rows(d_v_out + at * D, p.add_mm(d_target, d_z, p.load_t(w_in + fixed, D, H), PRECISION), HEADS * D, C, D)


@kernel
def key_gradients(
    k_in, keys_in, u_in, base_in, target_in, probe_in, log_eta, log_alpha,
    d_r_in, d_keys_in,
    w_in, anchor, states, d_states,
    d_z_out, d_k_out, d_log_eta_out,  # [B, T, H, h], [B, T, H, d], [B, T, H]
    d_log_alpha,  # [B, T, H]: holds what reads give, out: all of it
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, UNIT: tl.constexpr, DGD: tl.constexpr, ERASED: tl.constexpr, L2: tl.constexpr,
    OWN: tl.constexpr, RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """r = k + A keys + probe V keys - target, its system, and V_C = gamma_C V - keys^T (Gamma_C eta u)."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, fixed = p.place(i, n, T, HEADS, C), n.to(tl.int64) * D * H
    step = p.each(log_alpha + at, HEADS, C)
    eta, total, end = p.exp(p.each(log_eta + at, HEADS, C), PRECISION), tl.cumsum(step, 0), tl.sum(step, 0)
    since = total if ERASED else total - step
    state = (n.to(tl.int64) * (chunks + 1) + i) * D * H
    u, d_r = p.rows(u_in + at * D, HEADS * D, C, D), p.rows(d_r_in + at * D, HEADS * D, C, D)
    d_V = p.load_t(d_states + state + D * H, H, D)
    ends = tl.sum(tl.sum(d_V * p.load_t(states + state + D * H, H, D), 1), 0)
    d_keys = p.rows(d_keys_in + at * H, HEADS * H, C, H).to(tl.float32)
    d_keys = p.add_mm(d_keys, u * (-eta * p.exp(end - total, PRECISION))[:, None], d_V, PRECISION)

    drive = tl.sum(d_r.to(tl.float32) * u.to(tl.float32), 1)
    p.store_each(d_log_eta_out + at, drive, HEADS, C)
    d_total, lost = -drive, drive
    if DGD:
        missed = -p.rows(base_in + at * D, HEADS * D, C, D).to(tl.float32)
        if OWN:
            missed += p.rows(target_in + at * D, HEADS * D, C, D)
        lost += tl.sum(missed * d_r, 1)
        d_total += lost
    d_log = p.each(d_log_alpha + at, HEADS, C) + tl.cumsum(d_total, 0, reverse=True) + ends
    if DGD and not ERASED:
        d_log -= lost
    p.store_each(d_log_alpha + at, d_log, HEADS, C)

    if DGD or L2:
        probe = p.each(probe_in + at, HEADS, C)
        d_keys = p.add_mm(d_keys, d_r * probe[:, None], p.load_t(states + state, H, D), PRECISION)
        if ANCHORED:
            d_keys = p.add_mm(d_keys, d_r, p.load_t(anchor + fixed, H, D), PRECISION)
    keys = p.rows(keys_in + at * H, HEADS * H, C, H)
    if DGD:
        d_gram = gram_gradient(d_r_in + at * D, u_in + at * D, HEADS * D, eta, since, total, C, D, PRECISION)
        d_keys = p.add_mm(d_keys, -d_gram, keys, PRECISION)

    d_k = d_keys
    if TWO_LAYERS:
        z = p.mm(p.rows(k_in + at * D, HEADS * D, C, D), p.load(w_in + fixed, D, H), PRECISION)
        if UNIT:
            d_keys = p.unit_backward(d_keys, keys, p.inverse_norm(p.silu(z, PRECISION), PRECISION))
        d_k = through_input_layer(d_keys, z, w_in + fixed, d_z_out + at * H, HEADS, C, D, H, PRECISION)
    if RESIDUAL:
        d_k += p.rows(d_r_in + at * D, HEADS * D, C, D)
    p.store_rows(d_k_out + at * D, d_k, HEADS * D, C, D)
