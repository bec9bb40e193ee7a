"""Checkpoints of real training in the formats of Megatron-Core and DeepSpeed, loaded by those libraries on several ranks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build


def live_state(engine):
    """Every tensor this rank owns, and every clock."""
    from hope_megatron.checkpoint.shards import group_scalars, live_shards

    pieces = {
        f"{state}/{piece.parameter}/{piece.offset}": view.clone()
        for piece in live_shards(engine)
        for state, view in piece.tensors.items()
    }
    return pieces, group_scalars(engine)


def load_with_deepspeed(engine, directory, **kwargs):
    engine._deepspeed._config.load_universal_checkpoint = True
    path, _ = engine._deepspeed.load_checkpoint(directory, **kwargs)
    assert path is not None


def formats(rank, world_size, directory):
    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file

    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.checkpoint.find import CheckpointSource
    from hope_megatron.checkpoint.format import read_full_tensors
    from hope_megatron.checkpoint.generators import seed_generators
    from hope_megatron.checkpoint.reshard import write_checkpoint
    from hope_megatron.checkpoint.unsharded import compare_unsharded, read_unsharded
    from hope_megatron.convert.deepspeed.universal import read_universal, write_universal
    from hope_megatron.convert.torch_dist import read_torch_dist, torch_dist_weights, write_torch_dist
    from hope_megatron.training.state import TrainingState

    base, found = Path(directory), {}
    config, state = tiny_run_config(tp=2, sequence_parallel=True, zero_stage=1, mup_base_width=16), TrainingState()
    engine = build(config)
    seed_generators(config.training.seed, engine.mesh.dp_rank)
    advance(engine, config, state, 4)
    description = {"progress": state.to_dict(), "config": config.model_dump(mode="json"), "provenance": {}, "data": {}}
    path = Checkpointer(engine, base / "run").save_now(description)
    if rank == 0:
        unsharded = read_unsharded(CheckpointSource(path))
        found["numbers"] = write_torch_dist(unsharded, base / "dist"), write_universal(unsharded, base / "universal")
        back, also = read_torch_dist(base / "dist"), read_universal(base / "universal")
        assert compare_unsharded(back, also) == compare_unsharded(unsharded, back)
        found["clocks and position"] = unsharded.description == back.description == also.description
        write_checkpoint(back, back.layout, base / "back")
        write_checkpoint(also, also.layout, base / "also")
        pairs = [
            (load_file(base / name / f), load_file(path / f))
            for name in ("back", "also")
            for f in ("rank-00000.safetensors", "rank-00001.safetensors")
        ]
        found["back bitwise"] = all(
            left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
            for left, right in pairs
        )
    engine.control.gather(None)

    shards = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    for parameter in engine.model.parameters():
        parameter.data.fill_(float("nan"))
    loaded = dist_checkpointing.load({"model": engine.model.sharded_state_dict()}, str(base / "dist"))["model"]
    found["Megatron-Core reads"] = all(torch.equal(loaded[name], shards[name]) for name in shards)
    for name, parameter in engine.model.named_parameters():
        parameter.data.copy_(shards[name])
    if rank == 0:
        (base / "theirs").mkdir()
    engine.control.gather(None)
    # Megatron-Core writes from child processes, which Python forbids the daemons that run_distributed starts.
    multiprocessing.current_process()._config["daemon"] = False
    dist_checkpointing.save(engine.model.sharded_state_dict(), str(base / "theirs"))
    written, full = dict(torch_dist_weights(base / "theirs")), dict(read_full_tensors(path))
    found["Megatron-Core writes"] = written.keys() == full.keys() and all(
        torch.equal(written[n], full[n]) for n in full
    )

    expected, clocks = live_state(engine)
    engine = build(config)
    load_with_deepspeed(engine, base / "universal")
    tensors, their_clocks = live_state(engine)
    found["DeepSpeed reads, same ranks"] = their_clocks == clocks and all(
        torch.equal(tensors[key], expected[key]) for key in expected
    )
    undisturbed = advance(engine, config, TrainingState(**state.to_dict()), 2)
    for stage, name in ((2, "DeepSpeed reads, DP2 ZeRO-2"), (3, "DeepSpeed reads, DP2 ZeRO-3")):
        other = tiny_run_config(zero_stage=stage, mup_base_width=16)
        engine = build(other)
        load_with_deepspeed(engine, base / "universal", load_module_only=stage == 3)
        steps = advance(engine, other, TrainingState(**state.to_dict()), 2)
        found[name] = [abs(a - b) for (a, _), (b, _) in zip(steps, undisturbed)]
    return found


@pytest.mark.distributed
def test_megatron_and_deepspeed_load_what_was_converted(tmp_path):
    first, second = run_distributed(formats, 2, str(tmp_path), timeout_s=240)
    assert first["numbers"][0] == first["numbers"][1] > 0
    assert first["back bitwise"] and first["clocks and position"]
    for found in (first, second):
        assert found["Megatron-Core reads"] and found["Megatron-Core writes"]
        assert found["DeepSpeed reads, same ranks"]
        assert max(found["DeepSpeed reads, DP2 ZeRO-2"]) < 1e-6
        assert found["DeepSpeed reads, DP2 ZeRO-3"][0] < 1e-6  # weights alone: the update after the first step differs
