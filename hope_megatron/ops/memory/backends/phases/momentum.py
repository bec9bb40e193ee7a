"""Gradients of log-rates where there is momentum: through the tables, which are no exps of sums. All chunks at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.read import Read
from hope_megatron.ops.memory.backends.phases.tables import MomentumTables


class Layer(NamedTuple):
    """One layer of M_mem over all chunks of a segment, [N, b, ...]."""

    read: Read
    d_y: Tensor  # of what it read, [.., C, o]
    d_V: Tensor  # of V after the chunk, [.., o, i]
    d_S: Tensor
    d_r: Tensor  # [.., C, o]
    r: Tensor


def rate_gradients(c: MomentumTables, logs: Tensor, layers: tuple[Layer, ...]) -> Tensor:
    """Of log eta, log alpha and log theta, [N, b, 3, C]."""
    with torch.enable_grad():
        leaf = logs.detach().requires_grad_()
        t = c.of(leaf)
        m = t.momentum
        made = (t.gamma, m.m, m.m0, t.gamma_end, m.m_end, m.m0_end, m.theta_end, m.theta_all)
    total = [torch.zeros_like(x) for x in made]
    for layer in layers:
        for place, x in zip(total, _of_tables(layer)):
            place += x.reshape(place.shape)
    (found,) = torch.autograd.grad(made, leaf, total)
    found[:, :, 0] += sum((layer.d_r * layer.r).sum(-1) for layer in layers)  # rows = eta r
    return found


def _of_tables(layer: Layer) -> tuple[Tensor, ...]:
    """d gamma, m, m0, gamma_C, m_C, m_C0, Theta_C, Theta_C0 of one layer."""
    r, d_y, d_V, d_S = layer.read, layer.d_y, layer.d_V, layer.d_S
    whole = lambda a, b: (a * b).sum((-2, -1))  # noqa: E731
    reach = lambda d: -(r.rows * (r.keys @ d.mT)).sum(-1)  # noqa: E731
    return (
        (d_y * r.of_V).sum(-1), -(d_y @ r.rows.mT) * r.scores, (d_y * r.of_S).sum(-1), whole(d_V, r.V), reach(d_V),
        whole(d_V, r.S), reach(d_S), whole(d_S, r.S),
    )  # fmt: skip
