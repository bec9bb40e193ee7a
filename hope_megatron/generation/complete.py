"""Text in, text out."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from hope_megatron.generation.decoder import Decoder
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.model import LanguageModel


class TextTokenizer(Protocol):
    """What decoding needs of a tokenizer."""

    eos_id: int

    def encode(self, text: str) -> np.ndarray:
        """Token ids [n] int64 of a text."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""


def new_document(
    model: LanguageModel, tokenizer: TextTokenizer, batch_size: int = 1, kind: type[Decoder] = Decoder
) -> Decoder:
    """Streams at the beginning of a document: in training an end mark stands before each."""
    decoder = kind(model, batch_size)
    decoder.append(torch.full((batch_size, 1), tokenizer.eos_id))
    return decoder


def complete(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    options: SamplingOptions,
    rng: torch.Generator,
    end_id: int | None = None,
    kind: type[Decoder] = Decoder,
) -> list[str]:
    """Continue a prompt `num_samples` times, as one batch.

    Args:
        rng: source of the draws, on the model's device.
        end_id: token that ends a continuation and is not part of it; None: the end of a document, -1: nothing does.
        kind: LearningDecoder for a model that learns in context.

    Returns:
        The continuations, without the prompt.
    """
    end_id = tokenizer.eos_id if end_id is None else end_id
    decoder = new_document(model, tokenizer, num_samples, kind)
    decoder.append(torch.from_numpy(tokenizer.encode(prompt)).expand(num_samples, -1))
    rows: list[list[int]] = [[] for _ in range(num_samples)]
    running = set(range(num_samples))
    for tokens in decoder.generate(max_new_tokens, options, rng):
        for row in sorted(running):
            token = int(tokens[row])
            if token == end_id:
                running.discard(row)
            else:
                rows[row].append(token)
        if not running:
            break
    return [tokenizer.decode(row) for row in rows]
