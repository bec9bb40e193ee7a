"""Is M3 worth choosing? Test loss of AdamW, Muon, AdaMuon and M3 at equal steps, each at its own best learning rate.

    python benchmarks/experiments/optimizer_quality.py --json quality.json --png quality.png     about an hour on one core
    python benchmarks/experiments/optimizer_quality.py --quick                                   a minute, to see that it runs
    python benchmarks/experiments/optimizer_quality.py --tasks digits --optimizers m3 adamw

Tasks: hope_tiny and transformer_pp_tiny at the quickstart's size (two layers of width 128, vocabulary 1,024) on its corpus,
Python's standard library; vision transformers on scikit-learn's digits (8 x 8 pixels) and on letters of three alphabets that are
rendered from matplotlib's fonts (32 x 32 pixels, 120 classes). For each task

1. every optimizer with every learning rate of one grid, seed 0; the grid goes on while the best rate lies at its edge;
2. three other seeds at the best rate: mean and spread;
3. M3 at its best rate with other slow weights a, slow periods f and floors of the denominator, seed 0; the best of these
   with the other seeds.

What is best is decided by one half of what is held out, at seed 0; the other half is the test, which is read at the other seeds.

The schedule is a cosine after a tenth of warm-up; weight decay 0.1; gradients clipped to norm 1; embeddings, heads and norms
take AdamW at the same rate in every case. With --json every cell is written when it is done, and a repeated command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from hope_megatron.testing.benchmark import machine, print_table

import torch  # isort: skip  (after common has set OpenMP's wait policy)
from quality_tasks import Budget, Images, LanguageModel

from hope_megatron.config.optim import OptimConfig
from hope_megatron.config.optimizers import OPTIMIZERS as REGISTRY
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.parallel.distributed import init_distributed

TASKS = ("digits", "glyphs", "transformer_pp_tiny", "hope_tiny")
IMAGES = ("digits", "glyphs")
OPTIMIZERS = ("adamw", "muon", "adamuon", "m3")
RATES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
MAX_EXTENSIONS = 4
TUNING_SEED, SEEDS = 0, (1, 2, 3)
VARIANTS: tuple[dict[str, float], ...] = (
    *({"slow_weight": a} for a in (0.0, 0.2, 1.0)),
    *({"slow_period_steps": f} for f in (3, 30)),
    *({"denominator_floor": floor} for floor in (0.3, 1.0, 3.0)),
    {"slow_weight": 0.2, "denominator_floor": 1.0},
)
LANGUAGE = Budget(steps=250, batch=4, seq_length=128, eval_samples=128)
VISION = Budget(steps=200, batch=64, seq_length=0, eval_samples=0)
CURVE_POINTS = 30


class ResultsError(Exception):
    """The results file cannot be continued."""


class Results:
    """All cells that have been run, kept in a JSON file."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": machine(), "settings": settings, "cells": {}}
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("settings") != settings:
                raise ResultsError(f"{path} holds results of other settings; give another file, or remove it")
            self.content["cells"] = found["cells"]

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """By key, as `key` makes it."""
        return self.content["cells"]

    def add(self, name: str, cell: dict[str, Any]) -> None:
        """Keep a cell, on disk at once."""
        self.cells[name] = cell
        self.write()

    def write(self) -> None:
        """Replace the file whole."""
        if self.path is not None:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)


class Study:
    """One task with all its cells."""

    def __init__(self, name: str, args: argparse.Namespace, results: Results, device: torch.device) -> None:
        self.name, self.args, self.results, self.device = name, args, results, device
        self.budget = budget_of(name, args)
        self._task: Any = None

    def run(self) -> None:
        """Tune, repeat with other seeds, vary M3."""
        for optimizer in self.args.optimizers:
            for seed in SEEDS:
                self.cell(optimizer, self.best_rate(optimizer), seed)
        if "m3" in self.args.optimizers and not self.args.no_variants:
            rate = self.best_rate("m3")
            for variant in VARIANTS:
                self.cell("m3", rate, TUNING_SEED, variant)
            for seed in SEEDS:
                self.cell("m3", rate, seed, self.best_variant())

    def cell(self, optimizer: str, lr: float, seed: int, variant: dict[str, float] | None = None) -> dict[str, Any]:
        """The figures of a cell; trained if it has not been yet."""
        name = key(self.name, optimizer, lr, seed, variant or {})
        if name not in self.results.cells:
            if self._task is None:
                self._task = make_task(self.name, self.args, self.budget, self.device)
            optim = OptimConfig(name=optimizer, lr=lr, warmup_steps=self.budget.steps // 10, **(variant or {}))
            figures = self._task.run(optim, seed)
            train = figures.pop("train")
            every = max(1, self.budget.steps // CURVE_POINTS)
            curve = [round(statistics.mean(train[i : i + every]), 4) for i in range(0, len(train), every)]
            cell = {"task": self.name, "optimizer": optimizer, "lr": lr, "seed": seed, "variant": variant or {}}
            self.results.add(name, {**cell, **figures, "train_curve": curve})
            print(f"{name}: {figures['validation']} ({figures['step_s']:.3f} s/step)", flush=True)
        return self.results.cells[name]

    def tuning_loss(self, optimizer: str, lr: float, variant: dict[str, float] | None = None) -> float:
        """Validation loss at the seed that decides, infinite if the cell diverged."""
        loss = self.cell(optimizer, lr, TUNING_SEED, variant)["validation"]
        return float("inf") if loss is None else loss

    def rates(self, optimizer: str) -> list[float]:
        """The grid, and what follows it by factors of two on the side where the best rate is the last."""
        rates = list(RATES)
        for _ in range(MAX_EXTENSIONS):
            best = min(rates, key=lambda lr: self.tuning_loss(optimizer, lr))
            if best not in (rates[0], rates[-1]):
                break
            rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]
        return rates

    def best_rate(self, optimizer: str) -> float:
        """The rate with the lowest validation loss."""
        return min(self.rates(optimizer), key=lambda lr: self.tuning_loss(optimizer, lr))

    def best_variant(self) -> dict[str, float]:
        """The variant of M3 with the lowest validation loss."""
        return min(VARIANTS, key=lambda variant: self.tuning_loss("m3", self.best_rate("m3"), variant))

    # ---- reporting; all cells are there

    def summary(self) -> dict[str, Any]:
        """Losses by optimizer and by variant."""
        rows = []
        for optimizer in self.args.optimizers:
            rate = self.best_rate(optimizer)
            rows.append(
                {
                    "optimizer": optimizer,
                    "lr": rate,
                    "validation": self.tuning_loss(optimizer, rate),
                    **self._spread(optimizer, rate, {}),
                }
            )
        variants = []
        if "m3" in self.args.optimizers and not self.args.no_variants:
            rate = self.best_rate("m3")
            for variant in ({}, *VARIANTS):
                tuning = self.tuning_loss("m3", rate, variant)
                variants.append(
                    {"variant": describe(variant), "validation": tuning, **self._spread("m3", rate, variant)}
                )
        return {"task": self.name, "optimizers": rows, "m3_variants": variants}

    def _spread(self, optimizer: str, lr: float, variant: dict[str, float]) -> dict[str, Any]:
        keys = [key(self.name, optimizer, lr, seed, variant) for seed in SEEDS]
        cells = [self.results.cells[name] for name in keys if name in self.results.cells]
        losses = [float("inf") if cell["loss"] is None else cell["loss"] for cell in cells]
        accuracies = [cell["accuracy"] for cell in cells if cell.get("accuracy") is not None]
        return {
            "edge": lr in (self.rates(optimizer)[0], self.rates(optimizer)[-1]),
            "mean": statistics.mean(losses) if losses else None,
            "std": statistics.stdev(losses) if len(losses) > 1 else None,
            "seeds": len(losses),
            "accuracy": statistics.mean(accuracies) if accuracies else None,
            "step_s": statistics.median(cell["step_s"] for cell in cells) if cells else None,
        }


def budget_of(task: str, args: argparse.Namespace) -> Budget:
    """The budget of a task; --quick keeps ten steps of it."""
    budget = VISION if task in IMAGES else LANGUAGE
    return Budget(10, budget.batch, budget.seq_length, 8) if args.quick else budget


def make_task(name: str, args: argparse.Namespace, budget: Budget, device: torch.device) -> Images | LanguageModel:
    """The task of a name."""
    return Images(name, budget, device) if name in IMAGES else LanguageModel(name, args.data, budget, device)


def key(task: str, optimizer: str, lr: float, seed: int, variant: dict[str, float]) -> str:
    """Name of a cell."""
    return f"{task} {optimizer} lr={lr:g} {describe(variant)} seed={seed}"


def describe(variant: dict[str, float]) -> str:
    """A variant of M3 in the paper's letters."""
    letters = {"slow_weight": "a", "slow_period_steps": "f", "denominator_floor": "floor"}
    return " ".join(f"{letters[name]}={value:g}" for name, value in variant.items()) or "default"


def print_summary(summary: dict[str, Any], unit: str) -> None:
    """Tables of one task."""
    print(f"\n{summary['task']}: {unit}")
    header = ["optimizer", "lr", "validation", "mean", "std", "seeds", "accuracy", "s/step"]
    rows = [
        [row["optimizer"], f"{row['lr']:g}" + (" (edge)" if row["edge"] else ""), *_figures(row)]
        for row in summary["optimizers"]
    ]
    print_table(header, rows)
    if summary["m3_variants"]:
        print("\nM3 (defaults a=0.5 f=10 floor=0.1)")
        print_table(header[:1] + header[2:], [[row["variant"], *_figures(row)] for row in summary["m3_variants"]])


def _figures(row: dict[str, Any]) -> list[str]:
    formats = (
        ("validation", ".4f"),
        ("mean", ".4f"),
        ("std", ".4f"),
        ("seeds", "d"),
        ("accuracy", ".3f"),
        ("step_s", ".3f"),
    )
    return ["-" if row[name] is None else format(row[name], form) for name, form in formats]


def plot(studies: list[Study], path: Path) -> None:
    """One row per task: tuning curves with the spread over seeds; M3's variants beside its default."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(studies)), layout="constrained")
    FigureCanvasAgg(figure)
    for (left, right), study in zip(figure.subplots(len(studies), 2, squeeze=False), studies, strict=True):
        summary = study.summary()
        for row in summary["optimizers"]:
            name = row["optimizer"]
            rates = study.rates(name)
            (line,) = left.plot(rates, [study.tuning_loss(name, lr) for lr in rates], marker="o", ms=3, label=name)
            left.errorbar(row["lr"], row["mean"], row["std"] or 0.0, color=line.get_color(), marker="D", capsize=4)
        left.set(xscale="log", xlabel="learning rate", ylabel="loss (curve: validation, mark: test)", title=study.name)
        left.legend(frameon=False)
        finite = [row for row in summary["m3_variants"] if row["mean"] is not None and row["mean"] < float("inf")]
        right.errorbar(
            [row["mean"] for row in finite],
            range(len(finite)),
            xerr=[row["std"] or 0.0 for row in finite],
            fmt="o",
            capsize=4,
        )
        right.set(yticks=range(len(finite)), yticklabels=[row["variant"] for row in finite], xlabel="test loss")
        right.set_title("M3's settings that were tested, three seeds")
        for axes in (left, right):
            axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130, format="png")
    print(f"wrote {path}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=tuple(REGISTRY), default=list(OPTIMIZERS))
    parser.add_argument("--no-variants", action="store_true", help="leave the sweep of M3's settings out")
    parser.add_argument("--quick", action="store_true", help="ten steps per cell: shows that everything runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        default=Path("runs/optimizer_quality/data"),
        help="tokenizer and shards of the corpus, made if missing (default: runs/optimizer_quality/data)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results, written after each cell; continued if it exists"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the results")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then report."""
    args = parse()
    mesh = init_distributed(ParallelConfig(), num_threads=args.threads)
    budgets = {task: vars(budget_of(task, args)) for task in TASKS}
    settings = {
        "budgets": budgets,
        "rates": list(RATES),
        "tuning_seed": TUNING_SEED,
        "seeds": list(SEEDS),
        "variants": list(VARIANTS),
    }
    try:
        results = Results(args.json, settings)
    except ResultsError as error:
        sys.exit(f"error: {error}")
    studies = [Study(task, args, results, mesh.device) for task in args.tasks]
    for study in studies:
        study.run()
    results.content["summary"] = [study.summary() for study in studies]
    results.write()
    for study, summary in zip(studies, results.content["summary"], strict=True):
        print_summary(summary, Images.unit if study.name in IMAGES else LanguageModel.unit)
    if args.png:
        plot(studies, args.png)


if __name__ == "__main__":
    main()
