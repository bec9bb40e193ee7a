"""`hope doctor`: reports what is there, and fails only for what every run needs."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from hope_megatron.cli.main import main
from hope_megatron.config.environment import fused_kernels
from hope_megatron.doctor.finding import MISSING, NOTE, OK, WARNING
from hope_megatron.doctor.kernels import check_memory_kernel, check_triton_kernels
from hope_megatron.doctor.machine import check_slurm
from hope_megatron.doctor.packages import check_python
from hope_megatron.doctor.torch_here import check_torch, probe_torch


def test_this_machine_is_ready(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["torch"]["gloo"]
    topics = {finding["topic"] for finding in report["findings"]}
    assert {"Python", "torch", "gloo", "NCCL", "GPU", "cores", "memory", "disk", "Slurm"} <= topics
    assert {kernel["name"] for kernel in report["kernels"]} >= {"NVIDIA apex", "Transformer Engine", "PyTorch"}
    assert report["apex"]["kind"] in ("absent", "nvidia", "other")


@pytest.mark.parametrize("compiled", [True, False])
def test_one_row_says_what_computes_memories(compiled, monkeypatch):
    from hope_megatron.ops.memory.backends.cpu import compiling

    def load():
        if not compiled:
            raise compiling.NoKernel("no compiler")
        return SimpleNamespace(_name="kernel.so")

    monkeypatch.setattr(compiling, "load", load)
    (finding,) = check_memory_kernel()
    assert (finding.status == OK) == compiled == ("compiled for this one: kernel.so" in finding.text)
    for cuda in (True, False):
        rows = [kernel for kernel in fused_kernels(cuda=cuda) if "memories" in kernel.why]
        assert [kernel.why.rpartition("; ")[2] for kernel in rows] == [
            "the row `memory kernel` says what computes memories"
        ]


def test_kernels_are_checked_and_the_interpreter_is_named():
    pytest.importorskip("triton", reason="Triton is not installed")
    right, other = check_triton_kernels(["retnet", "yaad"], cuda=False)
    assert right.status == OK and "right, worst error" in right.text and "interpreter" in right.text
    assert other.status == NOTE and "not for this family" in other.text


def test_doctor_survives_a_torch_that_crashes(tmp_path, monkeypatch, capsys):
    (tmp_path / "torch.py").write_text("import os; os.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "cannot be used" in output
    assert "pip install torch" in output


def test_torch_that_cannot_be_imported_gives_its_reason(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "libcudart.so.13" in probe_torch()["error"]


def test_torch_that_hangs(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "did not answer" in probe_torch(timeout_s=1.0)["error"]


GPU = {"name": "GPU", "memory_bytes": 80e9, "capability": "9.0"}
TORCH = {"version": "2.13.0", "cuda_build": "13.0", "devices": [GPU], "bf16": True, "gloo": True, "nccl": "2.29.7"}


@pytest.mark.parametrize(
    ("change", "topic", "status"),
    [
        ({}, "NCCL", OK),
        ({"nccl": None}, "NCCL", MISSING),
        ({"nccl": None, "devices": []}, "NCCL", NOTE),
        ({"gloo": False}, "gloo", MISSING),
        ({"bf16": False}, "bf16", WARNING),
        ({"devices": [], "bf16": False}, "GPU", NOTE),
    ],
)
def test_findings_about_torch(change, topic, status, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    findings = {finding.topic: finding for finding in check_torch({**TORCH, **change})}
    assert findings[topic].status == status
    assert bool(findings[topic].advice) == (status in (MISSING, WARNING))


def test_python_outside_the_supported_range(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert check_python()[0].status == MISSING


def test_slurm_whose_controller_is_silent(tmp_path, monkeypatch):
    for name, body in (("sinfo", '[ "$1" = --version ] && echo slurm 22.05.8'), ("sbatch", ""), ("srun", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = check_slurm()[0]
    assert finding.status == NOTE
    assert finding.text.startswith("slurm 22.05.8")
