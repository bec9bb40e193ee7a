"""From logits to the next token: temperature, top-k, nucleus, repetition penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hope_megatron.generation.errors import GenerationError


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn. The filters apply in the order of the fields.

    Attributes:
        repetition_penalty: logits of tokens seen before are divided by this (multiplied when negative), as in CTRL
            (arXiv 1909.05858); 1 changes nothing.
        temperature: logits are divided by this; 0 takes the most likely token.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest tokens that hold this probability (arXiv 1904.09751); 1 keeps all.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GenerationError(
                f"temperature={self.temperature}: use 0 (greedy) or a positive number, for example 0.8"
            )
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k={self.top_k}: use at least 1, or leave it out to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p={self.top_p}: use a probability above 0 and at most 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise GenerationError(
                f"repetition_penalty={self.repetition_penalty}: use a positive number; 1 changes nothing"
            )


def sample(logits: Tensor, options: SamplingOptions, rng: torch.Generator, seen: Tensor | None = None) -> Tensor:
    """Draw one token per row.

    Args:
        logits: [B, V] float.
        options: filters and temperature.
        rng: source of the draw, on the device of `logits`; untouched when temperature is 0.
        seen: [B, V] bool, tokens the repetition penalty applies to; None for none.

    Returns:
        [B] int64.
    """
    logits = logits.float()
    if seen is not None and options.repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / options.repetition_penalty, logits * options.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if options.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = _keep_top_p(_keep_top_k(logits / options.temperature, options.top_k), options.top_p)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=rng).squeeze(-1)


def _keep_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """Everything below the k-th largest logit of its row becomes -inf."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def _keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Everything outside the smallest set that holds probability top_p becomes -inf; the likeliest token stays."""
    if top_p >= 1.0:
        return logits
    descending, order = logits.sort(dim=-1, descending=True)
    probabilities = descending.softmax(dim=-1)
    outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the mass before this token is enough already
    return logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
