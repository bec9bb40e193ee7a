"""What a training process finds in its environment: cores, GPUs, and the variables that it and its launcher share.

Nothing here imports torch: most of these variables only count when they are set before torch is loaded.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

LAUNCH_TIME_VARIABLE = "HOPE_LAUNCH_TIME"
"""Unix time at which the start of the workers began: the job's allocation, or the launcher's own start."""


def available_cpus() -> int:
    """CPU cores this process may run on (its affinity mask, which batch systems set)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_gpus() -> int:
    """NVIDIA GPUs visible to this process, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def process_environment(num_threads: int = 1) -> dict[str, str]:
    """Variables for one training process on this machine.

    Args:
        num_threads: CPU threads for torch operators.
    """
    environment = {
        # OpenMP threads that spin while they wait slow several torch processes on few cores down 4 to 6 times.
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(num_threads),
        # PyTorch takes large tensors in huge pages, where the kernel allows a program to ask for them.
        "THP_MEM_ALLOC_ENABLE": "1",
        # MLflow's client must give up on a dead server, not retry for minutes.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    if count_gpus() == 0:
        # The first compiled function costs seconds of Inductor, which pays off on GPUs only.
        environment |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    return environment


def apply_process_environment(num_threads: int = 1) -> None:
    """Set what `process_environment` says in this process, where the user has not chosen otherwise.

    Raises:
        RuntimeError: if torch is imported already, when it is too late.
    """
    if "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        raise RuntimeError("apply_process_environment() must run before torch is imported")
    for name, value in process_environment(num_threads).items():
        os.environ.setdefault(name, value)


def silence_import_warnings() -> None:
    """Keep Megatron-Core and DeepSpeed from announcing on every import which optional packages they do without."""
    for module in ("megatron", "deepspeed", "torch.distributed"):
        warnings.filterwarnings("ignore", module=module.replace(".", r"\."))


def start_up_text(phases: Mapping[str, float]) -> str:
    """`12.3 s: imports 8.1, model 2.0, ...` from seconds by phase."""
    parts = ", ".join(f"{phase.replace('_', ' ')} {seconds:.1f}" for phase, seconds in phases.items())
    return f"{sum(phases.values()):.1f} s: {parts}"


def is_worker() -> bool:
    """Whether a launcher (torchrun, srun) has told this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch_time(environment: Mapping[str, str]) -> float | None:
    """When the start of this worker began; None if no launcher says so."""
    try:
        return float(environment[LAUNCH_TIME_VARIABLE])
    except (KeyError, ValueError):
        return None


def process_start_time() -> float | None:
    """Unix time at which this process was started; None where the system does not tell."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), starttime
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def die_with_parent() -> None:
    """Ask Linux to end this process when its launcher dies, so that a killed launcher leaves no orphans."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
