"""What one chunk writes into one memory whose keys depend on weights that change. Tokens are columns: weights are first operands.

Of a vector memory, with V = W - A of either layer (`before`, `since`: log gamma and gamma one token back; `reach`: Gamma_C):
    z = W2 k    keys = unit(silu(z))    target = unit(v + W silu(W2 v))    e = k - target
    r = e + A keys + since V keys       u = Y r          V <- gamma_C V - (reach eta u)^T keys
    r_in = silu'(z) . W^T e + A2 k + since V2 k          V2 <- gamma_C V2 - r_in^T K_in
A scalar memory has one row for V, no skip, tanh for unit. With TAPE nothing is written: backward's tensors are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton.language import (
    dsilu,
    inverse_norm,
    load,
    load_rows,
    load_rows_t,
    load_t,
    mm,
    operand,
    sigmoid,
    silu,
    store,
    store_each,
    store_rows,
    store_rows_t,
    tanh,
)
from hope_megatron.ops.memory.backends.triton.system import decay_t, unit_upper_inverse


@triton.jit
def second_derivative(z, PRECISION: tl.constexpr):
    """Of SiLU."""
    s = sigmoid(z, PRECISION)
    return s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))


@triton.jit
def features_of_keys(
    k, w_in, anchor_in, keys_at, row_h, valid,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    MOVING: tl.constexpr, DGD: tl.constexpr, ANCHORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of keys k [D, C]: W2, V2 k, A2 k, z, 1 / |silu(z)| (DGD, else 1) and keys [H, C], which are stored too."""
    W = load(w_in, H, D)
    moved = mm(W, k, PRECISION)
    initial = moved * 0.0
    z = moved
    if MOVING and ANCHORED:
        A = load(anchor_in, H, D)
        initial = mm(A, k, PRECISION)
        z = moved + initial
        W = W + A
    keys = silu(z, PRECISION)
    scale = tl.sum(keys, 0) * 0.0 + 1.0
    if DGD:
        scale = inverse_norm(keys, 0, PRECISION)
        keys = keys * scale[None, :]
    keys = operand(keys, PRECISION)
    store_rows_t(keys_at, keys, row_h, valid, C, H)
    return operand(W, PRECISION), moved, initial, z, scale, keys


@triton.jit
def system_inverse(
    keys_at, keys, row_h, valid, eta, before, total,
    C: tl.constexpr, H: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y^T of keys [H, C], which lie at keys_at as rows too."""
    gram = mm(load_rows(keys_at, row_h, valid, C, H), keys, PRECISION)
    reach = decay_t(before, total, True, PRECISION, C) * eta[:, None]
    return operand(unit_upper_inverse(gram * reach, EXACT, PRECISION, C), PRECISION)


@triton.jit
def write_vector(
    k_at, v_at, keys_at,  # this chunk's rows: k, v [C, d]; where keys go [C, h]
    write_in_at, inverse_in_at,  # MOVING: K_in [C, d], and Y_in^T [C, C] for the tape
    V_at, A_at, w_in_at, anchor_in_at,  # V, A of W1 [d, h]; W2, or MOVING: V2, and A2 [h, d]
    next_V, next_in, first_V, first_in, anew,  # where the chunk's end goes, unless the next chunk starts anew from the first
    phi_v_at, write_at, u_at, target_at, missed_at, slope_k_at, slope_v_at, key_scale_at, target_scale_at,  # the tape
    e_at, u_in_at, missed_in_at, curve_at,  # the tape, MOVING
    inverse_at,  # the tape, READ: Y^T [C, C]
    HEADS, valid, eta, before, since, total, reach, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TAPE: tl.constexpr, READ: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr,
    OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, row_h = HEADS * D, HEADS * H
    k = load_rows_t(k_at, row, valid, C, D)
    W2, moved, initial, z, key_scale, keys = features_of_keys(
        k, w_in_at, anchor_in_at, keys_at, row_h, valid, C, D, H, MOVING, DGD, ANCHORED, PRECISION
    )
    V = load(V_at, D, H)
    W = V
    if ANCHORED:
        A = load(A_at, D, H)
        W = V + A
    e = load_rows_t(v_at, row, valid, C, D).to(tl.float32)
    if OWN:
        z_v = mm(W2, e, PRECISION)
        phi_v = operand(silu(z_v, PRECISION), PRECISION)
        e += mm(W, phi_v, PRECISION)
        if UNIT_TARGET:
            target_scale = inverse_norm(e, 0, PRECISION)
            e = e * target_scale[None, :]
            if TAPE:
                store_each(target_scale_at, target_scale, HEADS, valid, C)
        if TAPE:
            store_rows_t(phi_v_at, phi_v, row_h, valid, C, H)
            store_rows_t(slope_v_at, dsilu(z_v, PRECISION), row_h, valid, C, H)
            store_rows_t(target_at, e, row, valid, C, D)
    e = -e
    if RESIDUAL:
        e += k
    r = e
    missed = -e
    if DGD:
        r += mm(V, keys, PRECISION) * since[None, :]
        if ANCHORED:
            initial_out = mm(A, keys, PRECISION)
            r += initial_out
            missed -= initial_out
    tl.debug_barrier()  # keys, stored as columns, are read as rows
    u = r
    if DGD:
        inverse = system_inverse(keys_at, keys, row_h, valid, eta, before, total, C, H, EXACT, PRECISION)
        u = mm(r, inverse, PRECISION)
        if TAPE and READ:
            store(inverse_at, inverse, C, C)
    strength = eta * reach
    if TAPE:
        store_rows_t(u_at, u, row, valid, C, D)
        store_rows_t(missed_at, missed, row, valid, C, D)
        store_each(key_scale_at, key_scale, HEADS, valid, C)
        written = load_rows(keys_at, row_h, valid, C, H).to(tl.float32) * strength[:, None]
        if DGD:
            written = mm(inverse, written, PRECISION)
        store_rows(write_at, written, row_h, valid, C, H)
    else:
        new = V * kept - mm(u * strength[None, :], load_rows(keys_at, row_h, valid, C, H), PRECISION)
        if anew:
            new = load(first_V, D, H)
        store(next_V, new, D, H)
    slope = dsilu(z, PRECISION)
    if TAPE:
        store_rows_t(slope_k_at, slope, row_h, valid, C, H)
    if MOVING:
        W_t = load_t(V_at, D, H)
        if ANCHORED:
            W_t += load_t(A_at, D, H)
        hidden = mm(W_t, e, PRECISION)
        r_in = hidden * slope
        missed_in = -r_in
        if DGD_IN:
            r_in += moved * since[None, :] + initial
            missed_in -= initial
        if TAPE:
            store_rows_t(e_at, e, row, valid, C, D)
            store_rows_t(curve_at, hidden * second_derivative(z, PRECISION), row_h, valid, C, H)
            store_rows_t(missed_in_at, missed_in, row_h, valid, C, H)
            if DGD_IN:
                r_in = mm(r_in, load(inverse_in_at, C, C), PRECISION)
            store_rows_t(u_in_at, r_in, row_h, valid, C, H)
        else:
            new_in = load(w_in_at, H, D) * kept - mm(r_in, load_rows(write_in_at, row, valid, C, D), PRECISION)
            if anew:
                new_in = load(first_in, H, D)
            store(next_in, new_in, H, D)


@triton.jit
def write_scalar(
    k_at, v_at, keys_at, write_in_at, inverse_in_at,
    V_at, A_at, w_in_at, anchor_in_at,  # V, A [h]
    next_V, next_in, first_V, first_in, anew,
    phi_v_at, write_at, u_at, target_at, missed_at, slope_k_at, slope_v_at, key_scale_at,  # u, target, missed: one number a token
    e_at, u_in_at, missed_in_at, curve_at,
    HEADS, valid, eta, before, since, total, reach, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TAPE: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr,
    UNIT_TARGET: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, row_h, i_h = HEADS * D, HEADS * H, tl.arange(0, H)
    k = load_rows_t(k_at, row, valid, C, D)
    W2, moved, initial, z, key_scale, keys = features_of_keys(
        k, w_in_at, anchor_in_at, keys_at, row_h, valid, C, D, H, MOVING, DGD, ANCHORED, PRECISION
    )
    V = tl.load(V_at + i_h)
    W = V
    if ANCHORED:
        A = tl.load(A_at + i_h)
        W = V + A
    z_v = mm(W2, load_rows_t(v_at, row, valid, C, D), PRECISION)
    phi_v = silu(z_v, PRECISION)
    target = tl.sum(phi_v * W[:, None], 0)
    if UNIT_TARGET:
        target = tanh(target, PRECISION)
    if TAPE:
        store_rows_t(phi_v_at, phi_v, row_h, valid, C, H)
        store_rows_t(slope_v_at, dsilu(z_v, PRECISION), row_h, valid, C, H)
        store_each(target_at, target, HEADS, valid, C)
    e = -target
    r = e
    missed = target
    if DGD:
        r += tl.sum(keys * V[:, None], 0) * since
        if ANCHORED:
            initial_out = tl.sum(keys * A[:, None], 0)
            r += initial_out
            missed -= initial_out
    tl.debug_barrier()
    u = r
    if DGD:
        inverse = system_inverse(keys_at, keys, row_h, valid, eta, before, total, C, H, EXACT, PRECISION)
        u = tl.sum(inverse * r[:, None], 0)
    strength = eta * reach
    if TAPE:
        store_each(u_at, u, HEADS, valid, C)
        store_each(missed_at, missed, HEADS, valid, C)
        store_each(key_scale_at, key_scale, HEADS, valid, C)
        written = load_rows(keys_at, row_h, valid, C, H).to(tl.float32) * strength[:, None]
        if DGD:
            written = mm(inverse, written, PRECISION)
        store_rows(write_at, written, row_h, valid, C, H)
    else:
        new = V * kept - tl.sum(keys * (u * strength)[None, :], 1)
        if anew:
            new = tl.load(first_V + i_h)
        tl.store(next_V + i_h, new)
    slope = dsilu(z, PRECISION)
    if TAPE:
        store_rows_t(slope_k_at, slope, row_h, valid, C, H)
    if MOVING:
        hidden = W[:, None] * e[None, :]
        r_in = hidden * slope
        missed_in = -r_in
        if DGD_IN:
            r_in += moved * since[None, :] + initial
            missed_in -= initial
        if TAPE:
            store_each(e_at, e, HEADS, valid, C)
            store_rows_t(curve_at, hidden * second_derivative(z, PRECISION), row_h, valid, C, H)
            store_rows_t(missed_in_at, missed_in, row_h, valid, C, H)
            if DGD_IN:
                r_in = mm(r_in, load(inverse_in_at, C, C), PRECISION)
            store_rows_t(u_in_at, r_in, row_h, valid, C, H)
        else:
            new_in = load(w_in_at, H, D) * kept - mm(r_in, load_rows(write_in_at, row, valid, C, D), PRECISION)
            if anew:
                new_in = load(first_in, H, D)
            store(next_in, new_in, H, D)
