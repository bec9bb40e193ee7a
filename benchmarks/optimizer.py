"""What does an optimizer step cost, on one rank and on several, and what will it cost on many?

    python benchmarks/optimizer.py --json optimizer.json                 # everything, on hope_60m
    python benchmarks/optimizer.py --layers 2 --ranks 1 2                # a quicker look
    python benchmarks/optimizer.py --count-only                          # only the table, no training

1. Step time and memory of AdamW, Muon, AdaMuon, M3 and DeepSpeed's own Muon inside real ZeRO-1 engines on the parameter
   shapes of hope_60m: the time from loss to new weights (a trivial backward, reduction of gradients, the optimizer,
   all-gather of weights; DeepSpeed's Muon works during the reduction), state per rank, peak memory of the process.
2. Work and traffic per rank for larger models on up to 256 data-parallel ranks, counted by the plan that runs.

Targets: M3 at most 1.15 times our Muon at slow period 10; as many Newton-Schulz runs as matrices at every world size;
the worst step at most 1.3 times the median step.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn

from hope_megatron.config.load import load_model_config
from hope_megatron.config.optim import OptimConfig
from hope_megatron.optim import build_optimizer, read_tags
from hope_megatron.optim.plan import (
    ExchangePlan,
    Matrix,
    ParamLayout,
    Topology,
    assign_owners,
    assign_phases,
    collect_matrices,
    owner_loads,
    param_flops,
)
from hope_megatron.optim.tags import ParamTags
from hope_megatron.optim.zero import split_runs

OPTIMIZERS = ("adamw", "muon", "adamuon", "m3", "deepspeed_muon")
SLOW_PERIOD = 10
NS_STEPS = 5
BF16_BYTES = 2
TIMEOUT_S = 3600


@dataclass(frozen=True)
class Shape:
    """A parameter: its name, full shape and tags."""

    name: str
    shape: tuple[int, ...]
    tags: ParamTags


# ---- the parameters of a model --------------------------------------------------------------------------------------


def model_shapes(preset: str, num_layers: int | None = None) -> list[Shape]:
    """Shapes and tags of a preset's layers, read off one real layer. Embedding and head are left out: they are vectors."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # Megatron's groups stay in the child
        layer, layers = pool.apply(_one_layer, (preset,))
    count = num_layers or layers
    return [Shape(f"layers.{i}.{s.name}", s.shape, s.tags) for i in range(count) for s in layer]


def _one_layer(preset: str) -> tuple[list[Shape], int]:
    from hope_megatron.config.parallel import ParallelConfig
    from hope_megatron.engine.distributed import init_distributed
    from hope_megatron.model import build_model

    config = load_model_config(preset)
    init_distributed(ParallelConfig())
    model = build_model(load_model_config(preset, ["num_layers=1", "vocab_size=256"]))
    marker = "layers.0."
    layer = [
        Shape(name.split(marker)[1], tuple(p.shape), read_tags(p, name, p.shape))
        for name, p in model.named_parameters()
        if marker in name
    ]
    assert layer, "no parameter of a layer found"
    return layer, config.num_layers


class Parameters(nn.Module):
    """Parameters without a model. The loss has the random matrices `directions` as its gradient."""

    def __init__(self, shapes: list[Shape]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s.shape) * 0.02) for s in shapes)
        for p, s in zip(self.weights, shapes):
            p.optim_role, p.optim_fused_parts = s.tags.role, s.tags.fused_parts

    def forward(self, directions: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(p * d).sum() for p, d in zip(self.weights, directions)]).sum()


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(name: str, shapes: list[Shape], num_ranks: int, steps: int) -> dict[str, Any]:
    """One optimizer on `num_ranks` fresh processes; the slowest rank counts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed"])  # imported once for all measurements
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(r, num_ranks, folder, name, shapes, steps)) for r in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT_S)
            process.kill()
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"{name} on {num_ranks} ranks failed; see the messages above")
        results = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(num_ranks)]
    times = [max(step) for step in zip(*(result["step_s"] for result in results))]
    return {
        "optimizer": name,
        "ranks": num_ranks,
        "median_step_s": statistics.median(times),
        "mean_step_s": statistics.mean(times),
        "worst_step_s": max(times),
        "state_mib_per_rank": max(result["state_bytes"] for result in results) / 2**20,
        "peak_rss_mib_per_rank": max(result["peak_rss_kib"] for result in results) / 2**10,
        "newton_schulz_per_step": sum(result["newton_schulz"] for result in results) / steps or None,
    }


def _rank(rank: int, size: int, folder: str, name: str, shapes: list[Shape], steps: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    if name == "deepspeed_muon":  # it takes four dimensions for a convolution and fails on stacks of stacks
        shapes = [replace(s, shape=(math.prod(s.shape[:-2]), *s.shape[-2:])) if len(s.shape) > 3 else s for s in shapes]
    engine = _engine(name, shapes)
    generator = torch.Generator().manual_seed(rank)
    warm_up = SLOW_PERIOD if name == "m3" else 1  # every slow clock has ticked once
    times, counted = [], 0.0
    for step in range(min(warm_up, steps) + steps):
        directions = [torch.randn(s.shape, generator=generator) for s in shapes]
        loss = engine(directions)
        dist.barrier()
        start = time.perf_counter()
        engine.backward(loss)
        engine.step()
        if step >= min(warm_up, steps):
            times.append(time.perf_counter() - start)
            if name != "deepspeed_muon":
                counted += engine.basic_optimizer.last_step_stats().get("optim/newton_schulz_calls", 0.0)
    state = engine.basic_optimizer.state.values()
    result = {
        "step_s": times,
        "newton_schulz": counted,
        "state_bytes": sum(v.nbytes for entry in state for v in entry.values() if isinstance(v, torch.Tensor)),
        "peak_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    os._exit(0)


def _engine(name: str, shapes: list[Shape]) -> Any:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    model = Parameters(shapes)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    if name == "deepspeed_muon":
        # It picks its matrices itself: everything of two and more dimensions. torch's AdamW for the rest: no compiler needed.
        params = {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}
        config["optimizer"] = {"type": "Muon", "params": params}
        return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    settings = OptimConfig(name=name, slow_period_steps=SLOW_PERIOD)
    optimizer = build_optimizer(model.named_parameters(), settings)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    optimizer.bind_zero(engine.optimizer)
    return engine


# ---- counting -------------------------------------------------------------------------------------------------------


def count(preset: str, dp_size: int, shapes: list[Shape]) -> dict[str, Any]:
    """Newton-Schulz FLOPs and traffic per rank and optimizer step under ZeRO-1 in bf16, for M3; Muon is the fast part alone.

    Levels with an update period of n are a vector and an exchange of their own, of which every step has 1/n.
    """
    matrix_shapes = [s for s in shapes if s.tags.role == "matrix"]
    periods = sorted({s.tags.update_period_steps for s in matrix_shapes})
    groups = [
        (n, _count_group([s for s in matrix_shapes if s.tags.update_period_steps == n], dp_size)) for n in periods
    ]

    def per_step(name: str) -> float:
        return sum(group[name] / period for period, group in groups)

    muon, m3, total = per_step("muon_flop"), per_step("m3_flop"), per_step("total_flop")
    numel = sum(math.prod(s.shape) for s in matrix_shapes)
    return {
        "model": preset,
        "data_parallel": dp_size,
        "matrices": sum(group["matrices"] for _, group in groups),
        "matrix_parameters": numel,
        "muon_gflop_per_rank": muon / 1e9,
        "m3_gflop_per_rank": m3 / 1e9,
        "imbalance": muon * dp_size / total,
        "redundant_gflop_per_rank_saved": (total - muon) / 1e9,
        "m3_over_muon_flop": m3 / muon,
        "worst_over_median_update": max(group["worst_over_median"] for _, group in groups),
        "sent_mb_per_rank": per_step("muon_sent") * BF16_BYTES / 1e6,
        "m3_sent_mb_per_rank": per_step("m3_sent") * BF16_BYTES / 1e6,
        "gradient_reduction_mb_per_rank": 2 * numel * (dp_size - 1) / dp_size * BF16_BYTES / 1e6,
    }


def _count_group(shapes: list[Shape], dp_size: int) -> dict[str, Any]:
    """One update of one parameter group: the slowest rank, for M3 averaged over the slow period."""
    layouts = zero1_layouts(shapes, dp_size)
    topology = Topology.grid(dp_size)
    matrices = collect_matrices(layouts, topology)
    fast_flops, fast_sent = _per_rank(matrices, topology)
    phases = assign_phases({p.name: param_flops(p, 1, NS_STEPS) for p in layouts}, SLOW_PERIOD)
    phase_of = [phases[p.name] for p in layouts]
    slow = [
        _per_rank([m for m in matrices if phase_of[m.param] == i], topology, fast_flops) for i in range(SLOW_PERIOD)
    ]
    # fast and slow work lie between the same two exchanges, where all wait for the slowest rank
    updates = [max(f + s for f, s in zip(fast_flops, flops)) for flops, _ in slow]
    return {
        "matrices": len(matrices),
        "total_flop": sum(fast_flops),
        "muon_flop": max(fast_flops),
        "m3_flop": statistics.mean(updates),
        "worst_over_median": max(updates) / statistics.median(updates),
        "muon_sent": max(fast_sent),
        "m3_sent": max(fast_sent) + statistics.mean(max(sent) for _, sent in slow),
    }


def _per_rank(
    matrices: list[Matrix], topology: Topology, base_loads: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """(Newton-Schulz FLOPs, elements sent to others) of every rank."""
    owners = assign_owners(matrices, topology.size, NS_STEPS, base_loads)
    plans = [ExchangePlan(matrices, owners, topology, rank) for rank in range(topology.size)]
    return owner_loads(matrices, owners, topology.size, NS_STEPS), [plan.sent_elements for plan in plans]


def zero1_layouts(shapes: list[Shape], dp_size: int) -> list[ParamLayout]:
    """Where ZeRO-1 puts parameters that follow each other in one vector."""
    sizes = [torch.Size(s.shape).numel() for s in shapes]
    partition = -(-sum(sizes) // dp_size)
    layouts, offset = [], 0
    for s, size in zip(shapes, sizes):
        layouts.append(ParamLayout(s.name, s.shape, s.tags, split_runs(offset, size, partition, dp_size)))
        offset += size
    return layouts


# ---- reporting ------------------------------------------------------------------------------------------------------


def print_table(rows: list[dict[str, Any]]) -> None:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    columns = list(rows[0])
    widths = [max(len(c), *(len(cell(row[c])) for row in rows)) for c in columns]
    for line in [columns, *([cell(row[c]) for c in columns] for row in rows)]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))
    print()


def ratios(rows: list[dict[str, Any]], shapes: list[Shape]) -> dict[str, Any]:
    """The targets of the docstring, as numbers."""
    by_key = {(row["optimizer"], row["ranks"]): row for row in rows}
    found: dict[str, Any] = {
        "matrices": sum(
            len(collect_matrices([p], Topology.grid(1)))
            for p in zero1_layouts([s for s in shapes if s.tags.role == "matrix"], 1)
        )
    }
    for ranks in sorted({row["ranks"] for row in rows}):
        m3, muon = by_key.get(("m3", ranks)), by_key.get(("muon", ranks))
        if m3 and muon:
            found[f"m3_over_muon_{ranks}_ranks"] = m3["mean_step_s"] / muon["mean_step_s"]
            found[f"m3_worst_over_median_{ranks}_ranks"] = m3["worst_step_s"] / m3["median_step_s"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument(
        "--model", default="hope_60m", help="preset whose parameter shapes are timed (default: hope_60m)"
    )
    parser.add_argument("--layers", type=int, help="time this many layers only (default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="gloo ranks (default: 1 2 4)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=SLOW_PERIOD, help=f"timed steps (default: {SLOW_PERIOD})")
    parser.add_argument("--count-models", nargs="*", default=["hope_760m", "hope_1b3", "hope_7b"])
    parser.add_argument("--count-ranks", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--count-only", action="store_true", help="skip the timing")
    args = parser.parse_args()

    report: dict[str, Any] = {
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "settings": {"model": args.model, "layers": args.layers, "steps": args.steps, "slow_period_steps": SLOW_PERIOD},
    }
    if not args.count_only:
        shapes = model_shapes(args.model, args.layers)
        rows = []
        for ranks in args.ranks:
            rows += [measure(name, shapes, ranks, args.steps) for name in args.optimizers]
        print_table(rows)
        report["timing"], report["ratios"] = rows, ratios(rows, shapes)
        print(json.dumps(report["ratios"], indent=2), "\n")
    if args.count_models:
        table = [
            count(m, dp, shapes) for m in args.count_models for shapes in [model_shapes(m)] for dp in args.count_ranks
        ]
        print_table(table)
        report["counted"] = table
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
