"""Bad gradients: a passing one leaves no trace, a lasting one is skipped by all ranks; both at every ZeRO stage."""

from __future__ import annotations

import math

import pytest

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config
from hope_megatron.testing.training import build

LAYOUTS = {
    "tp2-zero1": {"tp": 2, "sequence_parallel": True, "zero_stage": 1},
    "dp2-zero2-bf16": {"zero_stage": 2, "precision": "bf16"},
    "dp2-zero1-bf16": {"zero_stage": 1, "precision": "bf16"},
    "dp2-zero3": {"zero_stage": 3},
    "dp2-zero0": {"zero_stage": 0},
}


def bad_steps(rank, world_size):
    """For each layout: an undisturbed run, one with a fault at step 3 that comes once, and one with a fault that stays."""
    from hope_megatron.engine.engine import NonFiniteError
    from hope_megatron.runtime.heartbeat import HEART
    from hope_megatron.training.batches import BatchReader
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step
    from tests.distributed.test_checkpoint import local_state

    def run(config, steps, times, value=math.nan):
        engine, state = build(config), TrainingState()
        left = [times]

        def spoil(phase, step):
            if phase == "step" and rank == 1 and state.step == 2 and left[0]:
                left[0] -= 1
                shard = max(engine.gradient_shards(), key=lambda tensor: tensor.numel())
                if math.isfinite(value):
                    for tensor in engine.gradient_shards():
                        tensor.mul_(value)
                else:
                    shard.view(-1)[shard.numel() // 2] = value

        HEART.listeners[:] = [spoil]
        with BatchReader(RepeatingSource(), config, engine.mesh) as reader:
            results = [train_step(engine, reader, state, config) for _ in range(steps)]
        HEART.listeners.clear()
        return results, local_state(engine), state

    def same(left, right):
        """ZeRO-3 leaves small parameters gathered or not, as the last pass happened to need them."""
        return left[1] == right[1] and all(
            left[0][name] == data for name, data in right[0].items() if len(left[0][name]) == len(data)
        )

    seen = {}
    for name, layout in LAYOUTS.items():
        config = tiny_run_config(**layout)
        expected = run(config, 4, 0)
        once, always = run(config, 4, 1), run(config, 4, 2)
        undisturbed = run(config, 2, 0)
        frozen = run(config, 3, 2)
        seen[name] = {
            "once": expected[1] == once[1] and once[0][2].recomputed and not once[0][2].skipped,
            "losses": [r.loss for r in expected[0]] == [r.loss for r in once[0]],
            "skipped": [r.skipped for r in always[0]] == [False, False, True, False],
            "clocks": (always[2].step, always[2].samples, always[2].skipped_steps) == (4, 16, 1),
            "unchanged": same(frozen[1], undisturbed[1]),
            "other bits": always[1] != expected[1],
        }
    config = tiny_run_config(zero_stage=1)
    object.__setattr__(config.resilience.bad_step, "nonfinite", "off")
    try:
        run(config, 3, 1)
        seen["off"] = "went on"
    except NonFiniteError as error:
        seen["off"] = str(error)
    return seen


@pytest.mark.distributed
def test_a_passing_fault_leaves_no_trace_and_a_lasting_one_is_skipped():
    first, second = run_distributed(bad_steps, 2, timeout_s=280)
    assert first == second
    assert "gradient norm is NaN" in first.pop("off")
    for name, checks in first.items():
        assert all(checks.values()), (name, checks)


def hard_rules(rank, world_size):
    """Extreme gradients with `act`, and one bad step too many."""
    from hope_megatron.config.resilience import BadStepConfig, ResilienceConfig
    from hope_megatron.engine.engine import NonFiniteError
    from hope_megatron.runtime.heartbeat import HEART
    from hope_megatron.training.batches import BatchReader
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step

    rules = ResilienceConfig(bad_step=BadStepConfig(extreme="act", max_in_a_row=2))
    config = tiny_run_config(training={"steps": 40}).model_copy(update={"resilience": rules})
    engine, state = build(config), TrainingState()

    def spoil(phase, step):
        if phase == "step" and rank == 0 and state.step >= 20:
            for tensor in engine.gradient_shards():
                tensor.mul_(1e4)

    HEART.listeners[:] = [spoil]
    skipped, message = [], ""
    with BatchReader(RepeatingSource(), config, engine.mesh) as reader:
        try:
            while state.step < 40:
                skipped.append(train_step(engine, reader, state, config).skipped)
        except NonFiniteError as error:
            message = str(error)
    HEART.listeners.clear()
    return skipped, message, state.step


@pytest.mark.distributed
def test_extreme_gradients_are_skipped_and_k_in_a_row_stop():
    for skipped, message, step in run_distributed(hard_rules, 2, timeout_s=200):
        assert skipped == [False] * 20 + [True] * 2 and step == 22
        assert "3 steps in a row were bad (extreme gradients" in message
