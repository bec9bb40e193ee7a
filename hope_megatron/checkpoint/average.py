"""The average of several checkpoints of one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint


def average(checkpoints: Sequence[UnshardedCheckpoint], weights: Sequence[float]) -> UnshardedCheckpoint:
    """The weighted mean of the weights, summed in float64, with the progress and data position of the newest checkpoint.

    Optimizer states are not carried: a mean of momenta belongs to no trajectory. The probe is not either, for its logits
    are of other weights.

    Args:
        checkpoints: at least two of one architecture.
        weights: one for each; they are divided by their sum.

    Raises:
        ConversionError: the models differ, or the weights have no mean.
    """
    total = math.fsum(weights)
    if not all(math.isfinite(weight) for weight in weights) or total <= 0:
        raise ConversionError(f"weights {list(weights)} must be finite, with a positive sum")
    newest = max(checkpoints, key=lambda unsharded: unsharded.description["progress"]["step"])
    shapes = {name: parameter.shape for name, parameter in newest.parameters.items()}
    model = newest.config.model.model_copy(update={"name": ""})
    for unsharded in checkpoints:
        if (
            unsharded.config.model.model_copy(update={"name": ""}) != model
            or {name: parameter.shape for name, parameter in unsharded.parameters.items()} != shapes
        ):
            raise ConversionError(
                f"{unsharded.origin} is another model than {newest.origin}; only one architecture has a mean"
            )

    def read(name: str, state: str) -> Tensor:
        mean = torch.zeros(shapes[name], dtype=torch.float64)
        for unsharded, weight in zip(checkpoints, weights):
            mean += unsharded.read(name, state).double() * (weight / total)
        return mean.float()

    parts = [[unsharded.origin, weight / total] for unsharded, weight in zip(checkpoints, weights)]
    origins = ", ".join(unsharded.origin for unsharded in checkpoints)
    mean = replace(newest.weights_only(), origin=origins, read=read, extra_files=())
    mean.description.pop("heldout_loss", None)
    return replace(mean.with_history("average", parts=parts), origin=f"the average of {len(checkpoints)} checkpoints")
