"""Parameter shapes of a preset, and what an optimizer step costs on many ranks: counted by the plan that runs."""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hope_megatron.config.load import load_model_config
from hope_megatron.config.matrices.plan import (
    ExchangePlan,
    Matrix,
    ParamLayout,
    Topology,
    assign_owners,
    assign_phases,
    assign_slow_owners,
    collect_matrices,
    owner_loads,
    param_flops,
)
from hope_megatron.config.matrices.runs import split_runs
from hope_megatron.ops.newton_schulz_cost import newton_schulz_flops
from hope_megatron.optim import read_tags
from hope_megatron.optim.tags import ParamTags

SLOW_PERIOD = 10
NS_STEPS = 5
BF16_BYTES = 2
FP32_BYTES = 4
M3_STATE_TENSORS = 4
DEEP = {"dgd": (2, 3, 1), "delta_momentum": (2, 4, 1), "dmgd": (7, 6, 2)}
"""Products of 2 MN min(M, N) FLOPs, tensors that owners get and return, and state tensors (hope_megatron/optim/README.md)."""


@dataclass(frozen=True)
class Shape:
    """A parameter: its name, full shape and tags."""

    name: str
    shape: tuple[int, ...]
    tags: ParamTags


def model_shapes(preset: str, num_layers: int | None = None) -> list[Shape]:
    """Shapes and tags of a preset's layers, read off one real layer. Embedding and head are left out: they are vectors."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # Megatron's groups stay in the child
        layer, layers = pool.apply(_one_layer, (preset,))
    count = num_layers or layers
    return [Shape(f"layers.{i}.{s.name}", s.shape, s.tags) for i in range(count) for s in layer]


def _one_layer(preset: str) -> tuple[list[Shape], int]:
    from hope_megatron.config.parallel import ParallelConfig
    from hope_megatron.model import build_model
    from hope_megatron.parallel.distributed import init_distributed

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


def zero1_layouts(shapes: list[Shape], dp_size: int) -> list[ParamLayout]:
    """Where ZeRO-1 puts parameters that follow each other in one vector."""
    sizes = [math.prod(s.shape) for s in shapes]
    partition = -(-sum(sizes) // dp_size)
    layouts, offset = [], 0
    for s, size in zip(shapes, sizes):
        layouts.append(ParamLayout(s.name, torch.Size(s.shape), s.tags, split_runs(offset, size, partition, dp_size)))
        offset += size
    return layouts


@dataclass(frozen=True)
class GroupCount:
    """One parameter group, of one update period and decay: a vector with an exchange of its own.

    FLOPs are of the slowest rank, for all wait for it at the second transfer; elements are those it sends to others.
    """

    period: int
    """Optimizer steps from update to update."""
    matrices: int
    total_flop: int
    largest_flop: int
    """Of one matrix: no rank can have less than that."""
    muon_flop: int
    m3_flop: list[int]
    """By slow phase: the work of every step and the slow tick of that phase."""
    m3_bound: float
    """The mean over phases if work were divisible down to one matrix."""
    product_flop: int
    """One product of every matrix with a square one, as the deep optimizers multiply."""
    muon_sent: int
    m3_sent: float
    runs: int
    """Newton-Schulz runs of all ranks in one slow period of updates."""

    @property
    def redundant_runs(self) -> int:
        """More than every matrix once per update, and once more per slow period."""
        return self.runs - self.matrices * (SLOW_PERIOD + 1)


def count_group(shapes: list[Shape], dp_size: int) -> GroupCount:
    """One update of one group under ZeRO-1; Muon's work is the fast part of M3's."""
    layouts, topology = zero1_layouts(shapes, dp_size), Topology.grid(dp_size)
    matrices = collect_matrices(layouts, topology)
    costs = [newton_schulz_flops(*matrix.shape, NS_STEPS) for matrix in matrices]
    owners = assign_owners(matrices, dp_size, NS_STEPS)
    fast = owner_loads(matrices, owners, dp_size, NS_STEPS)
    fast_sent, runs = _traffic(matrices, owners, topology)
    phase_of = assign_phases({p.name: param_flops(p, 1, NS_STEPS) for p in layouts}, SLOW_PERIOD)
    phases = [phase_of[p.name] for p in layouts]
    m3_flop, slow_sent, bounds, runs = [], [], [], runs * SLOW_PERIOD
    for phase in range(SLOW_PERIOD):
        ticking, slow_owners = assign_slow_owners(matrices, owners, phases, phase, dp_size, NS_STEPS)
        slow = owner_loads(ticking, slow_owners, dp_size, NS_STEPS)
        m3_flop.append(max(a + b for a, b in zip(fast, slow)))
        bounds.append(max((sum(fast) + sum(slow)) / dp_size, max(costs)))
        sent, slow_runs = _traffic(ticking, slow_owners, topology)
        slow_sent.append(sent)
        runs += slow_runs
    return GroupCount(
        period=shapes[0].tags.update_period_steps,
        matrices=len(matrices),
        total_flop=sum(costs),
        largest_flop=max(costs),
        muon_flop=max(fast),
        m3_flop=m3_flop,
        m3_bound=statistics.mean(bounds),
        product_flop=max(_product_loads(matrices, owners, dp_size)),
        muon_sent=fast_sent,
        m3_sent=fast_sent + statistics.mean(slow_sent),
        runs=runs,
    )


def _product_loads(matrices: list[Matrix], owners: list[int], dp_size: int) -> list[int]:
    """FLOPs of each owner."""
    loads = [0] * dp_size
    for matrix, owner in zip(matrices, owners):
        rows, cols = matrix.shape
        loads[owner] += 2 * rows * cols * min(rows, cols)
    return loads


def _traffic(matrices: list[Matrix], owners: list[int], topology: Topology) -> tuple[int, int]:
    """(most elements that a rank sends to others, Newton-Schulz runs of all ranks) of one orthogonalisation."""
    plans = [ExchangePlan(matrices, owners, topology, rank) for rank in range(topology.size)]
    return max(plan.sent_elements for plan in plans), sum(len(plan.owned) for plan in plans)


def count(preset: str, dp_size: int, shapes: list[Shape]) -> dict[str, Any]:
    """FLOPs and bytes of the slowest rank per optimizer step under ZeRO-1, momentum travelling in bf16.

    A level with an update period of n takes part in every n-th step: figures per step are means over those steps.
    """
    matrix_shapes = [s for s in shapes if s.tags.role == "matrix"]
    by_group: dict[str, list[Shape]] = {}
    for s in matrix_shapes:
        by_group.setdefault(s.tags.group_name, []).append(s)
    groups = [count_group(members, dp_size) for members in by_group.values()]

    def per_step(value: Callable[[GroupCount], float]) -> float:
        return sum(value(group) / group.period for group in groups)

    muon, m3 = per_step(lambda g: g.muon_flop), per_step(lambda g: statistics.mean(g.m3_flop))
    muon_bound = per_step(lambda g: max(g.total_flop / dp_size, g.largest_flop))
    numel = sum(math.prod(s.shape) for s in matrix_shapes)
    return {
        "model": preset,
        "data_parallel": dp_size,
        "matrices": sum(group.matrices for group in groups),
        "matrix_parameters": numel,
        "muon_gflop_per_rank": muon / 1e9,
        "m3_gflop_per_rank": m3 / 1e9,
        "m3_over_muon": m3 / muon,
        "muon_over_bound": muon / muon_bound,
        "m3_over_bound": m3 / per_step(lambda g: g.m3_bound),
        "slow_worst_over_median": _worst_over_median([(1, g.m3_flop) for g in groups if g.period == 1]),
        "clock_worst_over_median": {
            "muon": _worst_over_median([(g.period, [g.muon_flop]) for g in groups]),
            "m3": _worst_over_median([(g.period, g.m3_flop) for g in groups]),
        },
        "redundant_runs": sum(group.redundant_runs for group in groups),
        "saved_gflop_per_rank": per_step(lambda g: g.total_flop - g.muon_flop) / 1e9,
        "muon_sent_mb_per_rank": per_step(lambda g: g.muon_sent) * BF16_BYTES / 1e6,
        "m3_sent_mb_per_rank": per_step(lambda g: g.m3_sent) * BF16_BYTES / 1e6,
        "deep": {
            name: {
                "gflop_per_rank": products * per_step(lambda g: g.product_flop) / 1e9,
                "sent_mb_per_rank": tensors * per_step(lambda g: g.muon_sent) / 2 * FP32_BYTES / 1e6,
                "state_mb_per_rank": states * FP32_BYTES * numel / dp_size / 1e6,
            }
            for name, (products, tensors, states) in DEEP.items()
        },
        "gradient_reduction_mb_per_rank": 2 * numel * (dp_size - 1) / dp_size * BF16_BYTES / 1e6,
        "m3_state_mb_per_rank": M3_STATE_TENSORS * FP32_BYTES * numel / dp_size / 1e6,
    }


def _worst_over_median(groups: list[tuple[int, list[int]]]) -> float:
    """Over the optimizer steps in which groups come together. groups: update period, and cost by slow phase."""
    steps = range(1, math.lcm(*(period for period, _ in groups)) * SLOW_PERIOD + 1)
    totals = [sum(costs[-(step // n) % len(costs)] for n, costs in groups if step % n == 0) for step in steps]
    return max(totals) / statistics.median(totals)
