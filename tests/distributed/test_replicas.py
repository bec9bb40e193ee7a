"""Silent corruption: flips in what ranks share are found, the rank is named where a majority tells; no false alarm."""

from __future__ import annotations

import pytest

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config
from hope_megatron.testing.training import advance, build

LAYOUTS = {
    "dp4-zero1": {"zero_stage": 1},
    "dp4-zero0": {"zero_stage": 0},
    "tp2-dp2-zero2-bf16": {"tp": 2, "sequence_parallel": True, "zero_stage": 2, "precision": "bf16"},
    "dp2-cp2-zero1": {"zero_stage": 1, "cp": 2},
    "dp4-zero3": {"zero_stage": 3},
}


def replicas(rank, world_size):
    import torch

    from hope_megatron.checkpoint.shards import live_shards
    from hope_megatron.testing.faults import _flip
    from hope_megatron.training.batches import micro_batches, rank_samples
    from hope_megatron.training.replicas import Replay, SilentCorruptionError, check_replicas
    from hope_megatron.training.state import TrainingState

    def message(action, *arguments):
        try:
            return action(*arguments)
        except SilentCorruptionError as error:
            return str(error), error.bad_rank

    seen = {}
    for name, layout in LAYOUTS.items():
        config = tiny_run_config(**layout)
        engine, state = build(config), TrainingState()
        checked = []
        for _ in range(6):
            advance(engine, config, state, 1)
            checked.append(check_replicas(engine))
        seen[name, "false alarms"] = checked
        seen[name, "replay"] = []
        for count in range(0 if "cp" in layout else 2):  # a slice of a sequence is not computed twice
            replay = Replay(engine)
            owner = replay.owner(count)
            numbers = rank_samples(state.samples, 4, owner, engine.mesh.dp_size)[:1]
            ((tokens, targets),) = micro_batches(RepeatingSource(), numbers, 1, engine.mesh.device)
            before = message(replay.before_step, owner, tokens, targets, None)
            advance(engine, config, state, 1)
            seen[name, "replay"] += [before, message(replay.after_step)]
        if layout["zero_stage"] == 3:
            continue
        if "cp" not in layout:
            seen[name, "activation"] = wrong_activation(rank, engine, state, message)
        # a flipped parameter
        shared = dict(engine.model.named_parameters())["norm.weight"]
        if rank == 2:
            _flip(shared)
        seen[name, "parameter"] = message(check_replicas, engine)
        if rank == 2:
            _flip(shared)  # and back
        assert check_replicas(engine)
        # a flipped optimizer state that ranks share: of a replicated parameter under TP, of anything at ZeRO 0
        if name in ("dp4-zero0", "tp2-dp2-zero2-bf16"):
            if rank == 1 and name == "dp4-zero0":
                bound = next(b for b in engine.optimizer.bound_vectors() if b.params[0].name == "norm.weight")
                states = engine.optimizer.state[bound.tensor]
                _flip(next(t for t in states.values() if isinstance(t, torch.Tensor) and t.numel() > 1))
            pieces = {piece.parameter: piece.tensors for piece in live_shards(engine)}
            if rank % 2 == 1 and name != "dp4-zero0" and "norm.weight" in pieces:
                _flip(next(t for state_name, t in pieces["norm.weight"].items() if state_name != "master"))
            seen[name, "state"] = message(check_replicas, engine)
        torch.distributed.barrier()
    return seen


def wrong_activation(rank, engine, state, message):
    """What is said of a wrong activation in the pass of one rank, replayed by its partner."""
    from hope_megatron.testing.faults import _flip
    from hope_megatron.training.batches import micro_batches, rank_samples
    from hope_megatron.training.replicas import Replay

    replay = Replay(engine)
    owner = replay.owner(0)
    numbers = rank_samples(state.samples, 4, owner, engine.mesh.dp_size)[:1]
    ((tokens, targets),) = micro_batches(RepeatingSource(), numbers, 1, engine.mesh.device)
    if rank == 1:
        handle = engine.model.layers[0].register_forward_hook(
            lambda m, i, o: _flip(o[0] if isinstance(o, tuple) else o)
        )
    said = message(replay.before_step, owner, tokens, targets, None)
    if rank == 1:
        handle.remove()
    return said


@pytest.mark.distributed
def test_flips_in_replicas_are_found_and_named():
    results = run_distributed(replicas, 4, timeout_s=280)
    for seen in results:
        for (name, what), found in seen.items():
            if what == "false alarms":
                assert len(set(found)) == 1 and (found[0] > 10 or name == "dp4-zero3"), (name, found)
            elif what == "replay":
                assert found == [None] * (0 if "cp" in name else 4), (name, found)
            elif what == "activation":
                assert "the same micro-batch gave other bits on ranks" in found[0], (name, found)
            elif what == "parameter" and name.startswith("dp"):
                assert found == ("silent corruption: norm.weight on rank 2 is not what 3 other ranks hold", 2)
            elif what == "parameter":
                assert "norm.weight" in found[0], found
            elif what == "state" and name == "dp4-zero0":
                assert found[1] == 1 and "of norm.weight on rank 1" in found[0], found
            elif what == "state":
                assert "of norm.weight differs between ranks" in found[0], found
