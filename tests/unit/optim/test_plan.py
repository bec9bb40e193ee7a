"""The exchange plan by itself: every element travels once, work is balanced, all ranks agree. No process groups."""

from __future__ import annotations

import itertools

import pytest
import torch

from hope_megatron.config.matrices.plan import (
    ExchangePlan,
    ParamLayout,
    Topology,
    assign_owners,
    assign_phases,
    assign_slow_owners,
    collect_matrices,
    owner_loads,
    param_flops,
)
from hope_megatron.config.matrices.runs import Run, partition_runs, split_runs
from hope_megatron.ops.newton_schulz_cost import newton_schulz_flops
from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.tags import ParamTags

STEPS = 5
PARAMS = [
    ("a", (12, 7), ParamTags(partition_dim=0)),
    ("b", (10, 6), ParamTags(partition_dim=1)),
    ("c", (3, 4, 5), ParamTags(partition_dim=0)),
    ("d", (9, 8), ParamTags()),
    ("e", (14, 4), ParamTags(partition_dim=0, partition_stride=2)),
]


def flat_layout(params, dp_size: int, zero3: bool) -> list[ParamLayout]:
    layouts, offset = [], 0
    total = sum(torch.Size(shape).numel() for _, shape, _ in params)
    partition = -(-total // dp_size)
    for name, shape, tags in params:
        numel = torch.Size(shape).numel()
        if zero3:
            runs = partition_runs(offset, -(-numel // dp_size), numel, dp_size)
            offset += -(-numel // dp_size)
        else:
            runs = split_runs(offset, numel, partition, dp_size)
            offset += numel
        layouts.append(ParamLayout(name, shape, tags, runs))
    return layouts


def plans_of(matrices, topology) -> list[ExchangePlan]:
    owners = assign_owners(matrices, topology.size, STEPS)
    return [ExchangePlan(matrices, owners, topology, rank) for rank in range(topology.size)]


@pytest.mark.parametrize("zero3", [False, True])
@pytest.mark.parametrize(("dp_size", "tp_size"), [(1, 1), (3, 1), (2, 2), (4, 2), (1, 2)])
def test_every_piece_goes_to_the_owner_and_back(zero3, dp_size, tp_size):
    topology = Topology.grid(dp_size, tp_size)
    fused = ("f", (6, 4), ParamTags(partition_dim=0, partition_stride=2, fused_parts=(2 * tp_size, 4 * tp_size)))
    layouts = flat_layout([*PARAMS, fused], dp_size, zero3)
    matrices = collect_matrices(layouts, topology)
    plans = plans_of(matrices, topology)

    assert all(plan.owners == plans[0].owners for plan in plans)
    assert sorted(itertools.chain(*(plan.owned for plan in plans))) == list(range(len(matrices)))
    for one, other in itertools.product(plans, plans):
        assert one.gather.send_counts[other.rank] == other.gather.receive_counts[one.rank]
        assert one.scatter.send_counts[other.rank] == other.scatter.receive_counts[one.rank]

    for plan in plans:
        # an owner receives each element of its matrices once, a holder gets back each element it holds once
        assert sum(plan.gather.receive_counts) == sum(matrices[i].numel for i in plan.owned)
        held = [
            i
            for p in (p for m in matrices for p in m.runs if p.rank == plan.rank)
            for i in _elements(p.flat_start, p.numel)
        ]
        returned = [i for start, numel in plan.scatter.receive_runs for i in _elements(start, numel)]
        assert sorted(returned) == sorted(held) and len(set(held)) == len(held)
        written = [i for start, numel in plan.gather.receive_runs for i in _elements(start, numel)]
        assert len(set(written)) == len(written) and max(written, default=-1) < plan.workspace_numel


def _elements(start: int, numel: int) -> range:
    return range(start, start + numel)


def test_replicated_matrix_has_one_owner_and_one_source():
    topology = Topology.grid(2, 2)
    matrices = collect_matrices(flat_layout([("d", (9, 8), ParamTags())], 2, False), topology)
    assert len(matrices) == 1
    plans = plans_of(matrices, topology)
    assert sum(sum(plan.gather.send_counts) for plan in plans) == 72
    assert sum(sum(plan.scatter.send_counts) for plan in plans) == 2 * 72


@pytest.mark.parametrize("num_ranks", [2, 7, 64])
def test_owners_are_balanced_as_well_as_greedy_balance_allows(num_ranks):
    params = [
        (f"layer{i}.{kind}", shape, ParamTags())
        for i in range(12)
        for kind, shape in (("up", (64, 24)), ("down", (24, 64)), ("mix", (24, 24)), ("heads", (4, 6, 12)))
    ]
    topology = Topology.grid(num_ranks)
    layouts = flat_layout(params, num_ranks, False)
    matrices = collect_matrices(layouts, topology)
    owners = assign_owners(matrices, num_ranks, STEPS)
    loads = owner_loads(matrices, owners, num_ranks, STEPS)
    largest = max(newton_schulz_flops(*matrix.shape, STEPS) for matrix in matrices)
    assert max(loads) <= sum(loads) / num_ranks + largest

    # every matrix has one slow tick per period, in a phase of its own, that fills the gaps of the work of every step
    costs = {p.name: param_flops(p, 1, STEPS) for p in layouts}
    phases, ticked = [assign_phases(costs, 10)[p.name] for p in layouts], []
    for phase in range(10):
        slow, slow_owners = assign_slow_owners(matrices, owners, phases, phase, num_ranks, STEPS)
        ticked += [matrix.name for matrix in slow]
        both = zip(loads, owner_loads(slow, slow_owners, num_ranks, STEPS), strict=True)
        together = [fast + tick for fast, tick in both]
        assert max(together) <= max(max(loads), sum(together) / num_ranks + largest)
    assert sorted(ticked) == sorted(matrix.name for matrix in matrices)


def test_matrices_that_lie_on_one_rank_stay_there():
    params = [(f"w{i}", (16, 16), ParamTags()) for i in range(8)]
    topology = Topology.grid(4)
    plans = plans_of(collect_matrices(flat_layout(params, 4, False), topology), topology)
    assert [plan.sent_elements for plan in plans] == [0, 0, 0, 0]


def test_missing_pieces_are_an_error_that_names_the_matrix():
    layout = ParamLayout("layers.3.up", (4, 6), ParamTags(), (Run(0, 0, 0, 20),))
    with pytest.raises(OptimError, match=r"layers\.3\.up.*20 of its 24"):
        collect_matrices([layout], Topology.grid(1))


def test_phases_spread_the_work_evenly():
    costs = {f"w{i}": 100 + i % 7 for i in range(50)}
    phases = assign_phases(costs, 10)
    loads = [sum(cost for name, cost in costs.items() if phases[name] == p) for p in range(10)]
    assert max(loads) <= 1.05 * min(loads)
    assert phases == assign_phases(dict(reversed(costs.items())), 10)
