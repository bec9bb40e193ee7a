"""Decay tables of a chunk by one product with a constant matrix and one exp.

Of log-rates logs [N, b, 2, C] (of eta / eta_max and of alpha) every table is exp of a sum; README.md has the notation.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.tables import ChunkTables, chunk_tables

SMALLEST_LOG_RATE = -80.0
"""Rates below exp(-80) count as that much: 1 / eta stays finite in fp32."""


class Tables(NamedTuple):
    """What writing takes."""

    E: Tensor | None  # Gamma a token back, strictly lower, [N, b, C, C]; with momentum there is no system
    D: Tensor | None  # diag(1 / eta), [N, b, C, C]
    f: Tensor  # 1, gamma_{t-1}, and how a row reaches the chunk's end: Gamma_Ct, or m_Ct and Theta_Ct; [N, b, C, 2 + parts]
    eta: Tensor  # [N, b, C, 1]
    end: Tensor  # what is kept of V, and of S: gamma_C, Theta_C0; [N, b, parts]
    m0_end: Tensor | None = None  # what S gives to V, [N, b, 1, 1]

    def at(self, i: int) -> Tables:
        """Those of one chunk."""
        return Tables(*(None if x is None else x[:, i : i + 1] for x in self))

    @property
    def kept_by_column(self) -> Tensor:
        """`end` for [.., r, parts, columns]."""
        return self.end[..., None, :, None]

    @property
    def kept_by_row(self) -> Tensor:
        """`end` for [.., parts, r, columns]."""
        return self.end[..., :, None, None]


class Consts:
    """Constant matrices for chunks of C tokens. erased: D is diag(1 / (alpha eta))."""

    def __init__(self, C: int, eta_max: float, erased: bool, dtype: torch.dtype, device: torch.device):
        new = dict(dtype=dtype, device=device)
        lower, eye, zero = torch.ones(C, C, **new).tril(), torch.eye(C, **new), torch.zeros(C, C, **new)
        self.C, self.later, self.onward = C, lower.mT - eye, lower.mT  # sums over j > t, and over j >= t
        below = lower - eye
        self._sizes = [C * C, C * C, 3 * C, C, 1]
        f = torch.stack([zero, below.mT, lower[-1:].mT - lower.mT], -1).view(C, 3 * C)
        none = torch.zeros(C, C * C, **new)
        of_eta = torch.cat([none, -torch.diag_embed(eye).view(C, C * C), zero.repeat(1, 3), eye, zero[:, :1]], 1)
        of_diagonal = -torch.diag_embed(eye).view(C, C * C) if erased else none
        of_alpha = torch.cat([_differences(below, below), of_diagonal, f, zero, lower[-1:].mT], 1)
        self._write = torch.cat([of_eta, of_alpha])
        diagonal = _masked(eye, -math.log(eta_max))
        rates = torch.cat(
            [torch.zeros(3 * C, **new), torch.full((C,), math.log(eta_max), **new), torch.zeros(1, **new)]
        )
        self._write_bias = torch.cat([_masked(below, 0.0), diagonal, rates])
        self._read = torch.cat([_differences(lower, lower), lower.mT], 1)
        self._read_bias = torch.cat([_masked(lower, 0.0), torch.zeros(C, **new)])

    def write(self, logs: Tensor) -> Tables:
        """The tables of writing, of log-rates [N, b, 2, C]."""
        N, b, _, C = logs.shape
        found = torch.addmm(self._write_bias, logs.view(N * b, 2 * C), self._write).exp_().unflatten(0, (N, b))
        E, D, f, eta, end = found.split(self._sizes, -1)
        square, column = lambda x: x.unflatten(-1, (C, C)), lambda x: x.unsqueeze(-1)
        return Tables(square(E), square(D), f.unflatten(-1, (C, 3)), column(eta), end)

    def read(self, logs: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gamma [N, b, C, C] and gamma [N, b, C, 1]; there is no reach of momentum."""
        N, b, _, C = logs.shape
        found = torch.addmm(self._read_bias, logs[:, :, 1].reshape(N * b, C), self._read).exp_().unflatten(0, (N, b))
        return found[..., : C * C].unflatten(-1, (C, C)), found[..., C * C :].unsqueeze(-1), None

    def rates(self, sums: int) -> Tensor:
        """[1 + 2 C] per set of sums, times `sums` sets -> d log eta, d log alpha [2 C]: one product.

        A set is <dV, V> at the chunk's end, then e_t, then f_t (README.md, "In phases").
        """
        return _rates(self.C, sums, self.later)


class MomentumTables(NamedTuple):
    """In the place of `Consts` with momentum: log-rates [N, b, 3, C], of theta too. Its tables are no exps of sums."""

    eta_max: float

    def of(self, logs: Tensor) -> ChunkTables:
        """For each of N b chunks. Differentiable."""
        eta, alpha, theta = logs.flatten(0, 1).unbind(1)
        return chunk_tables(self.eta_max * eta.exp(), alpha, theta)

    def write(self, logs: Tensor) -> Tables:
        """See `Consts`."""
        t, by_chunk = self.of(logs), lambda x: x.unflatten(0, logs.shape[:2])
        f = torch.cat([torch.ones_like(t.eta), torch.ones_like(t.eta), t.momentum.m_end, t.momentum.theta_end], -1)
        end = torch.cat([t.gamma_end, t.momentum.theta_all], -1).squeeze(-2)
        return Tables(None, None, by_chunk(f), by_chunk(t.eta), by_chunk(end), by_chunk(t.momentum.m0_end))

    def read(self, logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m [N, b, C, C], gamma and m0 [N, b, C, 1]."""
        t = self.of(logs)
        return tuple(x.unflatten(0, logs.shape[:2]) for x in (t.momentum.m, t.gamma, t.momentum.m0))


def tables_of(form: Form, like: Tensor) -> Consts | MomentumTables:
    """What makes the tables of a form, for tensors like this."""
    if form.momentum:
        return MomentumTables(form.eta_max)
    return _consts(form.C, form.eta_max, form.erased, like.dtype, like.device)


@functools.lru_cache(maxsize=16)
def _consts(C: int, eta_max: float, erased: bool, dtype: torch.dtype, device: torch.device) -> Consts:
    return Consts(C, eta_max, erased, dtype, device)


def _rates(C: int, sums: int, later: Tensor) -> Tensor:
    eye = torch.eye(C, dtype=later.dtype, device=later.device)
    zero = torch.zeros_like(eye)
    ends = torch.cat([zero[:, :1], torch.ones_like(eye[:, :1])])
    of_e, of_f = torch.cat([eye, -eye]), torch.cat([zero, later])
    return torch.cat([ends.repeat(1, sums), of_e.repeat(1, sums), of_f.repeat(1, sums)], 1)


def _differences(rows: Tensor, mask: Tensor) -> Tensor:
    """[C, C C]: log-rates -> total_t (of `rows`) - total_s, where the mask lets it."""
    C = rows.size(0)
    lower = torch.ones_like(rows).tril()
    return ((rows[:, None] - lower[None]) * mask[..., None]).reshape(C * C, C).mT


def _masked(mask: Tensor, value: float) -> Tensor:
    return torch.full_like(mask, value).masked_fill(mask == 0, -math.inf).view(-1)
