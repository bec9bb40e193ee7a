"""The loop over chunks of a memory with fixed features, forward and backward: one program per stream, three products a chunk."""

from __future__ import annotations

import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.launching import kernel


@kernel
def chain(
    keys_in, phi_v_in, write_in, base_in, target_in, probe_in, kept_in,  # as `prepare` left them
    begins,  # whether a stream starts anew at a chunk, [N, chunks + 1] int8
    states,  # V^T at the start of every chunk and at the end, [N, chunks + 1, h, d]; the first is given
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    PROBE: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """r = base + probe V keys - unit(target + V phi_v);  V <- gamma_C V - K^T r."""
    n = tl.program_id(0)
    state = states + n.to(tl.int64) * (chunks + 1) * D * H
    first = p.load(state, H, D)
    V = first
    for i in tl.range(0, chunks, disable_licm=True):  # hoisted addresses would fill the registers
        at = p.place(i, n, T, HEADS, C)
        if RESETS:
            V = tl.where(tl.load(begins + n * (chunks + 1) + i) != 0, first, V)
        p.store(state + i * D * H, V, H, D)
        weights = p.operand(V, PRECISION)
        r = p.rows(base_in + at * D, HEADS * D, C, D).to(tl.float32)
        if OWN:
            target = p.rows(target_in + at * D, HEADS * D, C, D).to(tl.float32)
            target = p.add_mm(target, p.rows(phi_v_in + at * H, HEADS * H, C, H), weights, PRECISION)
            if UNIT_TARGET:
                target = target * p.inverse_norm(target, PRECISION)[:, None]
            r -= target
        if PROBE:
            held = p.mm(p.rows(keys_in + at * H, HEADS * H, C, H), weights, PRECISION)
            r += held * p.each(probe_in + at, HEADS, C)[:, None]
        V = V * tl.load(kept_in + n * chunks + i)
        V = p.add_mm(V, p.columns(write_in + at * H, HEADS * H, C, H), -r, PRECISION)
    p.store(state + chunks * D * H, V, H, D)


@kernel
def chain_backward(
    keys_in, phi_v_in, write_in, probe_in, kept_in, target_in, target_scale_in,  # unit targets and 1 / norm: as `rows` left them
    d_r_in,  # what reads add to the gradient of r, [B, T, H, d]
    begins,
    d_r_out,  # the gradient of r, [B, T, H, d]
    d_states,  # of V^T, [N, chunks + 1, h, d]: the last is given, the others hold what reads add; out: at each chunk's start
    d_first,  # of the state that streams start anew from, [N, h, d]; out
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    PROBE: tl.constexpr, OWN: tl.constexpr, UNIT_TARGET: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_r = d_r - K dV;  dV <- gamma_C dV + keys^T (probe d_r) + phi_v^T d_target + what reads add."""
    n = tl.program_id(0)
    d_state = d_states + n.to(tl.int64) * (chunks + 1) * D * H
    d_V = p.load(d_state + chunks * D * H, H, D)
    if RESETS:
        d_reset = tl.zeros([H, D], tl.float32)
    for back in tl.range(0, chunks, disable_licm=True):
        i = chunks - 1 - back
        at = p.place(i, n, T, HEADS, C)
        d_r = p.rows(d_r_in + at * D, HEADS * D, C, D).to(tl.float32)
        d_r -= p.mm(p.rows(write_in + at * H, HEADS * H, C, H), d_V, PRECISION)
        p.store_rows(d_r_out + at * D, d_r, HEADS * D, C, D)
        d_V = d_V * tl.load(kept_in + n * chunks + i) + p.load(d_state + i * D * H, H, D)
        if PROBE:
            reached = d_r * p.each(probe_in + at, HEADS, C)[:, None]
            d_V = p.add_mm(d_V, p.columns(keys_in + at * H, HEADS * H, C, H), reached, PRECISION)
        if OWN:
            d_target = -d_r
            if UNIT_TARGET:
                target = p.rows(target_in + at * D, HEADS * D, C, D)
                d_target = p.unit_backward(d_target, target, p.each(target_scale_in + at, HEADS, C))
            d_V = p.add_mm(d_V, p.columns(phi_v_in + at * H, HEADS * H, C, H), d_target, PRECISION)
        if RESETS:
            anew = tl.load(begins + n * (chunks + 1) + i) != 0
            d_reset += tl.where(anew, d_V, 0.0)
            d_V = tl.where(anew, 0.0, d_V)
        p.store(d_state + i * D * H, d_V, H, D)
    if RESETS:
        d_V += d_reset
    p.store(d_first + n.to(tl.int64) * D * H, d_V, H, D)
