"""All of a memory with fixed features that does not depend on its changing weights, one program per chunk and stream.

keys = silu(W2 k), unit under DGD      phi_v = silu(W2 v)      r = base + probe V keys - unit(target + V phi_v)
u = Y r, Y = (I + N diag(eta))^-1, N_ts = exp(since_t - total_s) <keys_t, keys_s> for s < t (without DGD: u = r)
V_C = gamma_C V - K^T r, K = Y^T (eta Gamma_C keys)
"""

from __future__ import annotations

import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.launching import kernel
from hope_megatron.ops.memory.backends.triton.system import decay, unit_lower_inverse


@kernel
def prepare(
    k_in, v_in, log_eta, log_alpha,  # [B, T, H, d] and [B, T, H]
    w_in, anchor,  # W2^T [N, d, h]; A^T of W1 [N, h, d]
    keys_out, phi_v_out,  # [B, T, H, h]
    base_out, target_out,  # [B, T, H, d]
    probe_out, kept_out,  # [B, T, H]; gamma_C, [N, chunks]
    write_out,  # K, [B, T, H, h]
    inverse_out,  # Y, [N, chunks, C, C]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, UNIT: tl.constexpr, DGD: tl.constexpr, ERASED: tl.constexpr, L2: tl.constexpr,
    OWN: tl.constexpr, RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0), tl.program_id(1)
    at = p.place(i, n, T, HEADS, C)
    row, row_h, fixed = HEADS * D, HEADS * H, n.to(tl.int64) * D * H
    step = p.each(log_alpha + at, HEADS, C)
    total, end = tl.cumsum(step, 0), tl.sum(step, 0)
    since = total if ERASED else total - step
    tl.store(kept_out + n * chunks + i, p.exp(end, PRECISION))
    p.store_each(probe_out + at, p.exp(since, PRECISION) if DGD else total * 0 + 1, HEADS, C)

    k = p.rows(k_in + at * D, row, C, D)
    keys = k
    if TWO_LAYERS:
        keys = p.silu(p.mm(k, p.load(w_in + fixed, D, H), PRECISION), PRECISION)
        if UNIT:
            keys = keys * p.inverse_norm(keys, PRECISION)[:, None]
        keys = p.operand(keys, PRECISION)
        p.store_rows(keys_out + at * H, keys, row_h, C, H)
    base = tl.zeros([C, D], tl.float32)
    if RESIDUAL:
        base += k
    v = p.rows(v_in + at * D, row, C, D)
    if not OWN:
        base -= v
    if ANCHORED and (DGD or L2):
        base = p.add_mm(base, keys, p.load(anchor + fixed, H, D), PRECISION)
    p.store_rows(base_out + at * D, base, row, C, D)
    if OWN:
        phi_v = p.operand(p.silu(p.mm(v, p.load(w_in + fixed, D, H), PRECISION), PRECISION), PRECISION)
        p.store_rows(phi_v_out + at * H, phi_v, row_h, C, H)
        target = v.to(tl.float32)
        if ANCHORED:
            target = p.add_mm(target, phi_v, p.load(anchor + fixed, H, D), PRECISION)
        p.store_rows(target_out + at * D, target, row, C, D)
    eta = p.exp(p.each(log_eta + at, HEADS, C), PRECISION)
    if DGD:
        tl.debug_barrier()  # keys, stored as rows, are read as columns
        gram = p.mm(keys, p.columns((keys_out if TWO_LAYERS else k_in) + at * H, row_h, C, H), PRECISION)
        system = gram * decay(since, total, True, PRECISION, C) * eta[None, :]
        square = inverse_out + (n * chunks + i).to(tl.int64) * C * C
        p.store(square, unit_lower_inverse(system, EXACT, PRECISION, C), C, C)
        tl.debug_barrier()
        written = p.mm(p.load_t(square, C, C), keys * (eta * p.exp(end - total, PRECISION))[:, None], PRECISION)
    else:
        written = keys * (eta * p.exp(end - total, PRECISION))[:, None]
    p.store_rows(write_out + at * H, written, row_h, C, H)
