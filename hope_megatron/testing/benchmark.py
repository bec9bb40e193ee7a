"""What benchmarks share: a description of the machine, timing, tables, JSON."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# One process alone on the machine: its threads may spin between two small operators, which halves the time of many.
# (Several processes side by side want "passive".) Read when OpenMP starts, so before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "active")
# Long sequences allocate hundreds of MB per call; in pages of 4 KiB the kernel's clearing of them is a fifth of the time.
# Training processes set this as well.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Have glibc's malloc keep blocks of any size when they are freed, for the next ones, as PyTorch does by itself on GPUs.

    Else every pass gets its tensors as fresh pages, which Linux has to clear. Training leaves this to the environment
    (`MALLOC_MMAP_MAX_`, `MALLOC_TRIM_THRESHOLD_`: mallopt(3)), since a process then stays as large as it ever was; where they
    are set they count here too. C libraries other than glibc are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and date of this run."""
    import torch

    found = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "load_average": os.getloadavg()[0],
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(
    run: Callable[[], Any],
    *,
    repeats: int,
    device: str = "cpu",
    warmup: int = 1,
    before: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Wall time of each of `repeats` runs after `warmup` others. before: called ahead of every run, outside its time."""
    import torch

    times = []
    for i in range(warmup + repeats):
        before()
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(time.perf_counter() - started)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Right-aligned columns, the first one left."""
    cells = [
        [
            f"{x:,.0f}" if isinstance(x, float) and abs(x) >= 100 else f"{x:.3g}" if isinstance(x, float) else str(x)
            for x in row
        ]
        for row in rows
    ]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    for row in [header, *cells]:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))), flush=True)


def write_json(path: str | None, results: dict[str, Any]) -> None:
    """Write every figure, if a file was asked for."""
    if path:
        Path(path).write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {path}")
