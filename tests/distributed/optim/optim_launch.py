"""Run a function on several gloo ranks. A fork server imports torch, DeepSpeed and Megatron once for all launches."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_S = 300


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(rank, world_size, *args)` in `world_size` processes with a gloo group; their results in rank order."""
    # DeepSpeed reads these when it is imported; spinning OpenMP threads would starve the other ranks
    os.environ.update(
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        OMP_WAIT_POLICY="passive",
        TORCHDYNAMO_DISABLE="1",
        CUDA_VISIBLE_DEVICES="",
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "megatron.core.tensor_parallel"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, Path(folder), function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return [_collect(rank, process, Path(folder)) for rank, process in enumerate(processes)]
        finally:
            for process in processes:
                process.kill()


def _collect(rank: int, process: Any, folder: Path) -> Any:
    import torch

    process.join(TIMEOUT_S)
    error, result = folder / f"{rank}.err", folder / f"{rank}.pt"
    if error.exists():
        raise RuntimeError(f"rank {rank} failed:\n{error.read_text()}")
    if not result.exists():
        raise RuntimeError(
            f"rank {rank} gave no result (exit code {process.exitcode}, None: still running after {TIMEOUT_S} s)"
        )
    return torch.load(result, weights_only=True)


def _rank_main(rank: int, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
        torch.save(function(rank, world_size, *args), folder / f"{rank}.pt")
        dist.barrier()
    except BaseException:
        (folder / f"{rank}.err").write_text(traceback.format_exc())
    os._exit(0)
