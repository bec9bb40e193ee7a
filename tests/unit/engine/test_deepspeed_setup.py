"""What the engine tells DeepSpeed."""

from __future__ import annotations

import pytest

from hope_megatron.config import ConfigError
from hope_megatron.engine.deepspeed_setup import deepspeed_config
from hope_megatron.testing.tiny import tiny_run_config


def test_accumulation_follows_from_the_world():
    config = tiny_run_config(training={"global_batch_size": 8, "micro_batch_size": 2})
    assert deepspeed_config(config, 1)["gradient_accumulation_steps"] == 4
    assert deepspeed_config(config, 2)["gradient_accumulation_steps"] == 2


def test_world_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ConfigError, match="global_batch_size=4 is not divisible"):
        deepspeed_config(tiny_run_config(), 3)


def test_bf16_accumulates_in_fp32_and_refuses_overflow():
    settings = deepspeed_config(tiny_run_config(precision="bf16"), 1)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert settings["communication_data_type"] == "fp32"  # sums over ranks too
    assert "bf16" not in deepspeed_config(tiny_run_config(), 1)


def test_zero_0_in_bf16_is_refused():
    with pytest.raises(ValueError, match="set zero_stage=1"):
        tiny_run_config(zero_stage=0, precision="bf16")
