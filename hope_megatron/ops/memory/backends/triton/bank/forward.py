"""Memories whose keys depend on weights that change: the loop over chunks, and the tape of all chunks at once.

Either the self-memories (SELF: they make k, v and the rates from the inputs, chunk by chunk, and write them), or M_mem where its
input layer is written too (k, v and the rates are given). n memories, NV vector ones first; token planes of each memory lie one
after another, [n, B, T, H, .].
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.bank.write import input_weights, write_scalar, write_vector
from hope_megatron.ops.memory.backends.triton.launching import kernel
from hope_megatron.ops.memory.backends.triton.system import decay, unit_lower_inverse


@triton.jit
def input_system_of(
    k_at, table_at, write_in_at, inverse_in_at, row, strength,
    C: tl.constexpr, D: tl.constexpr, DGD_IN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K_in = Y_in^T (strength k) of a chunk, which all its input layers share; Y_in is stored too."""
    k = p.rows(k_at, row, C, D)
    written = k * strength[:, None]
    if DGD_IN:
        gram = p.mm_if(k, p.columns(k_at, row, C, D), EXACT, PRECISION)
        inverse = unit_lower_inverse(gram * p.load(table_at, C, C), EXACT, PRECISION, C)
        p.store(inverse_in_at, inverse, C, C)
        tl.debug_barrier()
        written = p.mm_if(p.load_t(inverse_in_at, C, C), written, EXACT, PRECISION)
    p.store_rows(write_in_at, written, row, C, D)


@kernel
def input_system(
    k, log_eta, log_alpha,
    table, write_in, inverse_in,  # [N, chunks, C, C]; K_in [B, T, H, d]; Y_in [N, chunks, C, C]
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, DGD_IN: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The decay table of all chunks, exp(since_t - total_s) eta_s, and `input_system_of` for keys that are known."""
    i, n = tl.program_id(0), tl.program_id(1)
    at, square = p.place(i, n, T, HEADS, C), (n.to(tl.int64) * chunks + i) * C * C
    eta, step = p.exp(p.each(log_eta + at, HEADS, C), PRECISION), p.each(log_alpha + at, HEADS, C)
    total = tl.cumsum(step, 0)
    p.store(table + square, decay(total - step, total, True, PRECISION, C) * eta[None, :], C, C)
    tl.debug_barrier()
    strength = eta * p.exp(tl.sum(step, 0) - total, PRECISION)
    input_system_of(
        k + at * D, table + square, write_in + at * D, inverse_in + square, HEADS * D, strength, C, D, DGD_IN, EXACT, PRECISION
    )  # fmt: skip


@kernel
def decay_tables(log_eta, log_alpha, table, T, HEADS, chunks, C: tl.constexpr, PRECISION: tl.constexpr):
    """exp(since_t - total_s) eta_s for s < t, [N, chunks, C, C]."""
    i, n = tl.program_id(0), tl.program_id(1)
    at = p.place(i, n, T, HEADS, C)
    eta, step = p.exp(p.each(log_eta + at, HEADS, C), PRECISION), p.each(log_alpha + at, HEADS, C)
    total = tl.cumsum(step, 0)
    reach = decay(total - step, total, True, PRECISION, C) * eta[None, :]
    p.store(table + (n.to(tl.int64) * chunks + i) * C * C, reach, C, C)


@kernel
def input_features(
    x_k, x_v, w_in, anchor_in,  # W2^T [N, n, d, h]; MOVING: V2^T [N, chunks + 1, n, d, h], and A2^T
    phi_x, slope_x,  # silu and its derivative at W2 x, [n, B, T, H, h]
    T, HEADS, chunks, plane,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    VALUE: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the self-memories' input layers make of the inputs. VALUE: number of M_v, which alone reads x_v."""
    i, n, m, memories = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    at = p.place(i, n, T, HEADS, C)
    memory = (n * memories + m) * H * D
    layer = memory
    if MOVING:
        layer = ((n * (chunks + 1) + i) * memories + m) * H * D
    x = x_k
    if m == VALUE:
        x = x_v
    W = input_weights(w_in + layer, anchor_in + memory, D, H, MOVING, ANCHORED, PRECISION)
    z = p.mm(p.rows(x + at * D, HEADS * D, C, D), W, PRECISION)
    token = (m * plane + at) * H
    p.store_rows(phi_x + token, p.silu(z, PRECISION), HEADS * H, C, H)
    if SLOPE:
        p.store_rows(slope_x + token, p.dsilu(z, PRECISION), HEADS * H, C, H)


@triton.jit
def features_of_inputs(
    x_at, phi_at, w_in, anchor_in, row, row_h,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """silu(W2 x), [C, h]; known where W2 is fixed."""
    if MOVING:
        W = input_weights(w_in, anchor_in, D, H, MOVING, ANCHORED, PRECISION)
        return p.silu(p.mm(p.rows(x_at, row, C, D), W, PRECISION), PRECISION)
    else:
        return p.rows(phi_at, row_h, C, H)


@triton.jit
def applied(
    x_at, phi_at, w_in, anchor_in, V_at, A_at, row, row_h,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x + W silu(W2 x) of a vector memory, [C, d]."""
    W = p.whole(V_at, A_at, H, D, ANCHORED)
    phi = features_of_inputs(x_at, phi_at, w_in, anchor_in, row, row_h, C, D, H, MOVING, ANCHORED, PRECISION)
    return p.add_mm(p.rows(x_at, row, C, D).to(tl.float32), phi, W, PRECISION)


@triton.jit
def applied_scalar(
    x_at, phi_at, w_in, anchor_in, V_at, A_at, row, row_h,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w silu(W2 x) of a scalar memory, [C]."""
    w = tl.load(V_at + tl.arange(0, H))
    if ANCHORED:
        w += tl.load(A_at + tl.arange(0, H))
    phi = features_of_inputs(x_at, phi_at, w_in, anchor_in, row, row_h, C, D, H, MOVING, ANCHORED, PRECISION)
    return tl.sum(phi * w[None, :], 1)


@triton.jit
def make_vector(
    x_at, phi_at, w_in, anchor_in, V_at, A_at, out_at, norm_at, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADAPTIVE: tl.constexpr, UNIT: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys or values of x [C, d], by their memory if ADAPTIVE: stored, and with UNIT 1 / norm."""
    row, row_h = HEADS * D, HEADS * H
    made = p.rows(x_at, row, C, D).to(tl.float32)
    if ADAPTIVE:
        made = applied(
            x_at, phi_at, w_in, anchor_in, V_at, A_at, row, row_h, C, D, H, MOVING, ANCHORED, PRECISION
        )  # fmt: skip
    if UNIT:
        norm = p.inverse_norm(made, PRECISION)
        p.store_each(norm_at, norm, HEADS, C)
        made = made * norm[:, None]
    p.store_rows(out_at, made, row, C, D)


@triton.jit
def make_rate(
    x_at, phi_at, w_in, anchor_in, V_at, A_at, given_at, out_at, log_most, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log rates [C], stored too: of logits and their memory if ADAPTIVE, else as they are given."""
    rate = p.each(given_at, HEADS, C).to(tl.float32)
    if ADAPTIVE:
        rate += applied_scalar(
            x_at, phi_at, w_in, anchor_in, V_at, A_at, HEADS * D, HEADS * H, C, D, H, MOVING, ANCHORED, PRECISION
        )
        rate = log_most + p.log_sigmoid(rate)
    p.store_each(out_at, rate, HEADS, C)
    return rate


@triton.jit
def generate(
    x_k, x_v, phi_x, eta_in, alpha_in, k, v, log_eta, log_alpha, key_norm, value_norm, square,  # this chunk's; phi_x: all
    now_in, anchors_in, now, anchors, now_s, anchors_s,  # weights at its start
    at, plane, log_eta_max, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr, UNIT_VALUE: tl.constexpr, NV: tl.constexpr,
    TABLE: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys, values and rates of a chunk, by the memories at its start; TABLE: and its decay table."""
    make_vector(
        x_k, phi_x + (KEY * plane + at) * H, now_in + KEY * H * D, anchors_in + KEY * H * D,
        now + KEY * D * H, anchors + KEY * D * H, k, key_norm, HEADS,
        C, D, H, KEY >= 0, True, MOVING, ANCHORED, PRECISION,
    )  # fmt: skip
    make_vector(
        x_v, phi_x + (VALUE * plane + at) * H, now_in + VALUE * H * D, anchors_in + VALUE * H * D,
        now + VALUE * D * H, anchors + VALUE * D * H, v, value_norm, HEADS,
        C, D, H, VALUE >= 0, UNIT_VALUE, MOVING, ANCHORED, PRECISION,
    )  # fmt: skip
    rate = make_rate(
        x_k, phi_x + (ETA * plane + at) * H, now_in + ETA * H * D, anchors_in + ETA * H * D,
        now_s + (ETA - NV) * H, anchors_s + (ETA - NV) * H, eta_in, log_eta, log_eta_max, HEADS,
        C, D, H, ETA >= 0, MOVING, ANCHORED, PRECISION,
    )  # fmt: skip
    step = make_rate(
        x_k, phi_x + (ALPHA * plane + at) * H, now_in + ALPHA * H * D, anchors_in + ALPHA * H * D,
        now_s + (ALPHA - NV) * H, anchors_s + (ALPHA - NV) * H, alpha_in, log_alpha, 0.0, HEADS,
        C, D, H, ALPHA >= 0, MOVING, ANCHORED, PRECISION,
    )  # fmt: skip
    total = tl.cumsum(step, 0)
    if TABLE:
        p.store(square, decay(total - step, total, True, PRECISION, C) * p.exp(rate, PRECISION)[None, :], C, C)


@kernel
def bank_chain(
    x_k, x_v, eta_in, alpha_in,  # SELF: inputs [B, T, H, d], and logits of eta and alpha (log rates where no memory makes them)
    phi_x,  # SELF, not MOVING: as `input_features` leaves it
    k, v, log_eta, log_alpha, key_norm, value_norm,  # SELF: out, with 1 / norm of k and v [B, T, H]; else in
    keys,  # [n, B, T, H, h], scratch
    table,  # SELF: scratch [N, 1, C, C]; else in, [N, chunks, C, C]
    write_in, inverse_in,  # MOVING: K_in [B, T, H, d]. SELF: scratch, the second [N, 1, C, C]
    w_in, anchor_in,  # W2^T [N, n, d, h]; MOVING: V2^T at chunk starts [N, chunks + 1, n, d, h], the first given, and A2^T
    states_vector, anchor_vector,  # V^T at chunk starts and the end, [N, chunks + 1, NV, h, d], the first given; A^T [N, NV, h, d]
    states_scalar, anchor_scalar,  # the same of scalar memories, [N, chunks + 1, NS, h]
    begins,  # where streams start anew, [N, chunks + 1] int8
    T, HEADS, chunks, plane, log_eta_max,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    SELF: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr,  # numbers, or -1
    UNIT_VALUE: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr, RESETS: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = HEADS * D
    all_in, all_out, all_scalar = (NV + NS) * H * D, NV * D * H, NS * H
    matrices_in, anchors_in = w_in + n * all_in, anchor_in + n * all_in
    if MOVING:
        matrices_in = w_in + n * (chunks + 1) * all_in
    matrices, anchors = states_vector + n * (chunks + 1) * all_out, anchor_vector + n * all_out
    vectors, anchors_s = states_scalar + n * (chunks + 1) * all_scalar, anchor_scalar + n * all_scalar
    for i in tl.range(0, chunks, disable_licm=True):  # hoisted addresses would fill the registers
        at = p.place(i, n, T, HEADS, C)
        now_in = matrices_in
        if MOVING:
            now_in = matrices_in + i * all_in
        now, now_s = matrices + i * all_out, vectors + i * all_scalar
        square = table + (n if SELF else n * chunks + i) * C * C
        if SELF:
            generate(
                x_k + at * D, x_v + at * D, phi_x, eta_in + at, alpha_in + at, k + at * D, v + at * D, log_eta + at, log_alpha + at,
                key_norm + at, value_norm + at, square, now_in, anchors_in, now, anchors, now_s, anchors_s,
                at, plane, log_eta_max, HEADS,
                C, D, H, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, NV, DGD or DGD_IN, MOVING, ANCHORED, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()  # what follows reads what other threads stored
        rate, step = p.each(log_eta + at, HEADS, C), p.each(log_alpha + at, HEADS, C)
        total, end = tl.cumsum(step, 0), tl.sum(step, 0)
        since, kept = p.exp(total - step, PRECISION), p.exp(end, PRECISION)
        strength = p.exp(rate + end - total, PRECISION)
        if MOVING and SELF:
            input_system_of(
                k + at * D, square, write_in + at * D, inverse_in + n * C * C, row, strength, C, D, DGD_IN, EXACT, PRECISION
            )  # fmt: skip
        anew = False
        if RESETS:
            anew = tl.load(begins + n * (chunks + 1) + i + 1) != 0
        for m in tl.range(0, NV, disable_licm=True):
            of_in, of = m * H * D, m * D * H
            write_vector(
                k + at * D, v + at * D, keys + (m * plane + at) * H, square, write_in + at * D, inverse_in,
                now + of, anchors + of, now_in + of_in, anchors_in + of_in,
                now + all_out + of, now_in + all_in + of_in, matrices + of, matrices_in + of_in, anew,
                keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys,
                HEADS, since, strength, kept, C, D, H,
                False, MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, EXACT, PRECISION,
            )  # fmt: skip
        for m in tl.range(0, NS, disable_licm=True):
            of_in, of = (NV + m) * H * D, m * H
            write_scalar(
                k + at * D, v + at * D, keys + ((NV + m) * plane + at) * H, square, write_in + at * D, inverse_in,
                now_s + of, anchors_s + of, now_in + of_in, anchors_in + of_in,
                now_s + all_scalar + of, now_in + all_in + of_in, vectors + of, matrices_in + of_in, anew,
                keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys,
                HEADS, since, strength, kept, C, D, H,
                False, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, EXACT, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the next chunk reads what other threads stored


@kernel
def bank_tape(
    k, v, log_eta, log_alpha, keys, table, write_in, inverse_in,
    w_in, anchor_in, states_vector, anchor_vector, states_scalar, anchor_scalar,
    phi_v, write, slope_k, slope_v, key_scale,  # of all memories: [n, B, T, H, h] four times, [n, B, T, H]
    inverse,  # Y, [n, N, chunks, C, C]
    u, target, missed, target_scale, e,  # of vector ones: [NV, B, T, H, d] thrice, [NV, B, T, H], [NV, B, T, H, d]
    u_scalar, target_scalar, missed_scalar, e_scalar,  # [NS, B, T, H]
    u_in, missed_in, curve,  # MOVING: [n, B, T, H, h]
    T, HEADS, chunks, plane,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per chunk, stream and memory: what backward (and M_mem's read) needs of what was written."""
    i, n, m = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    at = p.place(i, n, T, HEADS, C)
    step = p.each(log_alpha + at, HEADS, C)
    total, end = tl.cumsum(step, 0), tl.sum(step, 0)
    since, kept = p.exp(total - step, PRECISION), p.exp(end, PRECISION)
    strength = p.exp(p.each(log_eta + at, HEADS, C) + end - total, PRECISION)
    token, chunk, square = m * plane + at, n * (chunks + 1) + i, (n * chunks + i) * C * C
    wide = token * H
    memory_in = (n * (NV + NS) + m) * H * D
    layer_in = memory_in
    if MOVING:
        layer_in = (chunk * (NV + NS) + m) * H * D
    mine = inverse + m * (tl.num_programs(1).to(tl.int64) * chunks * C * C) + square
    if m < NV:
        memory, layer, narrow = (n * NV + m) * D * H, (chunk * NV + m) * D * H, token * D
        write_vector(
            k + at * D, v + at * D, keys + wide, table + square, write_in + at * D, inverse_in + square,
            states_vector + layer, anchor_vector + memory, w_in + layer_in, anchor_in + memory_in,
            keys, keys, keys, keys, False,
            phi_v + wide, write + wide, u + narrow, target + narrow, missed + narrow, slope_k + wide, slope_v + wide,
            key_scale + token, target_scale + token, mine, e + narrow, u_in + wide, missed_in + wide, curve + wide,
            HEADS, since, strength, kept, C, D, H,
            True, MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, EXACT, PRECISION,
        )  # fmt: skip
    else:
        memory, layer, narrow = (n * NS + m - NV) * H, (chunk * NS + m - NV) * H, token - NV * plane
        write_scalar(
            k + at * D, v + at * D, keys + wide, table + square, write_in + at * D, inverse_in + square,
            states_scalar + layer, anchor_scalar + memory, w_in + layer_in, anchor_in + memory_in,
            keys, keys, keys, keys, False,
            phi_v + wide, write + wide, u_scalar + narrow, target_scalar + narrow, missed_scalar + narrow,
            slope_k + wide, slope_v + wide, key_scale + token, mine, e_scalar + narrow, u_in + wide, missed_in + wide, curve + wide,
            HEADS, since, strength, kept, C, D, H,
            True, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, EXACT, PRECISION,
        )  # fmt: skip
