"""Sums over micro-batches in one fixed order, whatever number of ranks computes them: a balanced binary tree.

The usual all-reduce adds in an order that depends on the number of ranks, and gives other bits for 1, 2 and 4. Here each rank adds
its micro-batches as a binary tree, and the ranks' sums are the upper part of the same tree. Addition of two floating-point numbers
is commutative, so that both partners of an exchange get the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class TreeSum:
    """Adds lists of tensors in the order of a balanced binary tree; their number must be a power of two."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, Tensor]] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add the next leaf. Its tensors keep shapes and order from leaf to leaf."""
        level, flat = 0, torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        while self._stack and self._stack[-1][0] == level:
            flat = self._stack.pop()[1] + flat
            level += 1
        self._stack.append((level, flat))

    def take(self, group: dist.ProcessGroup) -> Tensor:
        """The sum over all leaves of all ranks of a group, the same bits on each; the tree is empty then. Collective."""
        ((_, flat),) = self._stack
        self._stack = []
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        distance = 1
        while distance < size:
            partner = dist.get_global_rank(group, rank ^ distance)
            other = torch.empty_like(flat)
            sending, receiving = (
                dist.P2POp(op, t, partner, group) for op, t in ((dist.isend, flat), (dist.irecv, other))
            )
            for work in dist.batch_isend_irecv([sending, receiving]):
                work.wait()
            flat = flat + other
            distance *= 2
        return flat
