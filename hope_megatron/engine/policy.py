"""How exactly a device computes, set in one place. docs/performance.md has the whole table of precisions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from hope_megatron.config.training import TrainingConfig


def apply_policy(training: TrainingConfig, device: torch.device) -> None:
    """Set what PyTorch and its libraries ask for: TF32, and deterministic algorithms. Before the first product on a GPU.

    Under `training.deterministic` PyTorch raises where an operator has no deterministic form, and names it.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision(matmul_precision(training))
        torch.backends.cudnn.allow_tf32 = training.float32_products == "tf32"
    if not training.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it with its first handle
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every allocation
    torch.backends.cudnn.benchmark = False  # picks algorithms by their time
    if device.type == "cuda":
        import torch._inductor.config as inductor

        if hasattr(inductor, "deterministic"):
            inductor.deterministic = True  # compiled regions pick block sizes by their time otherwise


def matmul_precision(training: TrainingConfig) -> str:
    """PyTorch's name for how GPUs multiply float32 matrices."""
    return "high" if training.float32_products == "tf32" else "highest"


@contextlib.contextmanager
def policy_restored() -> Iterator[None]:
    """Put PyTorch's settings back at the end."""
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
