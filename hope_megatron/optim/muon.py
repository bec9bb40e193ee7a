"""Muon and AdaMuon."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from hope_megatron.optim.base import BoundOptimizer, SharedSettings
from hope_megatron.optim.exchange import Job
from hope_megatron.optim.update import TINY, UPDATE_RMS, UpdateContext, averaged_momentum


class Muon(BoundOptimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan, 2024), scaled by 0.2 sqrt(max(M, N)) as in Moonlight (arXiv
    2502.16982): the RMS of an orthogonal M x N matrix times that is 0.2."""

    orthogonalizes = True
    matrix_state: tuple[str, ...] = ("m1",)

    def __init__(
        self,
        params: Any,
        lr: float = 8e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        **shared: Unpack[SharedSettings],
    ) -> None:
        super().__init__(params, lr, own={"momentum": momentum, "nesterov": nesterov}, **shared)

    def matrix_update(self, context: UpdateContext) -> Tensor:
        exchange = context.matrices
        update = torch.zeros_like(context.grad)
        exchange.orthogonalize(context.num_updates, Job(averaged_momentum(context), update))
        return exchange.scale_(update, UPDATE_RMS * exchange.shapes(update.device).amax(1).sqrt())


class AdaMuon(Muon):
    """Muon with a second moment of the orthogonalised update (arXiv 2507.11005): O = NS(sign(M)), V of O, U = O /
    (sqrt(V) + eps), scaled to RMS 0.2 per matrix. Independent of the scale of the gradient."""

    matrix_state: tuple[str, ...] = ("m1", "v")

    def matrix_update(self, context: UpdateContext) -> Tensor:
        exchange = context.matrices
        update = torch.zeros_like(context.grad)
        exchange.orthogonalize(context.num_updates, Job(averaged_momentum(context).sign(), update))
        beta2 = context.group["betas"][1]
        v = context.state["v"].mul_(beta2).addcmul_(update, update, value=1 - beta2)
        update.div_(v.sqrt().add_(context.group["eps"]))
        return exchange.scale_(update, UPDATE_RMS / exchange.root_mean_squares(update).clamp_min_(TINY))
