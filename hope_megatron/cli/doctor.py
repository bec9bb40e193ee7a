"""What this machine has, what is missing, and what to do about it.

Exit code 1 only if something that every run needs is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hope_megatron.cli.doctor_fabric import check_fabric
from hope_megatron.cli.doctor_finding import MISSING, NOTE, OK, WARNING, Finding
from hope_megatron.config.environment import fused_kernels, installed_versions, step_libraries
from hope_megatron.config.torch_build import driver_problem
from hope_megatron.runtime.apex import detect_apex
from hope_megatron.runtime.formatting import bytes_text
from hope_megatron.runtime.libraries import Choice

if TYPE_CHECKING:
    from rich.console import Console

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hope doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--kernels",
        nargs="*",
        metavar="FAMILY",
        help="also compile the Triton kernels of memories and hold them against PyTorch: of every family, or of those named "
        "(hope hope_w1). Minutes on a GPU; without one under Triton's interpreter, small",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    torch = probe_torch()
    findings = [
        *check_python(),
        *check_distributions(),
        *check_torch(torch),
        *check_driver(torch, driver_version()),
        *([] if "error" in torch else check_memory_kernel()),
        *check_machine(),
        *check_slurm(),
        *check_fabric(),
    ]
    cuda = bool(torch.get("devices"))
    if args.kernels is not None and "error" not in torch:
        findings += check_triton_kernels(args.kernels, cuda=cuda)
    kernels, libraries = fused_kernels(cuda=cuda), step_libraries(cuda=cuda)
    apex = detect_apex()
    if apex.kind == "other":
        findings.append(Finding("apex", WARNING, apex.describe()))
    if args.json:
        report = {
            "findings": [asdict(finding) for finding in findings],
            "versions": installed_versions(),
            "torch": torch,
            "kernels": [asdict(kernel) for kernel in kernels],
            "libraries": [choice.record() for choice in libraries],
            "apex": {"kind": apex.kind, "location": apex.location, "provides": dict(apex.provides)},
            "ok": not _anything_missing(findings),
        }
        print(json.dumps(report, indent=2))
    else:
        _print(findings, kernels, libraries)
    return 1 if _anything_missing(findings) else 0


def check_python() -> list[Finding]:
    """The interpreter's version."""
    text = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("Python", OK, text)]
    return [Finding("Python", MISSING, text, "use Python 3.11, 3.12 or 3.13")]


def check_memory_kernel() -> list[Finding]:
    """What computes memories, the only row that says so: the operator compiled for this CPU, built if it is not there yet."""
    from hope_megatron.ops.memory.backends.cpu.compiling import NoKernel, load

    try:
        return [
            Finding(
                "memory kernel", OK, f"on CPUs, compiled for this one: {load()._name}; elsewhere PyTorch's operators"
            )
        ]
    except NoKernel as reason:
        text = "none for this CPU: memories run through PyTorch's operators everywhere, several times slower on CPUs"
        return [Finding("memory kernel", NOTE, text, str(reason))]


def check_triton_kernels(families: list[str], *, cuda: bool) -> list[Finding]:
    """The Triton kernels of each family's memories against PyTorch."""
    from hope_megatron.cli.doctor_kernels import check_kernels

    try:
        rows = check_kernels(families, cuda=cuda)
    except RuntimeError as reason:
        return [
            Finding("Triton kernels", WARNING, str(reason), "set model.memory.kernel=phases until this is understood")
        ]
    findings = []
    for row in rows:
        topic, where = f"kernels of {row['family']}", row["device"]
        if not row["taken"]:
            findings.append(Finding(topic, NOTE, f"not for this family: {row['reason']}"))
        elif row["trusted"]:
            findings.append(
                Finding(topic, OK, f"right, worst error {row['worst']:.0e}, in {row['seconds']:.0f} s; {where}")
            )
        else:
            advice = "memory.kernel=auto does not use it; attach the output of `hope doctor --kernels --json` to a bug report"
            findings.append(Finding(topic, WARNING, f"wrong: {row['reason']}; {where}", advice))
    return findings


def check_distributions() -> list[Finding]:
    """Required distributions and their versions, against the installed package's own requirements."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        requirements = requires("hope_megatron") or []
    except PackageNotFoundError:
        advice = "pip install -e . in the source directory, or make quickstart, which does it"
        return [Finding("packages", WARNING, "hope_megatron runs from its sources, not installed", advice)]
    from packaging.requirements import Requirement

    findings, fine = [], []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_versions((requirement.name,))[requirement.name]
        if version is None:
            findings.append(Finding(requirement.name, MISSING, "not installed", f'pip install "{requirement}"'))
        elif not requirement.specifier.contains(version, prereleases=True):
            text = f"{version}, outside the tested {requirement.specifier}"
            findings.append(Finding(requirement.name, WARNING, text, f'pip install "{requirement}"'))
        else:
            fine.append(f"{requirement.name} {version}")
    return [Finding("packages", OK, ", ".join(fine)), *findings]


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
    elif shutil.which("nvidia-smi") and torch["cuda_build"] is None:
        findings.append(
            Finding(
                "GPU",
                WARNING,
                "nvidia-smi is here, but torch is a CPU build",
                "install torch from pytorch.org for CUDA",
            )
        )
    elif shutil.which("nvidia-smi"):
        findings.append(
            Finding(
                "GPU",
                WARNING,
                "nvidia-smi is here, but torch sees no device",
                "compare nvidia-smi and CUDA_VISIBLE_DEVICES",
            )
        )
    else:
        findings.append(Finding("GPU", NOTE, "none: runs use the CPU over gloo (tests, quickstart, small models)"))
    if torch["gloo"]:
        findings.append(Finding("gloo", OK, "available"))
    else:
        findings.append(
            Finding("gloo", MISSING, "torch was built without it", "install a torch from PyPI or pytorch.org")
        )
    if torch["nccl"]:
        findings.append(Finding("NCCL", OK, torch["nccl"]))
    elif torch["devices"]:
        findings.append(
            Finding("NCCL", MISSING, "torch was built without it", "install a torch from PyPI or pytorch.org")
        )
    else:
        findings.append(Finding("NCCL", NOTE, "not used without a GPU"))
    return findings


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    lines = (_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "").splitlines()
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


def check_machine() -> list[Finding]:
    """Cores, memory, disk, shared memory, and whether the host's own name resolves."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    advice = "" if cores >= 2 else "the quickstart runs two processes; on one core they take turns"
    findings = [Finding("cores", OK if cores >= 2 else WARNING, str(cores), advice)]

    memory = _available_memory()
    if memory is not None:
        little = memory < 4e9
        advice = "close other programs; the quickstart needs about 4 GB" if little else ""
        findings.append(Finding("memory", WARNING if little else OK, f"{bytes_text(memory)} available", advice))

    free = shutil.disk_usage(Path.cwd()).free
    little = free < 5e9
    advice = "checkpoints and shards go here by default; set output_dir to a larger disk" if little else ""
    findings.append(Finding("disk", WARNING if little else OK, f"{bytes_text(free)} free at {Path.cwd()}", advice))

    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        little = free < 1e9
        advice = "in a container, give --shm-size=8g or --ipc=host: NCCL and data loaders need it" if little else ""
        findings.append(Finding("/dev/shm", WARNING if little else OK, f"{bytes_text(free)} free", advice))

    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
        findings.append(Finding("host name", OK, f"{name} resolves"))
    except OSError:
        advice = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo for runs on one machine"
        findings.append(Finding("host name", WARNING, f"{name} does not resolve, which gloo may need", advice))
    return findings


def check_slurm() -> list[Finding]:
    """Slurm's commands and version."""
    missing = [command for command in ("sinfo", "sbatch", "srun") if shutil.which(command) is None]
    if missing:
        text = "not here" if len(missing) == 3 else f"{', '.join(missing)} not on PATH"
        return [Finding("Slurm", NOTE, f"{text}: runs start on this machine alone")]
    version = _output(["sinfo", "--version"])
    partitions = _output(["sinfo", "--noheader", "--format=%P"])
    if partitions is None:
        text = f"{version or 'installed'}, but it is not configured here or its controller does not answer"
        return [Finding("Slurm", NOTE, text, "see `scontrol ping`; runs on this machine do not need it")]
    return [Finding("Slurm", OK, f"{version}; partitions: {', '.join(partitions.split()) or 'none'}")]


def _output(command: list[str], timeout_s: float = 10.0) -> str | None:
    """First lines of a command's output, or None if it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _available_memory() -> float | None:
    """Bytes that can be taken without swapping; None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: 1024.0 * float(line.split()[1]) for line in lines}
    return values.get("MemAvailable")


def _anything_missing(findings: list[Finding]) -> bool:
    return any(finding.status == MISSING for finding in findings)


def _print(findings: list[Finding], kernels: list[Any], libraries: list[Choice]) -> None:
    from rich.console import Console

    marks = {
        OK: "[green]ok[/green]",
        NOTE: "[dim]note[/dim]",
        WARNING: "[yellow]warning[/yellow]",
        MISSING: "[red]missing[/red]",
    }
    console = Console(highlight=False)
    _print_rows(console, (row for finding in findings for row in _rows(finding, marks[finding.status])))
    console.print("\n[bold]Fused kernels[/bold]")
    in_use = {True: "[green]in use[/green]", False: "[dim]not used[/dim]"}
    _print_rows(console, ((in_use[bool(kernel.in_use)], kernel.name, kernel.why) for kernel in kernels))
    console.print("\n[bold]Parts of a step (training.libraries)[/bold]")
    _print_rows(
        console,
        (
            (choice.part, choice.library.name, "; ".join(f"not {reason}" for reason in choice.passed_over))
            for choice in libraries
        ),
    )
    missing = sum(finding.status == MISSING for finding in findings)
    warnings = sum(finding.status == WARNING for finding in findings)
    verdict = f"[red]{missing} missing[/red]" if missing else "[green]Ready.[/green]"
    console.print(f"\n{verdict}" + (f" {warnings} warning{'s' if warnings > 1 else ''}." if warnings else ""))


def _rows(finding: Finding, mark: str) -> Iterator[tuple[str, str, str]]:
    yield mark, finding.topic, finding.text
    if finding.advice:
        yield "", "", f"[bold]-> {finding.advice}[/bold]"


def _print_rows(console: Console, rows: Iterable[tuple[str, str, str]]) -> None:
    """Two short columns, and one of text that may take several lines."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
