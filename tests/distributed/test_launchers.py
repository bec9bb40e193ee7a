"""Real launchers, each with a tiny run of two ranks: one world, one run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hope_megatron.runtime.world import forget_launcher
from hope_megatron.testing.drill import Drill, final_state
from hope_megatron.training.metrics import read_metrics

pytestmark = pytest.mark.distributed

LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m"],
}


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    drill = Drill(tmp_path_factory.mktemp("launchers"), steps=2, every=2, hang_s=60)
    drill.prepare()
    return drill


@pytest.fixture(scope="module")
def supervised(drill: Drill) -> dict[str, str]:
    code, output = drill.run("supervised")
    assert code == 0, output
    return final_state(drill.run_dir("supervised"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_run_of_two_ranks(launcher: str, drill: Drill, supervised: dict[str, str]) -> None:
    if shutil.which(LAUNCHERS[launcher][0]) is None:
        pytest.skip(f"{launcher} is not installed (Debian: apt-get install openmpi-bin)")
    environment = dict(os.environ)
    forget_launcher(environment)
    done = subprocess.run(
        [*LAUNCHERS[launcher], "hope_megatron", "train", str(drill.write(launcher))],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert final_state(drill.run_dir(launcher)) == supervised
    assert [record["step"] for record in read_metrics(Path(drill.run_dir(launcher)) / "metrics.jsonl")] == [1, 2]
