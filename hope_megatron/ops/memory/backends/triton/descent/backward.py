"""The backward of the loop over chunks of a memory that descends (write.py), last chunk first."""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p
from hope_megatron.ops.memory.backends.triton.bank.backward import restart
from hope_megatron.ops.memory.backends.triton.descent.write import over_the_chunk
from hope_megatron.ops.memory.backends.triton.launching import kernel


@triton.jit
def whole_dot(a_at, b_at, X: tl.constexpr, Y: tl.constexpr):
    """<a, b> of two matrices."""
    return tl.sum(tl.sum(p.load(a_at, X, Y) * p.load(b_at, X, Y), 1), 0)


@triton.jit
def from_end(
    x_at, drive_at, d_x_at, d_drive_at, V_at, S_at, d_V_at, d_S_at, reach, reach_speed, HEADS,
    C: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through W_C = .. - x^T (reach drive), and S_C: gradients of x (added to what reads gave, stored), of drive; of reach,
    reach_speed [C], kept, moved and kept_speed. d_V_at, d_S_at: at the chunk's end."""
    x, drive = p.rows(x_at, HEADS * X, C, X), p.rows(drive_at, HEADS * Y, C, Y)
    back = p.mm(x, p.load(d_V_at, X, Y), PRECISION)
    d_drive = p.rows(d_drive_at, HEADS * Y, C, Y) - back * reach[:, None]
    d_reach = -tl.sum(back * drive, 1)
    d_x = p.rows(d_x_at, HEADS * X, C, X)
    d_x -= p.mm(drive * reach[:, None], p.load_t(d_V_at, X, Y), PRECISION)
    d_kept = whole_dot(d_V_at, V_at, X, Y)
    d_speed, d_moved, d_kept_speed = d_reach * 0.0, d_kept * 0.0, d_kept * 0.0
    if MOMENTUM:
        back = p.mm(x, p.load(d_S_at, X, Y), PRECISION)
        d_drive -= back * reach_speed[:, None]
        d_speed = -tl.sum(back * drive, 1)
        d_x -= p.mm(drive * reach_speed[:, None], p.load_t(d_S_at, X, Y), PRECISION)
        d_moved, d_kept_speed = whole_dot(d_V_at, S_at, X, Y), whole_dot(d_S_at, S_at, X, Y)
    p.store_rows(d_x_at, d_x, HEADS * X, C, X)
    return d_x, d_drive, d_reach, d_speed, d_kept, d_moved, d_kept_speed


@triton.jit
def carried(
    d_now, d_end, d_S_now, d_S_end, kept, moved, kept_speed, X: tl.constexpr, Y: tl.constexpr, MOMENTUM: tl.constexpr
):
    """What a layer's gradient is at the chunk's start, of what it decayed from and what reads gave, [X, Y]; of S: stored."""
    d = p.load(d_end, X, Y)
    if MOMENTUM:
        p.store(d_S_now, p.load(d_S_now, X, Y) + d * moved + p.load(d_S_end, X, Y) * kept_speed, X, Y)
    return p.load(d_now, X, Y) + d * kept


@triton.jit
def through_scale(d_e, d_g, e, g, phi, scale, slope, SCALED: tl.constexpr):
    """Through e scale and g scale, with scale = eta / max(1, slope): gradients of e, g, phi (added) and eta."""
    d_scale = tl.sum(d_e * e, 1) + tl.sum(d_g * g, 1)
    d_e, d_g, d_phi = d_e * scale[:, None], d_g * scale[:, None], phi * 0.0
    if SCALED:
        squared = tl.sum(e * e, 1) + p.SMALL
        d_slope = tl.where(slope > 1.0, -d_scale * scale / slope, 0.0)
        d_phi = phi * (2.0 * d_slope)[:, None]
        d_g += g * (2.0 * d_slope / squared)[:, None]
        d_e -= e * (2.0 * d_slope * tl.sum(g * g, 1) / (squared * squared))[:, None]
    return d_e, d_g, d_phi, d_scale / slope


@kernel
def descent_chain_backward(
    k, phi, z, delta, e, slope, drive, drive_in,  # the tape
    eta, reach, reach_speed, ends,
    states, speeds, states_in, speeds_in,
    d_k, d_phi, d_drive, d_drive_in,  # [B, T, H, .]: what reads give; d_k, out: all of it
    d_v, d_delta,  # out, [B, T, H, d]; scratch, [N, C, h]
    d_eta, d_reach, d_reach_speed, d_ends,  # out: as eta, reach, reach_speed, ends
    d_states, d_speeds, d_states_in, d_speeds_in,  # as states: the last is given, the others hold what reads give; out
    d_first, d_first_speed, d_first_in, d_first_speed_in,  # RESETS: of the first states beside those at the stream's start; zeros
    begins,
    T, HEADS, chunks,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    MOMENTUM: tl.constexpr, SCALED: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row, row_h, delta_at = HEADS * D, HEADS * H, d_delta + n * C * H
    for back in tl.range(0, chunks, disable_licm=True):
        i = chunks - 1 - back
        at, chunk, now = p.place(i, n, T, HEADS, C), n * chunks + i, (n * (chunks + 1) + i) * D * H
        then, token, wide = now + D * H, at * D, at * H
        to_end, to_speed = p.each(reach + chunk * C, 1, C), p.each(reach_speed + chunk * C, 1, C)
        kept, moved, kept_speed = over_the_chunk(ends + chunk * 3)
        d_features, d_e, d_to_end, d_to_speed, d_kept, d_moved, d_kept_speed = from_end(
            phi + wide, drive + token, d_phi + wide, d_drive + token, states + now, speeds + now, d_states + then,
            d_speeds + then, to_end, to_speed, HEADS, C, H, D, MOMENTUM, PRECISION,
        )  # fmt: skip
        d_keys, d_g, more_end, more_speed, more_kept, more_moved, more_kept_speed = from_end(
            k + token, drive_in + wide, d_k + token, d_drive_in + wide, states_in + now, speeds_in + now, d_states_in + then,
            d_speeds_in + then, to_end, to_speed, HEADS, C, D, H, MOMENTUM, PRECISION,
        )  # fmt: skip
        p.store_each(d_reach + chunk * C, d_to_end + more_end, 1, C)
        p.store_each(d_reach_speed + chunk * C, d_to_speed + more_speed, 1, C)
        tl.store(d_ends + chunk * 3, d_kept + more_kept)
        tl.store(d_ends + chunk * 3 + 1, d_moved + more_moved)
        tl.store(d_ends + chunk * 3 + 2, d_kept_speed + more_kept_speed)

        found_z, found_delta = p.rows(z + wide, row_h, C, H), p.rows(delta + wide, row_h, C, H)
        found_e, steep = p.rows(e + token, row, C, D), p.each(slope + chunk * C, 1, C)
        bend = p.dsilu(found_z, PRECISION)
        scale = p.each(eta + chunk * C, 1, C) / steep
        features = p.rows(phi + wide, row_h, C, H)
        d_e, d_g, more, of_eta = through_scale(d_e, d_g, found_e, found_delta * bend, features, scale, steep, SCALED)
        p.store_each(d_eta + chunk * C, of_eta, 1, C)
        p.store(delta_at, d_g * bend, C, H)
        d_e = p.add_mm(d_e, d_g * bend, p.load(states + now, H, D), PRECISION)
        p.store_rows(d_v + token, -d_e, row, C, D)
        d_features = p.add_mm(d_features + more, d_e, p.load_t(states + now, H, D), PRECISION)
        d_z = d_features * bend + d_g * found_delta * p.d2silu(found_z, PRECISION)
        d_keys = p.add_mm(d_keys + d_e, d_z, p.load_t(states_in + now, D, H), PRECISION)
        p.store_rows(d_k + token, d_keys, row, C, D)
        tl.debug_barrier()  # the gradient of delta, stored as rows, is read as columns
        d_V = carried(
            d_states + now, d_states + then, d_speeds + now, d_speeds + then, kept, moved, kept_speed, H, D, MOMENTUM
        )
        d_V = p.add_mm(d_V, p.columns(phi + wide, row_h, C, H), d_e, PRECISION)
        d_V = p.add_mm(d_V, p.columns(delta_at, H, C, H), found_e, PRECISION)
        p.store(d_states + now, d_V, H, D)
        d_V = carried(
            d_states_in + now, d_states_in + then, d_speeds_in + now, d_speeds_in + then, kept, moved, kept_speed, D, H, MOMENTUM
        )  # fmt: skip
        p.store(d_states_in + now, p.add_mm(d_V, p.columns(k + token, row, C, D), d_z, PRECISION), D, H)
        tl.debug_barrier()  # the next chunk reads what other threads stored
        if RESETS:  # noqa: SIM102 (decided when compiling, the next one when running)
            if tl.load(begins + n * (chunks + 1) + i) != 0:
                restart(d_states + now, d_first + n * D * H, H, D)
                restart(d_states_in + now, d_first_in + n * D * H, D, H)
                if MOMENTUM:
                    restart(d_speeds + now, d_first_speed + n * D * H, H, D)
                    restart(d_speeds_in + now, d_first_speed_in + n * D * H, D, H)
                tl.debug_barrier()
