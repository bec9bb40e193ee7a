"""M_mem where it descends on l2 (TTT-MLP; with momentum Titans): tables by PyTorch, the rest as one differentiable function."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.backends.triton.descent import backward, read, write
from hope_megatron.ops.memory.backends.triton.launching import constants, launch
from hope_megatron.ops.memory.backends.triton.sizes import Sizes, starts_of
from hope_megatron.ops.memory.rule import MemoryRule


class Setting(NamedTuple):
    """What kernels are specialised on."""

    rows: int  # of a chunk's tiles
    momentum: bool
    scaled: bool  # steps are normalised
    skip: bool  # y includes q
    precision: str

    @property
    def write(self) -> dict[str, Any]:
        return constants(self, "scaled", "precision")

    @property
    def read(self) -> dict[str, Any]:
        return constants(self, "momentum", "precision")


class Tables(NamedTuple):
    """Of all chunks, [N, chunks, ...], filled up to the rows of a tile with zeros. Without momentum m0 and reach_speed are gamma
    and reach."""

    eta: Tensor  # [.., C]
    m: Tensor  # [.., C, C]
    gamma: Tensor  # [.., C]
    m0: Tensor
    reach: Tensor
    reach_speed: Tensor
    ends: Tensor  # gamma_C, m_C0, Theta_C0 [.., 3]


class Layers(NamedTuple):
    """W^T [N, h, d], S^T, W2^T [N, d, h], S2^T (without momentum: W^T and W2^T again); of chunk starts [N, chunks + 1, ...]."""

    out: Tensor
    speed: Tensor
    inner: Tensor
    speed_in: Tensor


def tables_of(
    eta: Tensor | None, alpha: Tensor | None, theta: Tensor | None, rule: MemoryRule, rows: int, like: Tensor
) -> Tables:
    """Of logits [B, T, H] or None. like: [B, T, H, d]. Differentiable; few launches, where tables.py makes more than is needed."""
    B, T, H, _ = like.shape
    C, more, logits = rule.chunk_tokens, rows - rule.chunk_tokens, [x for x in (eta, alpha, theta) if x is not None]
    shape = (B * H * T // C, C)
    logs = list(F.logsigmoid(torch.stack(logits).transpose(2, 3).reshape(-1, *shape))) if logits else []
    rate = like.new_full(shape, rule.eta_max) if eta is None else rule.eta_max * logs.pop(0).exp()
    log_alpha = like.new_zeros(shape) if alpha is None else logs.pop(0)
    decays = torch.stack([log_alpha] if theta is None else [log_alpha, logs.pop(0) + math.log(rule.momentum_max)])
    total = decays.cumsum(-1)
    above = torch.ones(C, C, dtype=torch.bool, device=like.device).triu(1)
    reach = (
        (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(above, -math.inf).exp()
    )  # masked first: exp may overflow
    alone = total.exp()
    m, gamma = reach[0], alone[0]
    m0, speed, ends = gamma, m, [gamma[:, -1]] * 3
    if theta is not None:
        m, speed = torch.bmm(reach[0], reach[1]), reach[1]
        m0 = torch.bmm(reach[0], alone[1].unsqueeze(-1)).squeeze(-1)
        ends = [gamma[:, -1], m0[:, -1], alone[1, :, -1]]
    each = F.pad(torch.stack([rate, gamma, m0, m[:, -1], speed[:, -1]]), (0, more))
    found = Tables(each[0], F.pad(m, (0, more, 0, more)), *each[1:], torch.stack(ends, 1))
    return Tables(*(x.unflatten(0, (B * H, -1)).contiguous() for x in found))


class _Tape(NamedTuple):
    """As `descent_tape` leaves it."""

    phi: Tensor
    z: Tensor
    delta: Tensor
    e: Tensor
    slope: Tensor
    drive: Tensor
    drive_in: Tensor


def _tape(k: Tensor, v: Tensor, tables: Tables, starts: Layers, s: Setting, z: Sizes) -> _Tape:
    wide, narrow = lambda: z.rows(z.h, k), lambda: z.rows(z.d, k)
    t = _Tape(wide(), wide(), wide(), narrow(), torch.empty_like(tables.eta), narrow(), wide())
    launch(write.descent_tape, z.grid, k, v, tables.eta, starts.out, starts.inner, *t, *z.counts, **z.tile, **s.write)
    return t


class _Descent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Setting, begins, q, k, v, *weights: Tensor):
        tables, first = Tables(*weights[:7]), weights[7:]
        z = Sizes.of(q, first[0].size(-2), s.rows)
        starts = [starts_of(x, z.chunks) for x in first]
        starts = Layers(*starts) if s.momentum else Layers(starts[0], starts[0], starts[1], starts[1])
        scratch, y = k.new_empty(z.N, z.C, z.h), torch.empty_like(q)
        launch(
            write.descent_chain, (z.N,), k, v, tables.eta, tables.reach, tables.reach_speed, tables.ends, scratch, *starts,
            scratch if begins is None else begins, *z.counts, **z.tile, RESETS=begins is not None, **s.write | s.read,
        )  # fmt: skip
        t = _tape(k, v, tables, starts, s, z)
        launch(
            read.descent_read, z.grid, q, k, t.phi, t.drive, t.drive_in, *tables[1:4], *starts, y,
            *z.counts, **z.tile, **s.read, SKIP=s.skip,
        )  # fmt: skip
        ctx.s, ctx.begins = s, begins
        ctx.save_for_backward(q, k, v, *tables, *starts)
        return y, *(x[:, -1].clone() for x in (starts if s.momentum else starts[::2]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor, *d_ends: Tensor):
        s, begins, (q, k, v, *saved) = ctx.s, ctx.begins, ctx.saved_tensors
        tables, starts = Tables(*saved[:7]), Layers(*saved[7:])
        z = Sizes.of(q, starts.out.size(-2), s.rows)
        t = _tape(k, v, tables, starts, s, z)
        d_starts = [torch.empty_like(x) for x in (starts if s.momentum else starts[::2])]
        for d, end in zip(d_starts, d_ends):
            d[:, -1] = end
        first = [torch.zeros_like(d[:, 0]) for d in d_starts] if begins is not None else d_starts
        d_layers = Layers(*d_starts) if s.momentum else Layers(d_starts[0], d_starts[0], d_starts[1], d_starts[1])
        d_first = Layers(*first) if s.momentum else Layers(first[0], first[0], first[1], first[1])
        d, d_q, reads = _read_backward(d_y.contiguous(), q, k, tables, t, starts, d_layers, s, z)
        d_v = torch.empty_like(v)
        launch(
            backward.descent_chain_backward, (z.N,), k, *t[:5], t.drive, t.drive_in,
            tables.eta, tables.reach, tables.reach_speed, tables.ends, *starts, *reads, d_v, k.new_empty(z.N, z.C, z.h),
            d.eta, d.reach, d.reach_speed, d.ends, *d_layers, *d_first, d_v if begins is None else begins,
            *z.counts, **z.tile, RESETS=begins is not None, **s.write | s.read, warps=8,  # with 4 it spills
        )  # fmt: skip
        firsts = [x[:, 0] if begins is None else x[:, 0] + more for x, more in zip(d_starts, first)]
        if not s.momentum:  # those of gamma and reach stand for both
            d = d._replace(m0=torch.zeros_like(d.m0), reach_speed=torch.zeros_like(d.reach_speed))
        return None, None, d_q, reads[0], d_v, *d, *firsts


def _read_backward(d_y, q, k, tables: Tables, t: _Tape, starts: Layers, d_layers: Layers, s: Setting, z: Sizes):
    """Gradients of tables (as far as reads give them), of q; what reads give to k, phi, drive and drive_in."""
    d, d_q = Tables(*map(torch.empty_like, tables)), torch.empty_like(q)
    phi_q, d_z, d_k, d_phi, d_drive, d_drive_in = (z.rows(w, k) for w in (z.h, z.h, z.d, z.h, z.d, z.h))
    launch(
        read.descent_read_backward, z.grid, d_y, q, k, t.phi, t.drive, t.drive_in, *tables[1:4], *starts, phi_q, d_z, d_q,
        *d[1:4], *z.counts, **z.tile, **s.read, SKIP=s.skip,
    )  # fmt: skip
    for grad, x, keys, drive, *found, tile in (
        (d_y, phi_q, t.phi, t.drive, d_phi, d_drive, d_layers.out, d_layers.speed, z.tile),
        (d_z, q, k, t.drive_in, d_k, d_drive_in, d_layers.inner, d_layers.speed_in, z.tile | dict(D=z.h, H=z.d)),
    ):
        launch(
            read.descent_read_backward_writes,
            z.grid,
            grad,
            x,
            keys,
            drive,
            *tables[1:4],
            *found,
            *z.counts,
            **tile,
            **s.read,
        )
    return d, d_q, (d_k, d_phi, d_drive, d_drive_in)


def descending_memory(
    s: Setting, q: Tensor, k: Tensor, v: Tensor, tables: Tables, first: tuple[Tensor, ...], begins: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Write and read M_mem along a piece of a stream.

    Args:
        q, k, v: unit queries and keys, values [B, T, H, d], contiguous, T a multiple of the tiles' rows.
        first: the weights at the start, W^T [N, h, d] and W2^T [N, d, h], contiguous; with momentum W^T, S^T, W2^T, S2^T.
        begins: where streams start anew from `first`, [N, chunks + 1] int8; None: nowhere.

    Returns:
        y [B, T, H, d]; the weights after the last token, as `first`.
    """
    y, *ends = _Descent.apply(s, begins, q, k, v, *tables, *first)
    return y, ends
