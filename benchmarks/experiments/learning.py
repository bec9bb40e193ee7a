"""What the experiments that train share: families as small models, one training step, results that survive a stop."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hope_megatron.testing.benchmark import machine  # before torch: sets OpenMP's wait policy

import torch  # isort: skip
from torch import Tensor

from hope_megatron.config import ModelConfig, OptimConfig, load_model_config
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.model import build_model
from hope_megatron.optim import build_optimizer
from hope_megatron.parallel.distributed import init_distributed

SILENT = "memory.eta_max=0"  # the control: the same block, which never writes


class Cells:
    """One row per cell of an experiment, written after each: a run that was stopped goes on where it was.

    A cell is known by a mapping of what makes it (model, seed, settings, ...); the same mapping finds its row again.
    """

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self.rows: list[dict[str, Any]] = []
        if self.path and self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def find(self, **cell: Any) -> dict[str, Any] | None:
        """The row of a cell, if it was run."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in cell.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, print it, and write all rows."""
        self.rows.append(row)
        print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)
        if self.path:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({"machine": machine(), "rows": self.rows}, indent=1) + "\n")
            os.replace(part, self.path)


def start(threads: int) -> None:
    """A world of one process."""
    torch.set_num_threads(threads)
    init_distributed(ParallelConfig(), num_threads=threads)


def small_model(family: str, shape: Sequence[str], settings: Sequence[str] = ()) -> ModelConfig:
    """The preset of a family with another shape; both lists hold overrides, `key=value`."""
    return load_model_config(f"{family}_tiny", [*shape, *settings])


class Trainer:
    """A model, its optimizer, and what a step is: gradients clipped to norm 1, a linear warm-up, a scale from outside."""

    def __init__(self, args: argparse.Namespace, config: ModelConfig, seed: int) -> None:
        self.model = build_model(config, seed=seed)
        # one rate for matrices and vectors; weight decay would only matter in longer runs
        optim = OptimConfig(name=args.optimizer, lr=args.lr, weight_decay=0.0)
        self.optimizer = build_optimizer(self.model.named_parameters(), optim)
        self.lr, self.warmup, self.steps = args.lr, args.warmup, 0

    def step(self, loss: Tensor, scale: float = 1.0) -> float:
        """One step on a loss; returns the gradient's norm before clipping."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale * min(1.0, self.steps / self.warmup)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def training_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `start` and `Trainer` read, and where results go."""
    parser.add_argument("--optimizer", choices=["m3", "muon", "adamw"], default="m3")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up (default: 20)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="rows, written after each; those found there are not run again")
