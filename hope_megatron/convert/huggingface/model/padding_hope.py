"""Rows of unequal length in one batch, each read as if it stood alone.

A memory reads every token it is given, so padding is never read: rows are moved to the left, read together up to the end of
the shortest, which then leaves the batch with its state, and so on. Where no state is wanted, what stands behind a row's end
cannot change it, and one pass is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cache_hope import HopeCache

Read = Callable[[Tensor, "HopeCache | None"], "tuple[list[Tensor], HopeCache | None]"]
"""From inputs [B, T, D] and the state before to results [B, T, ...] and the state after; rows stand at one position."""


class Spans(NamedTuple):
    """Texts that are read as if each stood alone: of row `row`, columns first to first + length - 1. All [n] int64."""

    row: Tensor
    first: Tensor
    length: Tensor

    def one_per_row(self, batch_size: int) -> bool:
        """Whether the texts are the rows of a batch, in order."""
        return len(self.row) == batch_size and bool(
            (self.row == torch.arange(batch_size, device=self.row.device)).all()
        )


def spans_of(mask: Tensor | None, position_ids: Tensor | None, batch_size: int, num_tokens: int) -> Spans | None:
    """The texts of a batch; None if each row is one, without padding.

    Args:
        mask: [B, S] of ones and zeros. S may be more than `num_tokens`: then its last columns are those of this call.
        position_ids: [B, T] or [1, T]; where they do not count on, another text begins, as in packed batches.
    """
    given = position_ids if mask is None else mask
    if given is None or (mask is None and num_tokens == 1):
        return None
    real = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=given.device)
    if mask is not None:
        if mask.dim() != 2 or mask.size(0) != batch_size or mask.size(1) < num_tokens:
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}, expected [{batch_size}, {num_tokens}] or longer in the second "
                "dim: ones for tokens, zeros for padding at either end of a row"
            )
        real = mask[:, mask.size(1) - num_tokens :] != 0
    begins = _begins(real, position_ids)
    if bool(real.all()) and not bool(begins[:, 1:].any()):
        return None
    if not bool(real.any()):
        raise ValueError("attention_mask is all zeros: the batch has no token")
    runs = real.clone()
    runs[:, 1:] &= ~real[:, :-1]  # where a run of tokens begins
    broken = runs.sum(1) > 1
    if bool(broken.any()):
        row = int(broken.long().argmax())
        raise ValueError(
            f"attention_mask has zeros between the tokens of row {row}; a memory reads a text without gaps: padding stands at "
            "the beginning or the end of a row"
        )
    row, first = begins.nonzero().unbind(1)
    number = begins.flatten().cumsum(0).view_as(begins) - 1  # of the text that each token belongs to
    length = torch.bincount(number[real], minlength=len(row))
    return Spans(row, first, length)


def _begins(real: Tensor, position_ids: Tensor | None) -> Tensor:
    """Where a text begins, [B, T] bool: after padding at a row's beginning, and where positions do not count on."""
    begins = real & (real.cumsum(1) == 1)
    if position_ids is None or real.size(1) == 1:
        return begins
    if position_ids.dim() != 2 or position_ids.size(1) != real.size(1):
        raise ValueError(f"position_ids have shape {list(position_ids.shape)}, expected {list(real.shape)}")
    positions = position_ids.to(real.device).expand(real.size(0), -1)
    begins[:, 1:] |= real[:, 1:] & real[:, :-1] & (positions[:, 1:] != positions[:, :-1] + 1)
    return begins


def read_aligned(read: Read, x: Tensor, spans: Spans) -> list[Tensor]:
    """Results of texts without their state, in one pass; what is returned at padding means nothing."""
    if spans.one_per_row(x.size(0)) and bool((spans.first == 0).all()):
        return read(x, None)[0]
    place = torch.arange(int(spans.length.max()), device=x.device)
    row, first, length = (column.to(x.device)[:, None] for column in spans)
    results, _ = read(x[row, (first + place).clamp(max=x.size(1) - 1)], None)
    text, place = (place < length).nonzero().unbind(1)
    at = (row[text, 0], first[text, 0] + place)
    return [y.new_zeros(*x.shape[:2], *y.shape[2:]).index_put(at, y[text, place]) for y in results]


def read_rows(read: Read, x: Tensor, spans: Spans | None, cache: HopeCache | None) -> tuple[list[Tensor], HopeCache]:
    """Results and state of rows that have other lengths, or that stand at other positions.

    Results at padding are zeros.
    """
    batch_size, num_tokens = x.shape[:2]
    if spans is None:
        rows = torch.arange(batch_size)
        spans = Spans(rows, 0 * rows, 0 * rows + num_tokens)
    if not spans.one_per_row(batch_size):
        count = torch.bincount(spans.row, minlength=batch_size)
        row = int((count != 1).long().argmax())
        raise ValueError(
            f"row {row} of the batch holds {int(count[row])} texts by its attention_mask and position_ids, and a state belongs to "
            "one; give each row one text of at least one token, or use_cache=False"
        )
    position = torch.as_tensor(0 if cache is None else cache.position).expand(batch_size)
    firsts, lengths = spans.first.cpu(), spans.length.cpu()
    parts: list[tuple[Tensor, HopeCache]] = []
    outputs: list[Tensor] = []
    for start in position.unique().tolist():
        rows = (position.cpu() == start).nonzero().flatten()
        state = None if cache is None else _standing_at(cache.select(rows), start)
        done = 0
        for end in lengths[rows].unique().tolist():  # ascending
            at = (rows[:, None].to(x.device), (firsts[rows, None] + torch.arange(done, end)).to(x.device))
            pieces, after = read(x[at], state)
            outputs = outputs or [piece.new_zeros(batch_size, num_tokens, *piece.shape[2:]) for piece in pieces]
            outputs = [output.index_put(at, piece) for output, piece in zip(outputs, pieces)]
            assert after is not None
            over = lengths[rows] == end
            parts.append((rows[over], after.select(over.nonzero().flatten())))
            rows, state, done = rows[~over], after.select((~over).nonzero().flatten()), end
    return outputs, HopeCache.join(parts, num_tokens + (0 if cache is None else cache.num_columns))


def _standing_at(cache: HopeCache, position: int) -> HopeCache:
    return HopeCache(cache.layers, position, cache.num_columns)
