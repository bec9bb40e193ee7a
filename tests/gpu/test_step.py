"""Training on one GPU: steps, ZeRO-1, offload, checkpoints that resume bit for bit, exports."""

from __future__ import annotations

import math

import pytest
import torch

from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config
from hope_megatron.testing.training import advance, build
from hope_megatron.training.state import TrainingState


def steps(num_steps=3, **changes):
    config = tiny_run_config(**changes)
    return advance(build(config), config, TrainingState(), num_steps)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_follows_float32(zero_stage):
    expected = steps(zero_stage=1, training={"float32_products": "float32"}, optim={"ns_dtype": "float32"})
    for (loss, norm), (other, other_norm) in zip(expected, steps(zero_stage=zero_stage, precision="bf16")):
        assert loss == pytest.approx(other, rel=0.02) and norm == pytest.approx(other_norm, rel=0.1)


def test_offload_updates_as_the_gpu_does():
    config = tiny_run_config()
    offloaded = config.model_copy(update={"parallel": config.parallel.model_copy(update={"cpu_offload": True})})
    found = [advance(build(c), c, TrainingState(), 3) for c in (config, offloaded)]
    for (loss, _), (other, _) in zip(*found):
        assert loss == pytest.approx(other, rel=1e-3)


def test_a_step_waits_for_the_device_once(monkeypatch):
    config = tiny_run_config(precision="bf16")
    engine, state = build(config), TrainingState()
    advance(engine, config, state, 2)  # what is made once waits too
    waits = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            if self.is_cuda:
                waits.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    advance(engine, config, state, 1)
    assert len(waits) <= 1, waits


def test_deterministic_runs_resume_bit_for_bit(tmp_path):
    from hope_megatron.training.run import run_training

    changes = {"training": {"deterministic": True, "steps": 4}, "checkpoint": {"every": 2}}
    whole = run_training(tiny_run_config(output_dir=tmp_path / "whole", **changes), RepeatingSource())
    half = tiny_run_config(
        output_dir=tmp_path / "half", training={"deterministic": True, "steps": 2}, checkpoint={"every": 2}
    )
    run_training(half, RepeatingSource())
    resumed = run_training(tiny_run_config(output_dir=tmp_path / "half", **changes), RepeatingSource())
    for name, value in whole.engine.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.engine.model.state_dict()[name]), name


def test_kernels_of_the_memories_agree_with_pytorch():
    losses = []
    for kernel in ("torch", "phases", "auto"):
        config = tiny_run_config(hidden_size=64)
        memory = config.model.memory.model_copy(update={"kernel": kernel, "chunk_tokens": 16})
        config = config.model_copy(update={"model": config.model.model_copy(update={"memory": memory})})
        losses.append([loss for loss, _ in advance(build(config), config, TrainingState(), 3)])
    assert all(math.isfinite(loss) for loss in losses[0])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-2)


def test_memory_in_use_is_recorded():
    from hope_megatron.training.speed import memory_bytes

    steps(1)
    found = memory_bytes(torch.device("cuda", torch.cuda.current_device()))
    assert found["gpu/reserved_gib"] >= found["gpu/allocated_gib"] > 0 and found["gpu/peak_gib"] > 0
