"""Decay tables of a chunk and the triangular system of its Delta-Gradient-Descent writes.

Notation of README.md: gamma_t = prod alpha, Gamma_ts = gamma_t / gamma_s, Theta_ts = prod theta, m = Gamma Theta.
`_prev` shifts a table one token back (row t holds t - 1), `_end` is its last row as a column. N = B H.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MomentumTables(NamedTuple):
    """How a gradient of token s still moves the weights at token t."""

    m: Tensor  # [N, C, C]
    m_prev: Tensor  # [N, C, C]
    m_end: Tensor  # [N, C, 1]
    m0: Tensor  # reach of the incoming momentum S_0, [N, C, 1]
    m0_prev: Tensor  # [N, C, 1]
    m0_end: Tensor  # [N, 1, 1]
    theta_end: Tensor  # Theta_{C,s}, [N, C, 1]
    theta_all: Tensor  # Theta_{C,0}, [N, 1, 1]


class ChunkTables(NamedTuple):
    """All of a chunk that its memories share."""

    eta: Tensor  # [N, C, 1]
    erase: Tensor  # beta of the DGD term: eta, or alpha eta, [N, C, 1]
    erase_gamma_prev: Tensor  # [N, C, 1]
    gamma: Tensor  # decay since the chunk's start, [N, C, 1]
    gamma_end: Tensor  # [N, 1, 1]
    Gamma: Tensor  # decay from token s to t, lower triangular with diagonal, [N, C, C]
    Gamma_end: Tensor  # [N, C, 1]
    erase_Gamma_prev: Tensor  # strictly lower triangular, [N, C, C]
    momentum: MomentumTables | None

    def repeat(self, n: int) -> ChunkTables:
        """For a stack of n memories: every table n times in a row along the first dim."""
        if n == 1:
            return self
        repeat = lambda x: x.repeat_interleave(n, 0)  # noqa: E731
        momentum = self.momentum and MomentumTables(*map(repeat, self.momentum))
        # a stack never reads inside the chunk, so the two C x C tables stay as they are
        small = (repeat(x) for x in (self.eta, self.erase, self.erase_gamma_prev, self.gamma, self.gamma_end))
        return ChunkTables(*small, self.Gamma, repeat(self.Gamma_end), self.erase_Gamma_prev, momentum)


def chunk_tables(
    eta: Tensor, log_alpha: Tensor | None, log_theta: Tensor | None, *, decay_erased: bool = False
) -> ChunkTables:
    """Build the tables from per-token rates [N, C], in log space."""
    total = torch.zeros_like(eta) if log_alpha is None else log_alpha.cumsum(-1)
    total_prev = F.pad(total[:, :-1], (1, 0))
    gamma, Gamma = total.exp(), decay_matrix(total)
    momentum = None
    if log_theta is not None:
        speed = log_theta.cumsum(-1)
        Theta = decay_matrix(speed)
        m, m0 = torch.bmm(Gamma, Theta), torch.bmm(Gamma, speed.exp().unsqueeze(-1))
        momentum = MomentumTables(
            m=m,
            m_prev=F.pad(m[:, :-1], (0, 0, 1, 0)),
            m_end=m[:, -1, :, None],
            m0=m0,
            m0_prev=F.pad(m0[:, :-1], (0, 0, 1, 0)),
            m0_end=m0[:, -1:],
            theta_end=Theta[:, -1, :, None],
            theta_all=speed[:, -1, None, None].exp(),
        )
    erase = eta * log_alpha.exp() if decay_erased and log_alpha is not None else eta
    column = erase.unsqueeze(-1)
    return ChunkTables(
        eta=eta.unsqueeze(-1),
        erase=column,
        erase_gamma_prev=(erase * total_prev.exp()).unsqueeze(-1),
        gamma=gamma.unsqueeze(-1),
        gamma_end=gamma[:, -1, None, None],
        Gamma=Gamma,
        Gamma_end=Gamma[:, -1, :, None],
        erase_Gamma_prev=column * F.pad(Gamma[:, :-1], (0, 0, 1, 0)),
        momentum=momentum,
    )


def decay_matrix(total: Tensor) -> Tensor:
    """exp(total_t - total_s) on the lower triangle with its diagonal, 0 elsewhere: [N, C] -> [N, C, C].

    Masked before exp: above the diagonal the difference is positive and may overflow, and inf * 0 is NaN in backward.
    """
    C = total.size(-1)
    above = torch.ones(C, C, dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()


def gram(keys: Tensor) -> Tensor:
    """K K^T: [M, C, x] -> [M, C, C]."""
    return torch.bmm(keys, keys.mT)


def delta_inverse(grams: Tensor, tables: ChunkTables) -> Tensor:
    """(I + diag(beta) strictly_lower(Gamma_prev . K K^T))^-1 for grams K K^T, [N, C, C] or [N, n, C, C]."""
    decay = tables.erase_Gamma_prev if grams.dim() == 3 else tables.erase_Gamma_prev.unsqueeze(1)
    return lower_inverse(decay * grams)


def lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower triangular L [..., C, C], differentiable in two products."""
    return _Inverse.apply(lower)


class _Inverse(torch.autograd.Function):
    """`unit_lower_inverse` with a backward of two products, where autograd would solve again."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = unit_lower_inverse(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower triangular L [..., C, C]."""
    C = lower.size(-1)
    eye = torch.eye(C, dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)
