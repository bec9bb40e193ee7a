"""The deep optimizers of Nested Learning (arXiv 2512.24695): DGD, Delta Momentum and Deep Momentum Gradient Descent.

Legend: W a matrix [M, N], G its gradient, G' = G / ||G||_F. All three multiply whole matrices, so every matrix is worked on by one
owner (`MatrixExchange.apply`). An optimizer does not see the layer's inputs x: the delta rule's x x^T is G'^T G' here, which is the
same for one token, whose gradient is an outer product (**choice**); over a batch it is a mean over input directions, weighted by
how much of the gradient they carry. Vectors take AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from hope_megatron.optim.base import BoundOptimizer, SharedSettings
from hope_megatron.optim.deep_memory import OBJECTIVES, learn_and_read, unit
from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.exchange import NewtonSchulz
from hope_megatron.optim.update import TINY, UPDATE_RMS, UpdateContext, averaged_momentum

OUTPUTS = ("identity", "newton_schulz")


def erase_along(memory: Tensor, key: Tensor) -> Tensor:
    """memory K^T K: what the memory answers in the input directions of the key. Both [..., M, N]."""
    return (memory @ key.mT) @ key


def matched(context: UpdateContext, update: Tensor) -> Tensor:
    """Each matrix scaled to the root mean square of AdamW's typical update, in place."""
    exchange = context.matrices
    return exchange.scale_(update, UPDATE_RMS / exchange.root_mean_squares(update).clamp_min_(TINY))


class DGD(BoundOptimizer):
    """Delta Gradient Descent: a weight is a memory that forgets along the input it learns from (eq. 88 with momentum).

        W <- W (I - lr delta G'^T G') - lr S              S = momentum S + (1 - momentum) G

    form `ema`: S is scaled to a root mean square of 0.2, so that nothing has the scale of the loss. form `paper`: S as it is;
    with momentum 0, nesterov off and delta 1 that is the equation to the letter, unit keys included. `weight_decay` is the
    retention alpha, in all directions.
    """

    whole_matrices = True
    matrix_state: tuple[str, ...] = ("m1",)

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        *,
        delta: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        form: str = "ema",
        **shared: Unpack[SharedSettings],
    ) -> None:
        _check_form(form)
        _check_delta(delta, 2.0)
        self.form, self.grows_with_gradient = form, form == "paper"
        super().__init__(params, lr, own={"momentum": momentum, "nesterov": nesterov, "delta": delta}, **shared)

    def matrix_update(self, context: UpdateContext) -> Tensor:
        group, erased = context.group, torch.zeros_like(context.grad)
        context.matrices.apply(
            lambda weight, grad: (erase_along(weight, unit(grad)),), [context.matrix_weights, context.grad], [erased]
        )
        update = averaged_momentum(context).clone()
        if self.form == "ema":
            update = matched(context, update)
        # the sum of n gradients is n steps' worth of descent, and of forgetting
        steps = context.period if self.grows_with_gradient else 1
        return update.add_(erased, alpha=group["delta"] * steps)


class DeltaMomentum(BoundOptimizer):
    """Momentum written by the delta rule (eqs. 48, 49), read through an output map sigma (eq. 52).

        m <- m (alpha I - delta K^T K) + w G              W <- W - lr sigma(m)          alpha = momentum

    The term with K erases from the momentum what it holds in the input directions of the new gradient, before that is
    written: a decay that depends on the data. form `ema`: K = G', w = 1 - alpha, and sigma(m) is scaled to a root mean
    square of 0.2. form `paper`: K = G and w = 1, to the letter with delta 1: stable only while ||G||^2 < 1 + alpha, which
    clipping at 1 ensures. `momentum_output` newton_schulz: sigma is the polar factor, Muon's; delta 0 leaves Muon.
    """

    orthogonalizes = True
    matrix_state: tuple[str, ...] = ("m1",)

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        *,
        momentum: float = 0.95,
        delta: float = 0.1,
        form: str = "ema",
        momentum_output: str = "identity",
        **shared: Unpack[SharedSettings],
    ) -> None:
        _check_form(form)
        _check_delta(delta, 1 + momentum)
        self.form, self.output = form, _checked_output(momentum_output)
        self.grows_with_gradient = form == "paper" and momentum_output == "identity"
        super().__init__(params, lr, own={"momentum": momentum, "delta": delta}, **shared)

    def matrix_update(self, context: UpdateContext) -> Tensor:
        alpha, delta, paper = context.group["momentum"], context.group["delta"], self.form == "paper"
        sigma = _output_map(self.output, self.ns)

        def write_and_read(memory: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            erased = erase_along(memory, grad if paper else unit(grad))
            memory = alpha * memory - delta * erased + (1.0 if paper else 1 - alpha) * grad
            return memory, sigma(memory)

        memory, update = context.state["m1"], torch.zeros_like(context.grad)
        context.matrices.apply(write_and_read, [memory, context.grad], [memory, update])
        return update if paper else matched(context, update)


class DMGD(BoundOptimizer):
    """Deep Momentum Gradient Descent (eqs. 50, 52): momentum is an MLP that is trained on gradients while it steps weights.

        m <- alpha m - inner_lr grad_m L(m; G)             W <- W - lr sigma(-m(G)), scaled to a root mean square of 0.2

    alpha is `inner_decay`, L is `inner_objective` and sigma is `momentum_output`. The MLP and its losses are in
    `deep_memory.py`; its two weights have the shape of the matrix, hence ZeRO shards them as it does Adam's moments. The
    update does not depend on the scale of the loss.
    """

    orthogonalizes = True
    matrix_state: tuple[str, ...] = ("memory_in", "memory_out")

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        *,
        inner_lr: float = 0.5,
        inner_decay: float = 0.99,
        inner_objective: str = "l2",
        momentum_output: str = "identity",
        **shared: Unpack[SharedSettings],
    ) -> None:
        if inner_objective not in OBJECTIVES:
            raise OptimError(f"inner_objective {inner_objective!r} is unknown; use 'l2' or 'dot'")
        if not 0 <= inner_decay <= 1 or not 0 < inner_lr <= 1:
            raise OptimError(
                f"DMGD needs inner_decay in [0, 1] and inner_lr in (0, 1], got inner_decay {inner_decay}, inner_lr {inner_lr}"
            )
        self.objective, self.output = inner_objective, _checked_output(momentum_output)
        super().__init__(params, lr, own={"inner_lr": inner_lr, "inner_decay": inner_decay}, **shared)

    def matrix_update(self, context: UpdateContext) -> Tensor:
        group, sigma = context.group, _output_map(self.output, self.ns)

        def train_and_read(inner: Tensor, outer: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            inner, outer, read = learn_and_read(
                inner, outer, grad, rate=group["inner_lr"], decay=group["inner_decay"], objective=self.objective
            )
            return inner, outer, sigma(-read)

        update = torch.zeros_like(context.grad)
        memory = [context.state[name] for name in self.matrix_state]
        context.matrices.apply(train_and_read, [*memory, context.grad], [*memory, update])
        return matched(context, update)


def _output_map(name: str, ns: NewtonSchulz) -> Callable[[Tensor], Tensor]:
    """sigma of eq. 52, on [..., M, N]; the result has the dtype of its argument."""
    if name == "identity":
        return lambda matrices: matrices
    return lambda matrices: ns(matrices).to(matrices.dtype)


def _checked_output(name: str) -> str:
    if name not in OUTPUTS:
        raise OptimError(f"momentum_output {name!r} is unknown; use 'identity' or 'newton_schulz'")
    return name


def _check_form(form: str) -> None:
    if form not in ("ema", "paper"):
        raise OptimError(f"form {form!r} is unknown; use 'ema' or 'paper'")


def _check_delta(delta: float, most: float) -> None:
    if not 0 <= delta <= most:
        raise OptimError(f"delta is {delta}; it must lie in [0, {most:g}], above which what is erased grows")
