"""What does an optimizer step cost, on one rank and on several, and what will it cost on many?

    python benchmarks/costs/optimizer.py --json optimizer.json         everything, timed on hope_60m: ten minutes on two cores
    python benchmarks/costs/optimizer.py --parts timing --ranks 2      one part, or one number of ranks
    python benchmarks/costs/optimizer.py --layers 1 --steps 2          a minute, to see that it runs

timing: time and memory of AdamW, Muon, AdaMuon, M3, the deep optimizers and DeepSpeed's own Muon inside real ZeRO-1 engines on the
parameter shapes of hope_60m, in fp32: from the loss to new weights (a trivial backward, reduction of gradients, the optimizer,
all-gather of weights; DeepSpeed's Muon works during the reduction), state per rank, peak memory of the process. Every
level is updated in every step, as DeepSpeed's Muon knows no update clock; it takes fused projections whole, which is less
work than matrix by matrix, and convolutions too. Muon and M3 take turns, step by step, over one slow period; the others have
fewer steps. More ranks than cores share them: the processors' seconds of all ranks are beside the time.

counting: FLOPs and bytes of the slowest rank for larger models on up to 256 data-parallel ranks, by the plan that runs.

Targets: M3 at most 1.15 times our Muon at slow period 10; no redundant Newton-Schulz run at any world size; the worst
step of a slow period at most 1.3 times the median step. Each is printed with its figure, and the exit status is 1 if one is
missed.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from hope_megatron.testing.benchmark import machine, print_table, write_json

from importlib.metadata import version  # isort: skip  (common has put the repository on the path)
from optimizer_counts import SLOW_PERIOD, Shape, collect_matrices, count, model_shapes, zero1_layouts  # isort: skip
from optimizer_engines import OPTIMIZERS, measure  # isort: skip
from hope_megatron.config.matrices.plan import Topology  # isort: skip

PARTS = ("timing", "counting")
PAIR = ("muon", "m3")
MAX_RATIO = 1.15
MAX_WORST_OVER_MEDIAN = 1.3


class Targets:
    """Figures beside their limits."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, value: float, limit: float) -> None:
        """Print a figure and note whether it keeps its limit."""
        met = value <= limit
        self.rows.append({"target": what, "value": value, "limit": limit, "met": met})
        print(f"{'met   ' if met else 'MISSED'}  {what}: {value:.4g} (at most {limit:g})", flush=True)


# ---- timing ---------------------------------------------------------------------------------------------------------


def time_steps(args: argparse.Namespace, targets: Targets) -> list[dict[str, Any]]:
    """Every optimizer on every number of ranks."""
    shapes = model_shapes(args.model, args.layers)
    matrices = [s for s in shapes if s.tags.role == "matrix"]
    num_matrices = len(collect_matrices(zero1_layouts(matrices, 1), Topology.grid(1)))
    rows: list[dict[str, Any]] = []
    for ranks in args.ranks:
        found = _time_on(ranks, shapes, args)
        _print_timing(found, args.model, num_matrices)
        _check_timing({row["optimizer"]: row for row in found}, ranks, num_matrices, targets)
        print()
        rows += found
    return rows


def _time_on(ranks: int, shapes: list[Shape], args: argparse.Namespace) -> list[dict[str, Any]]:
    pair = [name for name in PAIR if name in args.optimizers]
    rows = measure(pair, shapes, ranks, args.steps) if pair else []
    for name in args.optimizers:
        if name not in PAIR:
            rows += measure([name], shapes, ranks, min(args.peer_steps, args.steps))
    return sorted(rows, key=lambda row: OPTIMIZERS.index(row["optimizer"]))


def _print_timing(rows: list[dict[str, Any]], model: str, num_matrices: int) -> None:
    print(f"\n{model}, {num_matrices} matrices, {rows[0]['ranks']} rank(s); slowest rank, MiB per rank")
    header = ["optimizer", "steps", "median s", "mean s", "worst s", "CPU s, all ranks", "state MiB", "peak RSS MiB"]
    header += ["Newton-Schulz runs per step", "sent MB per step, all ranks"]
    names = ["optimizer", "steps", "median_step_s", "mean_step_s", "worst_step_s", "cpu_s_per_step_all_ranks"]
    names += ["state_mib_per_rank", "peak_rss_mib_per_rank"]
    cells = []
    for row in rows:
        sent = "-" if row["optimizer"] == "deepspeed_muon" else row["sent_mb_per_step_all_ranks"]
        cells.append([*(row[name] for name in names), row["newton_schulz_runs"] / row["steps"], sent])
    print_table(header, cells)


def _check_timing(rows: dict[str, dict[str, Any]], ranks: int, num_matrices: int, targets: Targets) -> None:
    on = f"{ranks} rank(s)"
    if "m3" in rows and "muon" in rows:
        ratio = rows["m3"]["mean_step_s"] / rows["muon"]["mean_step_s"]
        targets.add(f"M3 / Muon, mean step time over {rows['m3']['steps']} steps, {on}", ratio, MAX_RATIO)
    if "m3" in rows:
        worst = rows["m3"]["worst_step_s"] / rows["m3"]["median_step_s"]
        targets.add(f"M3, worst / median step time, {on}", worst, MAX_WORST_OVER_MEDIAN)
    for name in ("muon", "adamuon", "m3"):
        if name in rows:
            steps = rows[name]["steps"]
            needed = num_matrices * steps + (num_matrices if name == "m3" and steps == SLOW_PERIOD else 0)
            if name != "m3" or steps == SLOW_PERIOD:
                redundant = rows[name]["newton_schulz_runs"] - needed
                targets.add(f"{name}, redundant Newton-Schulz runs, all ranks together, {on}", redundant, 0)


# ---- counting -------------------------------------------------------------------------------------------------------


def count_steps(args: argparse.Namespace, targets: Targets) -> list[dict[str, Any]]:
    """Every model on every number of ranks."""
    rows = [count(model, dp, shapes) for model in args.models for shapes in [model_shapes(model)] for dp in args.dp]
    _print_counts(rows)
    for row in rows:
        on = f"{row['model']} on {row['data_parallel']} ranks"
        targets.add(f"M3 / Muon, counted FLOP of the slowest rank, {on}", row["m3_over_muon"], MAX_RATIO)
        targets.add(
            f"M3, worst / median update of a slow period, {on}", row["slow_worst_over_median"], MAX_WORST_OVER_MEDIAN
        )
        targets.add(f"redundant Newton-Schulz runs, {on}", row["redundant_runs"], 0)
    return rows


def _print_counts(rows: list[dict[str, Any]]) -> None:
    print("\nper optimizer step, slowest rank, ZeRO-1; momentum and gradients travel in bf16")
    header = ["model", "DP", "matrices", "Muon GFLOP", "M3 GFLOP", "M3 / Muon", "Muon / bound", "M3 / bound"]
    header += ["worst / median: slow ticks", "clocks, Muon", "clocks, M3", "Muon sends MB", "M3 sends MB"]
    header += ["gradient reduction MB", "M3 state MB"]
    cells = [
        [
            row["model"], row["data_parallel"], row["matrices"], row["muon_gflop_per_rank"], row["m3_gflop_per_rank"],
            row["m3_over_muon"], row["muon_over_bound"], row["m3_over_bound"], row["slow_worst_over_median"],
            row["clock_worst_over_median"]["muon"], row["clock_worst_over_median"]["m3"],
            row["muon_sent_mb_per_rank"], row["m3_sent_mb_per_rank"], row["gradient_reduction_mb_per_rank"],
            row["m3_state_mb_per_rank"],
        ]
        for row in rows
    ]  # fmt: skip
    print_table(header, cells)
    print(
        "bound: if the work were divisible down to one matrix; clocks: steps in which slower levels are updated too\n"
    )
    print("deep optimizers, without an output map: float32 products, and float32 state that travels")
    header = ["model", "DP", "optimizer", "GFLOP", "sends MB", "state MB"]
    print_table(
        header,
        [
            [row["model"], row["data_parallel"], name, *deep.values()]
            for row in rows
            for name, deep in row["deep"].items()
        ],
    )


# ---- the command ----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--model", default="hope_60m", help="preset whose parameter shapes are timed (default: hope_60m)"
    )
    timing.add_argument("--layers", type=int, help="time this many layers only (default: all)")
    timing.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="gloo ranks (default: 1 2 4)")
    timing.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    timing.add_argument(
        "--steps", type=int, default=SLOW_PERIOD, help=f"timed steps of Muon and M3 (default: {SLOW_PERIOD})"
    )
    timing.add_argument("--peer-steps", type=int, default=3, help="timed steps of the others (default: 3)")
    counting = parser.add_argument_group("counting")
    counting.add_argument("--models", nargs="+", default=["hope_760m", "hope_1b3", "hope_7b"])
    counting.add_argument("--dp", type=int, nargs="+", default=[8, 64, 256], help="ranks (default: 8 64 256)")
    return parser.parse_args()


def main() -> None:
    """Run the parts and report."""
    args, targets = parse(), Targets()
    report: dict[str, Any] = {"machine": {**machine(), "deepspeed": version("deepspeed")}, "settings": vars(args)}
    if "counting" in args.parts:
        report["counting"] = count_steps(args, targets)
    if "timing" in args.parts:
        report["timing"] = time_steps(args, targets)
    report["targets"] = targets.rows
    write_json(args.json, report)
    missed = [row["target"] for row in targets.rows if not row["met"]]
    print(f"{len(targets.rows) - len(missed)} of {len(targets.rows)} targets met")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
