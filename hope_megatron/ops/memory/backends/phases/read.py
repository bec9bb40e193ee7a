"""Reads of M_mem, all chunks at once, and their backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.arithmetic import Products


class Read(NamedTuple):
    """y_t = W_t x_t of every token, with W_t as written so far. Leading dims [N, b]."""

    x: Tensor  # [.., C, i]
    keys: Tensor  # [.., C, i]
    rows: Tensor  # [.., C, o]
    V: Tensor  # [.., o, i] at the chunk's start
    A: Tensor  # [.., o, i]
    reach: Tensor  # of a row to a later token: Gamma, with momentum m; [.., C, C]
    gamma: Tensor  # [.., C, 1]
    m0: Tensor | None  # reach of the momentum at the chunk's start, [.., C, 1]
    S: Tensor | None  # that momentum
    scores: Tensor  # x keys^T
    of_A: Tensor  # A x
    of_V: Tensor  # V x
    of_S: Tensor | None
    y: Tensor


def read(p: Products, x, keys, rows, V, A, reach, gamma, m0=None, S=None) -> Read:
    """y = A x + gamma V x [+ m0 S x] - (reach . x keys^T) rows."""
    scores, of_A, of_V, of_S = p.mm(x, keys.mT), p.mm(x, A.mT), p.mm(x, V.mT), None
    y = torch.addcmul(of_A, gamma, of_V)
    if S is not None:
        of_S = p.mm(x, S.mT)
        y.addcmul_(m0, of_S)
    p.add(y, reach * scores, rows, alpha=-1)
    return Read(x, keys, rows, V, A, reach, gamma, m0, S, scores, of_A, of_V, of_S, y)


class ReadGradients(NamedTuple):
    """Gradients of what `read` was given."""

    x: Tensor
    keys: Tensor
    rows: Tensor
    V: Tensor
    A: Tensor
    S: Tensor | None
    rho: Tensor
    """Of log gamma_t through all that decayed: <d_y, y - A x>, [.., C]."""


def read_backward(p: Products, r: Read, d_y: Tensor) -> ReadGradients:
    """The gradients, d_y [.., C, o]. Those of the tables: `rho`, or momentum.py."""
    decayed = d_y * r.gamma
    d_rows = p.mm((r.reach * r.scores).mT, d_y).neg_()
    d_scores = p.mm(d_y, r.rows.mT).mul_(r.reach).neg_()
    d_x, d_keys = p.mm(d_scores, r.keys), p.mm(d_scores.mT, r.x)
    d_V, d_A, d_S = p.mm(decayed.mT, r.x), p.mm(d_y.mT, r.x), None
    p.add(d_x, decayed, r.V)
    p.add(d_x, d_y, r.A)
    if r.S is not None:
        moved = d_y * r.m0
        d_S = p.mm(moved.mT, r.x)
        p.add(d_x, moved, r.S)
    return ReadGradients(d_x, d_keys, d_rows, d_V, d_A, d_S, (d_y * (r.y - r.of_A)).sum(-1))
