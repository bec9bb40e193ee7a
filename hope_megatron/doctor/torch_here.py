"""Torch, its devices and their driver."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

from hope_megatron.config.torch_build import driver_problem
from hope_megatron.doctor.finding import MISSING, NOTE, OK, WARNING, Finding
from hope_megatron.doctor.output import output_of
from hope_megatron.runtime.formatting import bytes_text

TORCH_PROBE = """
import json, torch
import torch.distributed as dist
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({
    "version": torch.__version__,
    "cuda_build": torch.version.cuda,
    "devices": [
        {"name": d.name, "memory_bytes": d.total_memory, "capability": f"{d.major}.{d.minor}"} for d in devices
    ],
    "bf16": cuda and torch.cuda.is_bf16_supported(),
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda and dist.is_nccl_available() else None,
}))
"""
"""Runs in a process of its own, so that a torch that crashes or hangs is reported instead of ending the report."""


def probe_torch(timeout_s: float = 120.0) -> dict[str, Any]:
    """What torch says about itself and its devices; {"error": ...} if it cannot be asked."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_PROBE],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {timeout_s:.0f} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"ended with exit code {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check_torch(torch: dict[str, Any]) -> list[Finding]:
    """Torch, its devices, and its communication backends."""
    if "error" in torch:
        return [
            Finding("torch", MISSING, f"cannot be used: {torch['error']}", "reinstall it: pip install torch==2.13.0")
        ]
    build = f"CUDA {torch['cuda_build']}" if torch["cuda_build"] else "CPU"
    findings = [Finding("torch", OK, f"{torch['version']} ({build} build)")]
    if torch["devices"]:
        for device in torch["devices"]:
            text = f"{device['name']}, {bytes_text(device['memory_bytes'])}, compute capability {device['capability']}"
            findings.append(Finding("GPU", OK, text))
        if not torch["bf16"]:
            findings.append(Finding("bf16", WARNING, "not supported by this GPU", "set training.precision=fp32"))
    elif shutil.which("nvidia-smi"):
        seen, advice = ("sees no device", "compare nvidia-smi and CUDA_VISIBLE_DEVICES")
        if torch["cuda_build"] is None:
            seen, advice = ("is a CPU build", "install torch from pytorch.org for CUDA")
        findings.append(Finding("GPU", WARNING, f"nvidia-smi is here, but torch {seen}", advice))
    else:
        findings.append(Finding("GPU", NOTE, "none: runs use the CPU over gloo (tests, quickstart, small models)"))
    built_without = (MISSING, "torch was built without it", "install a torch from PyPI or pytorch.org")
    findings.append(Finding("gloo", OK, "available") if torch["gloo"] else Finding("gloo", *built_without))
    if torch["nccl"]:
        findings.append(Finding("NCCL", OK, torch["nccl"]))
    elif torch["devices"]:
        findings.append(Finding("NCCL", *built_without))
    else:
        findings.append(Finding("NCCL", NOTE, "not used without a GPU"))
    return findings


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    lines = (output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "").splitlines()
    return lines[0].strip() if lines else None


def check_driver(torch: dict[str, Any], driver: str | None) -> list[Finding]:
    """The driver against the CUDA that torch was built with, and a torch that GPU nodes could not use."""
    cuda = torch.get("cuda_build")
    if driver is not None and cuda:
        problem = driver_problem(cuda, driver)
        advice = "ask for a newer driver, or install a torch built for an older CUDA: https://pytorch.org/get-started"
        return [
            Finding("driver", MISSING, problem, advice)
            if problem
            else Finding("driver", OK, f"{driver}, for CUDA {cuda}")
        ]
    if driver is None and "error" not in torch and shutil.which("sbatch"):
        if cuda:
            return [
                Finding(
                    "driver", NOTE, f"no GPU on this node; torch is for CUDA {cuda}. Run hope doctor on a GPU node too"
                )
            ]
        advice = "make the environment on a GPU node, or install a CUDA build of torch: https://pytorch.org/get-started"
        return [
            Finding(
                "driver",
                WARNING,
                "a login node, and torch is a CPU build: no GPU node could use it",
                advice,
            )
        ]
    return []
