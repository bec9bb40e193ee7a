"""Context parallelism: a sequence is split over ranks, and mixers exchange their part of it for whole sequences of some heads.

Between mixers everything works on one token at a time, and a rank holds the tokens of its slice, in order of rank. Heads of a
mixer do not know each other, so inside it a rank has all tokens of its share of the heads. Two all-to-alls lead there and back.
The pattern is that of DeepSpeed-Ulysses (Jacobs et al., 2023), which splits attention so; here the heads are memories too.

Weights are the same on all ranks of the group. Each computes its tokens' or its heads' part of their gradients, and the parts are
summed with those of data parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def context_parallel_size() -> int:
    """Ranks that share a sequence; 1 where no process groups exist."""
    return max(1, parallel_state.get_context_parallel_world_size())


def own_tokens(x: Tensor, dim: int) -> Tensor:
    """This rank's slice of whole sequences along a dimension."""
    size = context_parallel_size()
    if size == 1:
        return x
    return x.chunk(size, dim)[parallel_state.get_context_parallel_rank()]


def own_heads(x: Tensor, dim: int = 0) -> Tensor:
    """This rank's share of the heads along a dimension, of what is there for all heads of the tensor-parallel rank."""
    return own_tokens(x, dim)  # the same cut


def tokens_to_heads(x: Tensor, dim: int) -> Tensor:
    """[T/cp, ..., H, ...], heads at `dim` -> [T, ..., H/cp, ...]: all tokens of this rank's heads. Collective, as is backward."""
    return x if context_parallel_size() == 1 else _Exchange.apply(x, dim, True)


def heads_to_tokens(x: Tensor, dim: int) -> Tensor:
    """[T, ..., H/cp, ...], heads at `dim` -> [T/cp, ..., H, ...]: all heads of this rank's tokens. Collective, as is backward."""
    return x if context_parallel_size() == 1 else _Exchange.apply(x, dim, False)


def gather_tokens(x: Tensor) -> Tensor:
    """[T/cp, ...] -> [T, ...], the same on all ranks of the group. Collective; without gradient."""
    size = context_parallel_size()
    if size == 1:
        return x
    parts = [torch.empty_like(x, requires_grad=False) for _ in range(size)]
    dist.all_gather(parts, x.detach().contiguous(), group=parallel_state.get_context_parallel_group())
    return torch.cat(parts)


def sum_over_tokens(parts: list[Tensor]) -> list[Tensor]:
    """Sums over the group of what each rank found in its tokens, in float32 at least, in one all-reduce; without gradient."""
    if context_parallel_size() == 1:
        return parts
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    flat = torch.cat([part.detach().to(dtype).flatten() for part in parts])
    dist.all_reduce(flat, group=parallel_state.get_context_parallel_group())
    return [x.view_as(part) for x, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, to_heads: bool) -> Tensor:
        ctx.dim, ctx.to_heads = dim, to_heads
        return _to_heads(x, dim) if to_heads else _to_tokens(x, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(dy, ctx.dim, not ctx.to_heads), None, None


def _to_heads(x: Tensor, dim: int) -> Tensor:
    parts = x.unflatten(dim, (context_parallel_size(), -1)).movedim(dim, 0)  # [cp, T/cp, ..., H/cp, ...], by heads
    return _all_to_all(parts).flatten(0, 1)


def _to_tokens(x: Tensor, dim: int) -> Tensor:
    parts = x.unflatten(0, (context_parallel_size(), -1))  # [cp, T/cp, ..., H/cp, ...], by tokens
    return _all_to_all(parts).movedim(0, dim).flatten(dim, dim + 1)


def _all_to_all(parts: Tensor) -> Tensor:
    """Part i goes to rank i of the group; what came from rank i is part i."""
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=parallel_state.get_context_parallel_group())
    return received
