"""Which held-out tokens a memory can help with: those that the context has shown before.

A model that remembers what it read should be better where the text repeats itself, and there alone. Arora et al.
("Zoology", arXiv 2312.04927) call a token that completes a pair of its context a recall hit, and find that most of the gap between
attention and recurrent models lies on these tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("new pair", "pair seen before", "run of four seen before")
"""What a target completes, with the tokens before it in its row: a pair that is new there; one that stood there before; and four
tokens that did, which copying alone predicts. Each target is of one kind."""
METRICS = ("heldout/loss_new", "heldout/loss_pair", "heldout/loss_run")
"""What training calls the losses of `KINDS`."""
NAMES = ("no name", "name, first time", "name seen before")
"""Whether a target spells a name (`name_kinds`)."""
_WORD = re.compile(r"\w{3,}")
_RUN = 4


def repetition_kinds(tokens: Tensor, targets: Tensor) -> Tensor:
    """The kind of each target, as an index of `KINDS`: [B, T] int64.

    Args:
        tokens, targets: [B, T] int64; target t follows token t of its row, and a row is all the context there is. What targets
            without a loss (negative ones) complete is of no account.
    """
    wanted = targets.clamp(min=-1) + 1
    pairs = _numbers(tokens * (wanted.max() + 1) + wanted)
    runs = torch.full_like(pairs, -1)
    runs[:, _RUN - 2 :] = _numbers(pairs[:, : pairs.shape[1] - _RUN + 2] * pairs.shape[1] + pairs[:, _RUN - 2 :])
    begun = torch.arange(pairs.shape[1], device=pairs.device) >= _RUN - 2
    return _seen(pairs).long() + (_seen(runs) & begun)


def _numbers(values: Tensor) -> Tensor:
    """Small numbers [B, T] that are equal in a row where its values are: the rank among the row's different values."""
    order = values.sort(1)
    steps = (order.values.diff(dim=1) != 0).long()
    ranks = torch.cat((torch.zeros_like(order.indices[:, :1]), steps.cumsum(1)), 1)
    return torch.empty_like(ranks).scatter_(1, order.indices, ranks)


def _seen(values: Tensor) -> Tensor:
    """Whether each value [B, T] stood earlier in its row."""
    order = values.sort(dim=1, stable=True)
    again = torch.zeros_like(values, dtype=torch.bool)
    again[:, 1:] = order.values.diff(dim=1) == 0
    return torch.empty_like(again).scatter_(1, order.indices, again)


def name_kinds(tokens: np.ndarray, row_length: int, decode: Callable[[list[int]], str]) -> np.ndarray:
    """Whether each target of a stream spells a name, as an index of `NAMES`: [n] int8.

    A name is a word of three characters or more with a digit, an underscore or a capital letter, unless the stream has it without
    capitals too ("The"). All its tokens count, and it was seen before if the row has it earlier.

    Args:
        tokens: [n + 1]; targets are tokens[1:].
        row_length: tokens of a row; the last may be shorter.
        decode: the tokenizer's.
    """
    texts = _token_texts(tokens, decode)
    ordinary = {
        word for word in _WORD.findall("".join(texts)) if word == word.lower() and not re.search(r"[\d_]", word)
    }
    kinds = np.zeros(len(tokens) - 1, np.int8)
    for start in range(0, len(kinds), row_length):
        row = texts[start : start + row_length + 1]
        ends = np.cumsum([len(text) for text in row])
        met: set[str] = set()
        for match in _WORD.finditer("".join(row)):
            word = match.group()
            if word.lower() in ordinary or (word == word.lower() and not re.search(r"[\d_]", word)):
                continue
            first, last = np.searchsorted(ends, [match.start() + 1, match.end()])
            kinds[start + max(int(first) - 1, 0) : start + int(last)] = 2 if word in met else 1
            met.add(word)
    return kinds


def _token_texts(tokens: np.ndarray, decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to a text: tokenizers drop the space of a first word, so that another token stands before it."""
    anchor = [int(tokens[0])]
    before = len(decode(anchor))
    texts = {token: decode([*anchor, token])[before:] for token in np.unique(tokens).tolist()}
    return [texts[token] for token in tokens.tolist()]


def loss_by_kind(
    losses: dict[str, np.ndarray], tokens: np.ndarray, row_length: int, decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """Mean loss of each model over the targets of each kind that occurs.

    Args:
        losses: [n] nats by model, of targets tokens[1:].
        tokens: [n + 1].
        row_length, decode: see `name_kinds`.

    Returns:
        A row per kind: `kind`, `tokens`, `share` of all targets, and `loss` by model in nats per token.
    """
    count = len(tokens) - 1
    padded = torch.from_numpy(np.append(tokens, np.full(-count % row_length, -1)).astype(np.int64))
    kinds = repetition_kinds(*(part.reshape(-1, row_length) for part in (padded[:-1], padded[1:])))
    found = [(KINDS, kinds.flatten()[:count].numpy()), (NAMES, name_kinds(tokens, row_length, decode))]
    return [
        {
            "kind": name,
            "tokens": int(mask.sum()),
            "share": float(mask.mean()),
            "loss": {model: float(nats[mask].mean()) for model, nats in losses.items()},
        }
        for names, of in found
        for index, name in enumerate(names)
        if (mask := of == index).any()
    ]
