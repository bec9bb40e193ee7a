"""Decay tables of a chunk by one product with a constant matrix and one exp.

Of log-rates logs [N, b, 2, C] (of eta / eta_max and of alpha) every table is exp of a sum; README.md has the notation.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_LOG_RATE = -80.0
"""Rates below exp(-80) count as that much: 1 / eta stays finite in fp32."""


class Tables(NamedTuple):
    """What writing takes."""

    E: Tensor  # Gamma a token back, strictly lower, [N, b, C, C]
    D: Tensor  # diag(1 / eta), [N, b, C, C]
    f: Tensor  # 1, gamma_{t-1}, Gamma_Ct in the last dim, [N, b, C, 3]
    eta: Tensor  # [N, b, C, 1]
    end: Tensor  # gamma_C, [N, b, 1, 1]

    def at(self, i: int) -> Tables:
        """Those of one chunk."""
        return Tables(*(x[:, i : i + 1] for x in self))


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
        return Tables(square(E), square(D), f.unflatten(-1, (C, 3)), column(eta), column(end))

    def read(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """Gamma [N, b, C, C] and gamma [N, b, C, 1]."""
        N, b, _, C = logs.shape
        found = torch.addmm(self._read_bias, logs[:, :, 1].reshape(N * b, C), self._read).exp_().unflatten(0, (N, b))
        return found[..., : C * C].unflatten(-1, (C, C)), found[..., C * C :].unsqueeze(-1)

    def rates(self, sums: int) -> Tensor:
        """[1 + 2 C] per set of sums, times `sums` sets -> d log eta, d log alpha [2 C]: one product.

        A set is <dV, V> at the chunk's end, then e_t, then f_t (README.md, "In phases").
        """
        return _rates(self.C, sums, self.later)


@functools.lru_cache(maxsize=16)
def consts(C: int, eta_max: float, erased: bool, dtype: torch.dtype, device: torch.device) -> Consts:
    """Made once."""
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
