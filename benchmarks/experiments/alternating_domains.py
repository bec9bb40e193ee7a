"""What does M3's slow momentum buy on a stream that alternates between two domains? Held-out loss of both after every phase.

    python benchmarks/experiments/alternating_domains.py --json alternating.json     minutes on one core; a repeated command goes on
    python benchmarks/experiments/alternating_domains.py --quick                     seconds, to see that it runs

A small Transformer++ reads code without its documentation strings, then documentation strings, then code again, and so on (from the
standard library of this Python), a phase of as many steps each, at a constant rate after a short warm-up. A direction that both
domains share should live longer than a phase; the slow momentum is what M3 has for it. Compared are M3 without it (a = 0), at its
defaults (a = 0.5, f = 10), and with a slow clock as long as a phase; AdamW stands beside. Rates are tried on seed 1000 with
validation text. The seeds that are reported are other ones; their held-out text decides nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from hope_megatron.testing.benchmark import machine, print_table

import torch  # isort: skip  (after common has set OpenMP's wait policy)

from hope_megatron.config.optim import OptimConfig
from hope_megatron.optim import build_optimizer
from hope_megatron.runtime.files import write_text
from hope_megatron.suites.domains import OWN_TEXT
from hope_megatron.suites.fit import small_model
from hope_megatron.suites.models import family_model, small_hope
from hope_megatron.suites.scoring import batch_loss, score_batch
from hope_megatron.suites.task import Split, Task
from hope_megatron.suites.text import text_source
from hope_megatron.suites.training_data import TrainingData

DOMAINS = ("code", "docs")
PHASES, PHASE_STEPS, BATCH, CONTEXT, WIDTH = 6, 60, 8, 64, 32
WARMUP = 10
TRY_SEED, SEEDS = 1000, (0, 1, 2)
RATES = {"adamw": (1e-3, 3e-3, 1e-2, 3e-2), "m3": (1e-2, 3e-2, 1e-1)}
SETTINGS: dict[str, dict[str, Any]] = {
    "m3, a 0": {"name": "m3", "slow_weight": 0.0},
    "m3, a 0.5, f 10": {"name": "m3"},
    "m3, a 0.5, f 60": {"name": "m3", "slow_period_steps": PHASE_STEPS},
    "adamw": {"name": "adamw"},
}


def tasks() -> list[Task]:
    """The two domains."""
    return [Task(name, 256, ("held out",), text_source(OWN_TEXT[name], CONTEXT), "loss") for name in DOMAINS]


def run(setting: dict[str, Any], lr: float, seed: int, phases: int, split: Split) -> list[list[float]]:
    """Loss [phases, domains] in nats per byte on a split, after every phase."""
    torch.manual_seed(seed)
    config = family_model("transformer_pp", small_hope(256, width=WIDTH, layers=2, heads=2, chunk_tokens=16))
    model = small_model(config, seed)
    optimizer = build_optimizer(
        model.named_parameters(), OptimConfig.model_validate({"weight_decay": 0.01, "lr": lr, **setting})
    )
    data = [TrainingData(task, seed) for task in tasks()]
    asked = [task.source(split, seed)("held out", 64, _draws(seed, i)) for i, task in enumerate(tasks())]
    base, losses = [group["lr"] for group in optimizer.param_groups], []
    for phase in range(phases):
        for step in range(phase * PHASE_STEPS, (phase + 1) * PHASE_STEPS):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
            model.train()
            batch_loss(model, data[phase % 2].batch(step, BATCH)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append([score_batch(model, batch, "loss").value for batch in asked])
    return losses


def _draws(seed: int, domain: int) -> Any:
    import numpy as np

    return np.random.default_rng((seed, 7, domain))


def figures(losses: list[list[float]]) -> dict[str, float]:
    """Mean over the later half of the phases: of the domain just learnt, of the other one, and of both."""
    later = list(enumerate(losses))[len(losses) // 2 :]
    here = statistics.mean(row[phase % 2] for phase, row in later)
    away = statistics.mean(row[1 - phase % 2] for phase, row in later)
    return {"learnt last": here, "the other": away, "both": (here + away) / 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="keep finished cells here, and go on from them")
    parser.add_argument("--quick", action="store_true", help="one rate, one seed, two phases")
    args = parser.parse_args()
    phases, seeds = (2, SEEDS[:1]) if args.quick else (PHASES, SEEDS)
    cells: dict[str, Any] = {}
    if args.json and args.json.exists():
        cells = json.loads(args.json.read_text(encoding="utf-8"))["cells"]

    def cell(name: str, lr: float, seed: int, split: Split) -> dict[str, float]:
        key = f"{name}, {lr:g}, {split} {seed}, {phases} phases"
        if key not in cells:
            cells[key] = run(SETTINGS[name], lr, seed, phases, split)
            if args.json:
                write_text(args.json, json.dumps({"machine": machine(), "cells": cells}, indent=1) + "\n")
            print(key, figures(cells[key]), flush=True)
        return figures(cells[key])

    rows = []
    for name, setting in SETTINGS.items():
        rates = RATES[setting["name"]][: 1 if args.quick else None]
        best = min(rates, key=lambda lr: cell(name, lr, TRY_SEED, "validation")["both"])
        found = [cell(name, best, seed, "test") for seed in seeds]
        spread = {k: [f[k] for f in found] for k in found[0]}
        rows.append([name, f"{best:g}", *(_with_spread(values) for values in spread.values())])
    print_table(["optimizer", "rate", "learnt last", "the other", "both"], rows)


def _with_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
