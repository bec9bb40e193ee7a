"""M3, Multi-scale Momentum Muon (Nested Learning, arXiv 2512.24695, algorithm 1)."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from hope_megatron.optim.base import BoundOptimizer, SharedSettings
from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.exchange import Job
from hope_megatron.optim.update import TINY, UPDATE_RMS, UpdateContext


class M3(BoundOptimizer):
    """Fast momentum every step, slow momentum every `slow_period_steps` updates, both orthogonalised.

    `form="paper"`, algorithm 1 to the letter, with sums that never forget (f = slow period, a = slow weight):

        every update:    M1 += beta1 g       V += beta2 g^2      O1 = NS(M1)
        every f updates: M2 += beta3 * (sum of the last f g)     O2 = NS(M2), used from the next update on
        Theta -= lr (O1 + a O2) / (sqrt(V) + eps)

    `form="ema"`, the practical form: the sums are moving averages, the denominator is relative to the matrix, and the
    update of each matrix is scaled to RMS 0.2, so that neither the scale of the loss nor clipping changes it:

        U = (O1 + a O2) / (sqrt(V) + floor * rms(sqrt V))        Theta -= lr * 0.2 U / rms(U)

    In a group with an update period, g is the sum of the gradients of the period: the paper's form divides by a sqrt(V)
    that has grown as much, while O1 and O2 have no scale, so its update is that much smaller. The ema form has no scale.

    Bias corrections would cancel and are left out. The floor bounds the gain of entries that hardly ever see a
    gradient, which Newton-Schulz does not leave small. In this form the slow clocks of different parameters are offset
    against each other (`stagger`), so that every step has about the same work; a parameter's first slow period may be
    shorter for it.
    """

    orthogonalizes = True
    matrix_state = ("m1", "v", "m2", "o2")

    def __init__(
        self,
        params: Any,
        lr: float = 8e-3,
        *,
        slow_beta: float = 0.9,
        slow_period_steps: int = 10,
        slow_weight: float = 0.5,
        form: str = "ema",
        denominator_floor: float = 0.1,
        stagger: bool = True,
        **shared: Unpack[SharedSettings],
    ) -> None:
        if form not in ("ema", "paper"):
            raise OptimError(f"M3 form {form!r} is unknown; use 'ema' or 'paper'")
        if slow_period_steps < 1:
            raise OptimError(f"slow_period_steps is {slow_period_steps}; it must be at least 1")
        if form == "ema" and denominator_floor <= 0:
            raise OptimError(f"denominator_floor is {denominator_floor}; it must be positive")
        self.form, self.stagger = form, stagger and form == "ema"
        own = {"slow_beta": slow_beta, "slow_period_steps": slow_period_steps, "slow_weight": slow_weight}
        super().__init__(params, lr, own=own | {"denominator_floor": denominator_floor}, **shared)

    def slow_period(self, group: dict[str, Any]) -> int:
        return group["slow_period_steps"] if self.stagger else 1

    def matrix_update(self, context: UpdateContext) -> Tensor:
        state, group, exchange, num_updates = context.state, context.group, context.matrices, context.num_updates
        self._add_gradient(context)
        fast = Job(state["m1"], out=torch.zeros_like(context.grad))
        update = state["o2"] * group["slow_weight"]  # that of the last period: the tick below is for the next update
        ending = self._phase_that_ends(num_updates, group)
        exchange.orthogonalize(
            num_updates, fast, *([Job(state["m2"], state["o2"], ending)] if ending is not None else [])
        )
        update.add_(fast.out)
        denominator = state["v"].sqrt()
        if self.form == "paper":
            update.div_(denominator.add_(group["eps"]))
        else:
            floor = exchange.means(state["v"]).sqrt_().mul_(group["denominator_floor"])
            update.div_(exchange.add_(denominator, floor).clamp_min_(TINY))
            exchange.scale_(update, UPDATE_RMS / exchange.root_mean_squares(update).clamp_min_(TINY))
        return update

    def _add_gradient(self, context: UpdateContext) -> None:
        grad, state, group = context.grad, context.state, context.group
        (beta1, beta2), beta3 = group["betas"], group["slow_beta"]
        # M2 needs no buffer for the running sum: adding beta3 g at every update is the same, and the moving average
        # decays at the first update of a period.
        if self.form == "paper":
            state["m1"].add_(grad, alpha=beta1)
            state["v"].addcmul_(grad, grad, value=beta2)
            state["m2"].add_(grad, alpha=beta3)
            return
        state["m1"].lerp_(grad, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        phase = self._phase_that_ends(context.num_updates - 1, group)
        if phase is not None:
            context.matrices.scale_phase_(state["m2"], beta3, phase)
        state["m2"].add_(grad, alpha=(1 - beta3) / group["slow_period_steps"])

    def _phase_that_ends(self, num_updates: int, group: dict[str, Any]) -> int | None:
        """The phase p whose slow period ends with this update, (num_updates + p) % f == 0; None if there is none."""
        phase = -num_updates % group["slow_period_steps"]
        return phase if self.stagger or phase == 0 else None
