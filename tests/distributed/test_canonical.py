"""`reduction: canonical`: 1, 2 and 4 ranks give the same bits, in losses, norms, weights and optimizer states."""

from __future__ import annotations

import pytest

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build


def train(rank, world_size, optimizer):
    import hashlib

    from hope_megatron.checkpoint.shards import live_shards
    from hope_megatron.training.state import TrainingState

    found = {}
    for reduction in ("canonical", "fast"):
        config = tiny_run_config(
            zero_stage=0,
            training={"steps": 8, "global_batch_size": 8, "reduction": reduction},
            optim={"name": optimizer, "lr": 3e-3},
        )
        engine, state = build(config), TrainingState()
        history = advance(engine, config, state, 8)
        digest = hashlib.sha256()
        for piece in live_shards(engine):
            for name, tensor in sorted(piece.tensors.items()):
                digest.update(f"{name}/{piece.parameter}".encode() + tensor.contiguous().numpy().tobytes())
        found[reduction] = history, digest.hexdigest()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["m3", "adamw"])
def test_any_number_of_ranks_gives_the_same_bits(optimizer):
    one, two, four = (run_distributed(train, world_size, optimizer, timeout_s=280)[0] for world_size in (1, 2, 4))
    assert one["canonical"] == two["canonical"] == four["canonical"]
    assert one["fast"] != two["fast"] or two["fast"] != four["fast"], "the usual reduction has other bits"
    for canonical, fast in zip(one["canonical"][0], one["fast"][0]):
        assert canonical == pytest.approx(fast, rel=1e-4)
