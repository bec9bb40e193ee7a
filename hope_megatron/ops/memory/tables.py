"""Decay tables of a chunk and the triangular system of its Delta-Gradient-Descent writes.

Notation of README.md: gamma_t = prod alpha, Gamma_ts = gamma_t / gamma_s, Theta_ts = prod theta, m = Gamma Theta.
A trailing minus (here `_prev`) shifts a table one token back: row t holds t - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ChunkTables:
    """All of a chunk that its memories share. Leading dims [B, H, 1]: the 1 broadcasts over memories."""

    eta: Tensor  # [B, H, 1, C]
    gamma: Tensor  # decay since the chunk's start, [B, H, 1, C]
    gamma_prev: Tensor
    Gamma: Tensor  # decay from token s to t, lower triangular with diagonal, [B, H, 1, C, C]
    Gamma_prev: Tensor  # strictly lower triangular
    momentum: MomentumTables | None


@dataclass(frozen=True)
class MomentumTables:
    """How a gradient of token s still moves the weights at token t."""

    theta_end: Tensor  # Theta_{C,s}, [B, H, 1, C]
    theta_all: Tensor  # Theta_{C,0}, [B, H, 1]
    m: Tensor  # [B, H, 1, C, C]
    m_prev: Tensor
    m0: Tensor  # reach of the incoming momentum S_0, [B, H, 1, C]
    m0_prev: Tensor


def chunk_tables(eta: Tensor, log_alpha: Tensor | None, log_theta: Tensor | None) -> ChunkTables:
    """Build the tables from per-token rates [B, H, C], in log space."""
    eta = eta.unsqueeze(2)
    log_alpha = torch.zeros_like(eta) if log_alpha is None else log_alpha.unsqueeze(2)
    total = log_alpha.cumsum(-1)
    total_prev = F.pad(total[..., :-1], (1, 0))
    Gamma = _decay_matrix(total, total)
    Gamma_prev = _decay_matrix(total_prev, total, strict=True)
    momentum = None
    if log_theta is not None:
        speed = log_theta.unsqueeze(2).cumsum(-1)
        Theta = _decay_matrix(speed, speed)
        m = Gamma @ Theta
        m0 = (Gamma @ speed.exp().unsqueeze(-1)).squeeze(-1)
        momentum = MomentumTables(
            theta_end=Theta[..., -1, :],
            theta_all=speed[..., -1].exp(),
            m=m,
            m_prev=F.pad(m[..., :-1, :], (0, 0, 1, 0)),
            m0=m0,
            m0_prev=F.pad(m0[..., :-1], (1, 0)),
        )
    return ChunkTables(eta, total.exp(), total_prev.exp(), Gamma, Gamma_prev, momentum)


def _decay_matrix(to: Tensor, since: Tensor, *, strict: bool = False) -> Tensor:
    """exp(to_t - since_s) on the lower triangle, 0 elsewhere.

    Masked before exp: above the diagonal the difference is positive and may overflow, and inf * 0 is NaN in backward.
    """
    C = to.size(-1)
    keep = torch.ones(C, C, dtype=torch.bool, device=to.device).tril(-1 if strict else 0)
    difference = to.unsqueeze(-1) - since.unsqueeze(-2)
    return difference.masked_fill(~keep, -torch.inf).exp()


def delta_inverse(keys: Tensor, tables: ChunkTables) -> Tensor:
    """(I + diag(eta) Gamma_prev . K K^T)^-1, unit lower triangular. keys [B, H, n or 1, C, x] -> [B, H, n or 1, C, C]."""
    C = keys.size(-2)
    system = tables.eta.unsqueeze(-1) * tables.Gamma_prev * (keys @ keys.mT)
    eye = torch.eye(C, dtype=keys.dtype, device=keys.device)
    return torch.linalg.solve_triangular(eye + system, eye.expand_as(system), upper=False, unitriangular=True)
