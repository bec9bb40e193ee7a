"""The launches of memories whose keys depend on weights that change, in order: forward, tape and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.triton.bank import backward as back
from hope_megatron.ops.memory.backends.triton.bank import forward as fore
from hope_megatron.ops.memory.backends.triton.launching import launch
from hope_megatron.ops.memory.backends.triton.sums import outer_sum


class Setting(NamedTuple):
    """What kernels are specialised on. Numbers of memories are -1 where there is none."""

    chunk: int  # tokens
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
    exact_inverse: bool
    log_eta_max: float
    precision: str

    @property
    def n(self) -> int:
        return self.num_vector + self.num_scalar

    def write(self) -> dict[str, Any]:
        """Constants of kernels that write or unwrite."""
        return dict(
            NV=self.num_vector, NS=self.num_scalar, MOVING=self.moving, DGD=self.dgd, DGD_IN=self.dgd_in, OWN=self.own,
            UNIT_TARGET=self.unit_target, RESIDUAL=self.residual, ANCHORED=self.anchored, PRECISION=self.precision,
        )  # fmt: skip

    def made(self) -> dict[str, Any]:
        """Constants of chains."""
        return dict(
            SELF=self.own_chain, KEY=self.key, VALUE=self.value, ETA=self.eta, ALPHA=self.alpha, UNIT_VALUE=self.unit_value
        )


class Layers(NamedTuple):
    """Weights of n memories in all streams, or gradients of them."""

    w_in: Tensor  # W2 [N, n, h, d]; moving: V2, at starts [N, chunks + 1, n, h, d]
    vector: Tensor  # V of W1 [N, NV, d, h], at starts [N, chunks + 1, NV, d, h]
    scalar: Tensor  # [N, NS, h], at starts [N, chunks + 1, NS, h]


class Made(NamedTuple):
    """What is written, and at which rates."""

    k: Tensor  # [B, T, H, d]
    v: Tensor
    log_eta: Tensor  # [B, T, H]
    log_alpha: Tensor


class Tape(NamedTuple):
    """As `bank_tape` leaves it."""

    keys: Tensor
    phi_v: Tensor
    write: Tensor
    write_in: Tensor
    slope_k: Tensor
    slope_v: Tensor
    key_scale: Tensor
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
    inverse: Tensor


class Place(NamedTuple):
    """Sizes that the launches of one operator share."""

    B: int
    T: int
    H: int
    d: int
    h: int
    chunks: int
    block: int

    @classmethod
    def of(cls, x: Tensor, h: int, s: Setting) -> Place:
        B, T, H, d = x.shape
        return cls(B, T, H, d, h, -(-T // s.chunk), max(16, 1 << (s.chunk - 1).bit_length()))

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.T, self.H, self.chunks, self.B * self.T * self.H

    def tile(self, s: Setting) -> dict[str, int]:
        return dict(C=self.block, CHUNK=s.chunk, D=self.d, H=self.h)

    def planes(self, n: int, width: int | None, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised [n, B, T, H, width]; width None: [n, B, T, H]."""
        shape = (n, self.B, self.T, self.H) if width is None else (n, self.B, self.T, self.H, width)
        return like.new_empty(shape, dtype=dtype)


def operand_dtype(precision: str) -> torch.dtype:
    """Of scratch that products read."""
    return torch.bfloat16 if precision in ("bf16", "bf16_ptx") else torch.float32


def starts_of(first: Layers, s: Setting, chunks: int) -> Layers:
    """Room for the weights at every chunk's start and the end, with the first ones in place."""

    def room(x: Tensor) -> Tensor:
        out = x.new_empty(x.size(0), chunks + 1, *x.shape[1:])
        out[:, 0] = x
        return out

    return Layers(room(first.w_in) if s.moving else first.w_in, room(first.vector), room(first.scalar))


def input_features(x_k, x_v, w: Layers, anchor: Layers, s: Setting, p: Place, *, slope: bool) -> tuple[Tensor, Tensor]:
    """phi_x, slope_x: [n, B, T, H, h]."""
    phi = p.planes(s.n, p.h, x_k, operand_dtype(s.precision))
    slopes = torch.empty_like(phi) if slope else phi
    launch(
        fore.input_features, (p.chunks, p.B * p.H, s.n), x_k, x_v, w.w_in, anchor.w_in, phi, slopes, *p.counts, **p.tile(s),
        VALUE=s.value, MOVING=s.moving, ANCHORED=s.anchored, SLOPE=slope, PRECISION=s.precision,
    )  # fmt: skip
    return phi, slopes


def chain(x, made: Made, norms, phi_x, starts: Layers, anchor: Layers, begins, s: Setting, p: Place, write_in: Tensor) -> None:
    """The loop over chunks: fills `starts`, and `made` with `norms` for self-memories. x: x_k, x_v and two logits."""
    keys = p.planes(s.n, p.h, made.k, operand_dtype(s.precision))
    launch(
        fore.bank_chain, (p.B * p.H,), *x, phi_x, *made, *norms, keys, write_in, starts.w_in, anchor.w_in,
        starts.vector, anchor.vector, starts.scalar, anchor.scalar, keys if begins is None else begins,
        *p.counts, s.log_eta_max, **p.tile(s), **s.made(), **s.write(), RESETS=begins is not None, EXACT=s.exact_inverse,
    )  # fmt: skip


def input_system(made: Made, s: Setting, p: Place) -> tuple[Tensor, Tensor]:
    """K_in [B, T, H, d] and Y_in^T [N, chunks, C, C]."""
    dtype = operand_dtype(s.precision)
    write_in = torch.empty_like(made.k, dtype=dtype)
    inverse = made.k.new_empty(p.B * p.H, p.chunks, p.block, p.block, dtype=dtype) if s.dgd_in else write_in
    tile = p.tile(s)
    tile.pop("H")
    launch(
        fore.input_system, (p.chunks, p.B * p.H), made.k, made.log_eta, made.log_alpha, write_in, inverse,
        *p.counts[:3], **tile, DGD_IN=s.dgd_in, EXACT=s.exact_inverse, PRECISION=s.precision,
    )  # fmt: skip
    return write_in, inverse


def tape(made: Made, starts: Layers, anchor: Layers, system: tuple[Tensor, Tensor], s: Setting, p: Place) -> Tape:
    """What backward needs of what every chunk wrote. system: as `input_system` leaves it; anything if not moving."""
    dtype, like, nv, ns = operand_dtype(s.precision), made.k, s.num_vector, s.num_scalar
    wide = lambda n: p.planes(n, p.h, like, dtype)  # noqa: E731
    narrow = lambda: p.planes(nv, p.d, like, dtype)  # noqa: E731
    each = lambda n: p.planes(n, None, like)  # noqa: E731
    moving = s.n if s.moving else 0
    t = Tape(
        keys=wide(s.n), phi_v=wide(s.n), write=wide(s.n), write_in=system[0], slope_k=wide(s.n), slope_v=wide(s.n),
        key_scale=each(s.n), u=narrow(), target=narrow(), missed=narrow(), target_scale=each(nv),
        e=narrow() if s.moving else wide(0), u_scalar=each(ns), target_scalar=each(ns), missed_scalar=each(ns),
        e_scalar=each(ns), u_in=wide(moving), missed_in=wide(moving), curve=wide(moving),
        inverse=system[1] if s.own_chain or not s.dgd else torch.empty_like(system[1]),
    )  # fmt: skip
    launch(
        fore.bank_tape, (p.chunks, p.B * p.H, s.n), *made, t.keys, *system, starts.w_in, anchor.w_in,
        starts.vector, anchor.vector, starts.scalar, anchor.scalar, t.phi_v, t.write, t.slope_k, t.slope_v, t.key_scale,
        t.u, t.target, t.missed, t.target_scale, t.e, t.u_scalar, t.target_scalar, t.missed_scalar, t.e_scalar,
        t.u_in, t.missed_in, t.curve, t.inverse, *p.counts, **p.tile(s), **s.write(), READ=not s.own_chain, EXACT=s.exact_inverse,
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
    x, phi_x, slope_x, made: Made, norms, t: Tape, starts: Layers, anchor: Layers, reads, d_made: Made, d_starts: Layers,
    begins, s: Setting, p: Place, *, added: bool,
) -> tuple[Found, Layers, tuple[Tensor, ...], Tensor]:  # fmt: skip
    """Returns what is left for sums; gradients of the first weights; d_raw_k, d_raw_v and of the logits; of A of scalar memories.

    reads: gradients that M_mem's read adds to r, keys and r_in; None: self-memories. d_made: added to. d_starts: the last are
    given; added: the others hold what is added; filled.
    """
    dtype, like = operand_dtype(s.precision), made.k
    wide = lambda n: p.planes(n, p.h, like, dtype)  # noqa: E731
    moving = s.n if s.moving else 0
    found = Found(
        p.planes(s.num_vector, p.d, like, dtype), p.planes(s.num_vector, p.d, like, dtype), wide(s.n), wide(s.n),
        wide(moving), wide(s.num_vector if s.moving else 0), wide(s.n if s.own_chain else 0),
    )  # fmt: skip
    d_first = Layers(*(torch.zeros_like(x[:, 0]) for x in d_starts)) if begins is not None else d_starts
    d_anchor_scalar = torch.zeros_like(starts.scalar[:, 0])
    d_raw = tuple(map(torch.empty_like, made)) if s.own_chain else tuple(made)
    launch(
        back.bank_chain_backward, (p.B * p.H,), *x[:2], phi_x, slope_x, *made, *norms,
        t.keys, t.phi_v, t.write, t.write_in, t.slope_k, t.slope_v, t.key_scale, t.u, t.target, t.missed, t.target_scale, t.e,
        t.u_scalar, t.target_scalar, t.missed_scalar, t.e_scalar, t.u_in, t.missed_in, t.curve,
        starts.w_in, anchor.w_in, starts.vector, anchor.vector, starts.scalar, anchor.scalar, *(reads or made[:3]),
        *d_made, d_starts.vector, d_starts.scalar, d_starts.w_in, d_first.vector, d_first.scalar, d_first.w_in,
        d_anchor_scalar, *found, *d_raw, t.keys if begins is None else begins, *p.counts, s.log_eta_max,
        **p.tile(s), **s.made(), **s.write(), RESETS=begins is not None, ADDED=added, READ=reads is not None,
    )  # fmt: skip
    first = Layers(*(x[:, 0] for x in d_starts))
    if begins is not None:
        first = Layers(*(a + b for a, b in zip(first, d_first)))
    return found, first, d_raw, d_anchor_scalar


def weight_sums(x, phi_x, made: Made, t: Tape, f: Found, d_raw, s: Setting) -> tuple[Tensor, Tensor | None]:
    """Gradients of W2 (moving: of A2) [N, n, h, d] and of A of vector memories [N, NV, d, h]."""
    d_in, d_anchor = [], []
    for m in range(s.n):
        vector = m < s.num_vector
        pairs = [(f.d_z_k[m], made.k)]
        if s.own or not vector:
            pairs.append((f.d_z_v[m], made.v))
        if s.own_chain:
            pairs.append((f.d_z_x[m], x[1] if m == s.value else x[0]))
        if s.moving and s.dgd_in:
            pairs.append((f.d_r_in[m], made.k))
        d_in.append(outer_sum(*pairs, precision=s.precision))
        if not (vector and s.anchored):
            continue
        pairs = [(f.d_r[m], t.keys[m])] if s.dgd else []
        if s.own:
            pairs.append((f.d_target[m], t.phi_v[m]))
        if s.own_chain:
            pairs.append((d_raw[1] if m == s.value else d_raw[0], phi_x[m]))
        if s.moving:
            pairs.append((t.e[m], f.d_hidden[m]))
        d_anchor.append(outer_sum(*pairs, precision=s.precision))
    return torch.stack(d_in, 1), torch.stack(d_anchor, 1) if d_anchor else None
