"""Attention with windows or documents by PyTorch's flex_attention: blocks that nobody sees are skipped, and no mask is stored.

CPUs compute its forward alone. Its backward has not been run on a GPU.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hope_megatron.ops.libraries import pytorch


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Tensor | None = None) -> Tensor:
    """See `pytorch.attention`, which computes what needs no mask: a flash kernel's causal flag is as good."""
    T, S = q.size(2), k.size(2)
    if not pytorch.needs_mask(T, S, window, documents):
        return pytorch.attention(q, k, v)
    blocks = _blocks_of_documents(documents, window) if documents is not None else _blocks(T, S, window, q.device)
    return compute(q, k, v, blocks)


def compute(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """The kernel."""
    function = _compiled() if q.is_cuda else flex_attention
    return function(q, k, v, block_mask=blocks, enable_gqa=q.size(1) != k.size(1))


@functools.lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=16)
def _blocks(T: int, S: int, window: int | None, device: torch.device) -> BlockMask:
    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        row = query + (S - T)
        return (key <= row) & (key > row - (window or S + 1))

    return create_block_mask(visible, None, None, T, S, device=device, _compile=device.type == "cuda")


_last: list[tuple[weakref.ref[Tensor], int | None, BlockMask]] = []
"""Of the documents that the layers of a model read one after the other."""


def _blocks_of_documents(documents: Tensor, window: int | None) -> BlockMask:
    for known, its_window, blocks in _last:
        if known() is documents and its_window == window:
            return blocks

    def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
        near = (key <= query) & (key > query - (window or documents.size(1) + 1))
        return near & (documents[batch, query] == documents[batch, key])

    (B, T), device = documents.shape, documents.device
    blocks = create_block_mask(visible, B, None, T, T, device=device, _compile=device.type == "cuda")
    _last[:] = [(weakref.ref(documents), window, blocks)]
    return blocks
