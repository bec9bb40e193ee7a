"""What one rank does to check its node: `srun python -m launch.node_check local|pair RESULTS` (launch/health.py judges).

Each rank leaves RESULTS/rank-N.json with `problems` (sentences; empty if all is well) and what it measured.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from hope_megatron.runtime.files import write_json
from hope_megatron.runtime.process import apply_process_environment
from launch.step import free_port
from launch.worker import rank_environment

_COLLECTIVE_TIMEOUT_S = 60
_MIN_FREE_GPU_SHARE = 0.9
_MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}
_REPEATS = 5


def main() -> int:
    """Check, and leave a report."""
    stage, results = sys.argv[1], Path(sys.argv[2])
    os.environ.update(rank_environment(dict(os.environ)))
    apply_process_environment()
    options = json.loads((results / "options.json").read_text())
    report: dict[str, Any] = {"node": os.environ["SLURMD_NODENAME"], "problems": []}
    try:
        if stage == "local":
            check_local(options, report)
        else:
            check_pair(options, report)
    except Exception as error:
        report["problems"].append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    write_json(results / f"rank-{int(os.environ['RANK']):05d}.json", report)
    # Not an orderly exit: destructors of a broken process group may hang.
    os._exit(0)


def check_local(options: dict[str, Any], report: dict[str, Any]) -> None:
    """The rank's own device, and the node's scratch directory and free port."""
    report["port"] = free_port(options["ports"], int(os.environ["SLURM_JOB_ID"]))
    if os.environ["LOCAL_RANK"] == "0":
        report["problems"] += scratch_problems(Path(options["scratch"]), options["min_free_scratch_gb"])
    report["problems"] += device_problems(options["gpus"])


def scratch_problems(scratch: Path, min_free_gb: float) -> list[str]:
    """What is wrong with a directory for temporary files."""
    probe = scratch / f".hope-check-{os.getpid()}"
    try:
        status = os.statvfs(scratch)
        free_gb = status.f_bavail * status.f_frsize / 1e9
        if free_gb < min_free_gb:
            return [f"{scratch} has {free_gb:.1f} GB free, less than {min_free_gb:g}"]
        with open(probe, "wb") as file:
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        return [f"{scratch} cannot be written: {error.strerror}"]
    return []


def device_problems(gpus: int) -> list[str]:
    """What is wrong with this rank's GPU: missing, used by somebody else, or computing wrongly."""
    if not gpus:
        return []
    import torch

    found = torch.cuda.device_count()
    if found < gpus:
        return [f"{found} GPUs seen, {gpus} expected"]
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    free, total = torch.cuda.mem_get_info(device)
    if free < _MIN_FREE_GPU_SHARE * total:
        return [f"GPU {device.index}: {(total - free) / 1e9:.1f} GB are in use by another process"]
    # Small integers, whose products and sums are exact in bf16 and fp32.
    left = torch.arange(1024 * 1024, device=device).remainder(3).reshape(1024, 1024)
    right = left.t().contiguous()
    expected = left.cpu().double() @ right.cpu().double()
    product = left.bfloat16() @ right.bfloat16()
    if not torch.equal(product.cpu().double(), expected.bfloat16().double()):
        return [f"GPU {device.index}: a matrix product is wrong"]
    return []


def check_pair(options: dict[str, Any], report: dict[str, Any]) -> None:
    """An all-reduce among the ranks of a pair of nodes."""
    import torch
    import torch.distributed as dist

    node, local_rank = report["node"], int(os.environ["LOCAL_RANK"])
    pair = next((pair for pair in options["pairs"] if node in pair["nodes"]), None)
    if pair is None:  # an odd one out in this round
        return
    ranks_per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    rank, world_size = pair["nodes"].index(node) * ranks_per_node + local_rank, len(pair["nodes"]) * ranks_per_node
    device = torch.device("cuda", local_rank) if options["gpus"] else torch.device("cpu")
    timeout = datetime.timedelta(seconds=_COLLECTIVE_TIMEOUT_S)
    store = dist.TCPStore(pair["nodes"][0], pair["port"], world_size, is_master=rank == 0, timeout=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    bandwidth, correct = measure_all_reduce(device)
    report["bandwidth_gb_s"] = round(bandwidth, 3)
    if not correct:
        report["problems"].append("the all-reduce gave a wrong sum")
    if options["min_bandwidth_gb_s"] is not None and bandwidth < options["min_bandwidth_gb_s"]:
        report["problems"].append(
            f"all-reduce bandwidth {bandwidth:.2f} GB/s, less than {options['min_bandwidth_gb_s']:g}"
        )
    dist.barrier()
    report["time"] = time.time()
    store.set(f"done-{rank}", b"")
    if rank == 0:  # the store lives in this process: stay until nobody needs it
        store.wait([f"done-{other}" for other in range(world_size)], timeout)


def measure_all_reduce(device: Any) -> tuple[float, bool]:
    """(bus bandwidth in GB/s, whether the sum is right) of all-reduces over the default group."""
    import torch
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    numbers = _MESSAGE_BYTES[device.type] // 4
    data = torch.full((numbers,), float(rank + 1), device=device)
    dist.all_reduce(data)
    correct = bool((data == world_size * (world_size + 1) // 2).all())
    _synchronize(device)
    started = time.monotonic()
    for _ in range(_REPEATS):
        dist.all_reduce(data)
    _synchronize(device)
    seconds = (time.monotonic() - started) / _REPEATS
    return 2 * (world_size - 1) / world_size * 4 * numbers / seconds / 1e9, correct


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
