"""Gradients summed over data-parallel ranks while backward still runs, at ZeRO-1 in bf16.

DeepSpeed's bf16 wrapper keeps whole float32 sums of gradients and reduces them after the last backward pass of a step, exposed.
Here neighbours in its flat vectors are buckets. In that last pass a bucket is added to its sums and sent as soon as all its
gradients are there, and in place: nothing is flattened and copied back. At the other stages DeepSpeed overlaps by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_megatron.config.matrices.layout import OVERLAPPED_NUMEL, in_portions
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.engine.gradient_sums import add_to_sums


def wants_overlap(parallel: ParallelConfig, device_type: str) -> bool:
    """Whether gradients are to be reduced under backward: `parallel.overlap_comm`, or where it is open, on GPUs."""
    return device_type == "cuda" if parallel.overlap_comm is None else parallel.overlap_comm


@dataclass
class _Bucket:
    """Neighbours in a group's flat vector."""

    group: int
    members: list[int]
    """Numbers of the parameters in their group."""
    flat: Tensor
    """Their float32 sums."""
    missing: int = 0
    sent: Tensor | None = None
    work: Any = None


class OverlappedReduction:
    """Reduces a step's gradients bucket by bucket, in the same order on all ranks: last layers first."""

    def __init__(self, model: nn.Module, deepspeed: Any, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        """dtype: in which gradients travel."""
        self._zero, self._deepspeed, self._process_group, self._dtype = deepspeed.optimizer, deepspeed, group, dtype
        self._positions = {id(parameter): i for i, parameter in enumerate(model.parameters())}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._buckets = self._make_buckets()
        self._next = 0
        for bucket in self._buckets:
            for i in bucket.members:
                parameter = self._zero.bf16_groups[bucket.group][i]
                parameter.register_post_accumulate_grad_hook(self._arrived(bucket))
                if hasattr(parameter, "main_grad"):  # then Megatron-Core gives it a stand-in for a gradient
                    parameter.grad_added_to_main_grad = False
        deepspeed.buffered_allreduce_fallback = self._finish
        self._forget()

    def _make_buckets(self) -> list[_Bucket]:
        zero, found = self._zero, []
        for group, sums in enumerate(zero.fp32_groups_gradients):
            last, flat = len(sums), zero.fp32_groups_gradients_flat[group]
            end = sum(x.numel() for x in sums)
            for sizes in in_portions([x.numel() for x in reversed(sums)], OVERLAPPED_NUMEL):
                first, start = last - len(sizes), end - sum(sizes)
                found.append(_Bucket(group, list(range(first, last)), flat.narrow(0, start, end - start)))
                last, end = first, start
        # backward comes to the first parameter of a bucket last
        return sorted(found, key=lambda bucket: -min(self._positions[id(x)] for x in self._parameters(bucket)))

    def _parameters(self, bucket: _Bucket) -> list[nn.Parameter]:
        return [self._zero.bf16_groups[bucket.group][i] for i in bucket.members]

    def _forget(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.missing, bucket.sent, bucket.work = len(bucket.members), None, None

    def _arrived(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not self._deepspeed.is_gradient_accumulation_boundary():
                return
            if bucket.work is not None:
                raise RuntimeError(
                    f"{self._names[id(parameter)]} got a second gradient in one backward pass, after the first was summed over "
                    "ranks; set parallel.overlap_comm=false"
                )
            bucket.missing -= 1
            while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
                self.send(self._buckets[self._next], hidden=self._next + 1 < len(self._buckets))

        return hook

    def send(self, bucket: _Bucket, *, hidden: bool) -> None:
        """Add its gradients to their sums, and let these travel. hidden: backward goes on meanwhile; rehearsals want to know."""
        add_to_sums(self._zero, bucket.group, bucket.members)
        bucket.sent = bucket.flat if self._dtype == bucket.flat.dtype else bucket.flat.to(self._dtype)
        bucket.work = dist.all_reduce(bucket.sent, group=self._process_group, async_op=True)
        self._next += 1

    def _finish(self, *args: Any, **kwargs: Any) -> None:
        """In the place of DeepSpeed's reduction: send what is left, wait for all, and make means of sums."""
        while self._next < len(self._buckets):
            self.send(self._buckets[self._next], hidden=False)
        share = 1.0 / dist.get_world_size(self._process_group)
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.sent.mul_(share)  # type: ignore[union-attr]
            if bucket.sent is not bucket.flat:
                bucket.flat.copy_(bucket.sent)  # type: ignore[arg-type]
        self._forget()
