"""Where numbers need more digits than the model computes in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32; what is float64 stays so, for tests that need its digits."""
    return x if x.dtype == torch.float64 else x.float()
