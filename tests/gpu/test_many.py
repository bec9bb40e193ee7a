"""Several GPUs of one node over NCCL: tensor and sequence parallelism, ZeRO 2 and 3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYOUTS = {
    "tp2-sp": ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"],
    "dp2-zero2": ["parallel.zero_stage=2"],
    "dp2-zero3": ["parallel.zero_stage=3"],
}


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_over_nccl(name, tmp_path):
    out = tmp_path / "train.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "benchmarks/train.py",
    ]
    command += ["--model", "hope_tiny", "--batch", "2", "--json", str(out), *LAYOUTS[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text())["models"]["hope_tiny"]["tokens_per_second"] > 0
