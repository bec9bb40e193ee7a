"""Run a function in several real processes over gloo."""

from __future__ import annotations

import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call fn(rank, world_size, *args) in `world_size` fresh processes with a default gloo group ready.

    Args:
        fn: a module-level function; its result must be picklable (move tensors to numpy or keep them small).
        world_size: number of processes.
        timeout_s: limit for the whole call and for every collective.

    Returns:
        The result of each rank, in order.

    Raises:
        RuntimeError: with the traceback of the first rank that failed, or at the time limit.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by OpenMP when the children start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    context = mp.get_context("spawn")
    results: mp.Queue = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        processes = [
            context.Process(target=_child, args=(fn, rank, world_size, store, timeout_s, results, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(results, processes, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(results, processes, timeout_s: float) -> list[Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(found) < len(processes):
        try:
            rank, error, value = results.get(timeout=1.0)
        except queue.Empty:
            dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in found]
            if dead:
                raise RuntimeError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"ranks {sorted(set(range(len(processes))) - set(found))} gave no result in {timeout_s} s"
                ) from None
            continue
        if error is not None:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        found[rank] = value
    return [found[rank] for rank in range(len(processes))]


def _child(fn, rank: int, world_size: int, store: str, timeout_s: float, results, args) -> None:
    import datetime

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timeout
        )
        results.put((rank, None, fn(rank, world_size, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None
