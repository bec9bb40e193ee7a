"""What to do when a GPU is full: the plan's figure beside the real one, and settings that need less."""

from __future__ import annotations

from pathlib import Path

import torch

from hope_megatron.config.footprint import footprint
from hope_megatron.config.run import RunConfig
from hope_megatron.runtime.disks import best_effort
from hope_megatron.runtime.formatting import bytes_text


class OutOfMemoryError(Exception):
    """A GPU is full. The message has the plan's figure beside the real one, and what to change."""

    is_user_error = True


def explained(
    error: torch.OutOfMemoryError, config: RunConfig, world_size: int, rank: int, snapshot: Path | None
) -> OutOfMemoryError:
    """An error of the allocator with figures and advice.

    Args:
        error: as PyTorch raised it.
        config: the run.
        world_size, rank: of the process that ran out.
        snapshot: where a snapshot of its memory was written, if it was.
    """
    planned, peak = footprint(config, world_size), 0
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    parts = {
        "weights": planned.weights,
        "gradients": planned.gradients,
        "optimizer": planned.optimizer,
        "memory states": planned.memory_states,
        "activations": planned.activations,
        "memory kernels": planned.memory_kernels,
    }
    largest = sorted(parts, key=parts.__getitem__, reverse=True)[:2]
    lines = [
        f"rank {rank} ran out of GPU memory: {str(error).split('. ')[0]}",
        f"allocated at most {bytes_text(peak)}; `hope plan` counts {bytes_text(planned.total)} without temporaries, most of "
        "it " + " and ".join(f"{name} ({bytes_text(parts[name])})" for name in largest),
        f"Change: {'; '.join(advice(config))}",
    ]
    if snapshot is not None:
        lines.append(f"What lay in memory: {snapshot} (open it at pytorch.org/memory_viz)")
    return OutOfMemoryError("\n  ".join(lines))


def advice(config: RunConfig) -> list[str]:
    """Settings that need less memory than these, the cheapest first."""
    training, parallel = config.training, config.parallel
    found = []
    if training.micro_batch_size > 1:
        found.append(f"training.micro_batch_size={training.micro_batch_size // 2} (the global batch stays)")
    if training.recompute != "layer":
        found.append("training.recompute=layer")
    if parallel.zero_stage < 3:
        found.append(f"parallel.zero_stage={parallel.zero_stage + 1}")
    if not parallel.cpu_offload:
        found.append("parallel.cpu_offload=true")
    if parallel.tensor_parallel < 8:
        found.append(f"parallel.tensor_parallel={2 * parallel.tensor_parallel} parallel.sequence_parallel=true")
    return found or ["training.truncate_tokens, which bounds how far backward reaches"]


def snapshot_beside(directory: Path, rank: int) -> Path | None:
    """Write what lies in the GPU's memory now; None without a GPU, or if it cannot be written."""
    if not torch.cuda.is_available():
        return None
    path = directory / "profile" / f"out_of_memory_rank_{rank}.pickle"
    with best_effort(str(path)):
        path.parent.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    return path if path.exists() else None
