"""The short convolution by causal-conv1d (1.4 or newer; read at 1.6.1). Not run on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.ops import short_conv


def convolved(x: Tensor, weight: Tensor, tail: Tensor, documents: Tensor | None) -> Tensor:
    """See `short_conv.convolved`. Its tensors are [B, N, T] with channels innermost, which ours are when seen transposed."""
    if not on_gpu(x) or x.dtype == torch.float64 or x.numel() == 0:
        return short_conv.convolved(x, weight, tail, documents)
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn

    by_document = None if documents is None else documents.to(torch.int32)
    start = tail.contiguous().mT if documents is None else None
    return causal_conv1d_fn(x.mT, weight, seq_idx=by_document, initial_states=start, activation="silu").mT


def on_gpu(x: Tensor) -> bool:
    """Where the kernels run."""
    return x.is_cuda
