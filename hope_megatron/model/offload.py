"""Inputs of layers in host memory between forward and backward: what recomputation keeps, moved off the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

LARGE = 2**16
"""Numbers from which on a tensor is worth a copy."""


@contextlib.contextmanager
def kept_on_host() -> Iterator[None]:
    """Keep a copy on the host of every large activation that autograd saves in here, in the place of the activation itself.

    Parameters stay where they are. Copies go through pinned memory on the current stream: they take the time of the bus, and
    nothing is computed beside them.
    """
    with torch.autograd.graph.saved_tensors_hooks(_to_host, _back):
        yield


def _to_host(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if tensor.numel() < LARGE or isinstance(tensor, nn.Parameter):
        return tensor
    on_gpu = tensor.is_cuda
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
    host.copy_(tensor, non_blocking=on_gpu)
    return tensor.device, host


def _back(saved: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    device, host = saved
    return host.to(device, non_blocking=device.type == "cuda")
