"""Where batches come from: any seekable sequence of samples, cut the same way for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Target id that carries no loss."""


class SampleSource(Protocol):
    """What training needs of its data. Sample numbers run from 0 without end; a sample never changes.

    `data_pipeline.TokenStream` is one; a test may use a dozen lines.
    """

    seq_length: int
    """Tokens per sample that the model sees; a sample has one more, the last target."""
    num_samples: int
    """Samples per epoch."""

    def sample(self, number: int) -> np.ndarray:
        """Sample `number`: int64 [seq_length + 1]."""
        ...

    def state(self, number: int) -> dict[str, Any]:
        """The position before sample `number`, as JSON values, for a checkpoint."""
        ...

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The sample number of a saved position; raises if that position belongs to other data."""
        ...


def rank_samples(first: int, global_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Sample numbers of one data-parallel rank: the ranks' parts in their order are the global batch, for every size."""
    per_rank = global_batch_size // dp_size
    return range(first + dp_rank * per_rank, first + (dp_rank + 1) * per_rank)


def micro_batches(
    source: SampleSource, numbers: range, micro_batch_size: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """(tokens, targets) of the samples, each [micro_batch_size, seq_length] int64 on the device."""
    batches = []
    for first in range(numbers.start, numbers.stop, micro_batch_size):
        rows = np.stack([source.sample(number) for number in range(first, first + micro_batch_size)])
        batches.append(_to_device(rows, device))
    return batches


def heldout_batches(
    source: SampleSource, num_sequences: int, batch_size: int, dp_rank: int, dp_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `num_sequences` samples, spread over data-parallel ranks.

    Every rank gets equally many batches of the same shape, because collectives need that; where there is nothing left,
    targets are IGNORE.
    """
    num_sequences = min(num_sequences, source.num_samples)
    for first in range(0, num_sequences, batch_size * dp_size):
        numbers = [first + dp_rank * batch_size + row for row in range(batch_size)]
        rows = np.stack([source.sample(min(number, num_sequences - 1)) for number in numbers])
        tokens, targets = _to_device(rows, device)
        for row, number in enumerate(numbers):
            if number >= num_sequences:
                targets[row] = IGNORE
        yield tokens, targets


def _to_device(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    samples = torch.from_numpy(rows)
    if device.type == "cuda":
        samples = samples.pin_memory().to(device, non_blocking=True)
    return samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
