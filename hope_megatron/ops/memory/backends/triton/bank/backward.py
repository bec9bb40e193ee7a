"""The backward of the loop over chunks (forward.py), last chunk first; and what it means for the inputs, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.bank.forward import pace
from hope_megatron.ops.memory.backends.triton.bank.unwrite import input_weights_t, unwrite_scalar, unwrite_vector
from hope_megatron.ops.memory.backends.triton.launching import kernel


@triton.jit
def unapplied(
    x_at, d_raw, phi_at, slope_at, d_z_at, V_at, A_at, d_V_at, d_in_at, row, row_h,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of V^T (and V2^T) of a vector memory that was applied to x are added; d_raw [C, d]."""
    p.store(d_V_at, p.add_mm(p.load(d_V_at, H, D), p.columns(phi_at, row_h, C, H), d_raw, PRECISION), H, D)
    if MOVING:
        d_z = p.mm(d_raw, p.whole_t(V_at, A_at, H, D, ANCHORED), PRECISION) * p.rows(slope_at, row_h, C, H)
        p.store_rows(d_z_at, d_z, row_h, C, H)
        p.store(d_in_at, p.add_mm(p.load(d_in_at, D, H), p.columns(x_at, row, C, D), d_z, PRECISION), D, H)


@triton.jit
def unapplied_scalar(
    x_at, d_logit, phi_at, slope_at, d_z_at, V_at, A_at, d_V_at, d_A_at, d_in_at, row, row_h,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of a scalar memory; d_logit [C]."""
    i_h = tl.arange(0, H)
    d_w = tl.sum(d_logit[:, None] * p.rows(phi_at, row_h, C, H), 0)
    tl.store(d_V_at + i_h, tl.load(d_V_at + i_h) + d_w)
    w = tl.load(V_at + i_h)
    if ANCHORED:
        w += tl.load(A_at + i_h)
        tl.store(d_A_at + i_h, tl.load(d_A_at + i_h) + d_w)
    if MOVING:
        d_z = d_logit[:, None] * w[None, :] * p.rows(slope_at, row_h, C, H)
        p.store_rows(d_z_at, d_z, row_h, C, H)
        p.store(d_in_at, p.add_mm(p.load(d_in_at, D, H), p.columns(x_at, row, C, D), d_z, PRECISION), D, H)


@triton.jit
def unmake_vector(
    x_at, y_at, d, norm_at, unit, d_raw_at, phi_at, slope_at, d_z_at, V_at, A_at, d_V_at, d_in_at, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient d [C, d] of keys or values y to that of what y was made of, stored, and to their memory's weights."""
    row, row_h = HEADS * D, HEADS * H
    y = p.rows(y_at, row, C, D) * tl.where(unit, 1.0, 0.0)
    d = p.unit_backward(d, y, p.each(norm_at, HEADS, C))
    p.store_rows(d_raw_at, d, row, C, D)
    if ADAPTIVE:
        unapplied(
            x_at, d, phi_at, slope_at, d_z_at, V_at, A_at, d_V_at, d_in_at, row, row_h, C, D, H, MOVING, ANCHORED, PRECISION
        )  # fmt: skip


@triton.jit
def unmake_rate(
    x_at, d_rate, log_rate, phi_at, slope_at, d_z_at, V_at, A_at, d_V_at, d_A_at, d_in_at, d_logit_at, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADAPTIVE: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of log rates [C] to that of logits, stored, and to their memory's weights. log_rate: log sigmoid."""
    if ADAPTIVE:
        d_rate = d_rate * p.one_minus_exp(log_rate)
        unapplied_scalar(
            x_at, d_rate, phi_at, slope_at, d_z_at, V_at, A_at, d_V_at, d_A_at, d_in_at, HEADS * D, HEADS * H,
            C, D, H, MOVING, ANCHORED, PRECISION,
        )  # fmt: skip
    p.store_each(d_logit_at, d_rate, HEADS, C)


@triton.jit
def restart(d_state, d_first, R: tl.constexpr, S: tl.constexpr):
    """A stream starts anew here: what came back belongs to the first state, and nothing goes further."""
    d = p.load(d_state, R, S)
    p.store(d_first, p.load(d_first, R, S) + d, R, S)
    p.store(d_state, d * 0.0, R, S)


@triton.jit
def all_rows(given_at, part, row, N: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Gradients [C, d]: what was given, and the parts of N memories, in order."""
    d = p.rows(given_at, row, C, D)
    for j in tl.static_range(N):
        d += p.load(part + j * C * D, C, D)
    return d


@triton.jit
def all_rates(given_at, part, HEADS, N: tl.constexpr, C: tl.constexpr):
    """The same of rates, [C]."""
    d = p.each(given_at, HEADS, C)
    for j in tl.static_range(N):
        d += p.each(part + j * 6 * C, 1, C)
    return d


@triton.jit
def unmake_given(
    x_k, x_v, k, v, d_k, d_v, d_log_eta, d_log_alpha, log_eta, log_alpha, key_norm, value_norm,  # this chunk's
    d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha, part_k, part_v, part_rates, HEADS,
    C: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr, UNIT_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The backward of `make_given` of forward.py."""
    row = HEADS * D
    if KEY < 0:
        d = all_rows(d_k, part_k, row, N, C, D)
        unmake_vector(
            x_k, k, d, key_norm, True, d_raw_k, k, k, k, k, k, k, k, HEADS, C, D, D, False, False, False, PRECISION
        )  # fmt: skip
    if VALUE < 0:
        d = all_rows(d_v, part_v, row, N, C, D)
        unmake_vector(
            x_v, v, d, value_norm, UNIT_VALUE, d_raw_v, v, v, v, v, v, v, v, HEADS, C, D, D, False, False, False, PRECISION
        )  # fmt: skip
    if ETA < 0:
        p.store_each(d_logit_eta, all_rates(d_log_eta, part_rates, HEADS, N, C), HEADS, C)
    if ALPHA < 0:
        p.store_each(d_logit_alpha, all_rates(d_log_alpha, part_rates + C, HEADS, N, C), HEADS, C)


@triton.jit
def unmake(
    x_k, x_v, k, v, d_k, d_v, d_log_eta, d_log_alpha, log_eta, log_alpha, key_norm, value_norm,  # this chunk's
    d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha, part_k, part_v, part_rates,
    phi_x, slope_x, d_z_x, V, A, d_V, d_A, d_in,  # the memory's
    m, log_eta_max, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, VECTOR: tl.constexpr, N: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr, UNIT_VALUE: tl.constexpr,
    MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The backward of `make` of forward.py, of what all memories give to keys, values and rates."""
    if KEY < 0 or VALUE < 0 or ETA < 0 or ALPHA < 0:  # noqa: SIM102 (decided when compiling, the next one when running)
        if m == 0:
            unmake_given(
                x_k, x_v, k, v, d_k, d_v, d_log_eta, d_log_alpha, log_eta, log_alpha, key_norm, value_norm,
                d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha, part_k, part_v, part_rates, HEADS,
                C, D, N, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, PRECISION,
            )  # fmt: skip
    if VECTOR:
        x, y, given, part, norm, raw = x_k, k, d_k, part_k, key_norm, d_raw_k
        if m == VALUE:
            x, y, given, part, norm, raw = x_v, v, d_v, part_v, value_norm, d_raw_v
        d = all_rows(given, part, HEADS * D, N, C, D)
        unmake_vector(
            x, y, d, norm, UNIT_VALUE or m == KEY, raw, phi_x, slope_x, d_z_x, V, A, d_V, d_in, HEADS,
            C, D, H, True, MOVING, ANCHORED, PRECISION,
        )  # fmt: skip
    else:
        given_rate, part_rate, made, most, logit = d_log_eta, part_rates, log_eta, log_eta_max, d_logit_eta
        if m == ALPHA:
            given_rate, part_rate, made, most, logit = (
                d_log_alpha, part_rates + C, log_alpha, log_eta_max * 0.0, d_logit_alpha
            )  # fmt: skip
        d_rate = all_rates(given_rate, part_rate, HEADS, N, C)
        unmake_rate(
            x_k, d_rate, p.each(made, HEADS, C) - most, phi_x, slope_x, d_z_x, V, A, d_V, d_A, d_in, logit, HEADS,
            C, D, H, True, MOVING, ANCHORED, PRECISION,
        )  # fmt: skip


@triton.jit
def unwrite_chunks(
    x_k, x_v, phi_x, slope_x, k, v, log_eta, log_alpha, key_norm, value_norm,
    keys, phi_v, write, table, write_in, slope_k, slope_v, key_scale, u, target, missed, target_scale, e,
    u_in, missed_in, curve, matrices_in, anchors_in, V, A, d_r_read, d_keys_read, d_r_in_read,
    d_k, d_v, d_log_eta, d_log_alpha, d_V, d_in, d_first, d_first_in, d_A,  # weights: of the memory, at the stream's first chunk
    d_r, d_target, d_z_k, d_z_v, d_r_in, d_hidden, d_z_x, d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha,
    part_k, part_v, part_rates, ring,  # of the stream, in the first half of a ring; how far its second is
    begins, met, n, m, first_alike, T, HEADS, chunks, plane, log_eta_max,  # first_alike: memory of its kind
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, VECTOR: tl.constexpr, N: tl.constexpr, each_state: tl.constexpr,
    SELF: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr,
    UNIT_VALUE: tl.constexpr, RESETS: tl.constexpr, ADDED: tl.constexpr, READ: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One memory along its stream, last chunk first. each_state: numbers between its states of two chunks."""
    all_in = N * H * D
    for back in tl.range(0, chunks, disable_licm=True):
        i = chunks - 1 - back
        at, square = p.place(i, n, T, HEADS, C), table + i * C * C
        _, since, _, kept, strength = pace(log_eta + at, log_alpha + at, HEADS, C, PRECISION)
        token, alike, half = m * plane + at, (m - first_alike) * plane + at, (back % 2) * ring
        wide, narrow, state, state_in = token * H, alike * D, i * each_state, i * all_in
        now_in, end_in = matrices_in, matrices_in
        if MOVING:
            now_in = matrices_in + state_in
            end_in = now_in + all_in
        rates = part_rates + (half + m * C) * 6
        mine_k, mine_v = d_k + at * D, d_v + at * D
        if SELF:
            mine_k, mine_v = part_k + (half * D + m * C * D), part_v + (half * D + m * C * D)
        if VECTOR:
            ends = unwrite_vector(
                k + at * D, v + at * D, keys + wide, phi_v + wide, write + wide, square, write_in + at * D,
                u + narrow, target + narrow, missed + narrow, slope_k + wide, slope_v + wide, key_scale + token,
                target_scale + alike, e + narrow, u_in + wide, missed_in + wide, curve + wide,
                V + state, A, now_in, anchors_in, V + state + each_state, end_in,
                d_V + state + each_state, d_in + state_in + all_in, d_V + state, d_in + state_in,
                d_r_read + at * D, d_keys_read + at * H, d_r_in_read + at * H,
                d_r + narrow, d_target + narrow, d_z_k + wide, d_z_v + wide, d_r_in + wide, d_hidden + wide,
                mine_k, mine_v, rates, HEADS, since, strength, kept, C, D, H,
                SELF, ADDED, READ, MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, PRECISION,
            )  # fmt: skip
        else:
            ends = unwrite_scalar(
                k + at * D, v + at * D, keys + wide, phi_v + wide, write + wide, square, write_in + at * D,
                u + alike, target + alike, missed + alike, slope_k + wide, slope_v + wide, key_scale + token,
                e + alike, u_in + wide, missed_in + wide, curve + wide,
                V + state, A, now_in, anchors_in, V + state + each_state, end_in,
                d_V + state + each_state, d_in + state_in + all_in, d_V + state, d_in + state_in, d_A,
                d_z_k + wide, d_z_v + wide, d_r_in + wide, mine_k, mine_v, rates,
                HEADS, since, strength, kept, C, D, H,
                ADDED, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
        drive, lost = p.each(rates, 1, C), p.each(rates + C, 1, C)
        if MOVING:
            drive, lost = drive + p.each(rates + 2 * C, 1, C), lost + p.each(rates + 3 * C, 1, C)
        d_step = tl.cumsum(lost - drive, 0, reverse=True) - lost + ends
        if SELF:
            p.store_each(rates + 4 * C, drive, 1, C)
            p.store_each(rates + 5 * C, d_step, 1, C)
            p.meet(met, (back + 1) * N, N)
            unmake(
                x_k + at * D, x_v + at * D, k + at * D, v + at * D, d_k + at * D, d_v + at * D, d_log_eta + at, d_log_alpha + at,
                log_eta + at, log_alpha + at, key_norm + at, value_norm + at, d_raw_k + at * D, d_raw_v + at * D,
                d_logit_eta + at, d_logit_alpha + at, part_k + half * D, part_v + half * D, part_rates + half * 6 + 4 * C,
                phi_x + wide, slope_x + wide, d_z_x + wide, V + state, A, d_V + state, d_A, d_in + state_in,
                m, log_eta_max, HEADS, C, D, H, VECTOR, N, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, MOVING, ANCHORED, PRECISION,
            )  # fmt: skip
        else:
            p.store_each(d_log_eta + at, p.each(d_log_eta + at, HEADS, C) + drive, HEADS, C)
            p.store_each(d_log_alpha + at, p.each(d_log_alpha + at, HEADS, C) + d_step, HEADS, C)
        tl.debug_barrier()
        if RESETS:  # noqa: SIM102 (decided when compiling, the next one when running)
            if tl.load(begins + n * (chunks + 1) + i) != 0:
                restart(d_V + state, d_first, H if VECTOR else 1, D if VECTOR else H)
                if MOVING:
                    restart(d_in + state_in, d_first_in, D, H)
                tl.debug_barrier()


@kernel
def bank_chain_backward(
    x_k, x_v, phi_x, slope_x,  # SELF: inputs, and as `input_features` leaves them
    k, v, log_eta, log_alpha, key_norm, value_norm,
    keys, phi_v, write, table, write_in, slope_k, slope_v, key_scale, u, target, missed, target_scale, e,  # the tape
    u_scalar, target_scalar, missed_scalar, e_scalar, u_in, missed_in, curve,
    w_in, anchor_in, states_vector, anchor_vector, states_scalar, anchor_scalar,
    d_r_read, d_keys_read, d_r_in_read,  # READ: what M_mem's read adds, [B, T, H, d], and h twice
    d_k, d_v, d_log_eta, d_log_alpha,  # gradients of k, v and log rates from elsewhere; M_mem: of all of them, out. fp32
    d_states_vector, d_states_scalar, d_states_in,  # as states; the last are given, ADDED: others hold what is added
    d_first_vector, d_first_scalar, d_first_in,  # RESETS: of the first states beside those at the stream's start; zeros
    d_anchor_scalar,  # of A, [N, NS, h]; zeros
    d_r, d_target, d_z_k, d_z_v, d_r_in, d_hidden, d_z_x,  # out: [NV, B, T, H, d] twice, [n, B, T, H, h]; the last two: NV, n
    d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha,  # SELF, out: of what k, v and the rates were made of
    part_k, part_v,  # SELF, scratch: what each memory gives to k and v, [2, N, n, C, d]
    part_rates,  # scratch: drive and lost of both layers, and what the memory gives to log rates, [2, N, n, 6, C]
    begins,
    met,  # SELF: how often programs of a stream met, [N] int32; zeros
    T, HEADS, chunks, plane, log_eta_max, streams, first,  # first: stream of the first program
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    SELF: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr,
    UNIT_VALUE: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr, RESETS: tl.constexpr, ADDED: tl.constexpr, READ: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program per stream and memory, which meet once a chunk, to add up what each gives to keys, values and rates."""
    N: tl.constexpr = NV + NS
    n, m = (first + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    one, begin, slot = (n * N + m) * H * D, n * (chunks + 1), n * N * C
    matrices_in, d_in = w_in + one, d_states_in
    if MOVING:
        matrices_in, d_in = w_in + (begin * N + m) * H * D, d_states_in + (begin * N + m) * H * D
    ring = streams.to(tl.int64) * N * C
    if NV > 0:  # noqa: SIM102 (decided when compiling, the next one when running)
        if m < NV:
            state, fixed = (begin * NV + m) * D * H, (n * NV + m) * D * H
            unwrite_chunks(
                x_k, x_v, phi_x, slope_x, k, v, log_eta, log_alpha, key_norm, value_norm,
                keys, phi_v, write, table + n * chunks * C * C, write_in, slope_k, slope_v, key_scale,
                u, target, missed, target_scale, e, u_in, missed_in, curve, matrices_in, anchor_in + one,
                states_vector + state, anchor_vector + fixed, d_r_read, d_keys_read, d_r_in_read,
                d_k, d_v, d_log_eta, d_log_alpha, d_states_vector + state, d_in, d_first_vector + fixed, d_first_in + one,
                d_anchor_scalar, d_r, d_target, d_z_k, d_z_v, d_r_in, d_hidden, d_z_x,
                d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha, part_k + slot * D, part_v + slot * D, part_rates + slot * 6, ring,
                begins, met + n, n, m, 0, T, HEADS, chunks, plane, log_eta_max,
                C, D, H, True, N, NV * D * H, SELF, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, RESETS, ADDED, READ,
                MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, PRECISION,
            )  # fmt: skip
    if NS > 0:  # noqa: SIM102
        if m >= NV:
            state, fixed = (begin * NS + m - NV) * H, (n * NS + m - NV) * H
            unwrite_chunks(
                x_k, x_v, phi_x, slope_x, k, v, log_eta, log_alpha, key_norm, value_norm,
                keys, phi_v, write, table + n * chunks * C * C, write_in, slope_k, slope_v, key_scale,
                u_scalar, target_scalar, missed_scalar, target_scale, e_scalar, u_in, missed_in, curve,
                matrices_in, anchor_in + one, states_scalar + state, anchor_scalar + fixed, d_r_read, d_keys_read, d_r_in_read,
                d_k, d_v, d_log_eta, d_log_alpha, d_states_scalar + state, d_in, d_first_scalar + fixed, d_first_in + one,
                d_anchor_scalar + fixed, d_r, d_target, d_z_k, d_z_v, d_r_in, d_hidden, d_z_x,
                d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha, part_k + slot * D, part_v + slot * D, part_rates + slot * 6, ring,
                begins, met + n, n, m, NV, T, HEADS, chunks, plane, log_eta_max,
                C, D, H, False, N, NS * H, SELF, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, RESETS, ADDED, READ,
                MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, PRECISION,
            )  # fmt: skip


@kernel
def input_gradients(
    x_k, x_v, slope_x, d_z_x,  # [n, B, T, H, h]; d_z_x: out, MOVING: in
    d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha,
    w_in, anchor_in, states_vector, anchor_vector, states_scalar, anchor_scalar,
    d_x_k, d_x_v,
    T, HEADS, chunks, plane,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr,
    MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x_k and x_v, from those of what the memories made of them."""
    i, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, row, row_h = p.place(i, n, T, HEADS, C), HEADS * D, HEADS * H
    chunk, i_h = n * (chunks + 1) + i, tl.arange(0, H)
    d_x = p.rows(d_raw_k + at * D, row, C, D)
    for m in tl.static_range(NV + NS):
        token, of_in, of = (m * plane + at) * H, (n * (NV + NS) + m) * H * D, (chunk * (NV + NS) + m) * H * D
        if MOVING:
            d_z = p.rows(d_z_x + token, row_h, C, H)
        else:
            slope = p.rows(slope_x + token, row_h, C, H)
            if m < NV:
                W_t = p.load_t(states_vector + (chunk * NV + m) * D * H, H, D)
                if ANCHORED:
                    W_t += p.load_t(anchor_vector + (n * NV + m) * D * H, H, D)
                d_z = p.mm(p.rows((d_raw_v if m == VALUE else d_raw_k) + at * D, row, C, D), W_t, PRECISION) * slope
            else:
                w = tl.load(states_scalar + (chunk * NS + m - NV) * H + i_h)
                if ANCHORED:
                    w += tl.load(anchor_scalar + (n * NS + m - NV) * H + i_h)
                d_z = p.each((d_logit_eta if m == ETA else d_logit_alpha) + at, HEADS, C)[:, None] * w[None, :] * slope
            p.store_rows(d_z_x + token, d_z, row_h, C, H)
        W2_t = input_weights_t(w_in + (of if MOVING else of_in), anchor_in + of_in, D, H, MOVING, ANCHORED)
        if m == VALUE:
            p.store_rows(d_x_v + at * D, p.add_mm(p.rows(d_raw_v + at * D, row, C, D), d_z, W2_t, PRECISION), row, C, D)
        else:
            d_x = p.add_mm(d_x, d_z, W2_t, PRECISION)
    p.store_rows(d_x_k + at * D, d_x, row, C, D)
    if VALUE < 0:
        p.store_rows(d_x_v + at * D, p.rows(d_raw_v + at * D, row, C, D), row, C, D)
