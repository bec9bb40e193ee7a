"""`srun hope train`: a Slurm step of several tasks on several nodes is one run."""

from __future__ import annotations

import subprocess
import sys

from runs import TIMEOUT_S, Workspace

from data_pipeline.corpus import iterate_texts
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from hope_megatron.training.metrics import read_metrics


def test_srun_on_two_nodes_is_one_run(workspace: Workspace) -> None:
    home = workspace.directory
    if not (home / "data/train/manifest.json").exists():
        tokenizer = train_tokenizer(iterate_texts([str(home / "text.jsonl")]), home / "data/tokenizer.model", 400)
        prepare([str(home / "text.jsonl")], tokenizer, home / "data", held_out_fraction=0.1)
    train = [sys.executable, "-m", "hope_megatron", "train", str(workspace.run_file), "name=bare"]
    train += ["training.steps=2", "tracking.mlflow=false"]
    srun = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--time=5", *train]
    done = subprocess.run(srun, env=workspace.slurm.environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "process 0 of 2, by srun: waiting for the others at node1:" in done.stderr
    run = home / "runs" / "bare"
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == [1, 2]
    assert len(list((run / "checkpoints" / "step-00000002").glob("rank-*.safetensors"))) == 2


def test_contradictory_variables_are_one_line(workspace: Workspace) -> None:
    environment = {
        **workspace.slurm.environment,
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }
    train = [sys.executable, "-m", "hope_megatron", "train", str(workspace.run_file)]
    done = subprocess.run(
        ["srun", "--ntasks=2", "--time=5", *train], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sorted(line.split("process ")[1][:6] for line in ours) == ["0 of 2", "1 of 2"]
    assert all("RANK=0 WORLD_SIZE=3, but srun says" in line for line in ours)
