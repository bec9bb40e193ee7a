"""A tiny real run to be hurt: data and run file in a directory, `hope train` on them, and the digest of what is left."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hope_megatron.training.metrics import read_metrics

VOCAB_SIZE = 384
UNREPEATABLE = ("speed/", "time/", "checkpoint/", "straggler/")
"""Metrics that are clocks, and not state of the run."""

_RUN = """\
name: {name}
output_dir: {root}/runs
model:
  vocab_size: {vocab_size}
  num_layers: 1
  hidden_size: 32
  num_heads: 2
  memory: {{chunk_tokens: 8}}
  cms: {{levels: [{{hidden_size: 32}}, {{hidden_size: 32, update_period_steps: 3}}]}}
parallel: {{tensor_parallel: {tp}, sequence_parallel: {sequence_parallel}, zero_stage: {zero_stage}}}
optim: {{name: m3, lr: 5.0e-3, slow_period_steps: 7, warmup_steps: 2}}
training: {{steps: {steps}, seq_length: 16, global_batch_size: 4, precision: fp32, log_every: 1, memory_every: 50}}
data: {{train: {root}/data/train, heldout: {root}/data/heldout, tokenizer: {root}/tokenizer.model}}
checkpoint: {{every: {every}, keep_last: 4}}
tracking: {{mlflow: false}}
resilience: {{hang: {{min_s: {hang_s}, first_step_s: {first_step_s}}}, allow_faults: true}}
"""


class Drill:
    """A directory with data, and runs on them.

    Args:
        root: made if it does not exist.
        ranks, tp, zero_stage: the layout of the runs.
        steps, every: their length, and how often they save.
        hang_s: `resilience.hang.min_s`; the first step of a process has ten times as long.
    """

    def __init__(
        self,
        root: Path,
        *,
        ranks: int = 2,
        tp: int = 2,
        zero_stage: int = 1,
        steps: int = 40,
        every: int = 10,
        hang_s: float = 4.0,
    ) -> None:
        self.root, self.ranks = root.absolute(), ranks
        self.values = {
            "root": self.root,
            "vocab_size": VOCAB_SIZE,
            "tp": tp,
            "sequence_parallel": "true" if tp > 1 else "false",
            "zero_stage": zero_stage,
            "steps": steps,
            "every": every,
            "hang_s": hang_s,
            "first_step_s": 10 * hang_s,
        }

    def prepare(self) -> None:
        """Make tokenizer and shards of a little text, once."""
        from data_pipeline import train_tokenizer
        from data_pipeline.prepare import prepare

        if (self.root / "data").exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        sources = [Path(str(module.__file__)).read_text() for module in (argparse, json, contextlib, random)]
        for number in range(80):
            text = sources[number % 4]
            start = number * 611 % max(1, len(text) - 4000)
            (self.root / f"text-{number}.txt").write_text(text[start : start + 4000])
        texts = [path.read_text() for path in sorted(self.root.glob("text-*.txt"))]
        train_tokenizer(texts, self.root / "tokenizer.model", VOCAB_SIZE)
        pattern = str(self.root / "text-*.txt")
        prepare([pattern], self.root / "tokenizer.model", self.root / "data", held_out_fraction=0.2, workers=1)

    def run_dir(self, name: str) -> Path:
        """Directory of a run."""
        return self.root / "runs" / name

    def write(self, name: str) -> Path:
        """The file of a run."""
        path = self.root / f"{name}.yaml"
        path.write_text(_RUN.format(name=name, **self.values))
        return path

    def start(self, name: str, faults: str = "", *overrides: str, log: Path | None = None) -> subprocess.Popen[str]:
        """`hope train` with its supervisor; its output goes to a file, or into a pipe."""
        command = [sys.executable, "-m", "hope_megatron", "train", str(self.write(name)), "--nproc", str(self.ranks)]
        environment = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HOPE_FAULTS")
        }
        environment |= {"HOPE_FAULTS": faults} if faults else {}
        output = open(log, "a") if log is not None else subprocess.PIPE  # noqa: SIM115 (the child's)
        return subprocess.Popen(
            [*command, "--oversubscribe", *overrides],
            env={**environment, "OMP_WAIT_POLICY": "passive"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, faults: str = "", *overrides: str, timeout_s: float = 280) -> tuple[int, str]:
        """Exit code and output of a run."""
        process = self.start(name, faults, *overrides)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"the run did not end:\n{output[-4000:]}") from None
        return process.returncode, output


def final_state(run_dir: Path) -> dict[str, str]:
    """Digests of everything that is state: every tensor of the last checkpoint with all clocks and positions, and every step's
    loss, norm and sample count, each exactly once."""
    newest = sorted((run_dir / "checkpoints").glob("step-*/manifest.json"))[-1].parent
    found = {"step": newest.name}
    for path in sorted(newest.glob("*.safetensors")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    description: dict[str, Any] = json.loads((newest / "checkpoint.json").read_text())
    description["progress"].pop("wall_s")
    for part in ("progress", "data", "optimizer", "layout", "parameters", "files"):
        found[part] = _digest(description[part])
    records = read_metrics(run_dir / "metrics.jsonl")
    found["every step once"] = str([record["step"] for record in records] == list(range(1, len(records) + 1)))
    found["metrics"] = _digest([_repeatable(record) for record in records])
    return found


def _repeatable(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith(UNREPEATABLE)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
