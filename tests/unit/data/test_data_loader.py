from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from data_pipeline.errors import SamplingError
from data_pipeline.loader import BatchLoader
from data_pipeline.manifest import Manifest
from data_pipeline.stream import TokenStream


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("depth", [1, 4])
def test_batches_come_in_order_whatever_the_threads(manifest: Manifest, threads: int, depth: int) -> None:
    stream = TokenStream(manifest, 16, seed=1)
    with BatchLoader(TokenStream(manifest, 16, seed=1), 6, 5, 1, 2, 3, depth=depth, threads=threads) as loader:
        for step in range(5, 40):
            batch = next(loader)
            assert batch.step == step
            assert np.array_equal(batch.tokens, stream.batch(step, 6, 1, 2, 3))


class SlowStream(TokenStream):
    delay = 0.0

    def fill(self, number: int, out: np.ndarray) -> None:
        time.sleep(self.delay)
        super().fill(number, out)


def test_stall_time_is_the_waiting_of_the_consumer(manifest: Manifest) -> None:
    stream = SlowStream(manifest, 16)
    stream.delay = 0.05
    with BatchLoader(stream, 1, depth=2) as loader:
        for _ in range(3):
            next(loader)
        assert loader.stall_seconds > 0.1  # a hungry consumer waits for every batch
        before = loader.stall_seconds
        for _ in range(3):
            time.sleep(0.2)
            assert next(loader).stall_seconds < 0.05
        assert loader.stall_seconds - before < 0.1  # a busy one does not


def test_reading_ahead_is_bounded(manifest: Manifest) -> None:
    numbers: list[int] = []

    class Counting(TokenStream):
        def fill(self, number: int, out: np.ndarray) -> None:
            numbers.append(number)
            super().fill(number, out)

    with BatchLoader(Counting(manifest, 16), 2, depth=3):
        time.sleep(0.2)
    assert sorted(numbers) == list(range(6))


def test_errors_come_with_their_batch_and_threads_end(manifest: Manifest) -> None:
    threads = threading.active_count()
    with BatchLoader(TokenStream(manifest, 16), 4, 0, 0, 3) as loader, pytest.raises(SamplingError, match="divide"):
        next(loader)
    with pytest.raises(SamplingError, match="closed"):
        next(loader)
    with pytest.raises(SamplingError, match="at least 1"):
        BatchLoader(TokenStream(manifest, 16), 4, depth=0)
    assert threading.active_count() == threads
