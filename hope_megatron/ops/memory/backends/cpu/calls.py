"""The compiled functions of scan.cpp, called with every tensor checked: nothing reads or writes beyond what is there."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.cpu.compiling import library


class TensorMismatch(RuntimeError):
    """A tensor that the compiled code may not be given. The message names it, what it is and what it must be."""


_LANES = 16
"""Widths are multiples of this: what the kernel's vectors and tables need."""

_LARGEST = 8192
"""Of a width or a chunk: offsets inside a stream are 32-bit."""


def why_not_sizes(d: int, h: int, chunk: int) -> str | None:
    """Why the compiled code does not know widths and a chunk; None if it does."""
    if d % _LANES or h % _LANES:
        return f"widths must be multiples of {_LANES}, not d={d}, h={h}"
    if not all(0 < size <= _LARGEST for size in (d, h, chunk)):
        return f"d={d}, h={h} and chunk={chunk} must be between 1 and {_LARGEST}"
    return None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a call computes; all but the threads of `Shape` in chunk.h."""

    sequences: int
    heads: int
    tokens: int
    d: int
    h: int
    chunk: int
    segment_chunks: int
    residual: bool
    read_skip: bool
    anchored: bool
    writes_in: bool
    eta_max: float

    @property
    def segments(self) -> int:
        """How often weights are kept."""
        return -(-self.tokens // (self.chunk * self.segment_chunks))

    @property
    def weights(self) -> int:
        """S, the numbers of a stream's weights: five W2, three W1 of matrices, two of rows."""
        return 5 * self.h * self.d + 3 * self.d * self.h + 2 * self.h

    def check(self) -> None:
        """Raises TensorMismatch for sizes that the compiled code does not know."""
        for name in ("sequences", "heads", "tokens", "segment_chunks"):
            if not 0 < getattr(self, name) < 2**31:
                raise TensorMismatch(f"{name}={getattr(self, name)} must be between 1 and 2^31 - 1")
        if (text := why_not_sizes(self.d, self.h, self.chunk)) is not None:
            raise TensorMismatch(text)
        if self.tokens % self.chunk:
            raise TensorMismatch(f"tokens={self.tokens} must be a multiple of chunk={self.chunk}")


_Shape = type(
    "_Shape",
    (ctypes.Structure,),
    {
        "__doc__": "`Shape` of chunk.h.",
        "_fields_": [
            (name, ctypes.c_int32)
            for name in ("sequences", "heads", "tokens", "d", "h", "chunk", "segment_chunks", "threads")
        ]
        + [(name, ctypes.c_int32) for name in ("residual", "read_skip", "anchored", "writes_in")]
        + [("eta_max", ctypes.c_float)],
    },
)


def call_forward(s: Settings, q, x_k, x_v, eta, alpha, anchor: Tensor | None, y, w, kept: Tensor | None) -> None:
    """`hope_memory_forward`: writes y, w (in: first weights, out: last ones) and, if given, kept.

    q, x_k, x_v, y [B, T, H, d]; eta, alpha [B, T, H]; anchor, w [B H, S]; kept [segments, B H, S].

    Raises:
        TensorMismatch: unless all are contiguous float32 on the CPU, of these shapes.
    """
    rows, rates, weights = _shapes(s)
    expected = {
        "q": (q, rows), "x_k": (x_k, rows), "x_v": (x_v, rows), "eta": (eta, rates), "alpha": (alpha, rates),
        "anchor": (anchor, weights if s.anchored else None), "y": (y, rows), "w": (w, weights),
        "kept": (kept, None if kept is None else (s.segments, *weights)),
    }  # fmt: skip
    _call("hope_memory_forward", s, expected)


def call_backward(
    s: Settings, q, x_k, x_v, eta, alpha, anchor: Tensor | None, kept, d_y, d_q, d_x_k, d_x_v, d_eta, d_alpha, d_w,
    d_anchor: Tensor | None,
) -> None:  # fmt: skip
    """`hope_memory_backward`: writes d_q to d_alpha, d_w (in: of the last weights, out: of the first ones); adds to d_anchor.

    Shapes are those of what they are the gradients of.

    Raises:
        TensorMismatch: as for `call_forward`.
    """
    rows, rates, weights = _shapes(s)
    anchors = weights if s.anchored else None
    expected = {
        "q": (q, rows), "x_k": (x_k, rows), "x_v": (x_v, rows), "eta": (eta, rates), "alpha": (alpha, rates),
        "anchor": (anchor, anchors), "kept": (kept, (s.segments, *weights)), "d_y": (d_y, rows), "d_q": (d_q, rows),
        "d_x_k": (d_x_k, rows), "d_x_v": (d_x_v, rows), "d_eta": (d_eta, rates), "d_alpha": (d_alpha, rates),
        "d_w": (d_w, weights), "d_anchor": (d_anchor, anchors),
    }  # fmt: skip
    _call("hope_memory_backward", s, expected)


def _shapes(s: Settings) -> tuple[tuple[int, ...], ...]:
    return (s.sequences, s.tokens, s.heads, s.d), (s.sequences, s.tokens, s.heads), (s.sequences * s.heads, s.weights)


def _call(function: str, s: Settings, expected: dict[str, tuple[Tensor | None, tuple[int, ...] | None]]) -> None:
    """Run on as many threads as PyTorch has: the kernel resolves OpenMP to the runtime that PyTorch brought along."""
    s.check()
    for name, (tensor, shape) in expected.items():
        if (text := _mismatch(tensor, shape)) is not None:
            raise TensorMismatch(f"{function}: {name} {text}")
    values = {field.name: getattr(s, field.name) for field in fields(s)}
    shape = _Shape(**values, threads=torch.get_num_threads())
    pointers = (ctypes.c_void_p(None if x is None else x.data_ptr()) for x, _ in expected.values())
    getattr(library(), function)(ctypes.byref(shape), *pointers)


def _mismatch(x: Tensor | None, shape: tuple[int, ...] | None) -> str | None:
    if x is None or shape is None:
        return None if x is None and shape is None else f"must be {'left out' if shape is None else list(shape)}"
    if x.dtype != torch.float32:
        return f"is {x.dtype}, it must be torch.float32"
    if x.device.type != "cpu" or x.layout != torch.strided:
        return f"is a {x.layout} tensor on {x.device}, it must be a strided one on the CPU"
    if x.shape != shape:
        return f"has shape {list(x.shape)}, it must be {list(shape)}"
    if not x.is_contiguous():
        return f"has strides {x.stride()}, it must be contiguous"
    return "is a conjugate or negative view" if x.is_neg() or x.is_conj() else None
