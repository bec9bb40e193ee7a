"""Delta Momentum with feature maps and preconditioners of gradients (Nested Learning, arXiv 2512.24695, eq. 51).

For plain float32 parameters in one process, or with replicated data-parallel gradients: no ZeRO, no tensor parallelism. What
`optim.name` knows is in `deep.py`. g is the gradient [M, N] of a matrix; other shapes are seen as [..., M, N], vectors
as [1, N].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hope_megatron.optim.deep_memory import unit
from hope_megatron.optim.errors import OptimError

TensorMap = Callable[[Tensor], Tensor]


def _as_matrices(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor


class DeltaMomentum(torch.optim.Optimizer):
    """Momentum written by the delta rule (eqs. 48, 49), with feature maps (eq. 51) and output maps (eq. 52):

        m <- m (alpha I - delta g^T g) - lr P phi(g)            W <- W + sigma(m)

    The term with g^T g erases from the memory what it holds in the direction of the new gradient, before that is
    written: a decay that depends on the data. delta = 0 leaves heavy-ball momentum; delta = 0 with sigma =
    Newton-Schulz is Muon with sums.

    literal: g^T g as in the paper, stable only while ||g||^2 < 1 + alpha. Otherwise the erased direction is that of g / ||g||
    (**choice**), which is stable for delta in [0, 1 + alpha] whatever the scale of the loss. `preconditioner`,
    `feature_map` and `output_map` are P, phi and sigma on [..., M, N] (default: identity). With an output map the step
    no longer has the size of lr: pass one that contains its scale.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        alpha: float = 0.9,
        delta: float = 1.0,
        literal: bool = False,
        preconditioner: TensorMap | None = None,
        feature_map: TensorMap | None = None,
        output_map: TensorMap | None = None,
    ) -> None:
        if not 0 <= alpha <= 1 or delta < 0:
            raise OptimError(f"DeltaMomentum needs alpha in [0, 1] and delta >= 0, got alpha {alpha}, delta {delta}")
        self.preconditioner, self.feature_map, self.output_map = preconditioner, feature_map, output_map
        super().__init__(params, {"lr": lr, "alpha": alpha, "delta": delta, "literal": literal})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise OptimError("DeltaMomentum takes no closure: compute the gradients before step()")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[param], _as_matrices(param.grad)
        if not state:
            state["memory"] = torch.zeros_like(grad)
        memory = state["memory"]
        key = grad if group["literal"] else unit(grad)
        erased = (memory @ key.mT) @ key
        written = self.feature_map(grad) if self.feature_map else grad
        if self.preconditioner:
            written = self.preconditioner(written)
        memory.mul_(group["alpha"]).sub_(erased, alpha=group["delta"]).sub_(written, alpha=group["lr"])
        update = self.output_map(memory) if self.output_map else memory
        param.add_(update.reshape(param.shape))
