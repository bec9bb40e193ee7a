"""Memories whose keys depend on weights that change: the loop over chunks, and the tape of all chunks at once.

Either the self-memories (SELF: they make k, v and the rates from the inputs, chunk by chunk, and write them), or M_mem where its
input layer is written too (k, v and the rates are given). n memories, NV vector ones first; token planes of each memory lie one
after another, [n, B, T, H, .].
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton.bank.write import write_scalar, write_vector
from hope_megatron.ops.memory.backends.triton.language import (
    dsilu,
    exp,
    inverse_norm,
    load_each,
    load_rows,
    load_rows_t,
    load_t,
    log_sigmoid,
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


@triton.jit
def write_system(
    k_at, write_in_at, inverse_in_at, row, valid, eta, before, total, reach,
    C: tl.constexpr, D: tl.constexpr, DGD_IN: tl.constexpr, TAPE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K_in = Y_in^T (reach eta k) of a chunk, which all its input layers share."""
    k = load_rows(k_at, row, valid, C, D)
    written = k * (eta * reach)[:, None]
    if DGD_IN:
        gram = mm(k, load_rows_t(k_at, row, valid, C, D), PRECISION)
        system = gram * decay_t(before, total, True, PRECISION, C) * eta[:, None]
        inverse = operand(unit_upper_inverse(system, EXACT, PRECISION, C), PRECISION)
        if TAPE:
            store(inverse_in_at, inverse, C, C)
        written = mm(inverse, written, PRECISION)
    store_rows(write_in_at, written, row, valid, C, D)


@kernel
def input_system(
    k, log_eta, log_alpha,
    write_in, inverse_in,  # K_in [B, T, H, d]; Y_in^T [N, chunks, C, C]
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, DGD_IN: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`write_system` of all chunks, for keys that are known."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, valid = place(i, n, T, HEADS, CHUNK)
    eta = exp(load_each(log_eta + at, HEADS, valid, float("-inf"), C), PRECISION)
    step = load_each(log_alpha + at, HEADS, valid, 0.0, C)
    total = tl.cumsum(step, 0)
    reach = exp(tl.sum(step, 0) - total, PRECISION)
    write_system(
        k + at * D, write_in + at * D, inverse_in + (n * chunks + i).to(tl.int64) * C * C, HEADS * D, valid,
        eta, total - step, total, reach, C, D, DGD_IN, True, EXACT, PRECISION,
    )  # fmt: skip


@kernel
def input_features(
    x_k, x_v, w_in, anchor_in,  # W2 [N, n, h, d]; MOVING: V2 [N, chunks + 1, n, h, d], and A2
    phi_x, slope_x,  # silu and its derivative at W2 x, [n, B, T, H, h]
    T, HEADS, chunks, plane,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    VALUE: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the self-memories' input layers make of the inputs. VALUE: number of M_v, which alone reads x_v."""
    i, n, m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    N_MEMORIES = tl.num_programs(2)
    at, valid = place(i, n, T, HEADS, CHUNK)
    memory = (n * N_MEMORIES + m).to(tl.int64) * H * D
    state = memory
    if MOVING:
        state = ((n.to(tl.int64) * (chunks + 1) + i) * N_MEMORIES + m) * H * D
    W = load_t(w_in + state, H, D)
    if MOVING and ANCHORED:
        W += load_t(anchor_in + memory, H, D)
    x = x_k
    if m == VALUE:
        x = x_v
    z = mm(load_rows(x + at * D, HEADS * D, valid, C, D), W, PRECISION)
    token = (m.to(tl.int64) * plane + at) * H
    store_rows(phi_x + token, silu(z, PRECISION), HEADS * H, valid, C, H)
    if SLOPE:
        store_rows(slope_x + token, dsilu(z, PRECISION), HEADS * H, valid, C, H)


@triton.jit
def applied(
    x_at, phi_at, w_in, anchor_in, V_at, A_at, row, row_h, valid,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x + W silu(W2 x) of a vector memory, [C, d]. phi_at: silu(W2 x) where it is known."""
    W = load_t(V_at, D, H)
    if ANCHORED:
        W += load_t(A_at, D, H)
    phi = features(x_at, phi_at, w_in, anchor_in, row, row_h, valid, C, D, H, MOVING, ANCHORED, PRECISION)
    return load_rows(x_at, row, valid, C, D) + mm(phi, W, PRECISION)


@triton.jit
def applied_scalar(
    x_at, phi_at, w_in, anchor_in, V_at, A_at, row, row_h, valid,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w silu(W2 x) of a scalar memory, [C]."""
    w = tl.load(V_at + tl.arange(0, H))
    if ANCHORED:
        w += tl.load(A_at + tl.arange(0, H))
    phi = features(x_at, phi_at, w_in, anchor_in, row, row_h, valid, C, D, H, MOVING, ANCHORED, PRECISION)
    return tl.sum(phi * w[None, :], 1)


@triton.jit
def features(
    x_at, phi_at, w_in, anchor_in, row, row_h, valid,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """silu(W2 x), [C, h]."""
    if MOVING:
        W = load_t(w_in, H, D)
        if ANCHORED:
            W += load_t(anchor_in, H, D)
        return silu(mm(load_rows(x_at, row, valid, C, D), W, PRECISION), PRECISION)
    else:
        return load_rows(phi_at, row_h, valid, C, H)


@kernel
def bank_chain(
    x_k, x_v, eta_in, alpha_in,  # SELF: inputs [B, T, H, d], and logits of eta and alpha (log rates where no memory makes them)
    phi_x,  # SELF, not MOVING: as `input_features` leaves it
    k, v, log_eta, log_alpha, key_norm, value_norm,  # SELF: out, with 1 / norm of k and v [B, T, H]; else in
    keys,  # [n, B, T, H, h], scratch
    write_in,  # MOVING: K_in [B, T, H, d]; SELF: scratch
    w_in, anchor_in,  # W2 [N, n, h, d]; MOVING: V2 at chunk starts [N, chunks + 1, n, h, d], the first given, and A2
    states_vector, anchor_vector,  # V of W1 at chunk starts and the end, [N, chunks + 1, NV, d, h], the first given; A [N, NV, d, h]
    states_scalar, anchor_scalar,  # the same of scalar memories, [N, chunks + 1, NS, h]
    begins,  # where streams start anew, [N, chunks + 1] int8
    T, HEADS, chunks, plane, log_eta_max,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    SELF: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr,  # numbers, or -1
    UNIT_VALUE: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr, RESETS: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row, row_h = HEADS * D, HEADS * H
    all_in, all_out, all_scalar = (NV + NS) * H * D, NV * D * H, NS * H
    matrices_in, anchors_in = w_in + n * all_in, anchor_in + n * all_in
    if MOVING:
        matrices_in = w_in + n * (chunks + 1) * all_in
    matrices, anchors = states_vector + n * (chunks + 1) * all_out, anchor_vector + n * all_out
    vectors, anchors_s = states_scalar + n * (chunks + 1) * all_scalar, anchor_scalar + n * all_scalar
    for i in tl.range(0, chunks, disable_licm=True):
        at, valid = place(i, n, T, HEADS, CHUNK)
        now_in = matrices_in
        if MOVING:
            now_in = matrices_in + i * all_in
        now, now_s = matrices + i * all_out, vectors + i * all_scalar
        if SELF:
            made = load_rows(x_k + at * D, row, valid, C, D).to(tl.float32)
            if KEY >= 0:
                made = applied(
                    x_k + at * D, phi_x + (KEY * plane + at) * H, now_in + KEY * H * D, anchors_in + KEY * H * D,
                    now + KEY * D * H, anchors + KEY * D * H, row, row_h, valid, C, D, H, MOVING, ANCHORED, PRECISION,
                )  # fmt: skip
            norm = inverse_norm(made, 1, PRECISION)
            store_each(key_norm + at, norm, HEADS, valid, C)
            store_rows(k + at * D, made * norm[:, None], row, valid, C, D)
            made = load_rows(x_v + at * D, row, valid, C, D).to(tl.float32)
            if VALUE >= 0:
                made = applied(
                    x_v + at * D, phi_x + (VALUE * plane + at) * H, now_in + VALUE * H * D, anchors_in + VALUE * H * D,
                    now + VALUE * D * H, anchors + VALUE * D * H, row, row_h, valid, C, D, H, MOVING, ANCHORED, PRECISION,
                )  # fmt: skip
            if UNIT_VALUE:
                norm = inverse_norm(made, 1, PRECISION)
                store_each(value_norm + at, norm, HEADS, valid, C)
                made = made * norm[:, None]
            store_rows(v + at * D, made, row, valid, C, D)
            rate = load_each(eta_in + at, HEADS, valid, float("-inf"), C)
            if ETA >= 0:
                rate += applied_scalar(
                    x_k + at * D, phi_x + (ETA * plane + at) * H, now_in + ETA * H * D, anchors_in + ETA * H * D,
                    now_s + (ETA - NV) * H, anchors_s + (ETA - NV) * H,
                    row, row_h, valid, C, D, H, MOVING, ANCHORED, PRECISION,
                )  # fmt: skip
                rate = log_eta_max + log_sigmoid(rate)
            store_each(log_eta + at, rate, HEADS, valid, C)
            step = load_each(alpha_in + at, HEADS, valid, 0.0, C)
            if ALPHA >= 0:
                step += applied_scalar(
                    x_k + at * D, phi_x + (ALPHA * plane + at) * H, now_in + ALPHA * H * D, anchors_in + ALPHA * H * D,
                    now_s + (ALPHA - NV) * H, anchors_s + (ALPHA - NV) * H,
                    row, row_h, valid, C, D, H, MOVING, ANCHORED, PRECISION,
                )  # fmt: skip
                step = tl.where(tl.arange(0, C) < valid, log_sigmoid(step), 0.0)
            store_each(log_alpha + at, step, HEADS, valid, C)
            tl.debug_barrier()  # what follows reads other threads' k and v
        else:
            rate = load_each(log_eta + at, HEADS, valid, float("-inf"), C)
            step = load_each(log_alpha + at, HEADS, valid, 0.0, C)
        eta, total = exp(rate, PRECISION), tl.cumsum(step, 0)
        end = tl.sum(step, 0)
        since, reach, kept = exp(total - step, PRECISION), exp(end - total, PRECISION), exp(end, PRECISION)
        if MOVING and SELF:
            write_system(
                k + at * D, write_in + at * D, write_in, row, valid, eta, total - step, total, reach,
                C, D, DGD_IN, False, EXACT, PRECISION,
            )  # fmt: skip
        anew = False
        if RESETS:
            anew = tl.load(begins + n * (chunks + 1) + i + 1) != 0
        for m in tl.range(0, NV, disable_licm=True):
            place_in = m * H * D
            write_vector(
                k + at * D, v + at * D, keys + (m * plane + at) * H, write_in + at * D, write_in,
                now + m * D * H, anchors + m * D * H, now_in + place_in, anchors_in + place_in,
                now + all_out + m * D * H, now_in + all_in + place_in, matrices + m * D * H, matrices_in + place_in, anew,
                keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys,
                HEADS, valid, eta, total - step, since, total, reach, kept, C, D, H,
                False, False, MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, EXACT, PRECISION,
            )  # fmt: skip
        for m in tl.range(0, NS, disable_licm=True):
            place_in = (NV + m) * H * D
            write_scalar(
                k + at * D, v + at * D, keys + ((NV + m) * plane + at) * H, write_in + at * D, write_in,
                now_s + m * H, anchors_s + m * H, now_in + place_in, anchors_in + place_in,
                now_s + all_scalar + m * H, now_in + all_in + place_in, vectors + m * H, matrices_in + place_in, anew,
                keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys,
                HEADS, valid, eta, total - step, since, total, reach, kept, C, D, H,
                False, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, EXACT, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the next chunk reads what other threads stored


@kernel
def bank_tape(
    k, v, log_eta, log_alpha, keys, write_in, inverse_in,
    w_in, anchor_in, states_vector, anchor_vector, states_scalar, anchor_scalar,
    phi_v, write, slope_k, slope_v, key_scale,  # of all memories: [n, B, T, H, h] four times, [n, B, T, H]
    u, target, missed, target_scale, e,  # of vector ones: [NV, B, T, H, d] thrice, [NV, B, T, H], [NV, B, T, H, d]
    u_scalar, target_scalar, missed_scalar, e_scalar,  # [NS, B, T, H]
    u_in, missed_in, curve,  # MOVING: [n, B, T, H, h]
    inverse,  # READ: Y^T of M_mem, [N, chunks, C, C]
    T, HEADS, chunks, plane,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr,
    READ: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk, stream and memory: what backward (and M_mem's read) needs of what was written."""
    i, n, m = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    at, valid = place(i, n, T, HEADS, CHUNK)
    step = load_each(log_alpha + at, HEADS, valid, 0.0, C)
    eta, total = exp(load_each(log_eta + at, HEADS, valid, float("-inf"), C), PRECISION), tl.cumsum(step, 0)
    end = tl.sum(step, 0)
    since, reach, kept = exp(total - step, PRECISION), exp(end - total, PRECISION), exp(end, PRECISION)
    token, chunk = m * plane + at, n * (chunks + 1) + i
    wide = token * H
    memory_in = (n * (NV + NS) + m) * H * D
    layer_in = memory_in
    if MOVING:
        layer_in = (chunk * (NV + NS) + m) * H * D
    square = inverse_in + (n * chunks + i) * C * C
    if m < NV:
        memory, layer, narrow = (n * NV + m) * D * H, (chunk * NV + m) * D * H, token * D
        write_vector(
            k + at * D, v + at * D, keys + wide, write_in + at * D, square,
            states_vector + layer, anchor_vector + memory, w_in + layer_in, anchor_in + memory_in,
            keys, keys, keys, keys, False,
            phi_v + wide, write + wide, u + narrow, target + narrow, missed + narrow, slope_k + wide, slope_v + wide,
            key_scale + token, target_scale + token, e + narrow, u_in + wide, missed_in + wide, curve + wide,
            inverse + (n * chunks + i) * C * C,
            HEADS, valid, eta, total - step, since, total, reach, kept, C, D, H,
            True, READ, MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, EXACT, PRECISION,
        )  # fmt: skip
    else:
        memory, layer, narrow = (n * NS + m - NV) * H, (chunk * NS + m - NV) * H, token - NV * plane
        write_scalar(
            k + at * D, v + at * D, keys + wide, write_in + at * D, square,
            states_scalar + layer, anchor_scalar + memory, w_in + layer_in, anchor_in + memory_in,
            keys, keys, keys, keys, False,
            phi_v + wide, write + wide, u_scalar + narrow, target_scalar + narrow, missed_scalar + narrow,
            slope_k + wide, slope_v + wide, key_scale + token, e_scalar + narrow, u_in + wide, missed_in + wide, curve + wide,
            HEADS, valid, eta, total - step, since, total, reach, kept, C, D, H,
            True, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, EXACT, PRECISION,
        )  # fmt: skip
