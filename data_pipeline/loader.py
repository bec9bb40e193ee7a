"""Batches ahead of time: reading, checking and downloading happen in threads while the training step computes."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from data_pipeline.errors import SamplingError
from data_pipeline.samples import SampleStream


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch."""

    step: int
    tokens: np.ndarray  # int64 [rows, seq_length + 1], or [num_micro_batches, micro_batch, seq_length + 1]
    stall_seconds: float  # how long the consumer waited for it


class BatchLoader(Iterator[Batch]):
    """An endless iterator over a rank's batches from ``start_step`` on, in order.

    Args:
        stream: where samples come from.
        global_batch: samples per step over all ranks.
        start_step: first step to deliver.
        dp_rank, dp_size: which part of each global batch this rank takes.
        micro_batch: rows per micro-batch; None leaves the batch in one piece.
        depth: batches held ready. Bounds the memory: depth x rows x (seq_length + 1) x 8 bytes.
        threads: batches made at a time. The result does not depend on it.

    Attributes:
        stall_seconds: total time that the consumer has waited.

    An error while making a batch is raised when that batch is asked for. Close the loader, or use it as a context.
    """

    def __init__(
        self,
        stream: SampleStream,
        global_batch: int,
        start_step: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
        micro_batch: int | None = None,
        *,
        depth: int = 4,
        threads: int = 1,
    ) -> None:
        if depth < 1 or threads < 1:
            raise SamplingError(f"depth={depth} and threads={threads} must be at least 1.")
        self.stall_seconds = 0.0
        self._stream = stream
        self._arguments = (global_batch, dp_rank, dp_size, micro_batch)
        self._depth = depth
        self._next_step = start_step  # the next to be started
        self._pending: collections.deque[tuple[int, Future[np.ndarray]]] = collections.deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="batch-loader")
        self._closed = False
        self._fill()

    def _fill(self) -> None:
        while len(self._pending) < self._depth:
            step = self._next_step
            self._pending.append((step, self._pool.submit(self._stream.batch, step, *self._arguments)))
            self._next_step += 1

    def __next__(self) -> Batch:
        if self._closed:
            raise SamplingError("the loader is closed: make a new one at the wanted step.")
        step, future = self._pending.popleft()
        started = time.perf_counter()
        tokens = future.result()
        stalled = time.perf_counter() - started
        self.stall_seconds += stalled
        self._fill()
        return Batch(step, tokens, stalled)

    def close(self) -> None:
        """Stop reading ahead and end the threads."""
        self._closed = True
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
