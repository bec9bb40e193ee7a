"""What one chunk writes into one memory whose keys depend on weights that change.

Of a vector memory, with V = W - A of either layer (`since`: gamma one token back, `strength`: Gamma_C eta, Y the system's inverse):
    z = W2 k    keys = unit(silu(z))    target = unit(v + W silu(W2 v))    e = k - target
    r = e + A keys + since V keys       u = Y r          V <- gamma_C V - keys^T (strength u)
    r_in = silu'(z) . W^T e + A2 k + since V2 k          V2 <- gamma_C V2 - K_in^T r_in
A scalar memory has one column for V, no skip, tanh for unit. With TAPE nothing is written: what backward needs is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.system import unit_lower_inverse


@triton.jit
def input_weights(
    w_in_at, anchor_in_at, D: tl.constexpr, H: tl.constexpr, MOVING: tl.constexpr, ANCHORED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W2^T [d, h]."""
    return p.operand(p.whole(w_in_at, anchor_in_at, D, H, MOVING and ANCHORED), PRECISION)


@triton.jit
def features_of_keys(
    k, w_in_at, anchor_in_at, keys_at, slope_k_at, key_scale_at, HEADS, since,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TAPE: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, ANCHORED: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z, silu'(z), keys, stored too, and MOVING: what the input layer holds, since V2 k + A2 k; all [C, h].

    TAPE: silu'(z) and 1 / |p.silu(z)| (DGD, else 1) are stored.
    """
    z = p.mm(k, p.load(w_in_at, D, H), PRECISION)
    held = z
    if MOVING:
        held = z * since[:, None]
        if ANCHORED:
            initial = p.mm(k, p.load(anchor_in_at, D, H), PRECISION)
            z += initial
            held += initial
    keys = p.silu(z, PRECISION)
    scale = since * 0.0 + 1.0
    if DGD:
        scale = p.inverse_norm(keys, PRECISION)
        keys = keys * scale[:, None]
    keys = p.operand_if(keys, EXACT, PRECISION)
    p.store_rows(keys_at, keys, HEADS * H, C, H)
    slope = p.dsilu(z, PRECISION)
    if TAPE:
        p.store_rows(slope_k_at, slope, HEADS * H, C, H)
        p.store_each(key_scale_at, scale, HEADS, C)
    return z, slope, keys, held


@triton.jit
def solved(
    keys, keys_at, table_at, inverse_at, write_at, row_h, strength,
    C: tl.constexpr, H: tl.constexpr, TAPE: tl.constexpr, DGD: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of the system of keys [C, h], which stand in memory too (without DGD: anything). TAPE: it and Y^T (strength keys)
    are stored."""
    inverse = keys
    if DGD:
        gram = p.mm_if(keys, p.columns(keys_at, row_h, C, H), EXACT, PRECISION)
        inverse = unit_lower_inverse(gram * p.load(table_at, C, C), EXACT, PRECISION, C)
        if TAPE:
            p.store(inverse_at, inverse, C, C)
            tl.debug_barrier()
            written = p.rows(keys_at, row_h, C, H) * strength[:, None]
            p.store_rows(write_at, p.mm_if(p.load_t(inverse_at, C, C), written, EXACT, PRECISION), row_h, C, H)
    elif TAPE:
        p.store_rows(write_at, keys * strength[:, None], row_h, C, H)
    return inverse


@triton.jit
def write_vector(
    k_at, v_at, keys_at,  # this chunk's rows: k, v [C, d]; where keys go [C, h]
    table_at,  # exp(since_t - total_s) eta_s for s < t, [C, C]
    write_in_at, inverse_in_at,  # MOVING: K_in [C, d], and Y_in [C, C] for the tape
    V_at, A_at, w_in_at, anchor_in_at,  # V^T, A^T of W1 [h, d]; W2^T, or MOVING: V2^T, and A2^T [d, h]
    next_V, next_in, first_V, first_in, anew,  # where the chunk's end goes, unless the next chunk starts anew from the first
    phi_v_at, write_at, u_at, target_at, missed_at, slope_k_at, slope_v_at, key_scale_at, target_scale_at, inverse_at,  # the tape
    e_at, u_in_at, missed_in_at, curve_at,  # the tape, MOVING
    HEADS, row_in, since, strength, kept,  # row_in: from token to token of K_in
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TAPE: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr,
    OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, RESIDUAL: tl.constexpr, ANCHORED: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, row_h = HEADS * D, HEADS * H
    k = p.rows(k_at, row, C, D)
    z, slope, keys, held_in = features_of_keys(
        k, w_in_at, anchor_in_at, keys_at, slope_k_at, key_scale_at, HEADS, since,
        C, D, H, TAPE, MOVING, DGD, ANCHORED, EXACT, PRECISION,
    )  # fmt: skip
    e = p.rows(v_at, row, C, D).to(tl.float32)
    if OWN:
        z_v = p.mm(e, input_weights(w_in_at, anchor_in_at, D, H, MOVING, ANCHORED, PRECISION), PRECISION)
        phi_v = p.operand_if(p.silu(z_v, PRECISION), EXACT, PRECISION)
        e += p.mm_if(phi_v, p.whole(V_at, A_at, H, D, ANCHORED), EXACT, PRECISION)
        if UNIT_TARGET:
            target_scale = p.inverse_norm(e, PRECISION)
            e = e * target_scale[:, None]
            if TAPE:
                p.store_each(target_scale_at, target_scale, HEADS, C)
        if TAPE:
            p.store_rows(phi_v_at, phi_v, row_h, C, H)
            p.store_rows(slope_v_at, p.dsilu(z_v, PRECISION), row_h, C, H)
            p.store_rows(target_at, e, row, C, D)
    e = -e
    if RESIDUAL:
        e += k
    if MOVING:  # before the system is solved: registers
        hidden = p.mm(e, p.whole_t(V_at, A_at, H, D, ANCHORED), PRECISION)
        if TAPE:
            p.store_rows(e_at, e, row, C, D)
            p.store_rows(curve_at, hidden * p.d2silu(z, PRECISION), row_h, C, H)
        write_input(
            hidden * slope, held_in, k_at, write_in_at, inverse_in_at, w_in_at, anchor_in_at, next_in, first_in, anew,
            u_in_at, missed_in_at, row_in, row, row_h, since, kept, C, D, H, TAPE, DGD_IN, ANCHORED, EXACT, PRECISION,
        )  # fmt: skip
    r = e
    if DGD:
        if ANCHORED:
            r = p.add_mm(r, keys, p.load(A_at, H, D), PRECISION)
        if TAPE:
            p.store_rows(missed_at, -r, row, C, D)
        r = p.add_mm(r, keys * since[:, None], p.load(V_at, H, D), PRECISION)
    tl.debug_barrier()  # keys, stored as rows, are read as columns
    inverse = solved(keys, keys_at, table_at, inverse_at, write_at, row_h, strength, C, H, TAPE, DGD, EXACT, PRECISION)
    if DGD:
        r = p.mm_if(inverse, r, EXACT, PRECISION)
    if TAPE:
        p.store_rows(u_at, r, row, C, D)
    else:
        new = p.load(V_at, H, D) * kept
        new += p.mm_if(p.columns(keys_at, row_h, C, H), r * -strength[:, None], EXACT, PRECISION)
        if anew:
            new = p.load(first_V, H, D)
        p.store(next_V, new, H, D)


@triton.jit
def write_input(
    r, held, k_at, write_in_at, inverse_in_at, w_in_at, anchor_in_at, next_in, first_in, anew, u_in_at, missed_in_at,
    row_in, row, row_h, since, kept,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TAPE: tl.constexpr, DGD_IN: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The input layer, which learns r = silu'(z) . W^T e [C, h] and held = since V2 k + A2 k."""
    if TAPE:
        missed = -r
        if DGD_IN and ANCHORED:
            missed -= p.mm(p.rows(k_at, row, C, D), p.load(anchor_in_at, D, H), PRECISION)
        p.store_rows(missed_in_at, missed, row_h, C, H)
    if DGD_IN:
        r += held
    if TAPE:
        if DGD_IN:
            r = p.mm_if(p.load(inverse_in_at, C, C), r, EXACT, PRECISION)
        p.store_rows(u_in_at, r, row_h, C, H)
    else:
        new = p.load(w_in_at, D, H) * kept
        new += p.mm_if(p.columns(write_in_at, row_in, C, D), -r, EXACT, PRECISION)
        if anew:
            new = p.load(first_in, D, H)
        p.store(next_in, new, D, H)


@triton.jit
def write_scalar(
    k_at, v_at, keys_at, table_at, write_in_at, inverse_in_at,
    V_at, A_at, w_in_at, anchor_in_at,  # V, A [h]
    next_V, next_in, first_V, first_in, anew,
    phi_v_at, write_at, u_at, target_at, missed_at, slope_k_at, slope_v_at, key_scale_at, inverse_at,  # u, target, missed: [C]
    e_at, u_in_at, missed_in_at, curve_at,
    HEADS, row_in, since, strength, kept,  # row_in: from token to token of K_in
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    TAPE: tl.constexpr, MOVING: tl.constexpr, DGD: tl.constexpr, DGD_IN: tl.constexpr,
    UNIT_TARGET: tl.constexpr, ANCHORED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `write_vector`; the target is its own always."""
    row, row_h, i_h = HEADS * D, HEADS * H, tl.arange(0, H)
    k = p.rows(k_at, row, C, D)
    z, slope, keys, held_in = features_of_keys(
        k, w_in_at, anchor_in_at, keys_at, slope_k_at, key_scale_at, HEADS, since,
        C, D, H, TAPE, MOVING, DGD, ANCHORED, EXACT, PRECISION,
    )  # fmt: skip
    V = tl.load(V_at + i_h)
    W = V
    if ANCHORED:
        A = tl.load(A_at + i_h)
        W = V + A
    W2 = input_weights(w_in_at, anchor_in_at, D, H, MOVING, ANCHORED, PRECISION)
    z_v = p.mm(p.rows(v_at, row, C, D), W2, PRECISION)
    phi_v = p.silu(z_v, PRECISION)
    target = tl.sum(phi_v * W[None, :], 1)
    if UNIT_TARGET:
        target = p.tanh(target, PRECISION)
    if TAPE:
        p.store_rows(phi_v_at, phi_v, row_h, C, H)
        p.store_rows(slope_v_at, p.dsilu(z_v, PRECISION), row_h, C, H)
        p.store_each(target_at, target, HEADS, C)
    e = -target
    if MOVING:  # before the system is solved: registers
        hidden = e[:, None] * W[None, :]
        if TAPE:
            p.store_each(e_at, e, HEADS, C)
            p.store_rows(curve_at, hidden * p.d2silu(z, PRECISION), row_h, C, H)
        write_input(
            hidden * slope, held_in, k_at, write_in_at, inverse_in_at, w_in_at, anchor_in_at, next_in, first_in, anew,
            u_in_at, missed_in_at, row_in, row, row_h, since, kept, C, D, H, TAPE, DGD_IN, ANCHORED, EXACT, PRECISION,
        )  # fmt: skip
    r = e
    if DGD:
        if ANCHORED:
            r += tl.sum(keys * A[None, :], 1)
        if TAPE:
            p.store_each(missed_at, -r, HEADS, C)
        r += tl.sum(keys * V[None, :], 1) * since
    tl.debug_barrier()
    inverse = solved(keys, keys_at, table_at, inverse_at, write_at, row_h, strength, C, H, TAPE, DGD, EXACT, PRECISION)
    if DGD:
        r = tl.sum(inverse * r[None, :], 1)
    if TAPE:
        p.store_each(u_at, r, HEADS, C)
    else:
        new = V * kept - tl.sum(p.rows(keys_at, row_h, C, H) * (r * strength)[:, None], 0)
        if anew:
            new = tl.load(first_V + i_h)
        tl.store(next_V + i_h, new)
