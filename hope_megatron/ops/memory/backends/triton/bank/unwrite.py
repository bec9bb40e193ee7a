"""The backward of write.py: one chunk of one memory, from the gradient of its weights at the chunk's end to that at its start.

Gradients d_x are those of x. What needs no carry is stored for sums over all chunks: d_r, d_target, d_z of keys and values, and
where W2 is written d_r_in and d_hidden. Those of k and v are added up over the memories, in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton.language import (
    load,
    load_each,
    load_rows,
    load_rows_t,
    load_t,
    mm,
    operand,
    store,
    store_each,
    store_rows,
    store_rows_t,
)
from hope_megatron.ops.memory.backends.triton.system import decay, decay_t


@triton.jit
def gram_gradient(
    d_r, u, d_r_t, u_t, eta, before, total,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both sides of the gram of keys in r = u + (Gamma . keys keys^T) eta u: minus its gradient, [C, C]. d_r, u [C, .] and transposed."""
    lower = mm(d_r, u_t, PRECISION) * decay(before, total, True, PRECISION, C) * eta[None, :]
    return lower + mm(u, d_r_t, PRECISION) * decay_t(before, total, True, PRECISION, C) * eta[:, None]


@triton.jit
def through_features(
    d_keys, keys, slope_k_at, key_scale_at, HEADS, valid,
    C: tl.constexpr, H: tl.constexpr, DGD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_z of keys = unit(silu(z)), [C, h]."""
    slope = load_rows(slope_k_at, HEADS * H, valid, C, H)
    if DGD:
        d_keys = (d_keys - keys * tl.sum(keys * d_keys, 1)[:, None]) * load_each(key_scale_at, HEADS, valid, 0.0, C)[:, None]
    return d_keys * slope


@triton.jit
def add_rows(base, x, stride, valid, C: tl.constexpr, W: tl.constexpr):
    store_rows(base, load_rows(base, stride, valid, C, W) + x, stride, valid, C, W)


@triton.jit
def input_layer(
    k_at, v_at, d_z_k_at, d_z_v_at, d_r_in_at, u_in_at, write_in_at,
    w_in_at, anchor_in_at, d_in_at, d_new_in,
    d_k_at, d_k, HEADS, valid, eta, before, since, total, strength, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADDED: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the written input layer gives to k (added to d_k [C, d]), and its gradient at the chunk's start."""
    row, row_h = HEADS * D, HEADS * H
    u = load_rows(u_in_at, row_h, valid, C, H)
    d_k -= mm(u * strength[:, None], load(d_in_at, H, D), PRECISION)
    d_z = load_rows_t(d_z_k_at, row_h, valid, C, H).to(tl.float32)
    if DGD_IN:
        d_r = load_rows(d_r_in_at, row_h, valid, C, H)
        d_r_t = load_rows_t(d_r_in_at, row_h, valid, C, H)
        d_k += mm(d_r * since[:, None], load(w_in_at, H, D), PRECISION)
        if ANCHORED:
            d_k += mm(d_r, load(anchor_in_at, H, D), PRECISION)
        d_gram = gram_gradient(d_r, u, d_r_t, load_rows_t(u_in_at, row_h, valid, C, H), eta, before, total, C, PRECISION)
        d_k -= mm(d_gram, load_rows(k_at, row, valid, C, D), PRECISION)
        d_z += d_r_t * since[None, :]
    store_rows(d_k_at, d_k, row, valid, C, D)
    d_in = load(d_in_at, H, D) * kept
    if ADDED:
        d_in += load(d_new_in, H, D)
    d_in += mm(d_z, load_rows(k_at, row, valid, C, D), PRECISION)
    if OWN:
        d_z_v = load_rows_t(d_z_v_at, row_h, valid, C, H)
        d_in += mm(d_z_v, load_rows(v_at, row, valid, C, D), PRECISION)
    store(d_new_in, d_in, H, D)


@triton.jit
def unwrite_vector(
    k_at, v_at, keys_at, phi_v_at, write_at, write_in_at,
    u_at, target_at, missed_at, slope_k_at, slope_v_at, key_scale_at, target_scale_at,
    e_at, u_in_at, missed_in_at, curve_at,
    V_at, A_at, w_in_at, anchor_in_at, V_end, end_in,  # V at the chunk's start, and W2, or MOVING: V2; both at its end
    d_V_at, d_in_at,  # gradients of V, V2 at the chunk's end
    d_new, d_new_in,  # and at its start; ADDED: hold what is added
    d_r_read_at, d_keys_read_at, d_r_in_read_at,  # READ: what M_mem's read adds
    d_r_at, d_target_at, d_z_k_at, d_z_v_at, d_r_in_at, d_hidden_at,  # out
    d_k_at, d_v_at,  # added to
    HEADS, valid, eta, before, since, total, reach, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADDED: tl.constexpr, READ: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr, OWN: tl.constexpr,
    UNIT_TARGET: tl.constexpr, RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Returns e, f of every token, summed over both layers, and <dV_C, V_C> (gradients.py has what they mean)."""
    row, row_h = HEADS * D, HEADS * H
    strength = eta * reach
    # r, both ways
    d_r = -mm(load_rows(write_at, row_h, valid, C, H), load_t(d_V_at, D, H), PRECISION)
    d_r_t = -mm(load(d_V_at, D, H), load_rows_t(write_at, row_h, valid, C, H), PRECISION)
    if READ:
        d_r += load_rows(d_r_read_at, row, valid, C, D)
        d_r_t += load_rows_t(d_r_read_at, row, valid, C, D)
    store_rows(d_r_at, d_r, row, valid, C, D)
    u = load_rows(u_at, row, valid, C, D)
    drive = tl.sum(d_r * u, 1)
    lost = drive * 0.0
    if DGD:
        lost = drive + tl.sum(d_r * load_rows(missed_at, row, valid, C, D), 1)
    ends = tl.sum(tl.sum(load(d_V_at, D, H) * load(V_end, D, H), 1), 0)
    d_e, d_e_t = d_r, d_r_t
    d_V = load(d_V_at, D, H) * kept
    if ADDED:
        d_V += load(d_new, D, H)

    if MOVING:  # the input layer's r, and through hidden = W^T e
        d_r_in = -mm(load_rows(write_in_at, row, valid, C, D), load_t(d_in_at, H, D), PRECISION)
        d_r_in_t = -mm(load(d_in_at, H, D), load_rows_t(write_in_at, row, valid, C, D), PRECISION)
        if READ:
            d_r_in += load_rows(d_r_in_read_at, row_h, valid, C, H)
            d_r_in_t += load_rows_t(d_r_in_read_at, row_h, valid, C, H)
        store_rows(d_r_in_at, d_r_in, row_h, valid, C, H)
        u_in = load_rows(u_in_at, row_h, valid, C, H)
        drive_in = tl.sum(d_r_in * u_in, 1)
        drive += drive_in
        if DGD_IN:
            lost += drive_in + tl.sum(d_r_in * load_rows(missed_in_at, row_h, valid, C, H), 1)
        ends += tl.sum(tl.sum(load(d_in_at, H, D) * load(end_in, H, D), 1), 0)
        d_hidden = operand(d_r_in * load_rows(slope_k_at, row_h, valid, C, H), PRECISION)
        store_rows(d_hidden_at, d_hidden, row_h, valid, C, H)
        W_t = load_t(V_at, D, H)
        W = load(V_at, D, H)
        if ANCHORED:
            W_t += load_t(A_at, D, H)
            W += load(A_at, D, H)
        d_e += mm(d_hidden, W_t, PRECISION)
        d_e_t += mm(W, d_r_in_t * load_rows_t(slope_k_at, row_h, valid, C, H), PRECISION)
        d_V += mm(load_rows_t(e_at, row, valid, C, D), d_hidden, PRECISION)

    # the target
    d_target, d_target_t = -d_e, -d_e_t
    if OWN and UNIT_TARGET:
        target, target_t = load_rows(target_at, row, valid, C, D), load_rows_t(target_at, row, valid, C, D)
        scale = load_each(target_scale_at, HEADS, valid, 0.0, C)
        d_target = (d_target - target * tl.sum(target * d_target, 1)[:, None]) * scale[:, None]
        d_target_t = (d_target_t - target_t * tl.sum(target_t * d_target_t, 0)[None, :]) * scale[None, :]
    d_v = d_target
    if OWN:
        store_rows(d_target_at, d_target, row, valid, C, D)
        d_V += mm(d_target_t, load_rows(phi_v_at, row_h, valid, C, H), PRECISION)
        W = load(V_at, D, H)
        if ANCHORED:
            W += load(A_at, D, H)
        d_z_v = mm(d_target, W, PRECISION) * load_rows(slope_v_at, row_h, valid, C, H)
        store_rows(d_z_v_at, d_z_v, row_h, valid, C, H)
        W2 = load(w_in_at, H, D)
        if MOVING and ANCHORED:
            W2 += load(anchor_in_at, H, D)
        d_v += mm(d_z_v, W2, PRECISION)
    add_rows(d_v_at, d_v, row, valid, C, D)

    # keys
    keys = load_rows(keys_at, row_h, valid, C, H)
    d_keys = -mm(u * strength[:, None], load(d_V_at, D, H), PRECISION)
    if READ:
        d_keys += load_rows(d_keys_read_at, row_h, valid, C, H)
    if DGD:
        d_V += mm(d_r_t * since[None, :], keys, PRECISION)
        d_keys += mm(d_r * since[:, None], load(V_at, D, H), PRECISION)
        if ANCHORED:
            d_keys += mm(d_r, load(A_at, D, H), PRECISION)
        d_gram = gram_gradient(d_r, u, d_r_t, load_rows_t(u_at, row, valid, C, D), eta, before, total, C, PRECISION)
        d_keys -= mm(d_gram, keys, PRECISION)
    store(d_new, d_V, D, H)
    d_z_k = through_features(d_keys, keys, slope_k_at, key_scale_at, HEADS, valid, C, H, DGD, PRECISION)
    if MOVING:
        d_z_k += load_rows(d_r_in_at, row_h, valid, C, H) * load_rows(curve_at, row_h, valid, C, H)
    store_rows(d_z_k_at, d_z_k, row_h, valid, C, H)
    W2 = load(w_in_at, H, D)
    if MOVING and ANCHORED:
        W2 += load(anchor_in_at, H, D)
    d_k = mm(d_z_k, W2, PRECISION) + load_rows(d_k_at, row, valid, C, D)
    if RESIDUAL:
        d_k += d_e
    if MOVING:
        tl.debug_barrier()  # d_z and d_r_in, stored as rows, are read as columns
        input_layer(
            k_at, v_at, d_z_k_at, d_z_v_at, d_r_in_at, u_in_at, write_in_at, w_in_at, anchor_in_at, d_in_at, d_new_in,
            d_k_at, d_k, HEADS, valid, eta, before, since, total, strength, kept,
            C, D, H, ADDED, DGD_IN, OWN, ANCHORED, PRECISION,
        )  # fmt: skip
    else:
        store_rows(d_k_at, d_k, row, valid, C, D)
    return drive, lost, ends


@triton.jit
def unwrite_scalar(
    k_at, v_at, keys_at, phi_v_at, write_at, write_in_at,
    u_at, target_at, missed_at, slope_k_at, slope_v_at, key_scale_at,  # u, target, missed: one number a token
    e_at, u_in_at, missed_in_at, curve_at,
    V_at, A_at, w_in_at, anchor_in_at, V_end, end_in,  # V, A [h]
    d_V_at, d_in_at, d_new, d_new_in, d_A_at,  # d_A_at: gradient of A, added to
    d_z_k_at, d_z_v_at, d_r_in_at,
    d_k_at, d_v_at,
    HEADS, valid, eta, before, since, total, reach, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    ADDED: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr,
    UNIT_TARGET: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `unwrite_vector`."""
    row, row_h, i_h = HEADS * D, HEADS * H, tl.arange(0, H)
    strength = eta * reach
    d_end = tl.load(d_V_at + i_h)
    V = tl.load(V_at + i_h)
    W = V
    if ANCHORED:
        A = tl.load(A_at + i_h)
        W = V + A
    d_r = -tl.sum(load_rows(write_at, row_h, valid, C, H) * d_end[None, :], 1)
    u = load_each(u_at, HEADS, valid, 0.0, C)
    drive = d_r * u
    lost = drive * 0.0
    if DGD:
        lost = drive + d_r * load_each(missed_at, HEADS, valid, 0.0, C)
    ends = tl.sum(d_end * tl.load(V_end + i_h), 0)
    d_e = d_r
    d_V = d_end * kept
    if ADDED:
        d_V += tl.load(d_new + i_h)
    d_A = d_end * 0.0
    if MOVING:
        d_r_in = -mm(load_rows(write_in_at, row, valid, C, D), load_t(d_in_at, H, D), PRECISION)
        store_rows(d_r_in_at, d_r_in, row_h, valid, C, H)
        drive_in = tl.sum(d_r_in * load_rows(u_in_at, row_h, valid, C, H), 1)
        drive += drive_in
        if DGD_IN:
            lost += drive_in + tl.sum(d_r_in * load_rows(missed_in_at, row_h, valid, C, H), 1)
        ends += tl.sum(tl.sum(load(d_in_at, H, D) * load(end_in, H, D), 1), 0)
        d_hidden = d_r_in * load_rows(slope_k_at, row_h, valid, C, H)
        d_e += tl.sum(d_hidden * W[None, :], 1)
        d_A += tl.sum(load_each(e_at, HEADS, valid, 0.0, C)[:, None] * d_hidden, 0)

    d_target = -d_e
    if UNIT_TARGET:
        target = load_each(target_at, HEADS, valid, 0.0, C)
        d_target = d_target * (1.0 - target * target)
    d_A += tl.sum(d_target[:, None] * load_rows(phi_v_at, row_h, valid, C, H), 0)
    d_V += d_A
    W2 = load(w_in_at, H, D)
    if MOVING and ANCHORED:
        W2 += load(anchor_in_at, H, D)
    d_z_v = d_target[:, None] * W[None, :] * load_rows(slope_v_at, row_h, valid, C, H)
    store_rows(d_z_v_at, d_z_v, row_h, valid, C, H)
    add_rows(d_v_at, mm(d_z_v, W2, PRECISION), row, valid, C, D)

    keys = load_rows(keys_at, row_h, valid, C, H)
    d_keys = -(u * strength)[:, None] * d_end[None, :]
    if DGD:
        held = d_r * since
        d_V += tl.sum(held[:, None] * keys, 0)
        d_keys += held[:, None] * V[None, :]
        if ANCHORED:
            d_keys += d_r[:, None] * A[None, :]
            d_A += tl.sum(d_r[:, None] * keys, 0)
        d_gram = d_r[:, None] * (u * eta)[None, :] * decay(before, total, True, PRECISION, C)
        d_gram += (u * eta)[:, None] * d_r[None, :] * decay_t(before, total, True, PRECISION, C)
        d_keys -= mm(d_gram, keys, PRECISION)
    tl.store(d_new + i_h, d_V)
    if ANCHORED:
        tl.store(d_A_at + i_h, tl.load(d_A_at + i_h) + d_A)
    d_z_k = through_features(d_keys, keys, slope_k_at, key_scale_at, HEADS, valid, C, H, DGD, PRECISION)
    if MOVING:
        d_z_k += load_rows(d_r_in_at, row_h, valid, C, H) * load_rows(curve_at, row_h, valid, C, H)
    store_rows(d_z_k_at, d_z_k, row_h, valid, C, H)
    d_k = mm(d_z_k, W2, PRECISION) + load_rows(d_k_at, row, valid, C, D)
    if MOVING:
        tl.debug_barrier()
        input_layer(
            k_at, v_at, d_z_k_at, d_z_v_at, d_r_in_at, u_in_at, write_in_at, w_in_at, anchor_in_at, d_in_at, d_new_in,
            d_k_at, d_k, HEADS, valid, eta, before, since, total, strength, kept,
            C, D, H, ADDED, DGD_IN, True, ANCHORED, PRECISION,
        )  # fmt: skip
    else:
        store_rows(d_k_at, d_k, row, valid, C, D)
    return drive, lost, ends
