"""M_mem where a stream does not change its input layer: the phases in order, forward and backward, as one differentiable function.

Covers one-layer memories and `written_layers: output`: features of keys, values and queries are known for all chunks at once, and
what must go chunk by chunk is three products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.triton.fixed import chain, gradients, prepare, read
from hope_megatron.ops.memory.backends.triton.launching import constants, launch
from hope_megatron.ops.memory.backends.triton.sizes import Sizes, operand_dtype, starts_of
from hope_megatron.ops.memory.backends.triton.sums import outer_sum


class Setting(NamedTuple):
    """What kernels are specialised on."""

    rows: int  # of a chunk's tiles
    two_layers: bool
    unit: bool  # keys of the output layer are unit features
    dgd: bool  # the output layer has the Delta Gradient Descent term
    erased: bool  # retention scales what is erased too
    l2: bool  # the objective; without DGD
    own: bool  # targets are M(v), else v
    unit_target: bool
    residual: bool  # what is learned is v - k
    anchored: bool  # retention forgets towards A
    causal: bool
    skip: bool  # y includes q
    recompute: bool  # backward computes rows and what is prepared again
    precision: str

    @property
    def probe(self) -> bool:
        """Whether what is written depends on what the memory holds at the key."""
        return self.dgd or self.l2

    def chain(self) -> dict[str, Any]:
        return constants(self, "probe", "own", "unit_target", "precision")

    def read(self) -> dict[str, Any]:
        return constants(self, "two_layers", "anchored", "causal", "skip", "precision")

    def key(self) -> dict[str, Any]:
        return constants(self, "two_layers", "unit", "dgd", "erased", "l2", "own", "residual", "anchored", "precision")


class Inputs(NamedTuple):
    """Unit queries, keys, values [B, T, H, d]; log eta, log alpha [B, T, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_eta: Tensor
    log_alpha: Tensor


class _Prepared(NamedTuple):
    """As `prepare` leaves it."""

    keys: Tensor
    phi_v: Tensor
    base: Tensor
    target: Tensor
    probe: Tensor
    kept: Tensor
    write: Tensor
    inverse: Tensor


class _Rows(NamedTuple):
    """As `solve` leaves it."""

    u: Tensor
    target: Tensor
    target_scale: Tensor


def _prepare(x: Inputs, w_in: Tensor, anchor: Tensor, s: Setting, z: Sizes) -> _Prepared:
    dtype = operand_dtype(s.precision)
    p = _Prepared(
        keys=z.rows(z.h, x.k, dtype) if s.two_layers else x.k,
        phi_v=z.rows(z.h, x.k, dtype) if s.own else x.v,
        base=z.rows(z.d, x.k, dtype),
        target=z.rows(z.d, x.k, dtype) if s.own else x.v,
        probe=torch.empty_like(x.log_eta),
        kept=x.log_eta.new_empty(z.N, z.chunks),
        write=z.rows(z.h, x.k, dtype),
        inverse=z.squares(x.k, dtype) if s.dgd else x.k,
    )
    launch(
        prepare.prepare, z.grid, x.k, x.v, x.log_eta, x.log_alpha, w_in, anchor, *p, *z.counts, **z.tile, **s.key(), EXACT=False
    )  # fmt: skip
    return p


def _chain(p: _Prepared, begins: Tensor | None, first: Tensor, s: Setting, z: Sizes) -> Tensor:
    """V^T at every chunk's start and at the end: [N, chunks + 1, h, d]."""
    states = starts_of(first, z.chunks)
    launch(
        chain.chain, (z.N,), p.keys, p.phi_v, p.write, p.base, p.target, p.probe, p.kept, p.kept if begins is None else begins,
        states, *z.counts, **z.tile, **s.chain(), RESETS=begins is not None,
    )  # fmt: skip
    return states


def _solve(p: _Prepared, states: Tensor, s: Setting, z: Sizes) -> _Rows:
    u = torch.empty_like(p.base)
    r = _Rows(u, torch.empty_like(u) if s.own else u, torch.empty_like(p.probe))
    launch(
        read.solve, z.grid, p.keys, p.phi_v, p.inverse, p.base, p.target, p.probe, states, *r, *z.counts, **z.tile,
        **s.chain(), DGD=s.dgd,
    )  # fmt: skip
    return r


def _backward(x: Inputs, p: _Prepared, r: _Rows, states, w_in, anchor, begins, d_y, d_end, s: Setting, z: Sizes):
    """Gradients of x, w_in, the first state and A. d_end: of the state at the end."""
    dtype, like = operand_dtype(s.precision), x.q
    phi_q, d_z_q = (z.rows(z.h, like, dtype), z.rows(z.h, like, dtype)) if s.two_layers else (x.q, x.q)
    d = Inputs(*map(torch.empty_like, x))
    launch(
        read.read_backward_queries, z.grid, d_y, x.q, p.keys, r.u, x.log_eta, x.log_alpha, w_in, anchor, states,
        phi_q, d_z_q, d.q, d.log_alpha, *z.counts, **z.tile, **s.read(),
    )  # fmt: skip
    d_keys, d_r_read, d_states = z.rows(z.h, like), z.rows(z.d, like), torch.empty_like(states)
    launch(
        read.read_backward_writes, z.grid, d_y, phi_q, p.keys, r.u, x.log_eta, x.log_alpha, p.inverse,
        d_keys, d_r_read, d_states, *z.counts, **z.tile, DGD=s.dgd, CAUSAL=s.causal, PRECISION=s.precision,
    )  # fmt: skip
    d_states[:, -1] = d_end
    d_r, d_first = z.rows(z.d, like, dtype), torch.empty_like(states[:, 0])
    launch(
        chain.chain_backward, (z.N,), p.keys, p.phi_v, p.write, p.probe, p.kept, r.target, r.target_scale, d_r_read,
        p.kept if begins is None else begins, d_r, d_states, d_first, *z.counts, **z.tile, **s.chain(), RESETS=begins is not None,
    )  # fmt: skip
    d_target = d_z_v = d_r
    if s.own:
        d_target, d_z_v = z.rows(z.d, like, dtype), z.rows(z.h, like, dtype)
        launch(
            gradients.value_gradients, z.grid, x.v, d_r, r.target, r.target_scale, w_in, anchor, states,
            d_target, d_z_v, d.v, *z.counts, **z.tile, UNIT_TARGET=s.unit_target, ANCHORED=s.anchored, PRECISION=s.precision,
        )  # fmt: skip
    else:
        d = d._replace(v=-d_r.to(x.v.dtype))
    d_z_k = z.rows(z.h, like, dtype) if s.two_layers else x.k
    launch(
        gradients.key_gradients, z.grid, x.k, p.keys, r.u, p.base, r.target, p.probe, x.log_eta, x.log_alpha, d_r, d_keys,
        w_in, anchor, states, d_states, d_z_k, d.k, d.log_eta, d.log_alpha, *z.counts, **z.tile, **s.key(),
    )  # fmt: skip
    d_w_in = d_anchor = None
    if s.two_layers:
        d_w_in = outer_sum((x.q, d_z_q), (x.k, d_z_k), *[(x.v, d_z_v)] * s.own, precision=s.precision)
    if s.anchored:
        pairs = [(p.keys, d_r)] * s.probe + [(p.phi_v, d_target)] * s.own
        d_anchor = outer_sum((phi_q, d_y), *pairs, precision=s.precision)
    return d, d_w_in, d_first, d_anchor


class _FixedMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Setting, begins, q, k, v, log_eta, log_alpha, w_in, first, anchor):
        x, z = Inputs(q, k, v, log_eta, log_alpha), Sizes.of(q, first.size(-2), s.rows)
        p = _prepare(x, w_in, anchor, s, z)
        states = _chain(p, begins, first, s, z)
        r = _solve(p, states, s, z)
        y = torch.empty_like(q)
        launch(
            read.read, z.grid, q, p.keys, r.u, log_eta, log_alpha, w_in, anchor, states, y, *z.counts, **z.tile, **s.read()
        )  # fmt: skip
        ctx.s, ctx.begins = s, begins
        ctx.save_for_backward(*x, w_in, anchor, states, *(() if s.recompute else (*p, *r)))
        return y, states[:, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y, d_end):
        saved = ctx.saved_tensors
        x, (w_in, anchor, states), kept, s = Inputs(*saved[:5]), saved[5:8], saved[8:], ctx.s
        z = Sizes.of(x.q, states.size(-2), s.rows)
        p = _Prepared(*kept[:8]) if kept else _prepare(x, w_in, anchor, s, z)
        r = _Rows(*kept[8:]) if kept else _solve(p, states, s, z)
        d, *weights = _backward(x, p, r, states, w_in, anchor, ctx.begins, d_y.contiguous(), d_end, s, z)
        return None, None, *d, *weights


def fixed_memory(s: Setting, x: Inputs, w_in: Tensor | None, first: Tensor, anchor: Tensor | None, begins=None):
    """Write and read one memory along a piece of a stream.

    Args:
        x: contiguous; T a multiple of the tiles' rows.
        w_in: W2^T [N, d, h]; None: one layer.
        first: V^T at the start, V = W1 - A, [N, h, d].
        anchor: A^T, [N, h, d]; None: zero.
        begins: where streams start anew from `first`, [N, chunks + 1] int8; None: nowhere.

    Returns:
        y [B, T, H, d]; V^T after the last token.
    """
    any_weights = first.detach()
    return _FixedMemory.apply(
        s, begins, *x, any_weights if w_in is None else w_in, first, any_weights if anchor is None else anchor
    )
