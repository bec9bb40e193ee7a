"""What PyTorch is told about precision and determinism."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.engine.policy import apply_policy, matmul_precision, policy_restored
from hope_megatron.optim.new_optimizer import newton_schulz_dtype
from hope_megatron.testing.tiny import tiny_run_config

CPU = torch.device("cpu")


def test_deterministic_is_asked_of_pytorch_and_put_back():
    with policy_restored():
        apply_policy(tiny_run_config(training={"deterministic": True}).training, CPU)
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_cpus_multiply_float32_in_full():
    with policy_restored():
        apply_policy(tiny_run_config().training, CPU)
        assert torch.get_float32_matmul_precision() == "highest"
    assert matmul_precision(tiny_run_config().training) == "high"


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_newton_schulz_runs_in_bf16_on_gpus(name, device, dtype):
    assert newton_schulz_dtype(name, device) is dtype
