"""Clocks inside the context: what is refused, and the closed forms."""

from __future__ import annotations

import pytest

from hope_megatron.config import ConfigError, load_model_config, resolve_run_config
from hope_megatron.config.accounting import in_context_flops, num_parameters
from hope_megatron.config.footprint import estimate, footprint
from hope_megatron.config.hardware import find_hardware

FAST = ["cms.levels.0.inner_chunk_tokens=64", "cms.levels.0.inner_rate=0.01"]
SLOW = ["cms.levels.1.inner_chunk_tokens=256", "cms.levels.1.inner_rate=0.01"]


def run_of(*overrides):
    data = {
        "name": "test",
        "model": "hope_tiny",
        "training": {"steps": 100, "seq_length": 1024, "global_batch_size": 64},
        "optim": {"warmup_steps": 0},
        "data": {"train": "a", "tokenizer": "b"},
    }
    return resolve_run_config(data, [f"model.{x}" if x.startswith("cms") else x for x in overrides], source="test")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cms.levels.0.inner_rate=0.1"], "no inner_chunk_tokens"),
        ([*FAST, "cms.levels.0.inner_weight_decay=200"], "overshoot"),
        ([*FAST, *SLOW, "cms.levels.1.inner_chunk_tokens=96"], r"levels\[0\].inner_chunk_tokens=64 does not divide"),
        ([*FAST, "cms.connection=nested"], "needs two levels"),
        (
            [*FAST, *SLOW, "cms.connection=nested", "cms.levels.1.inner_rate_kind=per_channel"],
            "whose channels are others",
        ),
        ([*FAST, "parallel.zero_stage=3"], "zero_stage=3"),
        (["training.truncate_tokens=100"], "does not divide training.seq_length"),
        ([*FAST, "training.truncate_tokens=32"], "not a multiple of the fastest"),
        ([*FAST, "training.truncate_tokens=64", "cms.levels.0.inner_rate_kind=learned"], "at least two chunks"),
        (
            [
                *FAST,
                "cms.levels.0.inner_chunk_tokens=1",
                "parallel.tensor_parallel=2",
                "parallel.sequence_parallel=true",
            ],
            "not divisible by parallel.tensor_parallel",
        ),
        (
            [*FAST, "cms.levels.0.inner_chunk_tokens=3", "training.seq_length=1536", "parallel.context_parallel=2"],
            "inner_chunk_tokens=3 does not divide into 2 slices",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_of(*overrides)


def test_a_rate_of_zero_is_no_clock():
    model = load_model_config(
        "hope_tiny", ["cms.levels.0.inner_chunk_tokens=64", "cms.levels.0.inner_rate_kind=learned"]
    )
    assert not model.cms.learns_in_context
    assert num_parameters(model) == num_parameters(load_model_config("hope_tiny"))
    assert in_context_flops(model, 1024) == 0


def test_segments_are_those_of_the_fastest_clock():
    assert load_model_config("hope_tiny", [*FAST, *SLOW]).cms.inner_segment_tokens == 64


def test_inner_clocks_cost_a_backward_pass_and_copies():
    static, clocked, truncated = (run_of(*changes) for changes in ((), FAST, (*FAST, "training.truncate_tokens=256")))
    row = find_hardware("h100")
    ratio = estimate(clocked, 1, row).flops_per_token / estimate(static, 1, row).flops_per_token
    assert ratio == pytest.approx(5 / 3)
    level = 4 * 256 * 3 * static.model.cms.levels[0].hidden_size
    # the second logits, for the inner loss, are small beside what the memories' backward needs
    more = footprint(clocked, 1).activations - footprint(static, 1).activations
    assert more == pytest.approx(level * (4 + 2 * 1024 / 64))
    assert footprint(truncated, 1).activations < footprint(clocked, 1).activations / 3
