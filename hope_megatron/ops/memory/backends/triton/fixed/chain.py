"""The loop over chunks of a memory with fixed features, forward and backward: one program per stream, three products a chunk."""

from __future__ import annotations

import triton.language as tl

from hope_megatron.ops.memory.backends.triton.language import (
    inverse_norm,
    load,
    load_each,
    load_rows,
    load_rows_t,
    mm,
    operand,
    place,
    store,
    store_rows_t,
)
from hope_megatron.ops.memory.backends.triton.launching import kernel


@kernel
def chain(
    keys_in, phi_v_in, write_in, base_in, target_in, probe_in, kept_in,  # as `prepare` left them
    begins,  # whether a stream starts anew at a chunk, [N, chunks] int8
    states,  # V at the start of every chunk and at the end, [N, chunks + 1, d, h]; the first is given
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    PROBE: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """r = base + probe V keys - unit(target + V phi_v);  V <- gamma_C V - r^T K.  All with tokens as columns: V is the first operand."""
    n = tl.program_id(0)
    state = states + n.to(tl.int64) * (chunks + 1) * D * H
    first = load(state, D, H)
    V = first
    for i in tl.range(0, chunks, disable_licm=True):  # hoisted addresses would fill the registers
        at, valid = place(i, n, T, HEADS, CHUNK)
        if RESETS:
            V = tl.where(tl.load(begins + n * chunks + i) != 0, first, V)
        store(state + i * D * H, V, D, H)
        weights = operand(V, PRECISION)
        r = load_rows_t(base_in + at * D, HEADS * D, valid, C, D).to(tl.float32)
        if OWN:
            target = mm(weights, load_rows_t(phi_v_in + at * H, HEADS * H, valid, C, H), PRECISION)
            target += load_rows_t(target_in + at * D, HEADS * D, valid, C, D)
            if UNIT_TARGET:
                target = target * inverse_norm(target, 0, PRECISION)[None, :]
            r -= target
        if PROBE:
            held = mm(weights, load_rows_t(keys_in + at * H, HEADS * H, valid, C, H), PRECISION)
            r += held * load_each(probe_in + at, HEADS, valid, 0.0, C)[None, :]
        written = mm(r, load_rows(write_in + at * H, HEADS * H, valid, C, H), PRECISION)
        V = V * tl.load(kept_in + n * chunks + i) - written
    store(state + chunks * D * H, V, D, H)


@kernel
def chain_backward(
    keys_in, phi_v_in, write_in, probe_in, kept_in, target_in, target_scale_in,  # unit targets and 1 / norm: as `rows` left them
    d_r_in,  # what reads add to the gradient of r, [B, T, H, d]
    begins,
    d_r_out,  # the gradient of r, [B, T, H, d]
    d_states,  # of V, [N, chunks + 1, d, h]: the last is given, of the others what reads add; out: all of it at each chunk's start
    d_first,  # of the state that streams start anew from, [N, d, h]; out
    T, HEADS, chunks,
    C: tl.constexpr, CHUNK: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    PROBE: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_r = d_r - K dV^T;  dV <- gamma_C dV + (probe d_r)^T keys + d_target^T phi_v + what reads add."""
    n = tl.program_id(0)
    d_state = d_states + n.to(tl.int64) * (chunks + 1) * D * H
    d_V = load(d_state + chunks * D * H, D, H)
    if RESETS:
        d_reset = tl.zeros([D, H], tl.float32)
    for back in tl.range(0, chunks, disable_licm=True):
        i = chunks - 1 - back
        at, valid = place(i, n, T, HEADS, CHUNK)
        d_r = load_rows_t(d_r_in + at * D, HEADS * D, valid, C, D).to(tl.float32)
        d_r -= mm(d_V, load_rows_t(write_in + at * H, HEADS * H, valid, C, H), PRECISION)
        store_rows_t(d_r_out + at * D, d_r, HEADS * D, valid, C, D)
        d_V = d_V * tl.load(kept_in + n * chunks + i) + load(d_state + i * D * H, D, H)
        if PROBE:
            reached = d_r * load_each(probe_in + at, HEADS, valid, 0.0, C)[None, :]
            d_V += mm(reached, load_rows(keys_in + at * H, HEADS * H, valid, C, H), PRECISION)
        if OWN:
            d_target = -d_r
            if UNIT_TARGET:
                target = load_rows_t(target_in + at * D, HEADS * D, valid, C, D).to(tl.float32)
                d_target -= target * tl.sum(target * d_target, 0)[None, :]
                d_target = d_target * load_each(target_scale_in + at, HEADS, valid, 0.0, C)[None, :]
            d_V += mm(d_target, load_rows(phi_v_in + at * H, HEADS * H, valid, C, H), PRECISION)
        if RESETS:
            new = tl.load(begins + n * chunks + i) != 0
            d_reset += tl.where(new, d_V, 0.0)
            d_V = tl.where(new, 0.0, d_V)
        store(d_state + i * D * H, d_V, D, H)
    if RESETS:
        d_V += d_reset
    store(d_first + n.to(tl.int64) * D * H, d_V, D, H)
