"""Regions: chains of pointwise operators that a GPU runs as one kernel, compiled by torch.compile; elsewhere plain PyTorch.

    @region(backward_kernels=1)
    def swiglu(x): ...

A region is an ordinary differentiable function of tensors. On a CUDA device Inductor fuses its forward and its backward, which
keeps nothing but its inputs. On a CPU, and where compiling is off, its lines run one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Region:
    """A function that may be compiled.

    Attributes:
        function: the lines themselves.
        backward_kernels: kernels of its backward once fused: one, and one for each gradient that is a sum over tokens.
    """

    compiles = True
    """Whether regions are compiled on CUDA devices; for all of them. `training.libraries.pointwise` sets it."""
    runner: Callable[[Region, tuple[Any, ...]], Any] | None = None
    """Runs regions that would be compiled; a rehearsal counts them by it."""

    def __init__(self, function: Callable[..., Any], backward_kernels: int) -> None:
        functools.update_wrapper(self, function)
        self.function, self.backward_kernels = function, backward_kernels
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if not Region.compiles:
            return self.function(*args)
        if Region.runner is not None:
            return Region.runner(self, args)
        if not _on_cuda(args):
            return self.function(*args)
        if self._compiled is None:
            self._compiled = torch.compile(self.function)
        return self._compiled(*args)


def region(*, backward_kernels: int = 1) -> Callable[[Callable[..., Any]], Region]:
    """Make a region of a function of tensors and constants, whose result is a tensor or a tuple of them."""
    return lambda function: Region(function, backward_kernels)


def _on_cuda(args: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.is_cuda for x in args)
