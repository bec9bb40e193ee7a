"""What M3's update of matrices does on a rank: kernels, bytes, FLOPs and exchanges, in closed form.

The plan of the exchange is the one that runs (plan.py); on top come the operators of `optim/m3.py`, `optim/exchange.py` and
`ops/newton_schulz.py`, each with what it reads and writes. Symbols: n numbers of a rank's vector, N numbers of a stack of
matrices, m their shorter side, M matrices of a group.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from hope_megatron.config.clock import UpdateClock
from hope_megatron.config.matrices.layout import MatrixVector, matrix_vectors
from hope_megatron.config.matrices.plan import (
    MAX_BATCH_NUMEL,
    ExchangePlan,
    Topology,
    assign_owners,
    assign_phases,
    assign_slow_owners,
    collect_matrices,
    owner_loads,
    param_flops,
)
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.optim import OptimConfig
from hope_megatron.config.run import RunConfig
from hope_megatron.config.update_kinds import update_kinds
from hope_megatron.ops.newton_schulz_cost import GRAM_RESTART_STEP, newton_schulz_flops, preferred_form

_FP32 = 4


@dataclass
class MatrixUpdate:
    """The update of a step's matrices on one rank."""

    kernels: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    """Of Newton-Schulz, in its dtype."""
    measured_flops: float = 0.0
    """Of the one matrix that is measured, in float32."""
    exchanges: float = 0.0
    exchanged_bytes: float = 0.0
    sums: float = 0.0
    summed_bytes: float = 0.0

    def add(self, kernels: float, num_bytes: float) -> None:
        """So many kernels that move so many bytes together."""
        self.kernels += kernels
        self.bytes += num_bytes

    def add_share(self, other: MatrixUpdate, share: float) -> None:
        """A share of another one."""
        for field in fields(MatrixUpdate):
            setattr(self, field.name, getattr(self, field.name) + share * getattr(other, field.name))


def m3_update(config: RunConfig, world_size: int) -> MatrixUpdate:
    """The mean step of rank 0, over the steps that a rehearsal takes."""
    parallel, replicas = config.parallel, config.replicas(world_size)
    layout = (config.model, parallel.tensor_parallel, parallel.zero_stage, replicas)
    half = config.optim.ns_dtype != "float32"  # "auto" on a GPU
    return _mean_step(config.optim, 2 if half else 4, tuple(update_kinds(config)), *layout)


@functools.lru_cache(maxsize=64)
def _mean_step(
    optim: OptimConfig, size: int, kinds: tuple[tuple[int, float], ...], model: ModelConfig, *layout: int
) -> MatrixUpdate:
    """size: bytes of a number in Newton-Schulz. layout: tensor-parallel size, ZeRO stage, replicas."""
    mean = MatrixUpdate()
    exchanges = _exchanges(optim, model, *layout)
    for step, share in kinds:
        for exchange in exchanges:
            if exchange.vector.clock.due(step):
                number = exchange.vector.clock.updates(step)
                mean.add_share(_VectorUpdate(optim, size, exchange).count(number), share)
    return mean


def _exchanges(optim: OptimConfig, model: ModelConfig, tp: int, stage: int, replicas: int) -> list[_Exchange]:
    """Vectors with their plans, bound one after the other: each fills the gaps of those before."""
    vectors = matrix_vectors(model, tp, stage, replicas)
    topology = Topology.grid(replicas if stage else 1, tp)
    slow = optim.slow_period_steps if optim.stagger and optim.form == "ema" else 1
    loads = [0] * topology.size
    groups: dict[tuple[UpdateClock, bool], dict[str, int]] = {}
    for vector in vectors:
        costs = {param.name: param_flops(param, tp, optim.ns_steps) for param in vector.params}
        groups.setdefault((vector.clock, vector.decays), {}).update(costs)
    phases = {name: phase for costs in groups.values() for name, phase in assign_phases(costs, slow).items()}
    # parameters without ZeRO are bound one by one, and only there no work is spread over them
    return [_Exchange(vector, topology, optim.ns_steps, phases, loads if stage else list(loads)) for vector in vectors]


class _Exchange:
    """The matrices of a vector, and the plans for all of them and for those of a slow phase."""

    def __init__(
        self, vector: MatrixVector, topology: Topology, steps: int, phases: dict[str, int], loads: list[int]
    ) -> None:
        self.vector, self.topology, self.steps = vector, topology, steps
        self.phases = [phases[param.name] for param in vector.params]
        self.matrices = collect_matrices(vector.params, topology)
        self._owners = assign_owners(self.matrices, topology.size, steps, list(loads))
        if len(loads) > 1:
            own = owner_loads(self.matrices, self._owners, len(loads), steps)
            loads[:] = [before + more for before, more in zip(loads, own)]

    @functools.cached_property
    def all(self) -> ExchangePlan:
        """The plan for all matrices."""
        return ExchangePlan(self.matrices, self._owners, self.topology, 0)

    def slow(self, phase: int) -> ExchangePlan:
        """The plan for those whose slow clock has this phase."""
        ticking = assign_slow_owners(self.matrices, self._owners, self.phases, phase, self.topology.size, self.steps)
        return ExchangePlan(*ticking, self.topology, 0)

    def runs_of_phase(self, phase: int) -> list[int]:
        """Lengths of the runs that rank 0 has of parameters with this phase."""
        params = zip(self.vector.params, self.phases)
        return [run.numel for param, own in params if own == phase for run in param.runs if run.dp_rank == 0]

    @functools.cached_property
    def equal_runs(self) -> list[tuple[int, int]]:
        """(number, length) of the equally long neighbours that reductions take together (optim/exchange.py)."""
        local = sorted(
            (run.flat_start, run.numel, i) for i, x in enumerate(self.matrices) for run in x.runs if run.rank == 0
        )
        found: list[list[int]] = []
        for start, length, i in local:
            if found and found[-1][:3] == [start, length, i]:
                found[-1][0], found[-1][2], found[-1][3] = start + length, i + 1, found[-1][3] + 1
            else:
                found.append([start + length, length, i + 1, 1])
        return [(count, length) for _, length, _, count in found]


class _VectorUpdate(MatrixUpdate):
    """The update of one vector, operator by operator."""

    def __init__(self, optim: OptimConfig, size: int, exchange: _Exchange) -> None:
        super().__init__()
        self._optim, self._size, self._exchange = optim, size, exchange
        self._n, self._matrices = exchange.vector.numel, len(exchange.matrices)

    def count(self, number: int) -> MatrixUpdate:
        """number: of this update, from 1."""
        n, optim, period = self._n, self._optim, self._optim.slow_period_steps
        practical, phased = optim.form == "ema", optim.stagger and optim.form == "ema"
        if self._exchange.vector.decays:
            self.add(1, 8 * n)
        self.add(3 + practical, (12 + 16 + 12 + 8 * practical) * n)  # m1, v, m2
        began, ends = -(number - 1) % period, -number % period
        if practical and (phased or began == 0):
            runs = self._exchange.runs_of_phase(began)
            self.add(len(runs), 8 * sum(runs))
        self.add(5, (8 + 8 + 12 + 8 + 12) * n)  # out, update from o2, their sum, root, weights
        self.add(1, 4 * n)  # norm
        plans = [self._exchange.all, *([self._exchange.slow(ends)] if phased or ends == 0 else [])]
        plans = [plan for plan in plans if plan.matrices]
        for plan in plans:
            self._travel(plan)
        if plans and plans[0].owned:
            _, shape = plans[0].place_of(number % len(plans[0].owned))
            self._measure(*shape)
        self._scale(practical)
        return self

    def _travel(self, plan: ExchangePlan) -> None:
        """Momentum to the owners, Newton-Schulz, and back (MatrixExchange.orthogonalize)."""
        size, there, back = self._size, plan.gather, plan.scatter
        sent, owned = sum(there.send_counts), sum(there.receive_counts)
        returned, received = sum(back.send_counts), sum(back.receive_counts)
        cast = size != _FP32
        self.add(bool(there.send_runs) + cast, 8 * sent + (4 + size) * sent * cast)
        self.add(len(there.receive_runs), 3 * size * owned)
        staged = sum(len(block.block.columns) for block in plan.staged_blocks)
        columns = sum(block.block.numel for block in plan.staged_blocks)
        self.add(2 * staged, 2 * 3 * size * columns)
        for _, count, (rows, cols) in plan.batches:
            most = max(1, MAX_BATCH_NUMEL // (rows * cols))
            for first in range(0, count, most):
                self._newton_schulz(min(most, count - first), rows, cols)
        self.add(bool(back.send_runs), 2 * size * returned)
        self.add(len(back.receive_runs), (8 + size) * received)
        if self._exchange.topology.size > 1:
            self.exchanges += 2
            self.exchanged_bytes += size * (max(sent, owned) + max(returned, received))

    def _newton_schulz(self, count: int, rows: int, cols: int) -> None:
        """A stack of matrices (ops/newton_schulz.py), and what becomes of it copied back."""
        m, steps, size = min(rows, cols), self._optim.ns_steps, self._size
        N, gram = count * rows * cols, count * m * m * self._size
        self.flops += count * newton_schulz_flops(rows, cols, steps)
        if size < _FP32:
            self.add(2, 2 * (_FP32 + size) * N)  # to float32, and back after the norm
        self.add(4, (4 + 8) * N + (8 + 16 + 12 + 4) * count)  # norm, its bound, its dtype, quotient
        self.add(1, 3 * size * N)
        if preferred_form(rows, cols, steps) == "direct":
            self.add(3 * steps, steps * (5 * size * N + 6 * gram))
            return
        for s in [steps] if steps <= GRAM_RESTART_STEP else [GRAM_RESTART_STEP, steps - GRAM_RESTART_STEP]:
            self.add(2, 4 * size * N + 2 * gram)
            # a square and a diagonal each, products of factors, congruences
            self.add(2 * s + 3 * (s - 1), (4 * s + 9 * (s - 1)) * gram + 2 * s * count * m * size)

    def _measure(self, rows: int, cols: int) -> None:
        """How orthogonal one matrix is."""
        m, N = min(rows, cols), rows * cols
        self.measured_flops += 2 * m * m * max(rows, cols)
        self.add(5, (self._size + 4 + 8) * N + 8 * m * m + 8 * m + 16)

    def _scale(self, practical: bool) -> None:
        """The denominator, and the update of each matrix to its root mean square (M3.matrix_update)."""
        n, M, runs = self._n, self._matrices, self._exchange.equal_runs
        if not practical:
            self.add(2, 8 * n + 12 * n)
            return
        rows = sum(count for count, _ in runs)
        held = sum(count * length for count, length in runs)
        self.add(2 * len(runs), 4 * held + (4 + 12) * rows)  # means: sums, added up
        self.add(3 * len(runs), 4 * held + (4 + 8 + 12) * rows)  # squares
        self.add(2 * len(runs), 16 * held + 8 * rows)  # the floor added, the update scaled
        self.add(2, 2 * (4 * n + 4 * M))  # sums begin at zero
        self.add(4, 2 * (12 + 12) * M)  # numbers of a matrix, quotients
        self.add(6, 6 * 8 * M)  # roots, floor, bounds, factors
        self.add(2, (8 + 12) * n)  # bound and quotient
        if self._exchange.topology.size > 1:
            self.sums += 2
            self.summed_bytes += 2 * 4 * M
