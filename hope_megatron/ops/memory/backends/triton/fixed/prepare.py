"""All of a memory with fixed features that does not depend on its changing weights, one program per chunk and stream."""

from __future__ import annotations

import triton.language as tl

from hope_megatron.ops.memory.backends.triton.language import (
    exp,
    inverse_norm,
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
from hope_megatron.ops.memory.backends.triton.system import decay_t, unit_upper_inverse


@kernel
def prepare(
    k_in, v_in, log_eta_in, log_alpha_in,  # [B, T, H, d] and [B, T, H]
    w_in, anchor,  # W2 [N, h, d]; A of W1 [N, d, h]
    keys_out, phi_v_out,  # [B, T, H, h]
    base_out, target_out,  # r and the raw target as far as they do not depend on V, [B, T, H, d]
    probe_out, kept_out,  # what multiplies V keys in r, [B, T, H]; gamma_C, [N, chunks]
    write_out,  # K = Y^T (eta Gamma_C keys), [B, T, H, h]: V_C = gamma_C V - r^T K
    inverse_out,  # Y^T, [N, chunks, C, C]
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TWO_LAYERS: tl.constexpr, UNIT: tl.constexpr, DGD: tl.constexpr, ERASED: tl.constexpr, L2: tl.constexpr,
    OWN: tl.constexpr, RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, n = tl.program_id(0), tl.program_id(1)
    at, valid = place(i, n, T, HEADS, CHUNK)
    row, row_h = HEADS * D, HEADS * H
    log_alpha = load_each(log_alpha_in + at, HEADS, valid, 0.0, C)
    total = tl.cumsum(log_alpha, 0)
    since = total if ERASED else total - log_alpha
    tl.store(kept_out + n * chunks + i, exp(tl.sum(log_alpha, 0), PRECISION))
    store_each(probe_out + at, exp(since, PRECISION) if DGD else total * 0 + 1, HEADS, valid, C)

    k = load_rows(k_in + at * D, row, valid, C, D)
    keys = k
    if TWO_LAYERS:
        keys = silu(mm(k, load_t(w_in + n * H * D, H, D), PRECISION), PRECISION)
        if UNIT:
            keys = keys * inverse_norm(keys, 1, PRECISION)[:, None]
        keys = operand(keys, PRECISION)
        store_rows(keys_out + at * H, keys, row_h, valid, C, H)
        tl.debug_barrier()  # what follows reads other threads' keys
    base = tl.zeros([C, D], tl.float32)
    if RESIDUAL:
        base += k.to(tl.float32)
    v = load_rows(v_in + at * D, row, valid, C, D)
    if not OWN:
        base -= v.to(tl.float32)
    if ANCHORED and (DGD or L2):
        base += mm(keys, load_t(anchor + n * D * H, D, H), PRECISION)
    store_rows(base_out + at * D, base, row, valid, C, D)
    if OWN:
        phi_v = v
        if TWO_LAYERS:
            phi_v = operand(silu(mm(v, load_t(w_in + n * H * D, H, D), PRECISION), PRECISION), PRECISION)
            store_rows(phi_v_out + at * H, phi_v, row_h, valid, C, H)
        target = tl.zeros([C, D], tl.float32)
        if TWO_LAYERS:
            target += v.to(tl.float32)
        if ANCHORED:
            target += mm(phi_v, load_t(anchor + n * D * H, D, H), PRECISION)
        store_rows(target_out + at * D, target, row, valid, C, D)
    eta = exp(load_each(log_eta_in + at, HEADS, valid, float("-inf"), C), PRECISION)
    written = keys.to(tl.float32) * (eta * exp(tl.sum(log_alpha, 0) - total, PRECISION))[:, None]
    if DGD:
        columns = load_rows_t((keys_out if TWO_LAYERS else k_in) + at * H, row_h, valid, C, H)
        reach = decay_t(since, total, True, PRECISION, C) * eta[:, None]
        inverse = unit_upper_inverse(mm(keys, columns, PRECISION) * reach, EXACT, PRECISION, C)
        inverse = operand(inverse, PRECISION)
        store(inverse_out + (n * chunks + i).to(tl.int64) * C * C, inverse, C, C)
        written = mm(inverse, written, PRECISION)
    store_rows(write_out + at * H, written, row_h, valid, C, H)
