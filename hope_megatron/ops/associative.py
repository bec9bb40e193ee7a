"""The associative memory of ARMT (Rodkin et al., arXiv 2407.04841): a matrix that memory tokens write at the end of a segment.

phi are the features of a key (DPFP, arXiv 2102.11174). For the memory tokens i of a segment, all at the state before it:

    v'_i = A phi(k_i) / (z . phi(k_i))                   what the key holds already
    A <- A + sum_i beta_i (v_i - v'_i) phi(k_i)^T        the delta rule
    z <- z + sum_i gamma_i phi(k_i)                      gamma_i = 1 - z . phi(k_i) / |phi(k_i)|^2: what is new about the key

and a token reads A phi(q) / (z . phi(q)). The features have unit length, gamma lies in [0, 1] and carries no gradient, and EPSILON
keeps an empty memory from dividing by 0, as in its authors' code. `associative_loop.py` says the same token by token.

Shapes: B sequences, T tokens, M memory tokens, H heads, K width of a key, F = 2 nu K features, V width of a value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NU = 3  # shifts of DPFP
EPSILON = 1e-5  # beside z . phi


class AssociativeState(NamedTuple):
    """What the memory of each head holds; zeros when a stream begins."""

    matrix: Tensor  # A [B, H, V, F]
    counts: Tensor  # z [B, H, F]


def num_features(key_size: int) -> int:
    """F of keys of this width."""
    return 2 * NU * key_size


def features(x: Tensor) -> Tensor:
    """DPFP at unit length: x [..., K] -> [..., F], none negative. Products of r = relu([x, -x]) with itself shifted by 1 to NU."""
    r = F.relu(torch.cat([x, -x], -1))
    return F.normalize(torch.cat([r * r.roll(shift, -1) for shift in range(1, NU + 1)], -1), dim=-1)


def read(q: Tensor, state: AssociativeState) -> Tensor:
    """Queries [B, T, H, K] -> values [B, T, H, V]."""
    return _held(features(q), state)[0]


def write(k: Tensor, v: Tensor, beta: Tensor, state: AssociativeState) -> AssociativeState:
    """The state after a segment.

    Args:
        k, v: of its memory tokens, [B, M, H, K] and [B, M, H, V].
        beta: how much of each is written, [B, M, H], from 0 to 1.
    """
    phi = features(k)
    held, overlap = _held(phi, state)
    gamma = (1 - overlap / (phi.square().sum(-1) + EPSILON)).clamp(0, 1).detach()
    return AssociativeState(
        state.matrix + torch.einsum("bmhv,bmhf->bhvf", beta.unsqueeze(-1) * (v - held), phi),
        state.counts + torch.einsum("bmh,bmhf->bhf", gamma, phi),
    )


def _held(phi: Tensor, state: AssociativeState) -> tuple[Tensor, Tensor]:
    """What features [B, T, H, F] find: values [B, T, H, V], and z . phi + EPSILON [B, T, H]."""
    overlap = torch.einsum("bhf,bthf->bth", state.counts, phi) + EPSILON
    return torch.einsum("bhvf,bthf->bthv", state.matrix, phi) / overlap.unsqueeze(-1), overlap
