"""The backward of the loop over chunks (forward.py), last chunk first; and what it means for the inputs, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
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
    x_at, y_at, d_at, norm_at, d_raw_at, phi_at, slope_at, d_z_at, V_at, A_at, d_V_at, d_in_at, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADAPTIVE: tl.constexpr, UNIT: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of keys or values y to that of what y = unit(.) was made of, stored, and to their memory's weights."""
    row, row_h = HEADS * D, HEADS * H
    d = p.rows(d_at, row, C, D)
    if UNIT:
        d = p.unit_backward(d, p.rows(y_at, row, C, D), p.each(norm_at, HEADS, C))
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
def restart_all(d_states, d_firsts, N: tl.constexpr, R: tl.constexpr, S: tl.constexpr):
    """`restart` of N memories."""
    for m in tl.range(0, N):
        restart(d_states + m * R * S, d_firsts + m * R * S, R, S)


@triton.jit
def degenerate(
    x_k, x_v, k, v, d_k, d_v, key_norm, value_norm, d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha,  # this chunk's
    phi_x, slope_x, d_z_x,  # all
    states, anchors, d_states, scalars, anchors_s, d_scalars, d_anchors_s, d_states_in,  # weights at its start, and their gradients
    d_rate, log_rate, d_step, step,  # [C]: gradients of log eta and log alpha, and log sigmoids
    at, plane, HEADS,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr, UNIT_VALUE: tl.constexpr, NV: tl.constexpr,
    MOVING: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The backward of `generate` of forward.py."""
    wide, memory = (KEY * plane + at) * H, KEY * D * H
    unmake_vector(
        x_k, k, d_k, key_norm, d_raw_k, phi_x + wide, slope_x + wide, d_z_x + wide,
        states + memory, anchors + memory, d_states + memory, d_states_in + memory,
        HEADS, C, D, H, KEY >= 0, True, MOVING, ANCHORED, PRECISION,
    )  # fmt: skip
    wide, memory = (VALUE * plane + at) * H, VALUE * D * H
    unmake_vector(
        x_v, v, d_v, value_norm, d_raw_v, phi_x + wide, slope_x + wide, d_z_x + wide,
        states + memory, anchors + memory, d_states + memory, d_states_in + memory,
        HEADS, C, D, H, VALUE >= 0, UNIT_VALUE, MOVING, ANCHORED, PRECISION,
    )  # fmt: skip
    wide, memory = (ETA * plane + at) * H, (ETA - NV) * H
    unmake_rate(
        x_k, d_rate, log_rate, phi_x + wide, slope_x + wide, d_z_x + wide, scalars + memory, anchors_s + memory,
        d_scalars + memory, d_anchors_s + memory, d_states_in + ETA * H * D, d_logit_eta,
        HEADS, C, D, H, ETA >= 0, MOVING, ANCHORED, PRECISION,
    )  # fmt: skip
    wide, memory = (ALPHA * plane + at) * H, (ALPHA - NV) * H
    unmake_rate(
        x_k, d_step, step, phi_x + wide, slope_x + wide, d_z_x + wide, scalars + memory, anchors_s + memory,
        d_scalars + memory, d_anchors_s + memory, d_states_in + ALPHA * H * D, d_logit_alpha,
        HEADS, C, D, H, ALPHA >= 0, MOVING, ANCHORED, PRECISION,
    )  # fmt: skip


@triton.jit
def unwrite_vectors(
    k, v, keys, phi_v, write, square, write_in, u, target, missed, slope_k, slope_v, key_scale, target_scale, e,
    u_in, missed_in, curve, states_vector, anchors, now_in, anchors_in, end_in, d_states_vector, d_states_in,
    d_r_read, d_keys_read, d_r_in_read,
    d_r, d_target, d_z_k, d_z_v, d_r_in, d_hidden, d_k, d_v,
    of_out, of_in, all_out, all_in, at, plane, HEADS, since, strength, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    NV: tl.constexpr, ADDED: tl.constexpr, READ: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr,
    DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, RESIDUAL: tl.constexpr,
    ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`unwrite_vector` of all of them. Returns drive, lost and ends, summed."""
    drive, lost, ends = since * 0.0, since * 0.0, kept * 0.0
    for m in tl.range(0, NV, disable_licm=True):
        token, memory, memory_in = m * plane + at, m * D * H, m * H * D
        wide, narrow, layer = token * H, token * D, of_out + memory
        drive_m, lost_m, ends_m = unwrite_vector(
            k + at * D, v + at * D, keys + wide, phi_v + wide, write + wide, square, write_in + at * D,
            u + narrow, target + narrow, missed + narrow, slope_k + wide, slope_v + wide,
            key_scale + token, target_scale + token, e + narrow, u_in + wide, missed_in + wide, curve + wide,
            states_vector + layer, anchors + memory, now_in + memory_in, anchors_in + memory_in,
            states_vector + layer + all_out, end_in + memory_in,
            d_states_vector + layer + all_out, d_states_in + of_in + all_in + memory_in,
            d_states_vector + layer, d_states_in + of_in + memory_in,
            d_r_read + at * D, d_keys_read + at * H, d_r_in_read + at * H,
            d_r + narrow, d_target + narrow, d_z_k + wide, d_z_v + wide, d_r_in + wide, d_hidden + wide,
            d_k + at * D, d_v + at * D,
            HEADS, since, strength, kept, C, D, H,
            ADDED, READ, MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, PRECISION,
        )  # fmt: skip
        drive, lost, ends = drive + drive_m, lost + lost_m, ends + ends_m
        tl.debug_barrier()  # sums over memories stand in memory
    return drive, lost, ends


@triton.jit
def unwrite_scalars(
    k, v, keys, phi_v, write, square, write_in, u_scalar, target_scalar, missed_scalar, slope_k, slope_v, key_scale, e_scalar,
    u_in, missed_in, curve, states_scalar, anchors_s, now_in, anchors_in, end_in, d_states_scalar, d_states_in, d_anchors_s,
    d_z_k, d_z_v, d_r_in, d_k, d_v,
    of_scalar, of_in, all_scalar, all_in, at, plane, HEADS, since, strength, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    NV: tl.constexpr, NS: tl.constexpr, ADDED: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr,
    DGD_IN: tl.constexpr, UNIT_TARGET: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of scalar memories."""
    drive, lost, ends = since * 0.0, since * 0.0, kept * 0.0
    for m in tl.range(0, NS, disable_licm=True):
        token, memory, memory_in = m * plane + at, m * H, (NV + m) * H * D
        wide, layer = (token + NV * plane) * H, of_scalar + memory
        drive_m, lost_m, ends_m = unwrite_scalar(
            k + at * D, v + at * D, keys + wide, phi_v + wide, write + wide, square, write_in + at * D,
            u_scalar + token, target_scalar + token, missed_scalar + token, slope_k + wide, slope_v + wide,
            key_scale + token + NV * plane, e_scalar + token, u_in + wide, missed_in + wide, curve + wide,
            states_scalar + layer, anchors_s + memory, now_in + memory_in, anchors_in + memory_in,
            states_scalar + layer + all_scalar, end_in + memory_in,
            d_states_scalar + layer + all_scalar, d_states_in + of_in + all_in + memory_in,
            d_states_scalar + layer, d_states_in + of_in + memory_in, d_anchors_s + memory,
            d_z_k + wide, d_z_v + wide, d_r_in + wide, d_k + at * D, d_v + at * D,
            HEADS, since, strength, kept, C, D, H,
            ADDED, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, PRECISION,
        )  # fmt: skip
        drive, lost, ends = drive + drive_m, lost + lost_m, ends + ends_m
        tl.debug_barrier()
    return drive, lost, ends


@kernel
def bank_chain_backward(
    x_k, x_v, phi_x, slope_x,  # SELF: inputs, and as `input_features` leaves them
    k, v, log_eta, log_alpha, key_norm, value_norm,
    keys, phi_v, write, table, write_in, slope_k, slope_v, key_scale, u, target, missed, target_scale, e,  # the tape
    u_scalar, target_scalar, missed_scalar, e_scalar, u_in, missed_in, curve,
    w_in, anchor_in, states_vector, anchor_vector, states_scalar, anchor_scalar,
    d_r_read, d_keys_read, d_r_in_read,  # READ: what M_mem's read adds, [B, T, H, d], and h twice
    d_k, d_v, d_log_eta, d_log_alpha,  # gradients of k, v and log rates from elsewhere: in; all of them: out. fp32
    d_states_vector, d_states_scalar, d_states_in,  # as states; the last are given, ADDED: others hold what is added
    d_first_vector, d_first_scalar, d_first_in,  # RESETS: of the first states beside those at the stream's start; zeros
    d_anchor_scalar,  # of A, [N, NS, h]; zeros
    d_r, d_target, d_z_k, d_z_v, d_r_in, d_hidden, d_z_x,  # out: [NV, B, T, H, d] twice, [n, B, T, H, h]; the last two: NV, n
    d_raw_k, d_raw_v, d_logit_eta, d_logit_alpha,  # SELF, out: of what k, v and the rates were made of
    begins,
    T, HEADS, chunks, plane, log_eta_max,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    SELF: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, ETA: tl.constexpr, ALPHA: tl.constexpr,
    UNIT_VALUE: tl.constexpr, NV: tl.constexpr, NS: tl.constexpr, RESETS: tl.constexpr, ADDED: tl.constexpr, READ: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr,
    RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    all_in, all_out, all_scalar = (NV + NS) * H * D, NV * D * H, NS * H
    begin = n * (chunks + 1)
    anchors_in, d_anchors_s = anchor_in + n * all_in, d_anchor_scalar + n * all_scalar
    anchors, anchors_s = anchor_vector + n * all_out, anchor_scalar + n * all_scalar
    for back in tl.range(0, chunks, disable_licm=True):
        i = chunks - 1 - back
        at, square = p.place(i, n, T, HEADS, C), table + (n * chunks + i) * C * C
        rate, step = p.each(log_eta + at, HEADS, C), p.each(log_alpha + at, HEADS, C)
        total, end = tl.cumsum(step, 0), tl.sum(step, 0)
        since, kept = p.exp(total - step, PRECISION), p.exp(end, PRECISION)
        strength = p.exp(rate + end - total, PRECISION)
        of_out, of_scalar, of_in = (begin + i) * all_out, (begin + i) * all_scalar, (begin + i) * all_in
        now_in, end_in = w_in + n * all_in, w_in
        if MOVING:
            now_in = w_in + of_in
            end_in = now_in + all_in
        drive, lost, ends = unwrite_vectors(
            k, v, keys, phi_v, write, square, write_in, u, target, missed,
            slope_k, slope_v, key_scale, target_scale, e, u_in, missed_in, curve, states_vector, anchors, now_in, anchors_in,
            end_in, d_states_vector, d_states_in, d_r_read, d_keys_read, d_r_in_read,
            d_r, d_target, d_z_k, d_z_v, d_r_in, d_hidden, d_k, d_v,
            of_out, of_in, all_out, all_in, at, plane, HEADS, since, strength, kept,
            C, D, H, NV, ADDED, READ, MOVING, DGD, DGD_IN, OWN, UNIT_TARGET, RESIDUAL, ANCHORED, PRECISION,
        )  # fmt: skip
        drive_s, lost_s, ends_s = unwrite_scalars(
            k, v, keys, phi_v, write, square, write_in, u_scalar, target_scalar, missed_scalar, slope_k, slope_v, key_scale,
            e_scalar, u_in, missed_in, curve, states_scalar, anchors_s, now_in, anchors_in, end_in, d_states_scalar, d_states_in,
            d_anchors_s,
            d_z_k, d_z_v, d_r_in, d_k, d_v,
            of_scalar, of_in, all_scalar, all_in, at, plane, HEADS, since, strength, kept,
            C, D, H, NV, NS, ADDED, MOVING, DGD, DGD_IN, UNIT_TARGET, ANCHORED, PRECISION,
        )  # fmt: skip
        drive, lost, ends = drive + drive_s, lost + lost_s, ends + ends_s
        d_rate = p.each(d_log_eta + at, HEADS, C) + drive
        d_step = p.each(d_log_alpha + at, HEADS, C) + tl.cumsum(lost - drive, 0, reverse=True) - lost + ends
        if SELF:
            degenerate(
                x_k + at * D, x_v + at * D, k + at * D, v + at * D, d_k + at * D, d_v + at * D, key_norm + at, value_norm + at,
                d_raw_k + at * D, d_raw_v + at * D, d_logit_eta + at, d_logit_alpha + at, phi_x, slope_x, d_z_x,
                states_vector + of_out, anchors, d_states_vector + of_out, states_scalar + of_scalar, anchors_s,
                d_states_scalar + of_scalar, d_anchors_s, d_states_in + of_in, d_rate, rate - log_eta_max, d_step, step,
                at, plane, HEADS, C, D, H, KEY, VALUE, ETA, ALPHA, UNIT_VALUE, NV, MOVING, ANCHORED, PRECISION,
            )  # fmt: skip
        else:
            p.store_each(d_log_eta + at, d_rate, HEADS, C)
            p.store_each(d_log_alpha + at, d_step, HEADS, C)
        tl.debug_barrier()
        if RESETS:  # noqa: SIM102 (decided when compiling, the next one when running)
            if tl.load(begins + begin + i) != 0:
                restart_all(d_states_vector + of_out, d_first_vector + n * all_out, NV, H, D)
                restart_all(d_states_scalar + of_scalar, d_first_scalar + n * all_scalar, NS, 1, H)
                if MOVING:
                    restart_all(d_states_in + of_in, d_first_in + n * all_in, NV + NS, D, H)
                tl.debug_barrier()


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
