"""Small agreements between all ranks, over gloo, so that they never wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class ControlGroup:
    """All ranks, for flags and small objects. On gloo it is the default group; beside NCCL it is a gloo group of its own."""

    def __init__(self) -> None:
        self.group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def maximum(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks: what every rank then acts on."""
        tensor = torch.tensor(values, dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank. The value travels as a pickle between processes of one job."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if any has an error: its own, or that of the lowest rank that has one."""
        errors = self.gather(error)
        if error is not None:
            raise error
        for other in errors:
            if other is not None:
                raise other
