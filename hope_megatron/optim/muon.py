"""Muon and AdaMuon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hope_megatron.optim.base import UPDATE_RMS, BoundOptimizer
from hope_megatron.optim.exchange import Job, MatrixExchange, NewtonSchulz

_TINY = 1e-30


class Muon(BoundOptimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan, 2024), scaled by 0.2 sqrt(max(M, N)) as in Moonlight (arXiv
    2502.16982): the RMS of an orthogonal M x N matrix times that is 0.2."""

    orthogonalizes = True
    matrix_state: tuple[str, ...] = ("m1",)

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns: NewtonSchulz | None = None,
    ) -> None:
        super().__init__(param_groups, betas=betas, eps=eps, ns=ns, momentum=momentum, nesterov=nesterov)

    def matrix_update(
        self,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        num_updates: int,
        exchange: MatrixExchange | None,
    ) -> Tensor:
        assert exchange is not None
        update = torch.zeros_like(grad)
        exchange.orthogonalize(num_updates, Job(averaged_momentum(grad, state, group), update))
        return exchange.scale_(update, UPDATE_RMS * exchange.shapes(update.device).amax(1).sqrt())


class AdaMuon(Muon):
    """Muon with a second moment of the orthogonalised update (arXiv 2507.11005): O = NS(sign(M)), V of O, U = O /
    (sqrt(V) + eps), scaled to RMS 0.2 per matrix. Independent of the scale of the gradient."""

    matrix_state: tuple[str, ...] = ("m1", "v")

    def matrix_update(
        self,
        grad: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        num_updates: int,
        exchange: MatrixExchange | None,
    ) -> Tensor:
        assert exchange is not None
        update = torch.zeros_like(grad)
        exchange.orthogonalize(num_updates, Job(averaged_momentum(grad, state, group).sign(), update))
        beta2 = group["betas"][1]
        v = state["v"].mul_(beta2).addcmul_(update, update, value=1 - beta2)
        update.div_(v.sqrt().add_(group["eps"]))
        return exchange.scale_(update, UPDATE_RMS / exchange.root_mean_squares(update).clamp_min_(_TINY))


def averaged_momentum(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Moving average of gradients, with one step of look-ahead if `nesterov`. Never an alias of the state's tensor in
    that case."""
    beta = group["momentum"]
    m1 = state["m1"].lerp_(grad, 1 - beta)
    return grad.lerp(m1, beta) if group["nesterov"] else m1
