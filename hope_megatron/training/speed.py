"""How fast a run is, against what its devices can do, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hope_megatron.config.accounting import forward_flops, in_context_flops, recompute_flops
from hope_megatron.config.hardware import HARDWARE, Hardware
from hope_megatron.config.run import RunConfig

_GIB = 2.0**30


def hardware_of(device_name: str) -> Hardware | None:
    """The row of the table that a device belongs to, by the name that CUDA gives it; None where there is none."""
    words = device_name.lower().replace("-", " ").split()
    return next((row for key, row in HARDWARE.items() if key in words), None)


def utilization(config: RunConfig, tokens_per_s_per_device: float, hardware: Hardware) -> dict[str, float]:
    """Shares of the device's peak that products take, as metrics.

    mfu: forward and backward, once each. mfu_outer, mfu_inner: its parts, without and of the inner memories. hfu: with what
    backward computes again.
    """
    model, seq_length = config.model, config.training.seq_length
    forward = forward_flops(model, seq_length)
    context = in_context_flops(model, seq_length)
    again = recompute_flops(model, seq_length, config.training.recompute)
    outer = 3 * (forward.total - forward.memory) + context
    inner = 3 * forward.memory
    share = tokens_per_s_per_device / hardware.peak_flops
    return {
        "speed/mfu": share * (outer + inner),
        "speed/mfu_outer": share * outer,
        "speed/mfu_inner": share * inner,
        "speed/hfu": share * (outer + inner + again),
    }


def speed_metrics(config: RunConfig, tokens_per_s: float, world_size: int, device: torch.device) -> dict[str, float]:
    """Tokens per second and device, and where the device is a GPU of the table, its utilization."""
    found = {"speed/tokens_per_s_per_gpu": tokens_per_s / world_size}
    if device.type == "cuda":
        hardware = hardware_of(torch.cuda.get_device_name(device))
        if hardware is not None:
            found |= utilization(config, tokens_per_s / world_size, hardware)
    return found


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes of the GPU by metric name; nothing on a CPU. The peak is that since the last call."""
    if device.type != "cuda":
        return {}
    found = {
        "gpu/allocated_gib": torch.cuda.memory_allocated(device),
        "gpu/reserved_gib": torch.cuda.memory_reserved(device),
        "gpu/peak_gib": torch.cuda.max_memory_allocated(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return found


def in_gib(sizes: Mapping[str, int]) -> dict[str, float]:
    """The same in GiB."""
    return {name: size / _GIB for name, size in sizes.items()}
