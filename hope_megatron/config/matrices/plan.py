"""Who orthogonalises which matrix, and what has to travel for it. Pure bookkeeping: no tensors, no process groups.

The ranks of one *exchange group* (data parallel x tensor parallel) hold a flat vector each. Every matrix gets one
owner; its runs travel there, Newton-Schulz works once, and the runs of the result travel back. The plan is a
function of the layout alone, so every rank computes the same one without talking, and one process can count the traffic
of a thousand ranks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from hope_megatron.config.matrices.errors import OptimError
from hope_megatron.config.matrices.geometry import Block, matrix_blocks, matrix_shapes
from hope_megatron.config.matrices.runs import Run
from hope_megatron.config.matrices.tags import ParamTags
from hope_megatron.ops.newton_schulz_cost import newton_schulz_flops

# Locality may cost at most this much balance: keeping a matrix where it lies saves its traffic.
_BALANCE_SLACK = 1.02

MAX_BATCH_NUMEL = 2**26
"""Numbers of equally large matrices that Newton-Schulz takes at once on a GPU: it needs four times as much beside them."""


@dataclass(frozen=True)
class Topology:
    """Coordinates of the ranks of an exchange group: `coordinates[rank] = (dp_rank, tp_rank)`."""

    coordinates: tuple[tuple[int, int], ...]

    @classmethod
    def grid(cls, dp_size: int, tp_size: int = 1) -> Topology:
        """Megatron's order: tensor-parallel ranks are neighbours."""
        return cls(tuple((dp, tp) for dp in range(dp_size) for tp in range(tp_size)))

    @property
    def size(self) -> int:
        return len(self.coordinates)

    @property
    def tp_size(self) -> int:
        return max(tp for _, tp in self.coordinates) + 1

    def tp_rank(self, rank: int) -> int:
        return self.coordinates[rank][1]


@dataclass(frozen=True)
class ParamLayout:
    """One parameter in a flat vector. The layout is the same on every TP rank, `runs` are those of all DP ranks."""

    name: str
    shape: tuple[int, ...]
    """Shape of the TP shard."""
    tags: ParamTags
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class MatrixRun:
    """A run of a block that one rank of the exchange group holds."""

    rank: int
    block: int
    block_start: int
    flat_start: int
    numel: int


@dataclass
class Matrix:
    """One matrix of a flat vector with all its runs, ordered by rank."""

    name: str
    shape: tuple[int, int]
    param: int
    """Index of its parameter in the flat vector."""
    blocks: list[Block]
    replicated: bool
    """Every TP rank holds a copy: one is used, the result goes to all."""
    runs: list[MatrixRun] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def collect_matrices(params: Sequence[ParamLayout], topology: Topology) -> list[Matrix]:
    """Cut every parameter into its matrices. Raises OptimError if a matrix is not covered exactly once."""
    rank_of = {place: rank for rank, place in enumerate(topology.coordinates)}
    matrices: list[Matrix] = []
    for index, param in enumerate(params):
        matrices += _param_matrices(index, param, topology.tp_size, rank_of)
    for matrix in matrices:
        matrix.runs.sort(key=lambda run: (run.rank, run.block, run.block_start))
        copies = topology.tp_size if matrix.replicated else 1
        held = sum(run.numel for run in matrix.runs)
        if held != copies * matrix.numel:
            raise OptimError(
                f"{matrix.name} {matrix.shape}: the ranks hold {held} of its {copies * matrix.numel} elements, so it "
                "cannot be orthogonalised; partition_dim and partition_stride must describe how the layer sharded it"
            )
    return matrices


def _param_matrices(index: int, param: ParamLayout, tp_size: int, rank_of: dict[tuple[int, int], int]) -> list[Matrix]:
    shapes = matrix_shapes(param.shape, param.tags, tp_size)
    replicated = param.tags.partition_dim is None and tp_size > 1
    label = param.name if len(shapes) == 1 else param.name + "[{}]"
    matrices = [Matrix(label.format(i), shape, index, [], replicated) for i, shape in enumerate(shapes)]
    blocks = matrix_blocks(param.shape, param.tags, tp_size, param.name)
    for tp_rank in range(tp_size):
        local = sorted((b for b in blocks if replicated or b.tp_rank == tp_rank), key=lambda b: b.start)
        starts = [b.start for b in local]
        for run in param.runs:
            rank = rank_of[run.dp_rank, tp_rank]
            position = max(0, bisect_right(starts, run.shard_start) - 1)
            while position < len(local) and local[position].start < run.shard_start + run.numel:
                _add_run(matrices[local[position].matrix], local[position], run, rank)
                position += 1
    return matrices


def _add_run(matrix: Matrix, block: Block, run: Run, rank: int) -> None:
    low = max(block.start, run.shard_start)
    high = min(block.start + block.numel, run.shard_start + run.numel)
    if low >= high:
        return
    if block not in matrix.blocks:
        matrix.blocks.append(block)
    flat_start = run.flat_start + low - run.shard_start
    matrix.runs.append(MatrixRun(rank, matrix.blocks.index(block), low - block.start, flat_start, high - low))


def assign_owners(
    matrices: Sequence[Matrix], num_ranks: int, ns_steps: int, base_loads: Sequence[int] | None = None
) -> list[int]:
    """One owner per matrix: the rank that holds most of it, unless the work becomes less balanced than it could be.

    `base_loads`: work that the ranks do anyway between the same two exchanges.
    """
    base = list(base_loads) if base_loads is not None else [0] * num_ranks
    costs = [newton_schulz_flops(*matrix.shape, ns_steps) for matrix in matrices]
    order = sorted(range(len(matrices)), key=lambda i: (-costs[i], i))
    cap = _BALANCE_SLACK * max(_balanced_loads([costs[i] for i in order], base), default=0)
    owners, loads = [0] * len(matrices), list(base)
    heap = [(load, rank) for rank, load in enumerate(base)]
    heapq.heapify(heap)
    for i in order:
        held: dict[int, int] = {}
        for run in matrices[i].runs:
            held[run.rank] = held.get(run.rank, 0) + run.numel
        fitting = [rank for rank in held if loads[rank] + costs[i] <= cap]
        if fitting:
            owner = min(fitting, key=lambda rank: (-held[rank], loads[rank], rank))
        else:
            while heap[0][0] != loads[heap[0][1]]:  # entries of ranks that have got work since are stale
                heapq.heappop(heap)
            owner = heap[0][1]
        owners[i] = owner
        loads[owner] += costs[i]
        heapq.heappush(heap, (loads[owner], owner))
    return owners


def assign_slow_owners(
    matrices: Sequence[Matrix],
    fast_owners: Sequence[int],
    phases: Sequence[int],
    phase: int,
    num_ranks: int,
    ns_steps: int,
) -> tuple[list[Matrix], list[int]]:
    """The matrices whose slow clock has this phase, and owners that fill the gaps which the work of every step leaves.

    `phases[p]` is the phase of parameter p.
    """
    ticking = [matrix for matrix in matrices if phases[matrix.param] == phase]
    base = owner_loads(matrices, fast_owners, num_ranks, ns_steps)
    return ticking, assign_owners(ticking, num_ranks, ns_steps, base)


def _balanced_loads(costs: Sequence[int], base: Sequence[int]) -> list[int]:
    """Longest processing time first: the loads of a greedy balance without regard to locality."""
    heap = [(load, rank) for rank, load in enumerate(base)]
    heapq.heapify(heap)
    for cost in costs:
        load, rank = heap[0]
        heapq.heapreplace(heap, (load + cost, rank))
    return [load for load, _ in heap]


def owner_loads(matrices: Sequence[Matrix], owners: Sequence[int], num_ranks: int, ns_steps: int) -> list[int]:
    """Newton-Schulz FLOPs of each rank."""
    loads = [0] * num_ranks
    for matrix, owner in zip(matrices, owners):
        loads[owner] += newton_schulz_flops(*matrix.shape, ns_steps)
    return loads


@dataclass(frozen=True)
class Transfer:
    """One uneven all-to-all as one rank sees it: (start, numel) runs in order of peers, and counts per peer."""

    send_runs: list[tuple[int, int]]
    send_counts: list[int]
    receive_runs: list[tuple[int, int]]
    receive_counts: list[int]

    @classmethod
    def build(cls, sends: list[list[tuple[int, int]]], receives: list[list[tuple[int, int]]]) -> Transfer:
        def counts(lists: list[list[tuple[int, int]]]) -> list[int]:
            return [sum(numel for _, numel in runs) for runs in lists]

        return cls(_merge_runs(sends), counts(sends), _merge_runs(receives), counts(receives))

    def sent_to_others(self, rank: int) -> int:
        """Elements that leave this rank."""
        return sum(self.send_counts) - self.send_counts[rank]


def _merge_runs(lists: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for runs in lists:
        for start, numel in runs:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + numel)
            else:
                merged.append((start, numel))
    return merged


@dataclass(frozen=True)
class StagedBlock:
    """A block of some columns of its matrix, staged at `start` of the workspace; the matrix lies at `matrix_start`."""

    start: int
    block: Block
    matrix_start: int
    matrix_cols: int


class ExchangePlan:
    """Ownership and transfers for a set of matrices, seen from one rank of the exchange group.

    The workspace of an owner holds its matrices batched by shape, then staging for blocks that are column slices.
    """

    def __init__(self, matrices: Sequence[Matrix], owners: Sequence[int], topology: Topology, rank: int) -> None:
        self.matrices, self.owners, self.topology, self.rank = list(matrices), list(owners), topology, rank
        self.owned = [i for i, owner in enumerate(self.owners) if owner == rank]
        self._place_workspace()
        self.gather = self._transfer(from_holders=True)
        self.scatter = self._transfer(from_holders=False)

    def _place_workspace(self) -> None:
        self.owned.sort(key=lambda i: (self.matrices[i].shape, i))
        self.batches: list[tuple[int, int, tuple[int, int]]] = []
        """(start, number of matrices, shape) of each batch in the workspace."""
        self.staged_blocks: list[StagedBlock] = []
        self._block_start: dict[tuple[int, int], int] = {}
        offset, matrix_start = 0, {}
        for i in self.owned:
            shape = self.matrices[i].shape
            if self.batches and self.batches[-1][2] == shape:
                start, count, _ = self.batches[-1]
                self.batches[-1] = (start, count + 1, shape)
            else:
                self.batches.append((offset, 1, shape))
            matrix_start[i] = offset
            offset += self.matrices[i].numel
        for i in self.owned:
            cols = self.matrices[i].shape[1]
            for k, block in enumerate(self.matrices[i].blocks):
                if block.cols == cols:
                    self._block_start[i, k] = matrix_start[i] + block.first_row * cols
                else:
                    self._block_start[i, k] = offset
                    self.staged_blocks.append(StagedBlock(offset, block, matrix_start[i], cols))
                    offset += block.numel
        self.workspace_numel = offset

    def _transfer(self, from_holders: bool) -> Transfer:
        """Holders -> owners, or back. Of a replicated matrix the owner's own TP rank sends, and all receive."""
        flat: list[list[tuple[int, int]]] = [[] for _ in range(self.topology.size)]
        work: list[list[tuple[int, int]]] = [[] for _ in range(self.topology.size)]
        # matrices in index order and runs in rank order on both sides: sender and receiver agree on the sequence
        for i, (matrix, owner) in enumerate(zip(self.matrices, self.owners)):
            for run in matrix.runs:
                same_tp = self.topology.tp_rank(run.rank) == self.topology.tp_rank(owner)
                if from_holders and matrix.replicated and not same_tp:
                    continue
                if run.rank == self.rank:
                    flat[owner].append((run.flat_start, run.numel))
                if owner == self.rank:
                    work[run.rank].append((self._block_start[i, run.block] + run.block_start, run.numel))
        return Transfer.build(flat, work) if from_holders else Transfer.build(work, flat)

    def place_of(self, position: int) -> tuple[int, tuple[int, int]]:
        """(start in the workspace, shape) of the owned matrix at a position of `owned`."""
        for start, count, (rows, cols) in self.batches:
            if position < count:
                return start + position * rows * cols, (rows, cols)
            position -= count
        raise IndexError(f"this rank owns {len(self.owned)} matrices")

    @property
    def sent_elements(self) -> int:
        """Elements this rank sends to others for one orthogonalisation, both ways."""
        return self.gather.sent_to_others(self.rank) + self.scatter.sent_to_others(self.rank)


def param_flops(param: ParamLayout, tp_size: int, ns_steps: int) -> int:
    """Newton-Schulz work for the full parameter."""
    return sum(newton_schulz_flops(*shape, ns_steps) for shape in matrix_shapes(param.shape, param.tags, tp_size))


def assign_phases(costs: dict[str, int], period: int) -> dict[str, int]:
    """Spread parameters over the phases 0..period-1 of the slow clock so that every step has about the same work.

    `costs` by parameter name. A function of names and costs alone: the same for every layout of the model.
    """
    heap = [(0, phase) for phase in range(period)]
    phases = {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        load, phase = heap[0]
        phases[name] = phase
        heapq.heapreplace(heap, (load + costs[name], phase))
    return phases
