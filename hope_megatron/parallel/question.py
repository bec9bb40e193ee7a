"""What all ranks decide a step by: one message between them, and the one time in a step that the host waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class UpdateQuestion:
    """Whether the update of a step may be made, asked once its gradient norm is known and before anything has changed.

    Attributes:
        norm: global gradient norm of the last step, before clipping; NaN if it is not finite.
        beside: values that the last step read together with the norm.
        accept: the answer to a norm. All ranks see the same numbers, so they answer alike.
        read_beside: makes those values, on the device or the host; none may be negative.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.norm = math.nan
        self.beside: list[float] = []
        self.accept: Callable[[float], bool] = math.isfinite
        self.read_beside: Callable[[], Sequence[Tensor | float]] = tuple
        self._group, self._device = group, device

    def ask(self, norm: Tensor | float) -> bool:
        """The answer. Collective: what a faulty rank has computed wrongly reaches the others, so that nobody decides alone."""
        values = [norm, *self.read_beside()]
        self.norm, *self.beside = largest(values, self._group, self._device)
        return self.accept(self.norm)


def largest(values: Sequence[Tensor | float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """The largest of each value over all ranks, and NaN where it is not a finite, non-negative number on some rank.

    Args:
        values: numbers of the host, or tensors of one element, on any device.
        group: ranks that call together.
        device: where the group communicates.
    """
    on_device = [x.detach().reshape(()).to(device, torch.float64) for x in values if isinstance(x, Tensor)]
    of_host = torch.tensor([x for x in values if not isinstance(x, Tensor)], dtype=torch.float64)
    numbers = torch.cat([*[x.unsqueeze(0) for x in on_device], of_host.to(device)])
    numbers = numbers.masked_fill(~torch.isfinite(numbers) | (numbers < 0), math.inf)  # larger than any other
    if dist.get_world_size(group) > 1:
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    found = [math.nan if math.isinf(value) else value for value in numbers.tolist()]
    tensors, host = iter(found[: len(on_device)]), iter(found[len(on_device) :])
    return [next(tensors) if isinstance(x, Tensor) else next(host) for x in values]
