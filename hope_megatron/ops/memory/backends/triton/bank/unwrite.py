"""The backward of write.py: one chunk of one memory, from the gradient of its weights at the chunk's end to that at its start.

Gradients d_x are those of x. What needs no carry is stored for sums over all chunks: d_r, d_target, d_z of keys and values, and
where W2 is written d_r_in and d_hidden. Those of k and v are added up over the memories, in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p


@triton.jit
def through_gram(
    d_keys, keys, d_r_at, u_at, stride, table_at, C: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """d_keys [C, .] with what the gram of keys in r = u + (table . gram) u gives, one side after the other: fewer registers."""
    d = p.mm(p.rows(d_r_at, stride, C, W), p.columns(u_at, stride, C, W), PRECISION) * p.load(table_at, C, C)
    d_keys = p.add_mm(d_keys, -d, keys, PRECISION)
    d = p.mm(p.rows(u_at, stride, C, W), p.columns(d_r_at, stride, C, W), PRECISION) * p.load_t(table_at, C, C)
    return p.add_mm(d_keys, -d, keys, PRECISION)


@triton.jit
def through_features(
    d_keys, keys_at, slope_k_at, key_scale_at, HEADS, C: tl.constexpr, H: tl.constexpr, DGD: tl.constexpr
):
    """d_z of keys = unit(silu(z)), [C, h]."""
    if DGD:
        d_keys = p.unit_backward(d_keys, p.rows(keys_at, HEADS * H, C, H), p.each(key_scale_at, HEADS, C))
    return d_keys * p.rows(slope_k_at, HEADS * H, C, H)


@triton.jit
def gradient_of_r(
    write_at, d_V_at, V_end, u_at, missed_at, d_r_read_at, d_r_at, rates_at, HEADS,
    C: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, READ: tl.constexpr, DGD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a layer, V^T [X, Y]: d_r [C, Y], stored too, and <d V_C, V_C>. drive and lost [C] are stored, one after the other."""
    d_V = p.load(d_V_at, X, Y)
    ends = tl.sum(tl.sum(d_V * p.load(V_end, X, Y), 1), 0)
    d_r = -p.mm(p.rows(write_at, HEADS * X, C, X), d_V, PRECISION)
    if READ:
        d_r += p.rows(d_r_read_at, HEADS * Y, C, Y)
    p.store_rows(d_r_at, d_r, HEADS * Y, C, Y)
    drive = tl.sum(d_r * p.rows(u_at, HEADS * Y, C, Y), 1)
    lost = drive * 0.0
    if DGD:
        lost = drive + tl.sum(d_r * p.rows(missed_at, HEADS * Y, C, Y), 1)
    p.store_each(rates_at, drive, 1, C)  # summed here: else compilers hold the tiles until the sums are wanted
    p.store_each(rates_at + C, lost, 1, C)
    return d_r, ends


@triton.jit
def input_layer(
    d_z_k, d_k, k_at, v_at, d_z_v_at, d_r_in_at, u_in_at, table_at, w_in_at, anchor_in_at, d_in_at, d_new_in,
    d_k_at, row_d, HEADS, since, strength, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADDED: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the written input layer gives to k (with d_k [C, d] so far: stored), and its gradient at the chunk's start."""
    row, row_h = HEADS * D, HEADS * H
    d_k = p.add_mm(d_k, p.rows(u_in_at, row_h, C, H) * -strength[:, None], p.load_t(d_in_at, D, H), PRECISION)
    if DGD_IN:
        reached = p.rows(d_r_in_at, row_h, C, H) * since[:, None]
        d_k = p.add_mm(d_k, reached, p.load_t(w_in_at, D, H), PRECISION)
        d_z_k += reached
        if ANCHORED:
            d_k = p.add_mm(d_k, p.rows(d_r_in_at, row_h, C, H), p.load_t(anchor_in_at, D, H), PRECISION)
        d_k = through_gram(d_k, p.rows(k_at, row, C, D), d_r_in_at, u_in_at, row_h, table_at, C, H, PRECISION)
    p.store_rows(d_k_at, d_k, row_d, C, D)
    d_in = p.load(d_in_at, D, H) * kept
    if ADDED:
        d_in += p.load(d_new_in, D, H)
    d_in = p.add_mm(d_in, p.columns(k_at, row, C, D), d_z_k, PRECISION)
    if OWN:
        d_in = p.add_mm(d_in, p.columns(v_at, row, C, D), p.rows(d_z_v_at, row_h, C, H), PRECISION)
    p.store(d_new_in, d_in, D, H)


@triton.jit
def keys_of_vector(
    keys_at, u_at, table_at, V_at, A_at, d_V_at, d_keys_read_at, d_r_at, row, row_h, since, strength,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    READ: tl.constexpr, DGD: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the keys of a vector memory's output layer, [C, h]."""
    d_keys = p.mm(p.rows(u_at, row, C, D) * -strength[:, None], p.load_t(d_V_at, H, D), PRECISION)
    if READ:
        d_keys += p.rows(d_keys_read_at, row_h, C, H)
    if DGD:
        d_keys = p.add_mm(d_keys, p.rows(d_r_at, row, C, D) * since[:, None], p.load_t(V_at, H, D), PRECISION)
        if ANCHORED:
            d_keys = p.add_mm(d_keys, p.rows(d_r_at, row, C, D), p.load_t(A_at, H, D), PRECISION)
        d_keys = through_gram(d_keys, p.rows(keys_at, row_h, C, H), d_r_at, u_at, row, table_at, C, D, PRECISION)
    return d_keys


@triton.jit
def values_of_vector(
    d_target, d_v_at, slope_v_at, d_z_v_at, V_at, A_at, w_in_at, anchor_in_at, row_d, row_h,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ALONE: tl.constexpr, MOVING: tl.constexpr, OWN: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the target gives to values: added, or ALONE stored; and d_z of their features, stored."""
    d_v = d_target
    if not ALONE:
        d_v += p.rows(d_v_at, row_d, C, D)
    if OWN:
        d_z_v = p.mm(d_target, p.whole_t(V_at, A_at, H, D, ANCHORED), PRECISION) * p.rows(slope_v_at, row_h, C, H)
        p.store_rows(d_z_v_at, d_z_v, row_h, C, H)
        d_v = p.add_mm(d_v, d_z_v, input_weights_t(w_in_at, anchor_in_at, D, H, MOVING, ANCHORED), PRECISION)
    p.store_rows(d_v_at, d_v, row_d, C, D)


@triton.jit
def unwrite_vector(
    k_at, v_at, keys_at, phi_v_at, write_at, table_at, write_in_at,
    u_at, target_at, missed_at, slope_k_at, slope_v_at, key_scale_at, target_scale_at,
    e_at, u_in_at, missed_in_at, curve_at,
    V_at, A_at, w_in_at, anchor_in_at, V_end, end_in,  # V^T at the chunk's start, and W2^T, or MOVING: V2^T; both at its end
    d_V_at, d_in_at,  # gradients of V^T, V2^T at the chunk's end
    d_new, d_new_in,  # and at its start; ADDED: hold what is added
    d_r_read_at, d_keys_read_at, d_r_in_read_at,  # READ: what M_mem's read adds
    d_r_at, d_target_at, d_z_k_at, d_z_v_at, d_r_in_at, d_hidden_at,  # out
    d_k_at, d_v_at,  # added to; ALONE: this memory's [C, d], filled
    rates_at,  # out: drive and lost of every token, and MOVING those of the input layer, [4, C]
    HEADS, since, strength, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ALONE: tl.constexpr, ADDED: tl.constexpr, READ: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr,
    OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns <dV_C, V_C>, of both layers (fixed/gradients.py has what it, drive and lost mean)."""
    row, row_h = HEADS * D, HEADS * H
    row_d = row
    if ALONE:
        row_d = D
    d_r, ends = gradient_of_r(
        write_at, d_V_at, V_end, u_at, missed_at, d_r_read_at, d_r_at, rates_at, HEADS, C, H, D, READ, DGD, PRECISION
    )
    d_target = -d_r
    if MOVING:  # through hidden = W^T e
        d_r_in, ends_in = gradient_of_r(
            write_in_at, d_in_at, end_in, u_in_at, missed_in_at, d_r_in_read_at, d_r_in_at, rates_at + 2 * C, HEADS,
            C, D, H, READ, DGD_IN, PRECISION,
        )  # fmt: skip
        ends += ends_in
        d_hidden = d_r_in * p.rows(slope_k_at, row_h, C, H)
        p.store_rows(d_hidden_at, d_hidden, row_h, C, H)
        d_target = p.add_mm(d_target, -d_hidden, p.whole(V_at, A_at, H, D, ANCHORED), PRECISION)
    if ALONE:
        d_k = tl.zeros([C, D], tl.float32)
    else:
        d_k = p.rows(d_k_at, row, C, D)
    if RESIDUAL:
        d_k -= d_target
    p.store_rows(d_k_at, d_k, row_d, C, D)
    if OWN:
        if UNIT_TARGET:
            d_target = p.unit_backward(d_target, p.rows(target_at, row, C, D), p.each(target_scale_at, HEADS, C))
        p.store_rows(d_target_at, d_target, row, C, D)
    values_of_vector(
        d_target, d_v_at, slope_v_at, d_z_v_at, V_at, A_at, w_in_at, anchor_in_at, row_d, row_h,
        C, D, H, ALONE, MOVING, OWN, ANCHORED, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()  # d_r, d_target, d_r_in and d_hidden, stored by other threads, are read
    d_V = p.load(d_V_at, H, D) * kept
    if ADDED:
        d_V += p.load(d_new, H, D)
    if OWN:
        d_V = p.add_mm(d_V, p.columns(phi_v_at, row_h, C, H), p.rows(d_target_at, row, C, D), PRECISION)
    if MOVING:
        d_V = p.add_mm(d_V, p.columns(d_hidden_at, row_h, C, H), p.rows(e_at, row, C, D), PRECISION)
    if DGD:
        d_V = p.add_mm(d_V, p.columns(keys_at, row_h, C, H), p.rows(d_r_at, row, C, D) * since[:, None], PRECISION)
    p.store(d_new, d_V, H, D)

    d_keys = keys_of_vector(
        keys_at, u_at, table_at, V_at, A_at, d_V_at, d_keys_read_at, d_r_at, row, row_h, since, strength,
        C, D, H, READ, DGD, ANCHORED, PRECISION,
    )  # fmt: skip
    d_z_k = through_features(d_keys, keys_at, slope_k_at, key_scale_at, HEADS, C, H, DGD)
    if MOVING:
        d_z_k += p.rows(d_r_in_at, row_h, C, H).to(tl.float32) * p.rows(curve_at, row_h, C, H)
    p.store_rows(d_z_k_at, d_z_k, row_h, C, H)
    W2_t = input_weights_t(w_in_at, anchor_in_at, D, H, MOVING, ANCHORED)
    d_k = p.add_mm(p.rows(d_k_at, row_d, C, D), d_z_k, W2_t, PRECISION)
    if MOVING:
        input_layer(
            d_z_k, d_k, k_at, v_at, d_z_v_at, d_r_in_at, u_in_at, table_at, w_in_at, anchor_in_at, d_in_at, d_new_in,
            d_k_at, row_d, HEADS, since, strength, kept, C, D, H, ADDED, DGD_IN, OWN, ANCHORED, PRECISION,
        )  # fmt: skip
    else:
        p.store_rows(d_k_at, d_k, row_d, C, D)
    return ends


@triton.jit
def input_weights_t(
    w_in_at, anchor_in_at, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr
):
    """W2 [h, d]."""
    return p.whole_t(w_in_at, anchor_in_at, D, H, MOVING and ANCHORED)


@triton.jit
def unwrite_scalar(
    k_at, v_at, keys_at, phi_v_at, write_at, table_at, write_in_at,
    u_at, target_at, missed_at, slope_k_at, slope_v_at, key_scale_at,  # u, target, missed: one number a token
    e_at, u_in_at, missed_in_at, curve_at,
    V_at, A_at, w_in_at, anchor_in_at, V_end, end_in,  # V, A [h]
    d_V_at, d_in_at, d_new, d_new_in, d_A_at,  # d_A_at: gradient of A, added to
    d_z_k_at, d_z_v_at, d_r_in_at,
    d_k_at, d_v_at,  # this memory's, [C, d]; filled
    rates_at,
    HEADS, since, strength, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADDED: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr,
    UNIT_TARGET: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `unwrite_vector`, and `through_gram` where a token has one number."""
    row_d, row_h, i_h = D, HEADS * H, tl.arange(0, H)
    d_end, V = tl.load(d_V_at + i_h), tl.load(V_at + i_h)
    W = V
    if ANCHORED:
        A = tl.load(A_at + i_h)
        W = V + A
    d_r = -tl.sum(p.rows(write_at, row_h, C, H) * d_end[None, :], 1)
    u = p.each(u_at, HEADS, C)
    drive = d_r * u
    lost = drive * 0.0
    if DGD:
        lost = drive + d_r * p.each(missed_at, HEADS, C)
    p.store_each(rates_at, drive, 1, C)
    p.store_each(rates_at + C, lost, 1, C)
    ends = tl.sum(d_end * tl.load(V_end + i_h), 0)
    d_target, d_A = -d_r, d_end * 0.0
    if MOVING:
        d_r_in, ends_in = gradient_of_r(
            write_in_at, d_in_at, end_in, u_in_at, missed_in_at, d_r_in_at, d_r_in_at, rates_at + 2 * C, HEADS,
            C, D, H, False, DGD_IN, PRECISION,
        )  # fmt: skip
        ends += ends_in
        d_hidden = d_r_in * p.rows(slope_k_at, row_h, C, H)
        d_target -= tl.sum(d_hidden * W[None, :], 1)
        d_A += tl.sum(p.each(e_at, HEADS, C)[:, None] * d_hidden, 0)
    if UNIT_TARGET:
        target = p.each(target_at, HEADS, C)
        d_target = d_target * (1.0 - target * target)
    d_A += tl.sum(d_target[:, None] * p.rows(phi_v_at, row_h, C, H), 0)
    d_V = d_end * kept + d_A
    if ADDED:
        d_V += tl.load(d_new + i_h)
    d_z_v = d_target[:, None] * W[None, :] * p.rows(slope_v_at, row_h, C, H)
    p.store_rows(d_z_v_at, d_z_v, row_h, C, H)
    W2_t = input_weights_t(w_in_at, anchor_in_at, D, H, MOVING, ANCHORED)
    p.store_rows(d_v_at, p.mm(d_z_v, W2_t, PRECISION), row_d, C, D)

    d_keys = (u * -strength)[:, None] * d_end[None, :]
    if DGD:
        keys, held = p.rows(keys_at, row_h, C, H), d_r * since
        d_V += tl.sum(held[:, None] * keys, 0)
        d_keys += held[:, None] * V[None, :]
        if ANCHORED:
            d_keys += d_r[:, None] * A[None, :]
            d_A += tl.sum(d_r[:, None] * keys, 0)
        d_keys = p.add_mm(d_keys, -d_r[:, None] * u[None, :] * p.load(table_at, C, C), keys, PRECISION)
        d_keys = p.add_mm(d_keys, -u[:, None] * d_r[None, :] * p.load_t(table_at, C, C), keys, PRECISION)
    tl.store(d_new + i_h, d_V)
    if ANCHORED:
        tl.store(d_A_at + i_h, tl.load(d_A_at + i_h) + d_A)
    d_z_k = through_features(d_keys, keys_at, slope_k_at, key_scale_at, HEADS, C, H, DGD)
    if MOVING:
        d_z_k += d_r_in * p.rows(curve_at, row_h, C, H)
    p.store_rows(d_z_k_at, d_z_k, row_h, C, H)
    d_k = p.mm(d_z_k, W2_t, PRECISION)
    if MOVING:
        tl.debug_barrier()  # d_r_in, stored as rows, is read as columns
        input_layer(
            d_z_k, d_k, k_at, v_at, d_z_v_at, d_r_in_at, u_in_at, table_at, w_in_at, anchor_in_at, d_in_at, d_new_in,
            d_k_at, row_d, HEADS, since, strength, kept, C, D, H, ADDED, DGD_IN, True, ANCHORED, PRECISION,
        )  # fmt: skip
    else:
        p.store_rows(d_k_at, d_k, row_d, C, D)
    return ends
