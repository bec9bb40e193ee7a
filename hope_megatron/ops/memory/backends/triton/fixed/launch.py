"""M_mem where a stream does not change its input layer: the phases in order, forward and backward, as one differentiable function.

Covers one-layer memories and `written_layers: output`: features of keys, values and queries are known for all chunks at once, and
what must go chunk by chunk is three products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.triton.fixed import chain as chains
from hope_megatron.ops.memory.backends.triton.fixed import gradients, prepare, read
from hope_megatron.ops.memory.backends.triton.launching import launch
from hope_megatron.ops.memory.backends.triton.sums import outer_sum


class Setting(NamedTuple):
    """What kernels are specialised on."""

    chunk: int  # tokens
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
    precision: str
    exact_inverse: bool = False

    @property
    def probe(self) -> bool:
        """Whether what is written depends on what the memory holds at the key."""
        return self.dgd or self.l2


class _Sizes(NamedTuple):
    grid: tuple[int, int]
    tokens: tuple[int, int, int]  # T, HEADS, chunks: arguments of every kernel
    tile: dict[str, int]


def _sizes(x: Tensor, h: int, s: Setting) -> _Sizes:
    B, T, H, d = x.shape
    chunks = -(-T // s.chunk)
    block = max(16, 1 << (s.chunk - 1).bit_length())
    return _Sizes((chunks, B * H), (T, H, chunks), dict(C=block, CHUNK=s.chunk, D=d, H=h))


class _Prepared(NamedTuple):
    keys: Tensor
    phi_v: Tensor
    base: Tensor
    target: Tensor
    probe: Tensor
    kept: Tensor
    write: Tensor
    inverse: Tensor


def _operands(like: Tensor, s: Setting) -> dict:
    """Options for scratch that only products read."""
    return dict(dtype=torch.bfloat16 if s.precision in ("bf16", "bf16_ptx") else torch.float32, device=like.device)


def _prepare(x: list[Tensor], w_in: Tensor, anchor: Tensor, s: Setting) -> _Prepared:
    q, k, v, log_eta, log_alpha = x
    (B, T, H, d), h, size, like = k.shape, anchor.size(-1), _sizes(k, anchor.size(-1), s), _operands(k, s)
    new = lambda *shape: torch.empty(shape, **like)  # noqa: E731
    p = _Prepared(
        keys=new(B, T, H, h) if s.two_layers else k,
        phi_v=new(B, T, H, h) if s.two_layers and s.own else v,
        base=new(B, T, H, d),
        target=new(B, T, H, d) if s.own else v,
        probe=torch.empty_like(log_eta),
        kept=k.new_empty(B * H, size.tokens[2], dtype=torch.float32),
        write=new(B, T, H, h),
        inverse=new(B * H, size.tokens[2], size.tile["C"], size.tile["C"]) if s.dgd else k,
    )
    launch(
        prepare.prepare, size.grid, 
        k, v, log_eta, log_alpha, w_in, anchor, *p, *size.tokens, **size.tile,
        TWO_LAYERS=s.two_layers, UNIT=s.unit, DGD=s.dgd, ERASED=s.erased, L2=s.l2, OWN=s.own, RESIDUAL=s.residual,
        ANCHORED=s.anchored, EXACT=s.exact_inverse, PRECISION=s.precision,
    )  # fmt: skip
    return p


def _chain(p: _Prepared, begins: Tensor | None, first: Tensor, s: Setting) -> Tensor:
    """V at every chunk's start and at the end: [N, chunks + 1, d, h]."""
    size = _sizes(p.base, first.size(-1), s)
    states = first.new_empty(len(first), size.tokens[2] + 1, *first.shape[1:])
    states[:, 0] = first
    launch(
        chains.chain, size.grid[1:], 
        *p[:2], p.write, p.base, p.target, p.probe, p.kept, _flags(begins, p), states, *size.tokens, **size.tile,
        PROBE=s.probe, OWN=s.own, UNIT_TARGET=s.unit_target, RESETS=begins is not None, PRECISION=s.precision,
    )  # fmt: skip
    return states


def _flags(begins: Tensor | None, p: _Prepared) -> Tensor:
    return p.kept if begins is None else begins


class _Rows(NamedTuple):
    u: Tensor
    target: Tensor
    target_scale: Tensor


def _rows(p: _Prepared, states: Tensor, s: Setting) -> _Rows:
    size = _sizes(p.base, states.size(-1), s)
    u = torch.empty_like(p.base)
    found = _Rows(u, torch.empty_like(u) if s.own else u, torch.empty_like(p.probe))
    launch(
        read.rows, size.grid, 
        p.keys, p.phi_v, p.inverse, p.base, p.target, p.probe, states, *found, *size.tokens, **size.tile,
        DGD=s.dgd, PROBE=s.probe, OWN=s.own, UNIT_TARGET=s.unit_target, PRECISION=s.precision,
    )  # fmt: skip
    return found


def _read(x: list[Tensor], p: _Prepared, r: _Rows, states: Tensor, w_in: Tensor, anchor: Tensor, s: Setting) -> Tensor:
    q, _, _, log_eta, log_alpha = x
    size, y = _sizes(q, states.size(-1), s), torch.empty_like(q)
    launch(
        read.read, size.grid, 
        q, p.keys, r.u, log_eta, log_alpha, w_in, anchor, states, y, *size.tokens, **size.tile,
        TWO_LAYERS=s.two_layers, ANCHORED=s.anchored, CAUSAL=s.causal, SKIP=s.skip, PRECISION=s.precision,
    )  # fmt: skip
    return y


def _backward(x, p, r, states, w_in, anchor, begins, d_y, d_states, s: Setting):
    """Gradients of x, w_in, the first state and A. d_states: of the states, [N, chunks + 1, d, h], all but the last zero."""
    q, k, v, log_eta, log_alpha = x
    (B, T, H, d), h = q.shape, states.size(-1)
    size, like = _sizes(q, h, s), _operands(q, s)
    args, wide = (*size.tokens,), dict(dtype=torch.float32, device=q.device)
    new = lambda width, **options: torch.empty(B, T, H, width, **(options or like))  # noqa: E731
    layers = dict(**size.tile, TWO_LAYERS=s.two_layers, ANCHORED=s.anchored, PRECISION=s.precision)

    phi_q, d_z_q = (new(h), new(h)) if s.two_layers else (q, q)
    d_q, rho = torch.empty_like(q), torch.empty_like(log_eta)
    launch(
        read.read_backward_queries, size.grid, 
        d_y, q, p.keys, r.u, log_eta, log_alpha, w_in, anchor, states, phi_q, d_z_q, d_q, rho, *args, **layers,
        CAUSAL=s.causal, SKIP=s.skip,
    )  # fmt: skip
    d_start = d_states[:, -2].clone()
    d_keys, d_r_read = new(h, **wide), new(d, **wide)
    launch(
        read.read_backward_writes, size.grid, 
        d_y, phi_q, p.keys, r.u, log_eta, log_alpha, p.inverse, d_keys, d_r_read, d_states, *args, **size.tile,
        DGD=s.dgd, CAUSAL=s.causal, PRECISION=s.precision,
    )  # fmt: skip
    d_states[:, -2] += d_start
    d_r, d_first = new(d), torch.empty_like(states[:, 0])
    launch(
        chains.chain_backward, size.grid[1:], 
        p.keys, p.phi_v, p.write, p.probe, p.kept, r.target, r.target_scale, d_r_read, _flags(begins, p), d_r, d_states,
        d_first, *args, **size.tile,
        PROBE=s.probe, OWN=s.own, UNIT_TARGET=s.unit_target, RESETS=begins is not None, PRECISION=s.precision,
    )  # fmt: skip
    d_v, d_target, d_z_v = torch.empty_like(v), d_r, d_r
    if s.own:
        d_target, d_z_v = new(d), new(h)
        launch(
        gradients.value_gradients, size.grid, 
            v, d_r, r.target, r.target_scale, w_in, anchor, states, d_target, d_z_v, d_v, *args, **layers,
            UNIT_TARGET=s.unit_target,
        )  # fmt: skip
    else:
        torch.neg(d_r, out=d_v) if d_r.dtype == d_v.dtype else d_v.copy_(d_r).neg_()
    d_k, d_z_k = torch.empty_like(k), new(h) if s.two_layers else k
    d_log_eta, d_log_alpha = torch.empty_like(log_eta), torch.empty_like(log_alpha)
    launch(
        gradients.key_gradients, size.grid, 
        k, p.keys, r.u, p.base, r.target, p.probe, log_eta, log_alpha, d_r, d_keys, rho, w_in, anchor, states, d_states,
        d_z_k, d_k, d_log_eta, d_log_alpha, *args, **layers,
        UNIT=s.unit, DGD=s.dgd, ERASED=s.erased, L2=s.l2, OWN=s.own, RESIDUAL=s.residual, CAUSAL=s.causal,
    )  # fmt: skip
    d_w_in = d_anchor = None
    if s.two_layers:
        pairs = [(d_z_q, q), (d_z_k, k)] + [(d_z_v, v)] * s.own
        d_w_in = outer_sum(*pairs, precision=s.precision)
    if s.anchored:
        pairs = [(d_y, phi_q)] + [(d_r, p.keys)] * s.probe + [(d_target, p.phi_v)] * s.own
        d_anchor = outer_sum(*pairs, precision=s.precision)
    return [d_q, d_k, d_v, d_log_eta, d_log_alpha], d_w_in, d_first, d_anchor


class _FixedMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Setting, begins, q, k, v, log_eta, log_alpha, w_in, first, anchor):
        x = [q, k, v, log_eta, log_alpha]
        p = _prepare(x, w_in, anchor, s)
        states = _chain(p, begins, first, s)
        r = _rows(p, states, s)
        y = _read(x, p, r, states, w_in, anchor, s)
        ctx.s, ctx.begins = s, begins
        ctx.save_for_backward(*x, w_in, anchor, states)
        ctx.p, ctx.r = p, r
        return y, states[:, -1].clone(), states[:, -2].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y, d_end, d_start):
        *x, w_in, anchor, states = ctx.saved_tensors
        d_states = torch.zeros_like(states)
        d_states[:, -1], d_states[:, -2] = d_end, d_start
        d_x, d_w_in, d_first, d_anchor = _backward(
            x, ctx.p, ctx.r, states, w_in, anchor, ctx.begins, d_y.contiguous(), d_states, ctx.s
        )
        return None, None, *d_x, d_w_in, d_first, d_anchor


def fixed_memory(s: Setting, x: list[Tensor], w_in: Tensor | None, first: Tensor, anchor: Tensor | None, begins=None):
    """Write and read one memory along a piece of a stream.

    Args:
        x: unit queries, keys, values [B, T, H, d]; log eta, log alpha [B, T, H]. Contiguous.
        w_in: W2 [N, h, d]; None: one layer.
        first: V = W1 - A at the start, [N, d, h].
        anchor: A, [N, d, h]; None: zero.
        begins: where streams start anew from `first`, [N, chunks] int8; None: nowhere.

    Returns:
        y [B, T, H, d]; V after the last token, and at the start of its chunk.
    """
    anchor_or_any = first.detach() if anchor is None else anchor
    return _FixedMemory.apply(s, begins, *x, first.detach() if w_in is None else w_in, first, anchor_or_any)
