"""Small agreements between all ranks, over gloo, so that they never wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from hope_megatron.parallel.messages import pack, unpack


class ControlGroup:
    """All ranks, for flags and small values. On gloo it is the default group; beside NCCL it is a gloo group of its own.

    Values travel as typed, authenticated messages (messages.py). Ranks that are not of the same attempt are refused at once.
    """

    def __init__(self) -> None:
        self.group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._sent = 0
        self.gather("here")

    def maximum(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all ranks: what every rank then acts on."""
        tensor = torch.tensor(values, dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank.

        Args:
            value: what messages.py can carry.

        Raises:
            ControlError: a message is not from a rank of this attempt.
        """
        number, self._sent = self._sent, self._sent + 1
        message = torch.frombuffer(bytearray(pack(value, self.rank, number)), dtype=torch.uint8)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = message.numel()
        dist.all_reduce(sizes, group=self.group)
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: message.numel()] = message
        messages = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(messages, padded, group=self.group)
        return [
            unpack(found[: int(sizes[rank])].numpy().tobytes(), rank, number) for rank, found in enumerate(messages)
        ]

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if any has an error: its own, or that of the lowest rank that has one."""
        errors = self.gather(error)
        if error is not None:
            raise error
        for other in errors:
            if other is not None:
                raise other
