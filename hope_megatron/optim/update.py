"""One update of one vector: what an optimizer is given for it, and AdamW's, which several share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from hope_megatron.runtime.step_parts import implementation

if TYPE_CHECKING:
    from hope_megatron.optim.exchange import MatrixExchange

# The size of AdamW's typical update. Orthogonal updates are scaled to it, so that one learning rate serves matrices and
# vectors (Moonlight, arXiv 2502.16982, section 2.2).
UPDATE_RMS = 0.2

TINY = 1e-30
"""Below any second moment in use: keeps 0 / 0 from becoming NaN in a matrix that never had a gradient, and in padding."""


class UpdateContext(NamedTuple):
    """What an optimizer makes an update of. All tensors are flat and as long as the vector.

    Attributes:
        grad: gradient (summed over the update period), float32.
        state: the optimizer's state tensors of this vector.
        group: the parameter group: rates and the optimizer's own settings.
        num_updates: number of this update, from 1.
        exchange: brings whole matrices together; None where nothing needs them.
        period: steps whose gradients `grad` is the sum of.
        weight: the weights that the update is for, after this update's weight decay; not to be written.
    """

    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]
    num_updates: int
    exchange: MatrixExchange | None = None
    weight: Tensor | None = None
    period: int = 1

    @property
    def matrices(self) -> MatrixExchange:
        """The exchange of an optimizer that needs whole matrices."""
        assert self.exchange is not None
        return self.exchange

    @property
    def matrix_weights(self) -> Tensor:
        """The weights, for an update that depends on them."""
        assert self.weight is not None
        return self.weight


def adam_update(context: UpdateContext) -> Tensor:
    """Adam's update with bias correction (weight decay is applied apart, as in AdamW)."""
    state, group = context.state, context.group
    update = implementation("adam")
    return update(context.grad, state["m1"], state["v"], group["betas"], group["eps"], context.num_updates)


def averaged_momentum(context: UpdateContext) -> Tensor:
    """Moving average of gradients, with one step of look-ahead if `nesterov`. Never an alias of the state's tensor in
    that case."""
    beta = context.group["momentum"]
    m1 = context.state["m1"].lerp_(context.grad, 1 - beta)
    return context.grad.lerp(m1, beta) if context.group["nesterov"] else m1
