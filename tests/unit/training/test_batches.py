"""Every sample is seen exactly once, however many ranks there are."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.testing.tiny import SEQ_LENGTH, RepeatingSource
from hope_megatron.training.batches import IGNORE, heldout_batches, micro_batches, rank_samples

CPU = torch.device("cpu")


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
