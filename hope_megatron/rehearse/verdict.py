"""What a rehearsal comes to: figures for a named GPU, as plain data."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hope_megatron.config.efficiency import DEFAULT, Efficiency
from hope_megatron.config.hardware import Hardware
from hope_megatron.config.roofline import (
    Phases,
    PhaseTime,
    Transfer,
    Work,
    bound_of,
    family_seconds,
    limit_of,
    phase_times,
    seconds_by_limit,
    transfer_seconds,
)
from hope_megatron.config.run import RunConfig
from hope_megatron.config.sharing import attention_exchanges, passing_states
from hope_megatron.rehearse.depth import Depths
from hope_megatron.rehearse.memory import Segment
from hope_megatron.rehearse.tally import Tally, grouped, phases_of, total

BLIND_SPOTS = (
    "values: whatever depends on them takes the usual branch (finite, nothing overflows)",
    "branches that only a CUDA build of PyTorch takes, inside PyTorch, Megatron-Core and DeepSpeed; those of this project and "
    "PyTorch's fused norms and attention are taken as on a GPU",
    "the order of work on several streams: a collective counts as overlapped where it is issued on a stream of its own",
    "memory that the allocator loses to fragmentation, and what NCCL, cuBLAS and the CUDA context hold: 1 to 3 GB",
    "inside of kernels: their workspaces, caches, clocks and how well they are written; times are counts over assumed rates",
)

_LABELS_KEPT = 12


def verdict(
    depths: Depths,
    groups: dict[str, tuple[int, ...]],
    world_size: int,
    hardware: Hardware,
    efficiency: Efficiency = DEFAULT,
    *,
    rank: int = 0,
    pass_states: int | None = None,
) -> dict[str, Any]:
    """Everything `hope rehearse` says.

    Args:
        depths: what was recorded.
        groups: ranks of the process groups, by name.
        world_size: number of ranks.
        hardware: the device that times are for.
        efficiency: what it is assumed to reach.
        rank: whose step it was.
        pass_states: ranks that would share a sequence by passing states; the run is that of a slice (`slice_config`).
    """
    config, micro_batch, step = depths.config, depths.micro_batch(), depths.step()
    windows = config.training.seq_length // (config.training.truncate_tokens or config.training.seq_length)
    transfers = transfers_of(step, groups, depths.accumulation * windows)
    works = works_of(step)
    times = phase_times(works, transfers, hardware, efficiency)
    step_s = sum(time.total for time in times.values())
    memory = _memory(depths)
    waits = {
        where: count
        for (where,), count in [*grouped(step, "wait", "where").items(), *grouped(step, "agreement", "where").items()]
    }
    return {
        "name": config.name,
        "model": config.model.name,
        "world_size": world_size,
        "rank": rank,
        "hardware": hardware.name,
        "accumulation_steps": depths.accumulation,
        "micro_batch_size": config.training.micro_batch_size,
        "seq_length": config.training.seq_length,
        "kernels_per_micro_batch": round(total(micro_batch, "kernels")),
        "kernels_per_step": round(total(step, "kernels")),
        "launch_s": sum(time.launch for time in times.values()),
        "bytes_moved": total(step, "bytes"),
        "flops_by_dtype": {dtype: value for (dtype,), value in grouped(step, "flops", "dtype").items()},
        "roofline_s_by_phase": {phase: time.device for phase, time in times.items()},
        "phases": {phase: _phase(phase, time, step) for phase, time in times.items()},
        "seconds_by_family": {
            phase: {family: family_seconds(family, work, hardware, efficiency)[1] for family, work in families.items()}
            for phase, families in works.items()
        },
        "kernels_by_family": {family: round(value) for (family,), value in grouped(step, "kernels", "family").items()},
        **memory,
        "fits": memory["peak_memory_bytes"] <= 0.9 * hardware.memory_bytes,
        "collectives": [_collective(t, hardware, efficiency) for t in transfers],
        "sequence_exchange": _sequence_exchange(config, micro_batch),
        "passing_states": pass_states and passing_states(config, pass_states, times, hardware, world_size),
        "host_waits_per_step": round(sum(waits.values())),
        "host_waits": {where: round(count) for where, count in sorted(waits.items())},
        "step_s": step_s,
        "tokens_per_second": config.training.tokens_per_step / world_size / step_s,
        "bound": bound_of(times),
        "limit": limit_of(times),
        "seconds_by_limit": seconds_by_limit(times),
        "cannot_see": [*BLIND_SPOTS, *_blind_spots_of(config, memory["memory_timeline"])],
    }


def _sequence_exchange(config: RunConfig, micro_batch: Tally) -> dict[str, float] | None:
    """Bytes that a rank sends per token of its slice, layer and forward pass: as counted, and of attention shared in other ways."""
    cp = config.parallel.context_parallel
    if cp == 1:
        return None
    sizes = grouped(micro_batch, "collective_bytes", "phase", "operator")
    tokens = config.training.micro_batch_size * config.training.seq_length / cp * config.model.num_layers
    counted = sizes.get(("forward", "alltoall"), 0.0) * (cp - 1) / cp / tokens
    return {"tokens for heads": counted, **attention_exchanges(config)}


def works_of(tally: Tally) -> Phases:
    """Kernels, bytes and FLOPs by phase and family."""
    works = {phase: {} for phase in phases_of(tally)}  # type: dict[str, dict[str, Work]]
    for what in ("kernels", "bytes", "steps"):
        for (phase, family), value in grouped(tally, what, "phase", "family").items():
            setattr(works[phase].setdefault(family, Work()), what, value)
    for (phase, family, dtype), value in grouped(tally, "flops", "phase", "family", "dtype").items():
        works[phase][family].flops[dtype] = value
    return {phase: families for phase, families in works.items() if families}


def transfers_of(tally: Tally, groups: dict[str, tuple[int, ...]], passes: int) -> list[Transfer]:
    """Collectives by phase, operator, group and way. passes: of backward in a step, of which the last one hides reduction."""
    sizes = grouped(tally, "collective_bytes", "phase", "operator", "group", "way")
    return [
        Transfer(
            phase,
            operator,
            group,
            groups[group],
            count,
            sizes.get((phase, operator, group, way), 0.0),
            way == "overlapped",
            *(("backward", 1 / passes) if phase == "reduction" else ()),
        )
        for (phase, operator, group, way), count in grouped(
            tally, "collective", "phase", "operator", "group", "way"
        ).items()
    ]


def _phase(phase: str, time: PhaseTime, step: Tally) -> dict[str, Any]:
    return {
        "kernels": round(total(step, "kernels", phase=phase)),
        "bytes": total(step, "bytes", phase=phase),
        "flops_by_dtype": {
            dtype: value for (p, dtype), value in grouped(step, "flops", "phase", "dtype").items() if p == phase
        },
        "launch_s": time.launch,
        "memory_s": time.memory,
        "math_s": time.math,
        "latency_s": time.latency,
        "network_s": time.network,
        "network_hidden_s": time.network_hidden,
        "total_s": time.total,
    }


def _collective(transfer: Transfer, hardware: Hardware, efficiency: Efficiency) -> dict[str, Any]:
    return {
        "phase": transfer.phase,
        "operator": transfer.operator,
        "group": transfer.group,
        "ranks": len(transfer.ranks),
        "count": round(transfer.count, 2),
        "bytes": transfer.bytes,
        "way": "overlapped" if transfer.hidden else "exposed",
        "seconds": transfer_seconds(transfer, hardware, efficiency),
    }


def _memory(depths: Depths) -> dict[str, Any]:
    """The peak, what is alive then, and the curve."""
    offloads, at_rest = depths.config.parallel.cpu_offload, depths.at_rest()
    host = at_rest.pop("optimizer") if offloads else 0
    start = sum(at_rest.values())
    timeline = depths.timeline()
    if timeline is None:
        timeline = depths.whole.segments
        peak, segment, alive = start + _linear_rise(depths), "somewhere in the step", Counter[str]()
    else:
        peak, segment, alive = _highest(start, timeline)
    activations = peak - start
    return {
        "peak_memory_bytes": peak,
        "peak_memory_breakdown": {**at_rest, "activations and temporaries": activations},
        "peak_at": segment,
        "alive_at_peak": [[label, size] for label, size in alive.most_common(_LABELS_KEPT) if size > 0],
        "host_memory_bytes": host,
        "memory_timeline": _curve(start, timeline) if segment != "somewhere in the step" else [],
    }


def _highest(start: int, timeline: list[Segment]) -> tuple[int, str, Counter[str]]:
    """(peak, segment, bytes by label beyond what was there at the start)."""
    level, peak, segment = start, start, "between micro-batches"
    held: Counter[str] = Counter()
    alive: Counter[str] = Counter()
    for part in timeline:
        if level + part.high > peak:
            peak, segment = level + part.high, part.name
            alive = Counter(held)
            alive.update(part.at_high)
        level += part.net
        held.update(part.at_end)
    return peak, segment, alive


def _linear_rise(depths: Depths) -> int:
    """Rise over the state at rest, linear in layers, where the order of layers is not that of a plain forward and backward."""
    rises = {kind: _highest(0, full.segments)[0] for kind, (_, full) in depths.shallow.items()}
    counts = Counter(depths.config.model.mixers)
    return rises[None] + sum((count - 1) * (rises[kind] - rises[None]) for kind, count in counts.items())


def _curve(start: int, timeline: list[Segment]) -> list[dict[str, Any]]:
    level, curve = start, []
    for segment in timeline:
        curve.append({"segment": segment.name, "bytes": [level + point for point in segment.trace]})
        level += segment.net
    return curve


def _blind_spots_of(config: RunConfig, timeline: list[Any]) -> list[str]:
    found = []
    if config.data.reset_at_documents:
        found.append(
            "data.reset_at_documents: where documents begin is a value; sequences were rehearsed as one document each"
        )
    if config.parallel.cpu_offload:
        found.append(
            "parallel.cpu_offload: the update on the host and the copies to and from it; it is priced as on the GPU"
        )
    if config.training.offload_activations:
        found.append(
            "training.offload_activations: host and GPU are one here, so that what is on the host counts as on the GPU"
        )
    if not timeline:
        found.append(
            "the order in which layers run, so that the peak was extrapolated and what lives there is not known"
        )
    return found
