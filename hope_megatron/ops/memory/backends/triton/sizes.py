"""Sizes that the launches of one operator share, and its scratch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """B sequences, T tokens (whole chunks), H heads, widths d and h, C rows of a chunk's tiles."""

    B: int
    T: int
    H: int
    d: int
    h: int
    C: int

    @classmethod
    def of(cls, x: Tensor, h: int, rows: int) -> Sizes:
        """x: tokens [B, T, H, d], T a multiple of `rows`."""
        B, T, H, d = x.shape
        assert T % rows == 0 and x.is_contiguous()
        return cls(B, T, H, d, h, rows)

    @property
    def N(self) -> int:
        """Streams."""
        return self.B * self.H

    @property
    def chunks(self) -> int:
        return self.T // self.C

    @property
    def grid(self) -> tuple[int, int]:
        """A program per chunk and stream."""
        return self.chunks, self.N

    @property
    def counts(self) -> tuple[int, int, int]:
        """T, HEADS, chunks: arguments of every kernel."""
        return self.T, self.H, self.chunks

    @property
    def plane(self) -> int:
        """Rows of tokens in one of several planes."""
        return self.B * self.T * self.H

    @property
    def tile(self) -> dict[str, int]:
        """Constants of most kernels."""
        return dict(C=self.C, D=self.d, H=self.h)

    def rows(self, width: int, like: Tensor, dtype: torch.dtype = torch.float32, planes: int | None = None) -> Tensor:
        """Uninitialised [B, T, H, width], or [planes, B, T, H, width]."""
        shape = (self.B, self.T, self.H, width)
        return like.new_empty(shape if planes is None else (planes, *shape), dtype=dtype)

    def each(self, planes: int, like: Tensor) -> Tensor:
        """Uninitialised [planes, B, T, H] in float32."""
        return like.new_empty(planes, self.B, self.T, self.H, dtype=torch.float32)

    def squares(self, like: Tensor, dtype: torch.dtype = torch.float32, planes: int = 1) -> Tensor:
        """Uninitialised [planes, N, chunks, C, C]."""
        return like.new_empty(planes, self.N, self.chunks, self.C, self.C, dtype=dtype)


def tile_rows(chunk: int) -> int:
    """Rows of a chunk's tiles: a power of two, and what products need at least."""
    return max(16, 1 << (chunk - 1).bit_length())


def operand_dtype(precision: str) -> torch.dtype:
    """Of scratch that products read."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def starts_of(first: Tensor, chunks: int) -> Tensor:
    """Room for weights at every chunk's start and the end, with the first in place: [N, ...] -> [N, chunks + 1, ...]."""
    out = first.new_empty(first.size(0), chunks + 1, *first.shape[1:])
    out[:, 0] = first
    return out
