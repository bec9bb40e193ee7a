"""The launches of memories whose keys depend on weights that change, in order: forward, tape and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.triton.bank import backward as back
from hope_megatron.ops.memory.backends.triton.bank import forward as fore
from hope_megatron.ops.memory.backends.triton.launching import constants, launch, launch_together
from hope_megatron.ops.memory.backends.triton.sizes import Sizes, operand_dtype
from hope_megatron.ops.memory.backends.triton.sums import outer_sum


class Setting(NamedTuple):
    """What kernels are specialised on. Numbers of memories are -1 where there is none."""

    rows: int  # of a chunk's tiles
    own_chain: bool  # self-memories; else M_mem
    key: int
    value: int
    eta: int
    alpha: int
    num_vector: int
    num_scalar: int
    moving: bool  # input layers are written
    dgd: bool  # the output layers have the Delta Gradient Descent term, and unit features as keys
    dgd_in: bool  # the input layers have it
    own: bool  # targets are M(v), else v; scalar memories always write their own
    unit_target: bool
    unit_value: bool
    residual: bool
    anchored: bool
    exact: bool  # systems, own targets and what is added to weights take more than bf16; scratch is fp32
    log_eta_max: float
    precision: str

    @property
    def n(self) -> int:
        return self.num_vector + self.num_scalar

    @property
    def scratch(self) -> torch.dtype:
        """Of what products read."""
        return torch.float32 if self.exact else operand_dtype(self.precision)

    def write(self) -> dict[str, Any]:
        """Constants of kernels that write or unwrite."""
        named = constants(self, "moving", "dgd", "dgd_in", "own", "unit_target", "residual", "anchored", "precision")
        return dict(NV=self.num_vector, NS=self.num_scalar, **named)

    def made(self) -> dict[str, Any]:
        """Constants of chains."""
        return dict(SELF=self.own_chain, **constants(self, "key", "value", "eta", "alpha", "unit_value"))


class Layers(NamedTuple):
    """Weights of n memories in all streams, or gradients of them; at chunk starts and the end: [N, chunks + 1, ...]."""

    w_in: Tensor  # W2^T [N, n, d, h]; moving: V2^T
    vector: Tensor  # V^T of W1 [N, NV, h, d]
    scalar: Tensor  # [N, NS, h]


class Made(NamedTuple):
    """What is written, and at which rates."""

    k: Tensor  # [B, T, H, d]
    v: Tensor
    log_eta: Tensor  # [B, T, H]
    log_alpha: Tensor


class System(NamedTuple):
    """What all memories of a bank share in a chunk, as `input_system` leaves it."""

    table: Tensor  # [1, N, chunks, C, C]
    write_in: Tensor  # K_in [B, T, H, d]
    inverse_in: Tensor  # Y_in [1, N, chunks, C, C]


class Tape(NamedTuple):
    """As `bank_tape` leaves it."""

    keys: Tensor
    phi_v: Tensor
    write: Tensor
    slope_k: Tensor
    slope_v: Tensor
    key_scale: Tensor
    inverse: Tensor
    u: Tensor
    target: Tensor
    missed: Tensor
    target_scale: Tensor
    e: Tensor
    u_scalar: Tensor
    target_scalar: Tensor
    missed_scalar: Tensor
    e_scalar: Tensor
    u_in: Tensor
    missed_in: Tensor
    curve: Tensor


def input_features(x_k, x_v, w: Layers, anchor: Layers, s: Setting, z: Sizes, *, slope: bool) -> tuple[Tensor, Tensor]:
    """phi_x, slope_x: [n, B, T, H, h]."""
    phi = z.rows(z.h, x_k, s.scratch, s.n)
    slopes = torch.empty_like(phi) if slope else phi
    launch(
        fore.input_features, (*z.grid, s.n), x_k, x_v, w.w_in, anchor.w_in, phi, slopes, *z.counts, z.plane, **z.tile,
        VALUE=s.value, MOVING=s.moving, ANCHORED=s.anchored, SLOPE=slope, PRECISION=s.precision,
    )  # fmt: skip
    return phi, slopes


def chain_scratch(made: Made, s: Setting, z: Sizes) -> System:
    """For the chain of self-memories: one chunk's squares, and K_in, of each memory."""
    one = made.k.new_empty(z.N, s.n, z.C, z.C, dtype=torch.float32)
    write_in = made.k.new_empty(z.N, s.n, z.C, z.d, dtype=s.scratch) if s.moving else made.k
    return System(one, write_in, torch.empty_like(one, dtype=s.scratch))


def system_of(made: Made, s: Setting, z: Sizes) -> System:
    """Decay tables, and moving: K_in and Y_in, of all chunks."""
    table, dtype = z.squares(made.k), s.scratch
    if not s.moving:
        sizes = dict(C=z.C, PRECISION=s.precision)
        launch(fore.decay_tables, z.grid, made.log_eta, made.log_alpha, table, *z.counts, **sizes)
        return System(table, made.k, table)
    system = System(table, torch.empty_like(made.k, dtype=dtype), z.squares(made.k, dtype) if s.dgd_in else table)
    launch(
        fore.input_system, z.grid, made.k, made.log_eta, made.log_alpha, *system, *z.counts,
        C=z.C, D=z.d, DGD_IN=s.dgd_in, EXACT=s.exact, PRECISION=s.precision,
    )  # fmt: skip
    return system


def chain(
    x, made: Made, norms, phi_x, system: System, starts: Layers, anchor: Layers, begins, s: Setting, z: Sizes
) -> None:
    """The loop over chunks: fills `starts`, and `made` with `norms` for self-memories. x: x_k, x_v and two logits."""
    keys = z.rows(z.h, made.k, s.scratch, s.n)
    met = torch.zeros(z.N, dtype=torch.int32, device=keys.device) if s.n > 1 else keys
    launch_together(
        fore.bank_chain, (z.N, s.n), *x, phi_x, *made, *norms, keys, *system, starts.w_in, anchor.w_in,
        starts.vector, anchor.vector, starts.scalar, anchor.scalar, keys if begins is None else begins, met,
        *z.counts, z.plane, s.log_eta_max, **z.tile, **s.made(), **s.write(), RESETS=begins is not None, EXACT=s.exact,
    )  # fmt: skip


def tape(made: Made, starts: Layers, anchor: Layers, system: System, s: Setting, z: Sizes) -> Tape:
    """What backward needs of what every chunk wrote."""
    dtype, like, nv, ns = s.scratch, made.k, s.num_vector, s.num_scalar
    wide = lambda n: z.rows(z.h, like, dtype, n)  # noqa: E731
    narrow = lambda n: z.rows(z.d, like, dtype, n)  # noqa: E731
    moving = s.n if s.moving else 0
    t = Tape(
        wide(s.n), wide(s.n), wide(s.n), wide(s.n), wide(s.n), z.each(s.n, like), z.squares(like, dtype, s.n if s.dgd else 0),
        narrow(nv), narrow(nv), narrow(nv), z.each(nv, like), narrow(nv if s.moving else 0),
        z.each(ns, like), z.each(ns, like), z.each(ns, like), z.each(ns, like), wide(moving), wide(moving), wide(moving),
    )  # fmt: skip
    launch(
        fore.bank_tape, (*z.grid, s.n), *made, t.keys, *system, starts.w_in, anchor.w_in,
        starts.vector, anchor.vector, starts.scalar, anchor.scalar, *t[1:6], t.inverse, *t[7:],
        *z.counts, z.plane, **z.tile, **s.write(), EXACT=s.exact,
    )  # fmt: skip
    return t


class Found(NamedTuple):
    """What the chain's backward leaves for sums over all tokens."""

    d_r: Tensor
    d_target: Tensor
    d_z_k: Tensor
    d_z_v: Tensor
    d_r_in: Tensor
    d_hidden: Tensor
    d_z_x: Tensor


def chain_backward(
    x, phi_x, slope_x, made: Made, norms, t: Tape, system: System, starts: Layers, anchor: Layers, reads,
    d_made: Made, d_starts: Layers, begins, s: Setting, z: Sizes, *, added: bool,
) -> tuple[Found, Layers, tuple[Tensor, ...], Tensor]:  # fmt: skip
    """Returns what is left for sums; gradients of the first weights; d_raw_k, d_raw_v and of the logits; of A of scalar memories.

    reads: gradients that M_mem's read adds to r, keys and r_in; None: self-memories. d_made: M_mem's are added to. d_starts:
    the last are given; added: the others hold what is added; filled.
    """
    dtype, like, nv = s.scratch, made.k, s.num_vector
    wide = lambda n: z.rows(z.h, like, dtype, n)  # noqa: E731
    narrow = lambda n: z.rows(z.d, like, dtype, n)  # noqa: E731
    found = Found(
        narrow(nv), narrow(nv), wide(s.n), wide(s.n), wide(s.n if s.moving else 0), wide(nv if s.moving else 0),
        wide(s.n if s.own_chain else 0),
    )  # fmt: skip
    d_first = Layers(*(torch.zeros_like(x[:, 0]) for x in d_starts)) if begins is not None else d_starts
    d_anchor_scalar, met = _zeros(starts.scalar[:, 0], z.N)
    d_raw = tuple(map(torch.empty_like, made)) if s.own_chain else tuple(made)
    slots = ((z.C, z.d), (z.C, z.d)) if s.own_chain else ((0,), (0,))
    parts = tuple(like.new_empty(2, z.N, s.n, *slot, dtype=torch.float32) for slot in (*slots, (6, z.C)))
    launch_together(
        back.bank_chain_backward, (z.N, s.n), *x[:2], phi_x, slope_x, *made, *norms,
        *t[:3], system.table, system.write_in, *t[3:6], *t[7:],
        starts.w_in, anchor.w_in, starts.vector, anchor.vector, starts.scalar, anchor.scalar, *(reads or made[:3]),
        *d_made, d_starts.vector, d_starts.scalar, d_starts.w_in, d_first.vector, d_first.scalar, d_first.w_in,
        d_anchor_scalar, *found, *d_raw, *parts, t.keys if begins is None else begins, met, *z.counts, z.plane,
        s.log_eta_max, z.N,
        **z.tile, **s.made(), **s.write(), RESETS=begins is not None, ADDED=added, READ=reads is not None,
    )  # fmt: skip
    first = Layers(*(x[:, 0] for x in d_starts))
    if begins is not None:
        first = Layers(*(a + b for a, b in zip(first, d_first)))
    return found, first, d_raw, d_anchor_scalar


def _zeros(like: Tensor, counts: int) -> tuple[Tensor, Tensor]:
    """Zeros like a tensor in float32, and as many int32 ones, by one kernel."""
    some = like.new_zeros(like.numel() + counts)
    return some[:-counts].view(like.shape), some[-counts:].view(torch.int32)


def weight_sums(x, phi_x, made: Made, t: Tape, f: Found, d_raw, s: Setting) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of W2^T (moving: of A2^T) [N, n, d, h] and of A^T of vector memories [N, NV, h, d]; None where there is no A."""
    d_in, d_anchor = [], []
    for m in range(s.n):
        vector = m < s.num_vector
        inputs = x[1] if m == s.value else x[0]
        if s.anchored or not s.moving:
            pairs = [(made.k, f.d_z_k[m])]
            pairs += [(made.v, f.d_z_v[m])] if s.own or not vector else []
            pairs += [(inputs, f.d_z_x[m])] if s.own_chain else []
            pairs += [(made.k, f.d_r_in[m])] if s.moving and s.dgd_in else []
            d_in.append(outer_sum(*pairs, precision=s.precision))
        if vector and s.anchored:
            pairs = [(t.keys[m], f.d_r[m])] * s.dgd + [(t.phi_v[m], f.d_target[m])] * s.own
            pairs += [(f.d_hidden[m], t.e[m])] if s.moving else []
            pairs += [(phi_x[m], d_raw[1] if m == s.value else d_raw[0])] if s.own_chain else []
            d_anchor.append(outer_sum(*pairs, precision=s.precision))
    return torch.stack(d_in, 1) if d_in else None, torch.stack(d_anchor, 1) if d_anchor else None
