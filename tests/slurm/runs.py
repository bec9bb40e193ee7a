"""What the tests do with a run: submit it by command line, wait for it to come to a step, hurt it, and compare what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from local_slurm import LocalSlurm
from safetensors.numpy import load_file

from hope_megatron.training.metrics import read_metrics

STEPS = 14
BATCH = 4
TIMEOUT_S = 240.0


class Workspace:
    """Configurations of tiny runs in a directory, and the cluster that trains them."""

    def __init__(self, directory: Path, slurm: LocalSlurm) -> None:
        self.directory = directory
        self.slurm = slurm
        self.run_file = self._write_yaml("run.yaml", self._run())
        self.cluster_file = self.write_cluster("cluster.yaml")

    def _run(self) -> dict[str, Any]:
        data = self.directory / "data"
        levels = [{"hidden_size": 32}, {"hidden_size": 32, "update_period_steps": 4}]
        model = {"name": "tiny", "vocab_size": 400, "num_layers": 1, "hidden_size": 32, "num_heads": 2}
        return {
            "name": "tiny",
            "output_dir": str(self.directory / "runs"),
            "model": {**model, "memory": {"chunk_tokens": 16}, "cms": {"levels": levels}},
            "optim": {"name": "m3", "lr": 0.003, "warmup_steps": 2},
            "training": {
                "steps": STEPS,
                "seq_length": 64,
                "global_batch_size": BATCH,
                "precision": "fp32",
                "log_every": 1,
                "eval_sequences": 2,
            },
            "data": {
                "train": str(data / "train"),
                "heldout": str(data / "heldout"),
                "tokenizer": str(data / "tokenizer.model"),
            },
            "checkpoint": {"every": 3},
            "resilience": {"hang": {"min_s": 600}},  # tests hold ranks still
        }

    def write_cluster(self, name: str, **changes: Any) -> Path:
        """A cluster file for the local cluster; without the node check unless `changes` say otherwise."""
        cluster = {
            "partition": "main",
            "time_limit": "00:10:00",
            "stop_before_end_s": 60,
            "python": sys.executable,
            "health": {"enabled": False},
        }
        return self._write_yaml(name, {**cluster, **changes})

    def _write_yaml(self, name: str, values: dict[str, Any]) -> Path:
        path = self.directory / name
        path.write_text(yaml.safe_dump(values))
        return path

    def hope(self, *arguments: object, code: int = 0) -> str:
        """Output of a `hope` command on the login node, which must end with the exit code."""
        command = [sys.executable, "-m", "hope_megatron", *map(str, arguments)]
        done = subprocess.run(command, env=self.slurm.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, (
            f"hope {' '.join(map(str, arguments))}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout + done.stderr

    def submit(self, name: str, *arguments: object, cluster: Path | None = None) -> Run:
        """`hope launch` of the tiny run under a name."""
        self.hope("launch", self.run_file, f"name={name}", "--cluster", cluster or self.cluster_file, *arguments)
        return Run(self, self.directory / "runs" / name)


class Run:
    """A launched run, seen from outside."""

    def __init__(self, workspace: Workspace, directory: Path) -> None:
        self.workspace = workspace
        self.slurm = workspace.slurm
        self.directory = directory

    @property
    def job_id(self) -> str:
        return json.loads((self.directory / "launch" / "submission.json").read_text())["job_id"]

    @property
    def log(self) -> str:
        path = self.directory / "launch" / "job.log"
        return path.read_text() if path.exists() else ""

    def attempts(self) -> list[dict[str, Any]]:
        """Ends of the attempts, in order."""
        lines = (self.directory / "launch" / "attempts.jsonl").read_text().splitlines()
        return [record for line in lines if line and (record := json.loads(line))["event"] == "end"]

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl, without a last line that is still being written."""
        return read_metrics(self.directory / "metrics.jsonl")

    def step(self) -> int:
        """The last recorded step."""
        return max((record["step"] for record in self.records()), default=0)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                queue = self.slurm.run("squeue", "-o", "%i %T %r %N", check=False)
                raise AssertionError(f"waited in vain for {what}\n{queue}\n{self.log}")
            time.sleep(0.1)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step has been recorded."""
        self.wait(lambda: self.step() >= step, f"step {step}")

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until the job's log has a text so many times."""
        self.wait(lambda: self.log.count(text) >= times, f"{text!r} in the log")

    def wait_for_end(self) -> str:
        """Wait until the job has left the queue; returns its state."""
        self.wait(lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), "the end of the job")
        return self.state()

    def state(self) -> str:
        """State of the job."""
        fields = self.slurm.run("scontrol", "show", "job", "--oneliner", self.job_id).split()
        return next(field.removeprefix("JobState=") for field in fields if field.startswith("JobState="))

    def nodes(self) -> list[str]:
        """Nodes of the job, rank by rank."""
        fields = self.slurm.run("scontrol", "show", "job", "--oneliner", self.job_id).split()
        nodes = next(field.removeprefix("NodeList=") for field in fields if field.startswith("NodeList="))
        return self.slurm.run("scontrol", "show", "hostnames", nodes).split()

    def kill_rank(self, rank: int) -> None:
        """SIGKILL to the process of a rank."""

        def kill() -> bool:
            return any(_signal(process, signal.SIGKILL) for process in self._processes(rank))

        self.wait(kill, f"rank {rank} to kill")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the ranks where they are, so that a fault meets them there however fast the machine steps."""
        processes = self._processes()
        for process in processes:
            _signal(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                _signal(process, signal.SIGCONT)

    def _processes(self, rank: int | None = None) -> list[int]:
        """Processes of a rank, or of all ranks, found by their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended meanwhile
                lines = path.read_bytes().decode(errors="replace").split("\0")
                environment = dict(line.split("=", 1) for line in lines if "=" in line)
                ours = environment.get("HOPE_LAUNCH_DIR") == f"{self.directory}/launch/reports"
                if ours and "RANK" in environment and rank in (None, int(environment["RANK"])):
                    found.append(int(path.parent.name))
        return found

    def final_state(self) -> dict[str, bytes]:
        """Every tensor of the last step's checkpoint: weights, optimizer states, random generators."""
        state = {}
        for path in sorted((self.directory / "checkpoints" / f"step-{STEPS:08d}").glob("rank-*.safetensors")):
            tensors = load_file(path)
            state |= {f"{path.stem}/{name}": array.tobytes() for name, array in tensors.items()}
        return state

    def trajectory(self) -> list[tuple[int, int, float]]:
        """(step, samples seen, loss) of every record."""
        return [(record["step"], record["train/samples"], record["train/loss"]) for record in self.records()]


def _signal(process: int, number: signal.Signals) -> bool:
    """Send a signal; whether the process was still there."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True
