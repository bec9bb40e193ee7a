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
    k_at, table_at, write_in_at, inverse_in_at, row, row_in, strength,
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
    p.store_rows(write_in_at, written, row_in, C, D)


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
        k + at * D, table + square, write_in + at * D, inverse_in + square, HEADS * D, HEADS * D, strength,
        C, D, DGD_IN, EXACT, PRECISION,
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
    x_at, phi_at, w_in, anchor_in, V_at, A_at, out_at, norm_at, unit, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys or values of x [C, d], by their memory if ADAPTIVE; with `unit` of length 1. They and what scaled them are stored."""
    row, row_h = HEADS * D, HEADS * H
    made = p.rows(x_at, row, C, D).to(tl.float32)
    if ADAPTIVE:
        made = applied(
            x_at, phi_at, w_in, anchor_in, V_at, A_at, row, row_h, C, D, H, MOVING, ANCHORED, PRECISION
        )  # fmt: skip
    scale = tl.where(unit, p.inverse_norm(made, PRECISION), 1.0)
    p.store_each(norm_at, scale, HEADS, C)
    p.store_rows(out_at, made * scale[:, None], row, C, D)


@triton.jit
def make_rate(
    x_at, phi_at, w_in, anchor_in, V_at, A_at, given_at, out_at, log_most, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log rates [C], stored: of logits and their memory if ADAPTIVE, else as they are given."""
    rate = p.each(given_at, HEADS, C).to(tl.float32)
    if ADAPTIVE:
        rate += applied_scalar(
            x_at, phi_at, w_in, anchor_in, V_at, A_at, HEADS * D, HEADS * H, C, D, H, MOVING, ANCHORED, PRECISION
        )
        rate = log_most + p.log_sigmoid(rate)
    p.store_each(out_at, rate, HEADS, C)


@triton.jit
def make_given(
    x_k, x_v, eta_in, alpha_in, k, v, log_eta, log_alpha, key_norm, value_norm,  # this chunk's
    HEADS,
    C: tl.constexpr, D: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr, UNIT_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What no memory makes of keys, values and rates."""
    if KEY < 0:
        make_vector(
            x_k, x_k, x_k, x_k, x_k, x_k, k, key_norm, True, HEADS, C, D, D, False, False, False, PRECISION
        )  # fmt: skip
    if VALUE < 0:
        make_vector(
            x_v, x_v, x_v, x_v, x_v, x_v, v, value_norm, UNIT_VALUE, HEADS, C, D, D, False, False, False, PRECISION
        )  # fmt: skip
    if ETA < 0:
        make_rate(x_k, x_k, x_k, x_k, x_k, x_k, eta_in, log_eta, 0.0, HEADS, C, D, D, False, False, False, PRECISION)
    if ALPHA < 0:
        make_rate(
            x_k, x_k, x_k, x_k, x_k, x_k, alpha_in, log_alpha, 0.0, HEADS, C, D, D, False, False, False, PRECISION
        )  # fmt: skip


@triton.jit
def make(
    x_k, x_v, phi_x, eta_in, alpha_in, k, v, log_eta, log_alpha, key_norm, value_norm,  # this chunk's
    now_in, anchors_in, now, anchors, now_s, anchors_s,  # the memory's weights at its start
    m, log_eta_max, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, VECTOR: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr, UNIT_VALUE: tl.constexpr,
    MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What memory m makes of a chunk: keys, values, or a rate. The first program makes what no memory makes, too."""
    if KEY < 0 or VALUE < 0 or ETA < 0 or ALPHA < 0:  # noqa: SIM102 (decided when compiling, the next one when running)
        if m == 0:
            make_given(
                x_k, x_v, eta_in, alpha_in, k, v, log_eta, log_alpha, key_norm, value_norm,
                HEADS, C, D, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, PRECISION,
            )  # fmt: skip
    if VECTOR:
        x, out, norm = x_k, k, key_norm
        if m == VALUE:
            x, out, norm = x_v, v, value_norm
        make_vector(
            x, phi_x, now_in, anchors_in, now, anchors, out, norm, UNIT_VALUE or m == KEY, HEADS,
            C, D, H, True, MOVING, ANCHORED, PRECISION,
        )  # fmt: skip
    else:
        given, out, most = eta_in, log_eta, log_eta_max
        if m == ALPHA:
            given, out, most = alpha_in, log_alpha, log_eta_max * 0.0
        make_rate(
            x_k, phi_x, now_in, anchors_in, now_s, anchors_s, given, out, most, HEADS,
            C, D, H, True, MOVING, ANCHORED, PRECISION,
        )  # fmt: skip


@triton.jit
def pace(log_eta, log_alpha, HEADS, C: tl.constexpr, PRECISION: tl.constexpr):
    """Of a chunk: log eta, since, total [C], kept, strength [C]; see write.py."""
    rate, step = p.each(log_eta, HEADS, C), p.each(log_alpha, HEADS, C)
    total, end = tl.cumsum(step, 0), tl.sum(step, 0)
    return rate, p.exp(total - step, PRECISION), total, p.exp(end, PRECISION), p.exp(rate + end - total, PRECISION)


@triton.jit
def write_chunks(
    x_k, x_v, eta_in, alpha_in, phi_x, k, v, log_eta, log_alpha, key_norm, value_norm, keys, table, write_in, inverse_in,
    matrices_in, anchors_in, matrices, anchors, vectors, anchors_s,  # of the stream and memory: at its first chunk
    begins, met, n, m, T, HEADS, chunks, plane, log_eta_max,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, VECTOR: tl.constexpr,
    SELF: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr,
    UNIT_VALUE: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr, RESETS: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One memory along its stream."""
    row, all_in, all_out, all_scalar = HEADS * D, (NV + NS) * H * D, NV * D * H, NS * H
    for i in tl.range(0, chunks, disable_licm=True):  # hoisted addresses would fill the registers
        at = p.place(i, n, T, HEADS, C)
        wide, narrow = (m * plane + at) * H, at * D
        now_in = matrices_in
        if MOVING:
            now_in = matrices_in + i * all_in
        now, now_s = matrices + i * all_out, vectors + i * all_scalar
        square, own, row_in = table, write_in + narrow, row
        if SELF:
            own, row_in = write_in, D
            make(
                x_k + narrow, x_v + narrow, phi_x + wide, eta_in + at, alpha_in + at, k + narrow, v + narrow,
                log_eta + at, log_alpha + at, key_norm + at, value_norm + at,
                now_in, anchors_in, now, anchors, now_s, anchors_s, m, log_eta_max, HEADS,
                C, D, H, VECTOR, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, MOVING, ANCHORED, PRECISION,
            )  # fmt: skip
            p.meet(met, (i + 1) * (NV + NS), NV + NS)
        else:
            square = table + i * C * C
        rate, since, total, kept, strength = pace(log_eta + at, log_alpha + at, HEADS, C, PRECISION)
        if SELF and (DGD or DGD_IN):
            step = p.each(log_alpha + at, HEADS, C)
            p.store(square, decay(total - step, total, True, PRECISION, C) * p.exp(rate, PRECISION)[None, :], C, C)
            tl.debug_barrier()
        if MOVING and SELF:
            input_system_of(k + narrow, square, own, inverse_in, row, row_in, strength, C, D, DGD_IN, EXACT, PRECISION)
        anew = False
        if RESETS:
            anew = tl.load(begins + n * (chunks + 1) + i + 1) != 0
        if VECTOR:
            write_vector(
                k + narrow, v + narrow, keys + wide, square, own, inverse_in,
                now, anchors, now_in, anchors_in, now + all_out, now_in + all_in, matrices, matrices_in, anew,
                keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys,
                HEADS, row_in, since, strength, kept, C, D, H,
                False, MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, EXACT, PRECISION,
            )  # fmt: skip
        else:
            write_scalar(
                k + narrow, v + narrow, keys + wide, square, own, inverse_in,
                now_s, anchors_s, now_in, anchors_in, now_s + all_scalar, now_in + all_in, vectors, matrices_in, anew,
                keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys, keys,
                HEADS, row_in, since, strength, kept, C, D, H,
                False, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, EXACT, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # the next chunk reads what other threads stored


@kernel
def bank_chain(
    x_k, x_v, eta_in, alpha_in,  # SELF: inputs [B, T, H, d], and logits of eta and alpha (log rates where no memory makes them)
    phi_x,  # SELF, not MOVING: as `input_features` leaves it
    k, v, log_eta, log_alpha, key_norm, value_norm,  # SELF: out, with 1 / norm of k and v [B, T, H]; else in
    keys,  # [n, B, T, H, h], scratch
    table,  # SELF: scratch [N, n, C, C]; else in, [N, chunks, C, C]
    write_in, inverse_in,  # MOVING: K_in [B, T, H, d]. SELF: scratch, [N, n, C, d] and [N, n, C, C]
    w_in, anchor_in,  # W2^T [N, n, d, h]; MOVING: V2^T at chunk starts [N, chunks + 1, n, d, h], the first given, and A2^T
    states_vector, anchor_vector,  # V^T at chunk starts and the end, [N, chunks + 1, NV, h, d], the first given; A^T [N, NV, h, d]
    states_scalar, anchor_scalar,  # the same of scalar memories, [N, chunks + 1, NS, h]
    begins,  # where streams start anew, [N, chunks + 1] int8
    met,  # SELF: how often programs of a stream met, [N] int32; zeros
    T, HEADS, chunks, plane, log_eta_max, first,  # first: stream of the first program
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    SELF: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr,  # numbers, or -1
    UNIT_VALUE: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr, RESETS: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program per stream and memory. Those of a stream meet once a chunk, for the keys, values and rates that they make."""
    n, m = (first + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    one = n * (NV + NS) + m
    all_in, begin = (NV + NS) * H * D, n * (chunks + 1)
    matrices_in = w_in + one * H * D
    if MOVING:
        matrices_in = w_in + begin * all_in + m * H * D
    scratch, mine_in = one * C * C, write_in + one * C * D
    if not SELF:
        scratch, mine_in = n * chunks * C * C, write_in
    matrices, anchors = states_vector, anchor_vector
    if NV > 0:
        matrices, anchors = states_vector + (begin * NV + m) * D * H, anchor_vector + (n * NV + m) * D * H
        if m < NV:
            write_chunks(
                x_k, x_v, eta_in, alpha_in, phi_x, k, v, log_eta, log_alpha, key_norm, value_norm,
                keys, table + scratch, mine_in, inverse_in + scratch,
                matrices_in, anchor_in + one * H * D, matrices, anchors, states_scalar, anchor_scalar,
                begins, met + n, n, m, T, HEADS, chunks, plane, log_eta_max, C, D, H, True,
                SELF, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, NV, NS, RESETS,
                MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, EXACT, PRECISION,
            )  # fmt: skip
    if NS > 0:
        vectors, anchors_s = states_scalar + (begin * NS + m - NV) * H, anchor_scalar + (n * NS + m - NV) * H
        if m >= NV:
            write_chunks(
                x_k, x_v, eta_in, alpha_in, phi_x, k, v, log_eta, log_alpha, key_norm, value_norm,
                keys, table + scratch, mine_in, inverse_in + scratch,
                matrices_in, anchor_in + one * H * D, matrices, anchors, vectors, anchors_s,
                begins, met + n, n, m, T, HEADS, chunks, plane, log_eta_max, C, D, H, False,
                SELF, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, NV, NS, RESETS,
                MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, EXACT, PRECISION,
            )  # fmt: skip


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
            HEADS, HEADS * D, since, strength, kept, C, D, H,
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
            HEADS, HEADS * D, since, strength, kept, C, D, H,
            True, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, EXACT, PRECISION,
        )  # fmt: skip
