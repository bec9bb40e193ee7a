"""Momentum as an associative memory of gradients: the optimizers of Nested Learning, section 4.4 (arXiv 2512.24695).

Research options on plain float32 parameters in one process (or with replicated data-parallel gradients); they know
neither ZeRO nor tensor parallelism. g is the gradient [M, N] of a matrix; other shapes are seen as [..., M, N], vectors
as [1, N].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hope_megatron.ops.newton_schulz import newton_schulz
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


class DeepMomentum(torch.optim.Optimizer):
    """Deep Momentum Gradient Descent (eqs. 50, 52): momentum is an MLP that is trained on gradients while it steps
    weights.

        u = g / ||g||_F * sqrt(M)          m <- alpha m - inner_lr * grad_m L2(m; u)          W <- W + lr sigma(m(u))

    **Choices**, since the paper leaves model and loss open and its target 1 has the shape of no weight: the memory maps
    each row of u to a row, m(x) = x A + silu(x B) C with A [N, N], B [N, hidden], C [hidden, N]. Its values are the
    descent direction, so the inner loss is 1/2 ||m(u) + u||^2 ("l2") or <m(u), u> ("dot"), averaged over rows. A starts
    as -I and C as zero, so that the first step is normalised gradient descent; alpha decays B and C, and A towards -I.
    The update is independent of the scale of the loss. `output="newton_schulz"` is the sigma of eq. 52.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        hidden: int = 16,
        alpha: float = 0.99,
        inner_lr: float = 0.1,
        objective: str = "l2",
        output: str = "identity",
        seed: int = 0,
    ) -> None:
        if objective not in ("l2", "dot") or output not in ("identity", "newton_schulz"):
            raise OptimError(
                f"DeepMomentum has objectives 'l2', 'dot' and outputs 'identity', 'newton_schulz', not {objective!r}, {output!r}"
            )
        self.objective, self.output, self.hidden = objective, output, hidden
        self._generator = torch.Generator().manual_seed(seed)
        super().__init__(params, {"lr": lr, "alpha": alpha, "inner_lr": inner_lr})

    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise OptimError("DeepMomentum takes no closure: compute the gradients before step()")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[param], _as_matrices(param.grad.detach())
        if not state:
            self._init_memory(state, grad)
        keys = unit(grad) * grad.shape[-2] ** 0.5
        self._learn(state, keys, group)
        with torch.no_grad():
            update = _read(state, keys)
            if self.output == "newton_schulz":
                update = newton_schulz(update)
            param.add_(update.reshape(param.shape), alpha=group["lr"])

    def _init_memory(self, state: dict[str, Any], grad: Tensor) -> None:
        lead, cols = grad.shape[:-2], grad.shape[-1]
        state["skip"] = -torch.eye(cols, device=grad.device).expand(*lead, cols, cols).clone()
        state["inner"] = (torch.randn(*lead, cols, self.hidden, generator=self._generator) / cols**0.5).to(grad.device)
        state["outer"] = torch.zeros(*lead, self.hidden, cols, device=grad.device)

    def _learn(self, state: dict[str, Any], keys: Tensor, group: dict[str, Any]) -> None:
        names = ("skip", "inner", "outer")
        weights = [state[name].requires_grad_() for name in names]
        with torch.enable_grad():
            values = _read(state, keys)
            losses = (values + keys).square() / 2 if self.objective == "l2" else values * keys
            gradients = torch.autograd.grad(losses.sum() / keys.shape[-2], weights)
        rest = {"skip": -torch.eye(keys.shape[-1], device=keys.device)}
        for name, weight, gradient in zip(names, weights, gradients):
            weight.requires_grad_(False)
            weight.lerp_(rest.get(name, torch.zeros_like(weight)).expand_as(weight), 1 - group["alpha"])
            weight.sub_(gradient, alpha=group["inner_lr"])


def _read(state: dict[str, Any], keys: Tensor) -> Tensor:
    return keys @ state["skip"] + nn.functional.silu(keys @ state["inner"]) @ state["outer"]
