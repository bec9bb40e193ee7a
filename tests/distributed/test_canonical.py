"""`reduction: canonical`: 1, 2 and 4 ranks give the same bits, in losses, norms, weights and optimizer states."""

from __future__ import annotations

import pytest

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build


def train(rank, world_size, optimizer, zero_stage=0, tp=1):
    import hashlib

    from hope_megatron.checkpoint.shards import live_shards
    from hope_megatron.training.state import TrainingState

    found = {}
    for reduction in ("canonical", "fast"):
        config = tiny_run_config(
            zero_stage=zero_stage,
            tp=tp,
            sequence_parallel=tp > 1,
            training={"steps": 8, "global_batch_size": 8, "reduction": reduction},
            optim={"name": optimizer, "lr": 3e-3},
        )
        engine, state = build(config), TrainingState()
        history = advance(engine, config, state, 8)
        pieces = engine.control.gather(
            [
                [
                    f"{engine.mesh.tp_rank}/{name}/{piece.parameter}",
                    piece.offset,
                    tensor.contiguous().numpy().tobytes().hex(),
                ]
                for piece in live_shards(engine)
                for name, tensor in piece.tensors.items()
            ]
        )
        whole = {}  # at ZeRO 0 all ranks hold the same pieces
        for name, _offset, data in sorted({tuple(piece) for of_rank in pieces for piece in of_rank}):
            whole[name] = whole.get(name, "") + data
        digest = hashlib.sha256(repr(sorted(whole.items())).encode())
        found[reduction] = history, digest.hexdigest()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("optimizer", "zero_stage", "tp", "worlds"),
    [("m3", 0, 1, (1, 2, 4)), ("adamw", 1, 1, (1, 4)), ("m3", 1, 2, (2, 4))],
)
def test_any_number_of_ranks_gives_the_same_bits(optimizer, zero_stage, tp, worlds):
    found = [run_distributed(train, size, optimizer, zero_stage, tp, timeout_s=280)[0] for size in worlds]
    assert all(one["canonical"] == found[0]["canonical"] for one in found)
    assert any(one["fast"] != found[0]["fast"] for one in found), "the usual reduction has other bits"
    for one in found:
        for canonical, fast in zip(one["canonical"][0], one["fast"][0]):
            assert canonical == pytest.approx(fast, rel=1e-4)
