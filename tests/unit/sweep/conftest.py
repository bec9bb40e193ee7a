"""Sweep files and simulated runs that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hope_megatron.sweep.collect import Observation
from hope_megatron.sweep.frontier import Curve
from hope_megatron.sweep.laws import CHINCHILLA, LossLaw

SWEEP: dict[str, Any] = {
    "name": "toy",
    "base": {
        "training": {"steps": 20, "seq_length": 64, "global_batch_size": 4, "precision": "fp32"},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "data": {"train": "data/train", "heldout": "data/heldout", "tokenizer": "data/tokenizer.model"},
    },
    "families": {
        "hope": {"model": "hope_tiny", "model.vocab_size": 512},
        "transformer_pp": {"model": "transformer_pp_tiny", "model.vocab_size": 512},
    },
    "hardware": {"name": "cpu"},
}


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep file: the toy one with the given sections laid over it."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**SWEEP, "output_dir": str(tmp_path / "sweeps"), **changes}))
        return path

    return write


def isoflop_design(
    budgets: tuple[float, ...] = (1e18, 1e19, 1e20, 1e21), sizes: int = 5, span: float = 6.0
) -> tuple[np.ndarray, np.ndarray]:
    """N and D of an isoFLOP design around the Chinchilla optimum, with C = 6 N D."""
    n = np.concatenate([CHINCHILLA.optimum(c).parameters * np.geomspace(1 / span, span, sizes) for c in budgets])
    return n, np.repeat(budgets, sizes) / (6 * n)


def simulated_runs(
    law: LossLaw = CHINCHILLA, *, noise: float = 0.0, seed: int = 0, family: str = "x"
) -> list[Observation]:
    """Runs of an isoFLOP design that follow a law."""
    rng = np.random.default_rng(seed)
    runs = []
    for n, d in zip(*isoflop_design()):
        along = np.geomspace(d / 100, d, 40)
        curve = Curve(n, 6 * n * along, along, law(n, along))
        loss = float(law(n, d)) * float(np.exp(noise * rng.normal()))
        runs.append(
            Observation(
                name=f"{family}-{n:.3g}",
                family=family,
                parameters=float(n),
                tokens=float(d),
                flops=float(6 * n * d),
                loss=loss,
                curve=curve,
            )
        )
    return runs
