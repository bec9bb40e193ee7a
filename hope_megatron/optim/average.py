"""An exponential average of weights, kept beside them.

It is elementwise, so the average of a shard is the shard of the average: ZeRO and tensor parallelism change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMA = "ema"
"""Name of the state tensor that holds the average."""


@torch.no_grad()
def update_average(average: Tensor, weights: Tensor, decay: float, step: int) -> None:
    """Take the weights after a step into the average, in place.

    average_t = sum_s decay^(t - s) w_s / sum_s decay^(t - s) over the steps s = 1..t: the initial weights have no part in it, and
    it needs no correction when it is read.

    Args:
        average: what it was; not read at step 1.
        weights: of the same shape and dtype.
        decay: in (0, 1).
        step: number of this step, from 1.
    """
    average.lerp_(weights, (1 - decay) / (1 - decay**step))
