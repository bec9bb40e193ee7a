"""The state of a HOPE model's streams: what transformers calls a cache. Its size is constant where all mixers are memories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class HopeCache:
    """Where each stream of a batch stands. A model makes a new one at every call and leaves the one it was given as it was.

    Attributes:
        layers: one state per layer, nested tuples of tensors whose first dim is the batch.
        position: tokens that the streams have read: a number, or [B] int64 where rows stand at different places.
        num_columns: how many columns of `generate`'s input_ids these tokens took, padding included.
    """

    is_compileable = False

    def __init__(self, layers: tuple[Any, ...], position: int | Tensor, num_columns: int) -> None:
        self.layers, self.position, self.num_columns = layers, position, num_columns

    @property
    def is_linear(self) -> list[bool]:
        """For transformers: what was read is not input again."""
        return [True] * len(self.layers)

    @property
    def batch_size(self) -> int:
        """Number of streams."""
        sizes: list[int] = []
        map_tensors(lambda x: sizes.append(x.size(0)), self.layers)
        return sizes[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included."""
        return self.num_columns

    def select(self, rows: Tensor) -> HopeCache:
        """The streams of the given rows [n] int64; a row may be there more than once."""
        position = self.position
        position = position if isinstance(position, int) else position[rows.to(position.device)]
        return HopeCache(map_tensors(lambda x: x[rows.to(x.device)], self.layers), position, self.num_columns)

    def repeat(self, times: int) -> HopeCache:
        """Every stream `times` times in a row."""
        return self.select(torch.arange(self.batch_size).repeat_interleave(times))

    def begun(self) -> HopeCache:
        """The same streams for a `generate` whose input_ids hold only what comes next."""
        return HopeCache(self.layers, self.position, 0)

    def detach(self) -> HopeCache:
        """Cut from the autograd graph."""
        return HopeCache(map_tensors(Tensor.detach, self.layers), self.position, self.num_columns)

    def to(self, device: torch.device | str) -> HopeCache:
        """On another device."""
        position = self.position if isinstance(self.position, int) else self.position.to(device)
        return HopeCache(map_tensors(lambda x: x.to(device), self.layers), position, self.num_columns)

    # -- in place, as transformers asks beams for it ---------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on with the stream of row beam_idx[i]."""
        chosen = self.select(beam_idx)
        self.layers, self.position = chosen.layers, chosen.position

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        raise ValueError(
            "a memory cannot be rolled back to an earlier token; keep the output of an earlier call instead"
        )

    @staticmethod
    def join(parts: list[tuple[Tensor, HopeCache]], num_columns: int) -> HopeCache:
        """One batch of several. parts: rows [n] that the streams of a part become, all rows 0..B-1 once."""
        order = torch.cat([rows for rows, _ in parts]).argsort()
        layers = tuple(
            map_tensors(lambda *xs: torch.cat(_of_one_length(xs))[order.to(xs[0].device)], *states)
            for states in zip(*(cache.layers for _, cache in parts))
        )
        positions = [torch.as_tensor(cache.position).expand(len(rows)).to(order.device) for rows, cache in parts]
        position = torch.cat(positions)[order]
        same = bool((position == position[0]).all())
        return HopeCache(layers, int(position[0]) if same else position, num_columns)


def _of_one_length(xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Keys and values [B, groups, S, d] get zeros in front, up to the longest; memories have one shape anyway."""
    if all(x.shape[1:] == xs[0].shape[1:] for x in xs):
        return xs
    longest = max(x.size(2) for x in xs)
    return tuple(F.pad(x, (0, 0, longest - x.size(2), 0)) for x in xs)


def map_tensors(fn: Callable[..., Any], *trees: Any) -> Any:
    """fn on the corresponding tensors of nested (named) tuples of one structure; numbers and None stay."""
    first = trees[0]
    if isinstance(first, Tensor):
        return fn(*trees)
    if isinstance(first, tuple):
        parts = [map_tensors(fn, *items) for items in zip(*trees)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return first
