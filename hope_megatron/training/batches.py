"""Where batches come from: any seekable sequence of samples, cut the same way for every number of ranks."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hope_megatron.config.parallel import Spans, own_spans
from hope_megatron.config.run import RunConfig
from hope_megatron.model import IGNORE
from hope_megatron.parallel.distributed import Mesh


class SampleSource(Protocol):
    """What training needs of its data. Sample numbers run from 0 without end; a sample never changes.

    `data_pipeline.TokenStream` is one; a test may use a dozen lines.
    """

    seq_length: int
    """Tokens per sample that the model sees; a sample has one more, the last target."""
    num_samples: int
    """Samples per epoch."""
    end_id: int
    """Token that ends every document; used with data.reset_at_documents."""

    def sample(self, number: int, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Sample `number`: int64 [seq_length + 1], or its tokens from `first` to before `stop`. Negative ids are no input and no
        target. Under context parallelism only parts are asked for. Whole samples may be [2, seq_length]: tokens, and targets that
        are not the tokens that follow."""
        ...

    def state(self, number: int) -> dict[str, Any]:
        """The position before sample `number`, as JSON values, for a checkpoint."""
        ...

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The sample number of a saved position; raises if that position belongs to other data."""
        ...


def rank_samples(first: int, global_batch_size: int, data_rank: int, data_size: int) -> range:
    """Sample numbers of one part of the batch: the parts in their order are the global batch, for every number of them."""
    per_rank = global_batch_size // data_size
    return range(first + data_rank * per_rank, first + (data_rank + 1) * per_rank)


def micro_batches(
    source: SampleSource, numbers: range, micro_batch_size: int, device: torch.device, spans: Spans | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(tokens, targets) of the samples, each [micro_batch_size, seq_length] int64 on the device; of `spans` alone if given."""
    spans = spans or ((0, source.seq_length),)
    rows = _read(source, numbers, spans)
    return [_to_device(rows[i : i + micro_batch_size], spans, device) for i in range(0, len(rows), micro_batch_size)]


def mesh_spans(config: RunConfig, mesh: Mesh, *, training: bool = False) -> Spans:
    """The tokens of every sequence that this rank reads, in training or in an evaluation."""
    piece = config.tokens_at_once(training=training)
    return own_spans(config.training.seq_length, piece, mesh.cp_rank, mesh.cp_size)


class BatchReader:
    """This rank's micro-batches of one step after the other, read by a thread while the steps before them compute.

    Attributes:
        stall_s: seconds that steps have waited for data in this process.

    An error while reading is raised when that batch is taken.
    """

    def __init__(self, source: SampleSource, config: RunConfig, mesh: Mesh) -> None:
        self.stall_s = 0.0
        self._source, self._mesh = source, mesh
        self._global_batch_size = config.training.global_batch_size
        self._micro_batch_size = config.training.micro_batch_size
        self._depth = config.data.prefetch_steps
        self._end_id = source.end_id if config.data.reset_at_documents else None
        self._spans = mesh_spans(config, mesh, training=True)
        self._pending: collections.deque[tuple[int, Future[np.ndarray]]] = collections.deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batch-reader")

    def take(self, first: int, *, is_last: bool = False) -> list[tuple[Tensor, Tensor]]:
        """(tokens, targets) of the global batch that begins at sample `first`, as `micro_batches` gives them.

        Args:
            first: number of its first sample. Batches that were read for another position are dropped.
            is_last: read nothing ahead.
        """
        started = time.perf_counter()
        if not self._pending or self._pending[0][0] != first:
            self._drop()
            self._submit(first)
        rows = self._pending.popleft()[1].result()
        for ahead in range(1, 1 if is_last else self._depth + 1):
            if len(self._pending) < ahead:
                self._submit(first + ahead * self._global_batch_size)
        self.stall_s += time.perf_counter() - started
        size = self._micro_batch_size
        return [_to_device(rows[i : i + size], self._spans, self._mesh.device) for i in range(0, len(rows), size)]

    def documents(self, tokens: Tensor) -> Tensor | None:
        """Documents of a micro-batch [B, T] if they are read apart, else None. Collective under context parallelism."""
        return None if self._end_id is None else document_numbers(tokens, self._end_id, self._mesh)

    def _submit(self, first: int) -> None:
        numbers = rank_samples(first, self._global_batch_size, self._mesh.data_rank, self._mesh.data_size)
        self._pending.append((first, self._pool.submit(_read, self._source, numbers, self._spans)))

    def _drop(self) -> None:
        while self._pending:
            self._pending.popleft()[1].cancel()

    def close(self) -> None:
        """Stop reading ahead and end the thread."""
        self._drop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read(source: SampleSource, numbers: Sequence[int], spans: Spans) -> np.ndarray:
    """int64 [samples, tokens of the spans and for each its last target]."""
    if spans == ((0, source.seq_length),):
        return np.stack([source.sample(number) for number in numbers])
    return np.stack(
        [np.concatenate([source.sample(number, first, stop + 1) for first, stop in spans]) for number in numbers]
    )


def document_numbers(tokens: Tensor, end_id: int, mesh: Mesh | None = None) -> Tensor:
    """Number of the document of every token within its sequence, [B, T] int64; an end mark belongs to what it ends.

    With the mesh of a context-parallel rank, whose tokens are a slice: of the whole sequences, [B, T cp]. Collective; ranks tell
    each other where documents end, a byte per token.
    """
    ends = tokens == end_id
    if mesh is not None and mesh.cp_size > 1:
        parts = [torch.empty_like(ends, dtype=torch.uint8) for _ in range(mesh.cp_size)]
        dist.all_gather(parts, ends.to(torch.uint8), group=mesh.cp_group)
        ends = torch.cat(parts, 1)
    ends = ends.long()
    return ends.cumsum(1) - ends


def heldout_batches(
    source: SampleSource,
    num_sequences: int,
    batch_size: int,
    data_rank: int,
    data_size: int,
    device: torch.device,
    spans: Spans | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `num_sequences` samples, spread over data-parallel ranks; of each the tokens of `spans`.

    Every rank gets equally many batches of the same shape, because collectives need that; where there is nothing left,
    targets are IGNORE.
    """
    num_sequences, spans = min(num_sequences, source.num_samples), spans or ((0, source.seq_length),)
    for first in range(0, num_sequences, batch_size * data_size):
        numbers = [first + data_rank * batch_size + row for row in range(batch_size)]
        rows = _read(source, [min(number, num_sequences - 1) for number in numbers], spans)
        tokens, targets = _to_device(rows, spans, device)
        for row, number in enumerate(numbers):
            if number >= num_sequences:
                targets[row] = IGNORE
        yield tokens, targets


def _to_device(rows: np.ndarray, spans: Spans, device: torch.device) -> tuple[Tensor, Tensor]:
    samples = torch.from_numpy(rows)
    if device.type == "cuda":
        samples = samples.pin_memory().to(device, non_blocking=True)
    if samples.dim() == 3:
        tokens, targets = samples.unbind(1)
    else:
        stretches = samples.split([stop - first + 1 for first, stop in spans], 1)
        tokens, targets = (torch.cat(part, 1) for part in zip(*((x[:, :-1], x[:, 1:]) for x in stretches)))
    return tokens.clamp(min=0), torch.where(targets < 0, IGNORE, targets)
