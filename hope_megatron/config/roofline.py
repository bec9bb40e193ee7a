"""From counts to time: the one formula that `hope plan` (closed forms) and `hope rehearse` (counts) share.

A phase takes the longer of two: the host issues its kernels one after the other, the device runs them one after the other. On the
device every family of kernels takes the longest of its bytes, its FLOPs by dtype, and the time that its kernels take however
little they do. Collectives that nothing hides come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from hope_megatron.config.efficiency import DEFAULT, Efficiency, End
from hope_megatron.config.hardware import Hardware

Bound = Literal["launch", "memory", "math", "network"]
"""What bounds a step. "launch" takes two together that `Limit` keeps apart."""

Limit = Literal["launch", "latency", "memory", "math", "network"]

LIMIT_IN_WORDS: dict[Limit, str] = {
    "launch": "launches by the host",
    "latency": "the latency of small kernels and of loops from chunk to chunk",
    "memory": "memory",
    "math": "math",
    "network": "network",
}
"""How a limit is printed."""

HOST_COPY = "copy to or from the host"
"""Operator of a transfer that is no collective."""

GPUS_PER_NODE = 8
"""Of the usual reference systems: ranks of one node are neighbours and talk over its links."""


@dataclass
class Work:
    """What a family of kernels does in a phase."""

    kernels: float = 0.0
    bytes: float = 0.0
    """Read and written."""
    flops: dict[str, float] = field(default_factory=dict)
    """By dtype: bfloat16, float32, tf32, float64."""
    steps: float = 0.0
    """Chunks that kernels go through one after the other."""


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind over one group in a phase."""

    phase: str
    """Of the step: forward, backward, ..."""
    operator: str
    """allreduce, allgather, reduce_scatter, alltoall, broadcast, or HOST_COPY."""
    group: str
    """Axis of the mesh."""
    ranks: tuple[int, ...]
    """Global ranks of the group."""
    count: float
    """Calls."""
    bytes: float
    """Of the largest operand, over all calls."""
    hidden: bool
    """Runs beside computation."""
    beside: str = ""
    """The phase whose computation that is, where it is not its own."""
    share: float = 1.0
    """Part of that phase that is still to come when it begins."""


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of a phase by what takes them."""

    launch: float
    """The host issues all kernels."""
    memory: float
    """Families of kernels that their bytes bound, on the device."""
    math: float
    """Families that their FLOPs bound."""
    latency: float
    """Families of many small kernels, which neither bounds."""
    network: float
    """Collectives that nothing hides."""
    network_hidden: float
    """Collectives beside computation, as far as they fit."""

    @property
    def device(self) -> float:
        """The device runs all kernels."""
        return self.memory + self.math + self.latency

    @property
    def total(self) -> float:
        """What the phase takes."""
        return max(self.launch, self.device) + self.network


Phases = Mapping[str, Mapping[str, Work]]
"""By phase and family."""


def phase_times(
    phases: Phases,
    transfers: Iterable[Transfer],
    hardware: Hardware,
    efficiency: Efficiency = DEFAULT,
    end: End = "expected",
) -> dict[str, PhaseTime]:
    """Time of each phase on given hardware, at one end of the assumed efficiencies."""
    transfers = list(transfers)
    names = dict.fromkeys([*phases, *(transfer.phase for transfer in transfers)])
    launches, devices = {}, {}
    for phase in names:
        families, device = phases.get(phase, {}), {"memory": 0.0, "math": 0.0, "latency": 0.0}
        for family, work in families.items():
            bound, seconds = family_seconds(family, work, hardware, efficiency, end)
            device[bound] += seconds
        launches[phase] = sum(work.kernels for work in families.values()) * efficiency.launch_s.at(end)
        devices[phase] = device
    busy = {phase: max(launches[phase], sum(devices[phase].values())) for phase in names}
    times = {}
    for phase in names:
        own = [transfer for transfer in transfers if transfer.phase == phase]
        exposed = sum(transfer_seconds(t, hardware, efficiency, end) for t in own if not t.hidden)
        hidden = sum(transfer_seconds(t, hardware, efficiency, end) for t in own if t.hidden)
        room = max((t.share * busy.get(t.beside or phase, 0.0) for t in own if t.hidden), default=0.0)
        network = exposed + max(0.0, hidden - room)
        times[phase] = PhaseTime(launches[phase], **devices[phase], network=network, network_hidden=min(hidden, room))
    return times


def family_seconds(
    family: str, work: Work, hardware: Hardware, efficiency: Efficiency, end: End = "expected"
) -> tuple[str, float]:
    """(bound, seconds on the device) of a family of kernels; bound: memory, math or latency."""
    seconds = {
        "memory": work.bytes / (hardware.memory_bandwidth * efficiency.memory.at(end)),
        "math": sum(flops / flop_rate(family, dtype, hardware, efficiency, end) for dtype, flops in work.flops.items()),
        "latency": work.kernels * efficiency.kernel_s.at(end) + work.steps * efficiency.chunk_s.at(end),
    }
    bound = max(seconds, key=seconds.__getitem__)
    return bound, seconds[bound]


def flop_rate(family: str, dtype: str, hardware: Hardware, efficiency: Efficiency, end: End = "expected") -> float:
    """FLOP/s that a family of kernels reaches in a dtype."""
    if dtype in ("bfloat16", "float16"):
        share = efficiency.attention if family == "attention" else efficiency.matmul_bf16
        return hardware.peak_flops * share.at(end)
    if family == "solves":
        return hardware.peak_fp32 * efficiency.solve.at(end)
    peak = {"tf32": hardware.peak_tf32, "float64": hardware.peak_fp32 / 2}.get(dtype, hardware.peak_fp32)
    return peak * efficiency.matmul_fp32.at(end)


def transfer_seconds(
    transfer: Transfer, hardware: Hardware, efficiency: Efficiency = DEFAULT, end: End = "expected"
) -> float:
    """Time of collectives by the bytes that pass through one device (nccl-tests' bus bandwidth)."""
    if transfer.operator == HOST_COPY:
        return transfer.bytes / (hardware.host_bandwidth * efficiency.host_link.at(end))
    n = len(transfer.ranks)
    if n < 2:
        return 0.0
    passes = {"allreduce": 2 * (n - 1) / n, "broadcast": 1.0, "reduce": 1.0}.get(transfer.operator, (n - 1) / n)
    link = hardware.link_bandwidth / 2 * efficiency.link.at(end)
    nodes = len({rank // GPUS_PER_NODE for rank in transfer.ranks})
    if nodes == 1:
        return transfer.count * efficiency.collective_s.at(end) + passes * transfer.bytes / link
    port = hardware.network_bandwidth * efficiency.network.at(end)
    # what is reduced or gathered passes a node's border once for all of its ranks, which share their ports
    shared = 1 if transfer.operator == "alltoall" else max(1, n // nodes)
    return transfer.count * efficiency.collective_between_s.at(end) + passes * transfer.bytes / min(link, shared * port)


def seconds_by_limit(times: Mapping[str, PhaseTime]) -> dict[Limit, float]:
    """What the time of a step goes to."""
    shares: dict[Limit, float] = {"launch": 0.0, "latency": 0.0, "memory": 0.0, "math": 0.0, "network": 0.0}
    for time in times.values():
        shares["network"] += time.network
        if time.launch >= time.device:
            shares["launch"] += time.launch
        else:
            shares["memory"] += time.memory
            shares["math"] += time.math
            shares["latency"] += time.latency
    return shares


def limit_of(times: Mapping[str, PhaseTime]) -> Limit:
    """What most of the time goes to; of launches and latency, which `bound_of` takes together, the longer."""
    shares, bound = seconds_by_limit(times), bound_of(times)
    return bound if bound != "launch" else max(("launch", "latency"), key=shares.__getitem__)


def bound_of(times: Mapping[str, PhaseTime]) -> Bound:
    """What most of the time goes to, launches and latency taken together."""
    shares = seconds_by_limit(times)
    together: dict[Bound, float] = {
        "launch": shares["launch"] + shares["latency"],
        "memory": shares["memory"],
        "math": shares["math"],
        "network": shares["network"],
    }
    return max(together, key=together.__getitem__)
