"""Run a function in several real processes over gloo."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Read when OpenMP, dynamo and DeepSpeed are imported. OpenMP threads that spin while they wait would starve the other ranks.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}
# Imported once, by the process from which ranks are forked: 5 s of each rank's life otherwise.
_PRELOAD = [
    "torch",
    "megatron.core.tensor_parallel",
    "hope_megatron.engine.preload",
    "hope_megatron.testing.distributed",
]


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call fn(rank, world_size, *args) in `world_size` new processes with a default gloo group ready.

    Args:
        fn: a module-level function; its result must be picklable.
        world_size: number of processes.
        timeout_s: limit for the whole call and for every collective.

    Returns:
        The result of each rank, in order.

    Raises:
        RuntimeError: with the traceback of the first rank that failed, or at the time limit.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    environment = dict(os.environ)  # the server has that of its own start
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes: list[BaseProcess] = [
            context.Process(
                target=_child, args=(fn, rank, world_size, folder, timeout_s, environment, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(folder, processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(folder: Path, processes: list[BaseProcess], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    waiting = set(range(len(processes)))
    while waiting:
        ended = {rank for rank in waiting if processes[rank].exitcode is not None}
        for rank in sorted(waiting):
            if (folder / f"{rank}.error").exists():
                raise RuntimeError(f"rank {rank} failed:\n{(folder / f'{rank}.error').read_text()}")
            if (folder / f"{rank}.result").exists():
                waiting.discard(rank)
            elif rank in ended:
                raise RuntimeError(f"rank {rank} died with exit code {processes[rank].exitcode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(waiting)} gave no result in {timeout_s} s")
        time.sleep(0.01)
    # Written by our own children, in a directory that only they can write.
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(len(processes))]


def _child(fn, rank: int, world_size: int, folder: Path, timeout_s: float, environment: dict[str, str], args) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        result = fn(rank, world_size, *args)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early would cut its peers off
        _write(folder / f"{rank}.result", lambda path: torch.save(result, path))
    except BaseException:
        error = traceback.format_exc()
        _write(folder / f"{rank}.error", lambda path: path.write_text(error))
    for child in multiprocessing.active_children():  # Megatron-Core keeps one that writes checkpoints
        child.kill()
    os._exit(0)  # libraries take seconds to leave


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """All at once: the parent looks while we write."""
    partial = path.with_suffix(".partial")
    write(partial)
    partial.replace(path)
