"""Every sample is seen exactly once, however many ranks there are."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from hope_megatron.config import CMSConfig, CMSLevelConfig
from hope_megatron.testing.tiny import SEQ_LENGTH, RepeatingSource, tiny_run_config
from hope_megatron.training.batches import (
    IGNORE,
    BatchReader,
    document_numbers,
    heldout_batches,
    micro_batches,
    rank_samples,
)

CPU = torch.device("cpu")
INNER = CMSConfig(levels=(CMSLevelConfig(hidden_size=16, inner_chunk_tokens=10, inner_rate=0.1),))


class WatchedSource(RepeatingSource):
    """Knows what was read and by which thread; a sample may take its time, be missing, or hold ids that are no tokens."""

    def __init__(
        self, seq_length: int = SEQ_LENGTH, *, seconds: float = 0.0, missing: int = -1, hole: int = -1
    ) -> None:
        super().__init__(seq_length=seq_length)
        self.seconds, self.missing, self.hole = seconds, missing, hole
        self.read: list[int] = []
        self.threads: set[int] = set()
        self.tokens_read = 0

    def sample(self, number, first=0, stop=None):
        if number == self.missing:
            raise LookupError(f"sample {number} is lost")
        time.sleep(self.seconds)
        self.read.append(number)
        self.threads.add(threading.get_ident())
        sample = super().sample(number)
        if number == self.hole:
            sample[3:6] = -1
        self.tokens_read += len(sample[first:stop])
        return sample[first:stop]


def reader_of(source, *, prefetch_steps: int = 2, dp_rank: int = 1) -> BatchReader:
    """Of one of two ranks, which takes two of the four samples of a step in micro-batches of one."""
    config = tiny_run_config(training={"micro_batch_size": 1})
    data = config.data.model_copy(update={"prefetch_steps": prefetch_steps})
    mesh = SimpleNamespace(data_rank=dp_rank, data_size=2, cp_rank=0, cp_size=1, device=CPU)
    return BatchReader(source, config.model_copy(update={"data": data}), mesh)


@pytest.mark.parametrize("prefetch_steps", [0, 1, 3])
def test_the_reader_gives_the_batches_of_the_positions_it_is_asked_for(prefetch_steps):
    source = RepeatingSource()
    with reader_of(source, prefetch_steps=prefetch_steps) as reader:
        for first in (0, 4, 8, 40, 44, 4, 8):  # going on, forward, and back
            expected = micro_batches(source, range(first + 2, first + 4), 1, CPU)
            for (tokens, targets), (other_tokens, other_targets) in zip(reader.take(first), expected, strict=True):
                assert torch.equal(tokens, other_tokens) and torch.equal(targets, other_targets)


def test_the_reader_reads_ahead_in_a_thread_and_not_beyond_the_last_step():
    source = WatchedSource()
    with reader_of(source) as reader:
        reader.take(0)
        reader.take(4)
        deadline = time.monotonic() + 10
        while len(source.read) < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert source.read == [2, 3, 6, 7, 10, 11, 14, 15]
        assert threading.get_ident() not in source.threads
        reader.take(8)
        reader.take(12, is_last=True)
    assert max(source.read) < 24
    idle = WatchedSource()
    with reader_of(idle) as reader:
        reader.take(0, is_last=True)
    assert idle.read == [2, 3]


def test_a_step_stalls_only_for_what_was_not_read_ahead():
    with reader_of(WatchedSource(seconds=0.1), prefetch_steps=1) as reader:
        reader.take(0)
        first = reader.stall_s
        assert first >= 0.2
        time.sleep(0.6)  # the step computes
        reader.take(4)
        assert reader.stall_s - first < 0.2


def test_an_error_is_raised_by_the_step_that_needs_the_batch():
    with reader_of(WatchedSource(missing=10)) as reader:
        reader.take(0)
        reader.take(4)
        with pytest.raises(LookupError, match="sample 10 is lost"):
            reader.take(8)


def test_ids_that_are_no_tokens_carry_no_loss():
    (tokens, targets), _ = micro_batches(WatchedSource(hole=3), range(3, 5), 1, CPU)
    assert (targets[0, 2:5] == IGNORE).all() and (targets[0] == IGNORE).sum() == 3
    assert tokens.min() >= 0


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_ranks_parts_in_order_are_the_global_batch(dp_size):
    parts = [number for rank in range(dp_size) for number in rank_samples(24, 8, rank, dp_size)]
    assert parts == list(range(24, 32))


def test_micro_batches_shift_by_one_and_keep_order():
    source = RepeatingSource()
    batches = micro_batches(source, range(3, 7), 2, CPU)
    assert [tokens.shape for tokens, _ in batches] == [(2, SEQ_LENGTH)] * 2
    for number, (tokens, targets) in zip((3, 5), batches):
        sample = torch.from_numpy(source.sample(number))
        assert torch.equal(tokens[0], sample[:-1]) and torch.equal(targets[0], sample[1:])


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({}, [16]),
        ({"training": {"truncate_tokens": 8}}, [8, 8]),
        ({"cms": INNER, "training": {"seq_length": 24}}, [10, 10, 4]),
    ],
    ids=["whole", "windows", "inner clocks"],
)
def test_a_context_parallel_rank_reads_its_slice_of_every_piece(changes, pieces):
    config = tiny_run_config(cp=2, **changes)
    length = config.training.seq_length
    whole = micro_batches(WatchedSource(length), range(4), 4, CPU)[0]
    for rank in range(2):
        source = WatchedSource(length)
        mesh = SimpleNamespace(data_rank=0, data_size=1, cp_rank=rank, cp_size=2, device=CPU)
        with BatchReader(source, config, mesh) as reader:
            batches = reader.take(0, is_last=True)
        for found, expected in zip(zip(*batches), whole):
            wanted = [piece.chunk(2, 1)[rank] for piece in expected.split(pieces, 1)]
            assert torch.equal(torch.cat(found), torch.cat(wanted, 1))
        assert source.tokens_read == 4 * (length // 2 + len(pieces))


@pytest.mark.parametrize(("num_sequences", "batch_size", "dp_size"), [(8, 2, 2), (7, 2, 2), (1, 4, 2), (5, 1, 3)])
def test_heldout_sequences_count_once_and_ranks_stay_in_step(num_sequences, batch_size, dp_size):
    source = RepeatingSource()
    ranks = [list(heldout_batches(source, num_sequences, batch_size, r, dp_size, CPU)) for r in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    scored = [row for batches in ranks for _, targets in batches for row in targets if (row != IGNORE).all()]
    expected = {tuple(source.sample(number)[1:]) for number in range(num_sequences)}
    assert len(scored) == num_sequences and {tuple(row.tolist()) for row in scored} == expected


def test_heldout_never_exceeds_what_is_there():
    source = RepeatingSource(num_samples=3)
    assert sum((targets != IGNORE).sum() for _, targets in heldout_batches(source, 100, 2, 0, 1, CPU)) == 3 * SEQ_LENGTH


def test_documents_end_with_their_mark():
    """And they are numbered only where they are to be read apart."""
    tokens = torch.tensor([[5, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6]])
    assert document_numbers(tokens, 0).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert reader_of(RepeatingSource()).documents(tokens) is None
    config = tiny_run_config()
    data = config.data.model_copy(update={"reset_at_documents": True})
    mesh = SimpleNamespace(cp_rank=0, cp_size=1)
    with BatchReader(RepeatingSource(), config.model_copy(update={"data": data}), mesh) as reader:
        assert torch.equal(reader.documents(tokens), document_numbers(tokens, 0))
