"""Streams that hold several documents: every document begins at the learned initial state, as if it were read alone.

A document's chunks begin with the document. Documents are moved apart until each begins at a period of the chunk form; then all
rows are read together, up to the next place where a document begins in any of them. That reset forgets what padding wrote.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.ops.memory.operator import memory_chunked
from hope_megatron.ops.memory.rule import AUTO, MemoryCompute, MemoryRule
from hope_megatron.ops.memory.types import MemoryParams, MemoryState, RateLogits, initial_state, map_params


def memory_packed(
    q: Tensor, k: Tensor, v: Tensor, logits: RateLogits,
    params: MemoryParams, rule: MemoryRule, documents: Tensor,
    *, compute: MemoryCompute = AUTO, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """`memory_chunked` of every document apart, put together again.

    Args:
        q, k, v, logits, params, rule, compute, recompute: as for `memory_chunked`.
        documents: number of the document that each token belongs to, [B, T] integers; where it changes, a new one begins.

    Returns:
        y [B, T, H, d]. There is no state to go on from: the last document of every row ends here.
    """
    B, period = q.size(0), rule.period
    place, borders = _move_apart(documents, period)
    rows = torch.arange(B, device=q.device).unsqueeze(1)
    length = int(place[:, -1].max()) + 1
    spread = lambda x: None if x is None else x.new_zeros(B, length, *x.shape[2:]).index_put((rows, place), x)  # noqa: E731
    begins = _begins(documents)
    state = fresh = initial_state(params, B, momentum=logits.theta is not None, dtype=_state_dtype(q))
    pieces = [None if x is None else x.split(borders, 1) for x in map(spread, (q, k, v, *logits))]
    outputs, at = [], 0
    for i, tokens in enumerate(borders):
        piece = [None if x is None else x[i] for x in pieces]
        state = _reset(state, fresh, (begins & (place == at)).any(1))
        rates = RateLogits(*piece[3:])
        y, state = memory_chunked(*piece[:3], rates, params, rule, state, compute=compute, recompute=recompute)
        outputs.append(y)
        at += tokens
    return torch.cat(outputs, 1)[rows, place]


def _begins(documents: Tensor) -> Tensor:
    """Where a document begins: [B, T] bool."""
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    return torch.cat([first, documents[:, 1:] != documents[:, :-1]], 1)


def _move_apart(documents: Tensor, period: int) -> tuple[Tensor, list[int]]:
    """The place of every token once documents begin at multiples of `period`, [B, T], and the lengths between resets."""
    T = documents.size(1)
    begins, at = _begins(documents), torch.arange(T, device=documents.device)
    start = torch.where(begins, at, 0).cummax(1).values
    length_before = torch.cat([torch.zeros_like(start[:, :1]), (at - start)[:, :-1] + 1], 1)
    place = at + torch.where(begins, -length_before % period, 0).cumsum(1)
    resets = torch.unique(place[begins]).tolist()  # 0 is one of them
    ends = [*resets[1:], int(place[:, -1].max()) + 1]
    return place, [end - first for first, end in zip(resets, ends)]


def _reset(state: MemoryState, fresh: MemoryState, rows: Tensor) -> MemoryState:
    """The state with the given rows begun anew. rows: [B] bool. At a border of a period `start` is `now`."""
    pick = lambda new, old: torch.where(rows.view(-1, *[1] * (old.dim() - 1)), new, old)  # noqa: E731
    now = map_params(pick, fresh.now, state.now)
    momentum = None if state.momentum is None else map_params(pick, fresh.momentum, state.momentum)
    return MemoryState(now, now, momentum, state.position)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
