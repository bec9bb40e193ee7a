"""Matrices of a flat vector: orthogonalise them across ranks, and reduce or scale matrix by matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hope_megatron.config.matrices.plan import (
    MAX_BATCH_NUMEL,
    ExchangePlan,
    ParamLayout,
    Topology,
    assign_owners,
    assign_slow_owners,
    collect_matrices,
    owner_loads,
)
from hope_megatron.ops.newton_schulz import newton_schulz, orthogonality_residual
from hope_megatron.optim.errors import OptimError

# Larger batches of equal shape are cut: Newton-Schulz needs about four times its input as scratch memory, which on a CPU
# should stay in the cache and below the size from which the allocator asks the kernel for zeroed pages every time.
_MAX_BATCH_NUMEL_CPU = 2**20


@dataclass(frozen=True)
class NewtonSchulz:
    """Settings of the iteration; momentum travels in `dtype` too."""

    steps: int = 5
    coefficients: str = "quintic"
    dtype: torch.dtype = torch.float32

    def __call__(self, matrices: Tensor) -> Tensor:
        return newton_schulz(matrices, steps=self.steps, coefficients=self.coefficients, dtype=self.dtype)


class Communicator:
    """The collectives an exchange needs. Without a group there is one rank and nothing travels."""

    def __init__(self, group: Any = None) -> None:
        size = dist.get_world_size(group) if group is not None else 1
        # CPU-offloaded vectors under NCCL travel, and are orthogonalised, on the GPU
        nccl = group is not None and dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        self.rank = dist.get_rank(group) if size > 1 else 0
        self.group = group if size > 1 else None
        self.topology = Topology.grid(1)

    @classmethod
    def over(cls, group: Any, dp_rank: int, tp_rank: int) -> Communicator:
        """Collective: every rank of the group tells its coordinates."""
        comm = cls(group)
        if comm.group is not None:
            mine = torch.tensor([dp_rank, tp_rank], device=comm.device)
            places = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
            dist.all_gather(places, mine, group=group)
            comm.topology = Topology(tuple((int(place[0]), int(place[1])) for place in places))
        return comm

    def all_to_all(self, send: Tensor, receive_counts: list[int], send_counts: list[int]) -> Tensor:
        if self.group is None:
            return send
        receive = send.new_empty(sum(receive_counts))
        dist.all_to_all_single(receive, send, receive_counts, send_counts, group=self.group)
        return receive

    def all_reduce_(self, values: Tensor) -> Tensor:
        if self.group is None:
            return values
        moved = values.to(self.device) if self.device is not None else values
        dist.all_reduce(moved, group=self.group)
        return values.copy_(moved) if moved is not values else values

    def check_agreement(self, description: str, what: str) -> None:
        """Collective: raise on every rank if the ranks describe `what` differently."""
        if self.group is None:
            return
        digest = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
        value = torch.tensor([digest, -digest], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        if int(value[0]) != -int(value[1]):
            raise OptimError(
                f"{what}: the ranks of the exchange group see different parameters or shapes; build the same model on "
                "every rank and give bind_zero the group of its data-parallel and tensor-parallel ranks"
            )


@dataclass(frozen=True)
class Job:
    """Matrices to orthogonalise: from one flat vector of this rank into another; those of a slow phase, or all."""

    momentum: Tensor
    out: Tensor
    phase: int | None = None


@dataclass(frozen=True)
class _EqualRuns:
    """`count` equally long runs of consecutive matrices, side by side in this rank's flat vector."""

    start: int
    count: int
    length: int
    first_matrix: int
    counted: bool
    """False for the second copy of a replicated matrix: it is scaled, but not summed."""


class MatrixExchange:
    """All matrices of one flat vector. `phases[p]` is the slow phase of parameter p (zero if not given).

    loads: work of each rank for vectors that are stepped beside this one; that of this one is added.
    """

    def __init__(
        self,
        params: Sequence[ParamLayout],
        comm: Communicator,
        ns: NewtonSchulz,
        phases: Sequence[int] | None = None,
        loads: list[int] | None = None,
    ) -> None:
        self.params, self.comm, self.ns = list(params), comm, ns
        self._base_loads = list(loads) if loads is not None else None
        self.phases = list(phases) if phases is not None else [0] * len(self.params)
        comm.check_agreement(
            repr([(p.name, p.shape, p.tags, p.runs) for p in self.params]), "the layout of a parameter group"
        )
        self.matrices = collect_matrices(self.params, comm.topology)
        self._plans: dict[int | None, ExchangePlan] = {}
        if loads is not None and len(loads) > 1:
            own = owner_loads(self.matrices, self.plan().owners, len(loads), ns.steps)
            loads[:] = [before + more for before, more in zip(loads, own)]
        self._equal_runs = list(self._local_equal_runs())
        self._shapes = torch.tensor([matrix.shape for matrix in self.matrices], dtype=torch.float32)
        self.calls = 0
        """Newton-Schulz runs of this rank: matrices, not batches."""
        self.last_calls = 0
        self.sent_bytes = 0
        """Bytes this rank sent to others since `begin_step`."""
        self.residual: Tensor | None = None
        """Of one matrix of the last update; None if this rank had none."""

    def plan(self, phase: int | None = None) -> ExchangePlan:
        """The plan for all matrices, or for those whose slow clock has this phase, which fills the gaps of the first."""
        if phase not in self._plans:
            num_ranks, matrices = self.comm.topology.size, self.matrices
            if phase is None:
                owners = assign_owners(matrices, num_ranks, self.ns.steps, self._base_loads)
            else:
                fast = self.plan().owners
                matrices, owners = assign_slow_owners(matrices, fast, self.phases, phase, num_ranks, self.ns.steps)
            self._plans[phase] = ExchangePlan(matrices, owners, self.comm.topology, self.comm.rank)
        return self._plans[phase]

    def begin_step(self) -> None:
        """Forget what was counted and measured in the last step."""
        self.last_calls, self.sent_bytes, self.residual = 0, 0, None

    @torch.no_grad()
    def orthogonalize(self, num_updates: int, *jobs: Job) -> None:
        """Write the polar factors of the matrices of each job's momentum to the same places of its `out`. Collective.

        All jobs share one stretch of computation between the transfers, so that only their sum has to be balanced. Of the
        first job one matrix is measured, another at every update: `num_updates` alone says which, so that a resumed run
        measures the same.
        """
        jobs = tuple(job for job in jobs if self.plan(job.phase).matrices)
        plans = [self.plan(job.phase) for job in jobs]
        works = [self._gather(plan, job.momentum, self.ns.dtype) for plan, job in zip(plans, jobs)]
        for plan, work in zip(plans, works):
            self._orthogonalize_batches(plan, work)
        if jobs and plans[0].owned:
            start, (rows, cols) = plans[0].place_of(num_updates % len(plans[0].owned))
            self.residual = orthogonality_residual(works[0].narrow(0, start, rows * cols).view(rows, cols))
        for plan, work, job in zip(plans, works, jobs):
            self._scatter(plan, work, job.out)

    @torch.no_grad()
    def apply(
        self, function: Callable[..., tuple[Tensor, ...]], sources: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> None:
        """Give `function` whole matrices and put what it returns into their places. Collective.

        function: called by owners with a stack [count, rows, cols] for each of `sources`, flat vectors of this rank; returns as
        many stacks as there are `outs`, at most as many as sources, which may be the same vectors. Everything travels in the
        precision of its source: unlike a momentum on its way to Newton-Schulz it is state.
        """
        plan = self.plan()
        works = [self._gather(plan, source, source.dtype) for source in sources]
        max_numel = _max_batch_numel(works[0])
        for start, count, (rows, cols) in plan.batches:
            stacks = [work.narrow(0, start, count * rows * cols).view(count, rows, cols) for work in works]
            for parts in zip(*(stack.split(max(1, max_numel // (rows * cols))) for stack in stacks)):
                for part, result in zip(parts, function(*parts)):
                    part.copy_(result)
        for work, out in zip(works, outs):
            self._scatter(plan, work, out)

    def _gather(self, plan: ExchangePlan, momentum: Tensor, dtype: torch.dtype) -> Tensor:
        """The workspace with the matrices that this rank owns."""
        send = _pack(momentum, plan.gather.send_runs, self.comm.device or momentum.device, dtype)
        received = self.comm.all_to_all(send, plan.gather.receive_counts, plan.gather.send_counts)
        self.sent_bytes += plan.gather.sent_to_others(self.comm.rank) * dtype.itemsize
        work = received.new_empty(plan.workspace_numel)
        _unpack(received, work, plan.gather.receive_runs)
        _copy_slices(plan, work, into_matrices=True)
        return work

    def _scatter(self, plan: ExchangePlan, work: Tensor, out: Tensor) -> None:
        _copy_slices(plan, work, into_matrices=False)
        send = _pack(work, plan.scatter.send_runs, work.device, work.dtype)
        received = self.comm.all_to_all(send, plan.scatter.receive_counts, plan.scatter.send_counts)
        _unpack(received, out, plan.scatter.receive_runs)
        self.sent_bytes += plan.scatter.sent_to_others(self.comm.rank) * work.dtype.itemsize

    def _orthogonalize_batches(self, plan: ExchangePlan, work: Tensor) -> None:
        max_numel = _max_batch_numel(work)
        for start, count, (rows, cols) in plan.batches:
            batch = work.narrow(0, start, count * rows * cols).view(count, rows, cols)
            for part in batch.split(max(1, max_numel // (rows * cols))):
                part.copy_(self.ns(part))
            self.calls += count
            self.last_calls += count

    def _local_equal_runs(self) -> Iterator[_EqualRuns]:
        local = sorted(
            (
                run.flat_start,
                run.numel,
                index,
                not matrix.replicated or self.comm.topology.tp_rank(self.comm.rank) == 0,
            )
            for index, matrix in enumerate(self.matrices)
            for run in matrix.runs
            if run.rank == self.comm.rank
        )
        pending: _EqualRuns | None = None
        for start, length, matrix, counted in local:
            if (
                pending is not None
                and pending.length == length
                and pending.counted == counted
                and pending.start + pending.count * length == start
                and pending.first_matrix + pending.count == matrix
            ):
                pending = _EqualRuns(pending.start, pending.count + 1, length, pending.first_matrix, counted)
                continue
            if pending is not None:
                yield pending
            pending = _EqualRuns(start, 1, length, matrix, counted)
        if pending is not None:
            yield pending

    def _rows(self, values: Tensor, equal: _EqualRuns) -> Tensor:
        return values.narrow(0, equal.start, equal.count * equal.length).view(equal.count, equal.length)

    def _reduce(self, values: Tensor, rows_to_sums: Callable[[Tensor], Tensor]) -> Tensor:
        sums = values.new_zeros(len(self.matrices))
        for equal in self._equal_runs:
            if equal.counted:
                sums.narrow(0, equal.first_matrix, equal.count).add_(rows_to_sums(self._rows(values, equal)))
        return self.comm.all_reduce_(sums)

    def shapes(self, device: torch.device) -> Tensor:
        """Full shapes of the matrices, [matrices, 2] float32."""
        if self._shapes.device != device:
            self._shapes = self._shapes.to(device)
        return self._shapes

    def means(self, values: Tensor) -> Tensor:
        """Mean of the elements of each matrix: flat vector -> [matrices]. Collective."""
        return self._reduce(values, lambda rows: rows.sum(1)) / self.shapes(values.device).prod(1)

    def root_mean_squares(self, values: Tensor) -> Tensor:
        """RMS of the elements of each matrix: flat vector -> [matrices]. Collective."""
        sums = self._reduce(values, lambda rows: torch.linalg.vector_norm(rows, dim=1).square_())
        return (sums / self.shapes(values.device).prod(1)).sqrt_()

    def add_(self, values: Tensor, per_matrix: Tensor) -> Tensor:
        """Add to each element the number of its matrix, in place."""
        for equal in self._equal_runs:
            self._rows(values, equal).add_(per_matrix.narrow(0, equal.first_matrix, equal.count).unsqueeze(1))
        return values

    def scale_(self, values: Tensor, per_matrix: Tensor) -> Tensor:
        """Multiply each element by the number of its matrix, in place."""
        for equal in self._equal_runs:
            self._rows(values, equal).mul_(per_matrix.narrow(0, equal.first_matrix, equal.count).unsqueeze(1))
        return values

    def scale_phase_(self, values: Tensor, factor: float, phase: int) -> Tensor:
        """Multiply the parameters of one slow phase, in place."""
        dp_rank = self.comm.topology.coordinates[self.comm.rank][0]
        for param, param_phase in zip(self.params, self.phases):
            if param_phase == phase:
                for run in param.runs:
                    if run.dp_rank == dp_rank:
                        values.narrow(0, run.flat_start, run.numel).mul_(factor)
        return values


def _max_batch_numel(work: Tensor) -> int:
    return _MAX_BATCH_NUMEL_CPU if work.device.type == "cpu" else MAX_BATCH_NUMEL


def _pack(source: Tensor, runs: list[tuple[int, int]], device: torch.device, dtype: torch.dtype) -> Tensor:
    parts = [source.narrow(0, start, numel) for start, numel in runs]
    packed = torch.cat(parts) if parts else source.new_empty(0)
    return packed.to(device=device, dtype=dtype)


def _unpack(packed: Tensor, target: Tensor, runs: list[tuple[int, int]]) -> None:
    offset = 0
    for start, numel in runs:
        target.narrow(0, start, numel).copy_(packed.narrow(0, offset, numel))
        offset += numel


def _copy_slices(plan: ExchangePlan, work: Tensor, into_matrices: bool) -> None:
    """Between the staging area of column-sliced blocks and their places in the matrices."""
    for sliced in plan.staged_blocks:
        block, cols = sliced.block, sliced.matrix_cols
        staged = work.narrow(0, sliced.start, block.numel).view(block.rows, block.cols)
        matrix = work.narrow(0, sliced.matrix_start + block.first_row * cols, block.rows * cols).view(block.rows, cols)
        for run in block.columns:
            inside, outside = matrix.narrow(1, run.full, run.length), staged.narrow(1, run.local, run.length)
            if into_matrices:
                inside.copy_(outside)
            else:
                outside.copy_(inside)
