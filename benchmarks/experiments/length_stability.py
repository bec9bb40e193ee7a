"""Which settings of HOPE stay right beyond the lengths they were trained on? A choice that never sees the suites' longer bins.

    python benchmarks/experiments/length_stability.py --json docs/records/data/length_stability.json
    python benchmarks/experiments/length_stability.py --variants w1 "w1, forgetting" --tasks parity

The suite `languages` trains on up to 24 symbols and tests on 25 to 96. Here models are trained on up to 12 and validated on 13 to
24, inside the suite's trained lengths, so that what is chosen here has not seen its test. The same command goes on where it
stopped. Kept of every cell: the share of strings without a mistake at 20 snapshots, for raw and for averaged weights. Printed at
the end: over the snapshots of the last half mean / worst, and at the last one.
"""

from __future__ import annotations

import argparse
import time
from statistics import fmean
from typing import Any

from learning import Cells, start  # before torch: sets OpenMP's wait policy

import numpy as np  # isort: skip

from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.fit import FitOptions, fit_task
from hope_megatron.suites.languages import LANGUAGES
from hope_megatron.suites.models import small_hope, suite_model
from hope_megatron.suites.scoring import score_batch
from hope_megatron.suites.task import Batch, Draw, Split, Task
from hope_megatron.suites.training_data import TrainingData

TRAINED, LONGER = "2-12", "13-24"
FORGETTING = ("memory.eta_init=0.5", "memory.alpha_init=0.9")
ADDING = ("memory.eta_max=0.01", "memory.eta_init=0.5", "memory.alpha_init=0.9999")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "own": ("hope", ()),
    "forgetting": ("hope", FORGETTING),
    "adding": ("hope", ADDING),
    "w1": ("hope_w1", ()),
    "w1, forgetting": ("hope_w1", FORGETTING),
    "w1, adding": ("hope_w1", ADDING),
    "w1, adding, no DGD": ("hope_w1", (*ADDING, "memory.dgd_layers=none")),
    "w1, static keys and values": ("hope_w1", ("memory.adaptive_key=false", "memory.adaptive_value=false")),
    "w1, external targets": ("hope_w1", ("memory.own_targets=false",)),
    "no self-memories": (
        "hope",
        tuple(f"memory.adaptive_{name}=false" for name in ("key", "value", "eta", "alpha")),
    ),
}
TASKS = ("parity", "(aa)*", "(abab)*", "a^n b^n", "shuffle-2")


def main() -> None:
    args = parse()
    start(1)
    cells = Cells(args.json)
    for seed in range(args.seeds):
        for task in args.tasks:
            for variant in args.variants:
                cell = {
                    "task": task,
                    "variant": variant,
                    "seed": seed,
                    "steps": args.steps,
                    "optimizer": args.optimizer,
                }
                if cells.find(**cell) is None:
                    cells.add({**cell, **measure(task, variant, seed, args)})
    table(cells.rows, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=LANGUAGES, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--optimizer", default="m3")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def development_task(name: str) -> Task:
    """A language at the trained lengths and at the longer half; nothing is held out, for nothing is tested."""
    language = LANGUAGES[name]

    def source(split: Split, seed: int) -> Draw:
        def draw(bin_name: str, size: int, rng: np.random.Generator) -> Batch:
            return language.draw(bin_name, size, rng)

        return draw

    return Task(name, language.vocab_size, (TRAINED, LONGER), source, "sequences")


def model_of(task: Task, variant: str) -> ModelConfig:
    family, settings = VARIANTS[variant]
    return suite_model(family, small_hope(task.vocab_size, width=32, layers=2, heads=2, chunk_tokens=1), settings)


def measure(name: str, variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    task, started = development_task(name), time.monotonic()
    options = FitOptions(args.steps, lr=args.lr, optimizer=args.optimizer)
    trained = fit_task(model_of(task, variant), TrainingData(task, seed), options, seed)
    rng = np.random.default_rng((seed, 11))
    batches = {bin_name: task.source("validation", seed)(bin_name, 64, rng) for bin_name in task.bins}
    found: dict[str, Any] = {"snapshots": [snapshot.step for snapshot in trained.snapshots]}
    for kind in ("raw", "averaged"):
        for bin_name, batch in batches.items():
            found[f"{kind} {bin_name}"] = [
                score_batch(trained.use(kind, i), batch, "sequences").value for i in range(len(trained.snapshots))
            ]
        found[f"{kind} end"] = found[f"{kind} {LONGER}"][-1]
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    for kind in ("raw", "averaged"):
        print(
            f"\n{kind} weights at {LONGER}: last half of training, mean / worst over snapshots and seeds; at the end by seed"
        )
        for variant in args.variants:
            texts = []
            for task in args.tasks:
                found = [r for r in rows if (r["task"], r["variant"]) == (task, variant) and r["steps"] == args.steps]
                half = [value for r in found for value in r[f"{kind} {LONGER}"][len(r["snapshots"]) // 2 :]]
                if half:
                    ends = " ".join(f"{r[f'{kind} end']:.2f}" for r in found)
                    texts.append(f"{task}: {fmean(half):.2f} / {min(half):.2f} ({ends})")
            print(f"  {variant:<28} " + "; ".join(texts))


if __name__ == "__main__":
    main()
