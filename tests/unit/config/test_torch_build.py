"""The torch of an environment, from its files, and what drivers and clusters make of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hope_megatron.config.torch_build import TorchBuild, driver_problem, torch_of
from hope_megatron.doctor.torch_here import check_driver
from launch.cluster import ClusterConfig
from launch.errors import LaunchError
from launch.preflight import _torch

VERSION = """\
from typing import Optional
__version__ = '2.15.0+cu132'
debug = False
cuda: Optional[str] = {!r}
hip: Optional[str] = {!r}
"""


def environment(root: Path, cuda: str | None, hip: str | None = None) -> Path:
    package = root / "lib/python3.13/site-packages/torch"
    package.mkdir(parents=True)
    (package / "version.py").write_text(VERSION.format(cuda, hip))
    return root


def test_the_installed_torch_is_read_as_it_says_itself():
    import torch

    assert torch_of(Path(sys.prefix)) == TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip)


@pytest.mark.parametrize(
    ("cuda", "driver", "words"),
    [
        ("13.0", "580.65.06", None),
        ("13.2", "575.57.08", "575.57.08 is too old for CUDA 13.2, which needs 580.65"),
        ("12.8", "525.60.13", None),
        ("12.1", "470.82", "too old"),
        ("99.0", "1.0", None),
        ("13.0", "unknown", None),
    ],
)
def test_drivers(cuda, driver, words):
    problem = driver_problem(cuda, driver)
    assert problem is None if words is None else words in problem


def test_doctor_compares_driver_and_build(monkeypatch, tmp_path):
    assert check_driver({"cuda_build": "13.0"}, "570.1")[0].status == "missing"
    assert check_driver({"cuda_build": "13.0"}, "580.82")[0].status == "ok"
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_driver({"cuda_build": None}, None)[0].status == "warning"
    assert check_driver({"cuda_build": "13.0"}, None)[0].status == "note"
    monkeypatch.setenv("PATH", "")
    assert check_driver({"cuda_build": None}, None) == []


def test_preflight_refuses_a_cpu_torch_on_a_gpu_cluster(tmp_path):
    venv = environment(tmp_path / "venv", None)
    cluster = ClusterConfig(gpus_per_node=8, hardware="h100", setup=("module load cuda", f"source {venv}/bin/activate"))
    with pytest.raises(LaunchError, match=r"torch 2.15.0\+cu132, a CPU build.*gpus_per_node=8.*CUDA build"):
        _torch(cluster)
    good = cluster.model_copy(update={"setup": (f". {environment(tmp_path / 'good', '13.2')}/bin/activate",)})
    assert "for CUDA 13.2" in _torch(good)
    assert "not looked at" in _torch(cluster.model_copy(update={"setup": ("module load torch",)}))
    assert "none to be seen" in _torch(cluster.model_copy(update={"setup": (f"source {tmp_path}/none/bin/activate",)}))
