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
    """Gradient descent with momentum as a moving average (not a sum: the step does not grow with the momentum)."""

    matrix_state = ("m1",)
    vector_state = ("m1",)

    def __init__(self, param_groups: list[dict[str, Any]], *, momentum: float = 0.95, nesterov: bool = False) -> None:
        super().__init__(param_groups, momentum=momentum, nesterov=nesterov)

    def matrix_update(self, context: UpdateContext) -> Tensor:
        return averaged_momentum(context)

    def vector_update(self, context: UpdateContext) -> Tensor:
        return averaged_momentum(context)
