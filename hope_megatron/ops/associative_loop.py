"""The associative memory of ARMT, one sequence, head and token at a time: what `associative.py` is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.ops.associative import EPSILON, NU, AssociativeState


def features_loop(x: Tensor) -> Tensor:
    """DPFP of one vector [K] -> [F], at unit length."""
    signed = [*x, *(-x)]
    positive = [torch.relu(value) for value in signed]
    found = [positive[i] * positive[i - shift] for shift in range(1, NU + 1) for i in range(len(positive))]
    phi = torch.stack(found)
    return phi / torch.linalg.vector_norm(phi).clamp_min(1e-12)


def read_loop(q: Tensor, state: AssociativeState) -> Tensor:
    """As `read`."""
    B, T, H, _ = q.shape
    rows = [
        _held(features_loop(q[b, t, h]), state.matrix[b, h], state.counts[b, h])[0]
        for b in range(B)
        for t in range(T)
        for h in range(H)
    ]
    return torch.stack(rows).view(B, T, H, -1)


def write_loop(k: Tensor, v: Tensor, beta: Tensor, state: AssociativeState) -> AssociativeState:
    """As `write`: every memory token is compared with the state before all of them."""
    B, M, H, _ = k.shape
    matrices, counts = [], []
    for b in range(B):
        for h in range(H):
            A, z = before = state.matrix[b, h], state.counts[b, h]
            for m in range(M):
                phi = features_loop(k[b, m, h])
                held, overlap = _held(phi, *before)
                gamma = (1 - overlap / (phi @ phi + EPSILON)).clamp(0, 1).detach()
                A = A + beta[b, m, h] * torch.outer(v[b, m, h] - held, phi)
                z = z + gamma * phi
            matrices.append(A)
            counts.append(z)
    return AssociativeState(
        torch.stack(matrices).view_as(state.matrix),
        torch.stack(counts).view_as(state.counts),
    )


def _held(phi: Tensor, A: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    overlap = z @ phi + EPSILON
    return A @ phi / overlap, overlap
