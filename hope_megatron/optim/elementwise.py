"""AdamW and SGD: every element for itself, so the layout does not matter to the update, only to checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hope_megatron.optim.base import BoundOptimizer
from hope_megatron.optim.update import UpdateContext, adam_update, averaged_momentum


class AdamW(BoundOptimizer):
    """AdamW (arXiv 1711.05101) on matrices and vectors."""

    matrix_state = ("m1", "v")

    def matrix_update(self, context: UpdateContext) -> Tensor:
        return adam_update(context)


class SGD(BoundOptimizer):
    """Gradient descent with momentum as a moving average (not a sum: the step does not grow with the momentum).

    A group with an update period of n makes one step n times as long, by the sum of n gradients: its learning rate must be
    stable at n times its value.
    """

    grows_with_gradient = True
    matrix_state = ("m1",)
    vector_state = ("m1",)

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = False,
        vector_lr: float | None = None,
        weight_decay: float = 0.1,
    ) -> None:
        own = {"momentum": momentum, "nesterov": nesterov}
        super().__init__(params, lr, vector_lr=vector_lr, weight_decay=weight_decay, own=own)

    def matrix_update(self, context: UpdateContext) -> Tensor:
        return averaged_momentum(context)

    def vector_update(self, context: UpdateContext) -> Tensor:
        return averaged_momentum(context)
