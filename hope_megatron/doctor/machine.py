"""Cores, memory, disks, names, and Slurm."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from hope_megatron.doctor.finding import NOTE, OK, WARNING, Finding
from hope_megatron.doctor.output import output_of
from hope_megatron.runtime.formatting import bytes_text


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
    version = output_of(["sinfo", "--version"])
    partitions = output_of(["sinfo", "--noheader", "--format=%P"])
    if partitions is None:
        text = f"{version or 'installed'}, but it is not configured here or its controller does not answer"
        return [Finding("Slurm", NOTE, text, "see `scontrol ping`; runs on this machine do not need it")]
    return [Finding("Slurm", OK, f"{version}; partitions: {', '.join(partitions.split()) or 'none'}")]


def _available_memory() -> float | None:
    """Bytes that can be taken without swapping; None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: 1024.0 * float(line.split()[1]) for line in lines}
    return values.get("MemAvailable")
