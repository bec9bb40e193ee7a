"""A micro-batch that gives every parameter a gradient and does nothing else.

What follows backward (accumulation, reduction, the update) does not ask how gradients came about. So it is rehearsed on the whole
model without the time that its layers would take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hope_megatron.model.language_model import ModelOutput


@contextlib.contextmanager
def cheap_passes(model: nn.Module) -> Iterator[None]:
    """Let the model's forward be one that costs nothing, for a while. Not under ZeRO-3, whose parameters are there inside of their
    modules alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(tokens: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> ModelOutput:
        losses = torch.zeros(tokens.shape, device=tokens.device)
        for parameter in parameters:  # backward meets them in the opposite order, as it does layers
            losses = _Touch.apply(losses, parameter)
        return ModelOutput(losses, None, None)

    with patch.object(model, "forward", forward):
        yield


class _Touch(torch.autograd.Function):
    """x, as if it depended on a parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        if hasattr(ctx.parameter, "main_grad") and not hasattr(ctx.parameter, "grad_added_to_main_grad"):
            return gradient, None  # the product that makes it has added it already
        return gradient, torch.empty_like(ctx.parameter, memory_format=torch.contiguous_format)
