"""Time of a step from closed forms: what `hope plan` says. The same formula as `hope rehearse` (roofline.py), on counts from sizes.

Counts of forward, recomputation and backward were fitted to rehearsals and agree with them within 2 % (step_counts.json, made by
tools/fit_step_counts.py). Micro-batches of one sequence have coefficients of their own, and both again under context parallelism.
They hold for HOPE's own rule on Triton kernels, which no GPU has run, and for softmax attention.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hope_megatron.config.accounting import Weight, forward_flops, num_parameters, weight_table
from hope_megatron.config.efficiency import DEFAULT, Efficiency, End
from hope_megatron.config.features import frame_features, layer_features, slice_tokens, variant
from hope_megatron.config.footprint import layer_input_bytes
from hope_megatron.config.hardware import Hardware
from hope_megatron.config.matrices.layout import OVERLAPPED_NUMEL, SUMMED_NUMEL, in_portions, matrix_params
from hope_megatron.config.matrices.update import m3_update
from hope_megatron.config.roofline import (
    HOST_COPY,
    Bound,
    Limit,
    PhaseTime,
    Transfer,
    Work,
    bound_of,
    limit_of,
    phase_times,
)
from hope_megatron.config.run import RunConfig

_COUNTS = Path(__file__).with_name("step_counts.json")
# Reduction, and what the update does to vectors and to all of AdamW's: a term for each operator, in bytes per number, within 2 %
# of rehearsals in bf16 at ZeRO-1. M3's update of matrices: matrices/update.py. Those of other optimizers are guesses.
_NEWTON_SCHULZ_FLOPS = 35e3
"""Per parameter at matrices of width 2048."""
_DEEP_FLOPS = {"dgd": 8.2e3, "delta_momentum": 8.2e3, "dmgd": 28.7e3}
"""The same for products in float32: two, and seven of DMGD, of 2 MN min(M, N) FLOPs."""
_UPDATE_BYTES = {
    "muon": 150,
    "adamuon": 160,
    "sgd": 60,
    "dgd": 180,
    "delta_momentum": 180,
    "dmgd": 240,
}
"""Per number of a shard's matrices; AdamW's are vectors to it."""
_UPDATE_KERNELS = {"m3": 0, "adamw": 0, "sgd": 0, "dmgd": 300}
"""Beside those of vectors; 200 of an optimizer that is not named."""
_ADAM_BYTES, _DECAY_BYTES = 8 + 28 + 12 + 4, 8
"""Per number that is updated: an empty update, Adam's kernel, the step, its norm; and weight decay."""
_GATHERED_BYTES, _PENDING_BYTES, _TICK_BYTES = 8, 12, 16
"""Per number of a shard and step: the bf16 weights; of a slow level its sum of gradients too, copied and cleared at ticks."""
_NORM_BYTES, _CLIP_BYTES, _CLEAR_BYTES = 4, 8, 16
"""Per number of a rank and step: the norm, clipping, and clearing the sums, which DeepSpeed does twice."""
_FLATTEN_BYTES, _COPY_BYTES, _MEAN_BYTES, _SUM_BYTES = 8, 12, 8, 18
"""Per number of a rank: flattened and copied back once a step, divided where there are replicas, and for each micro-batch bf16
raised to float32 and added."""
_HALF_BYTES = 6 + 4 + 10
"""The same of gradients that travel in bf16: rounded, divided, copied back."""
_TOGETHER = 640 << 16
"""Numbers that an operator on lists covers with one kernel."""
_TENSORS_TOGETHER = 128
"""Tensors that it covers with one."""
_BUCKET = 5e8
"""Gradients that DeepSpeed reduces together."""
PROGRAMS_AT_ONCE = 264
"""Programs of a loop over chunks that an H100 runs side by side: two on each of 132 multiprocessors."""
_MEMORY_BACKWARD = 3
"""Products of the memories' backward over those of their forward."""

Works = dict[str, dict[str, Work]]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step on given hardware."""

    phases: dict[str, PhaseTime]
    bound: Bound
    limit: Limit
    """The bound, with launches and latency apart."""
    seconds: float
    fastest_s: float
    slowest_s: float
    """At the ends of the assumed efficiencies."""
    tokens_per_second: float
    """Over all devices."""


def why_not_counted(config: RunConfig) -> str | None:
    """Why the closed forms do not hold for a run, or None if they do."""
    memory = config.model.memory
    if "memory" in config.model.mixers:
        changed = sorted(
            memory.model_dump(exclude_defaults=True).keys() - {"chunk_tokens", "kernel", "keep_every", "precision"}
        )
        if changed:
            return f"memory.{changed[0]} is not HOPE's own"
        if memory.kernel in ("torch", "phases", "cpu"):
            return f"memory.kernel={memory.kernel}; they are of the Triton kernels"
    if config.model.cms.learns_in_context:
        return "it learns in context"
    if config.model.attention.segment_tokens:
        return "attention.segment_tokens reads segment after segment"
    return None


def step_time(config: RunConfig, world_size: int, hardware: Hardware, efficiency: Efficiency = DEFAULT) -> StepTime:
    """Time of a step of a run for which `why_not_counted` has no reason."""
    works, transfers = step_works(config, world_size), step_transfers(config, world_size)

    def at(end: End) -> dict[str, PhaseTime]:
        return phase_times(works, transfers, hardware, efficiency, end)

    expected = at("expected")
    seconds, fastest, slowest = (sum(p.total for p in times.values()) for times in (expected, at("best"), at("worst")))
    return StepTime(
        phases=expected,
        bound=bound_of(expected),
        limit=limit_of(expected),
        seconds=seconds,
        fastest_s=fastest,
        slowest_s=slowest,
        tokens_per_second=config.training.tokens_per_step / seconds,
    )


def micro_batch_works(config: RunConfig) -> Works:
    """Kernels, bytes and FLOPs of a micro-batch on one rank, by phase and family. Windows (training.truncate_tokens) count as that
    many micro-batches; what carrying their states on costs and saves is left out (up to 7 % in a rehearsal of four windows)."""
    counts, windows = Counter[str](), num_windows(config)
    for kind, number in Counter(config.model.mixers).items():
        _add(counts, kind + variant(config), layer_features(config, kind), number * windows)
    _add(counts, "frame" + variant(config), frame_features(config), windows)
    works: Works = {}
    for key, value in counts.items():
        phase, family, what = key.split("/")
        if phase != "recompute" or config.training.recompute == "layer":
            setattr(works.setdefault(phase, {}).setdefault(family, Work()), what, max(0.0, value))
    if "memory" in config.model.mixers:
        for phase in works:
            works[phase]["memories"].steps = _loop_steps(config)
            works[phase]["memories"].kernels += windows * _further_launches(config)
    for phase, families in _flops(config).items():
        for family, flops in families.items():
            if phase in works and flops:
                works[phase].setdefault(family, Work()).flops["float32" if family == "memories" else _dtype(config)] = (
                    flops
                )
    return works


def num_windows(config: RunConfig) -> int:
    """Windows that a sequence is read in."""
    return config.training.seq_length // (config.training.truncate_tokens or config.training.seq_length)


def step_works(config: RunConfig, world_size: int) -> Works:
    """The same of a whole step, with reduction and update."""
    accumulation, replicas = config.accumulation_steps(world_size), config.replicas(world_size)
    works = micro_batch_works(config)
    for families in works.values():
        for work in families.values():
            work.kernels, work.bytes, work.steps = (accumulation * x for x in (work.kernels, work.bytes, work.steps))
            work.flops = {dtype: accumulation * flops for dtype, flops in work.flops.items()}
    tp, rows = config.parallel.tensor_parallel, weight_table(config.model)
    local = sum(row.total / (tp if row.sharded else 1) for row in rows)
    times = accumulation * num_windows(config)
    shard = local / (replicas if config.parallel.zero_stage else 1)
    name, groups = config.optim.name, _groups(config)
    works["reduction"] = {"pointwise": _reduction(config, groups, times, replicas)}
    deep, m3 = name in _DEEP_FLOPS, name == "m3"
    matrices = sum(row.total for row in rows if row.matrix) / world_size * config.model.hidden_size / 2048
    flops = {"float32": matrices * _DEEP_FLOPS[name]} if deep else {}
    if name in ("muon", "adamuon") or (deep and config.optim.orthogonal_output):
        flops["bfloat16"] = matrices * _NEWTON_SCHULZ_FLOPS
    clip = _CLIP_BYTES if config.optim.grad_clip > 0 else 0
    num_bytes = (_NORM_BYTES + clip + _CLEAR_BYTES) * local
    for row in rows:
        num_bytes += _row_bytes(row, name) * row.total / (tp if row.sharded else 1) * shard / local
    lists = max(math.ceil(sum(map(len, _tensors(config).values())) / _TENSORS_TOGETHER), math.ceil(local / _TOGETHER))
    kernels: float = 26 + 2 * lists + _UPDATE_KERNELS.get(name, 200)
    # a group is cleared twice and gathered; at ticks it is updated, and the sum of a slow one copied and cleared
    for matrix, period, decays in groups:
        update = 0 if m3 and matrix else (5 + decays) / period
        kernels += 3 + update + ((1 + 2 / period) if period > 1 else 0)
    if m3:
        own = m3_update(config, world_size)
        kernels, num_bytes = kernels + own.kernels, num_bytes + own.bytes
        flops = {config.training.float32_products: own.measured_flops}
        dtype = config.training.float32_products if config.optim.ns_dtype == "float32" else "bfloat16"
        flops[dtype] = flops.get(dtype, 0.0) + own.flops
    works["update"] = {"pointwise": Work(kernels, num_bytes), "products": Work(0, 0.0, flops)}
    return works


def _decays(row: Weight) -> bool:
    return row.part in ("embedding", "head") or (row.matrix and row.part != "memories")


def _groups(config: RunConfig) -> dict[tuple[bool, int, bool], float]:
    """Numbers of a rank in each of the optimizer's groups, by role, period and decay."""
    found: dict[tuple[bool, int, bool], float] = {}
    for row in weight_table(config.model):
        key = (row.matrix, row.update_period_steps, _decays(row))
        found[key] = found.get(key, 0.0) + row.total / (config.parallel.tensor_parallel if row.sharded else 1)
    return found


def _reduction(config: RunConfig, groups: dict[tuple[bool, int, bool], float], times: int, replicas: int) -> Work:
    """Gradients of a rank: added up over micro-batches, flattened, averaged and copied back."""
    in_products = (
        config.training.libraries.weight_gradient == "apex"
    )  # then linears, whose weights decay, have added theirs
    added = {key: 0.0 if in_products and key[0] and key[2] else numbers for key, numbers in groups.items()}
    buckets, means = _buckets(groups), _MEAN_BYTES if replicas > 1 else 0
    tensors = {key: sizes for key, sizes in _tensors(config).items() if added[key]}
    lists = sum(_lists(in_portions(sizes, SUMMED_NUMEL)) for sizes in tensors.values())
    local, summed = sum(groups.values()), sum(added.values())
    if overlaps(config, replicas):  # the last pass adds bucket by bucket, and nothing is copied
        number = len(_overlapped(config))
        last = sum(_lists(in_portions(sizes[::-1], OVERLAPPED_NUMEL)) for sizes in tensors.values())
        half = config.parallel.reduce_dtype == "bf16"
        travel = _HALF_BYTES if half else _MEAN_BYTES
        kernels = 2 * ((times - 1) * lists + last) + times + 1 + number * (3 if half else 1)
        return Work(kernels, local * travel + times * summed * _SUM_BYTES)
    flattened = [sum(bucket) for bucket in buckets if len(bucket) > 1]  # a bucket of one group is flat already
    kernels = times * (2 * lists + 1) + len(groups) + 1 + len(flattened) + (replicas > 1) * len(buckets)
    moved = local * (_COPY_BYTES + means) + sum(flattened) * _FLATTEN_BYTES + times * summed * _SUM_BYTES
    return Work(kernels, moved)


def _lists(portions: list[list[int]]) -> int:
    """Kernels of an operator on two lists of tensors, over all portions."""
    return sum(
        max(1, math.ceil(2 * len(some) / _TENSORS_TOGETHER), math.ceil(2 * sum(some) / _TOGETHER)) for some in portions
    )


def overlaps(config: RunConfig, replicas: int) -> bool:
    """Whether gradients are summed over ranks under backward on GPUs (engine/overlap.py)."""
    parallel, training = config.parallel, config.training
    whole = parallel.zero_stage == 1 and training.precision == "bf16" and training.reduction != "canonical"
    return whole and replicas > 1 and parallel.overlap_comm is not False


def _overlapped(config: RunConfig) -> list[int]:
    """Numbers in the buckets that are summed under backward. The last one has nothing left to hide it: it has the embedding."""
    tensors = _tensors(config)
    first = tensors.pop((False, 1, True))
    found = [sum(some) for sizes in tensors.values() for some in in_portions(sizes[::-1], OVERLAPPED_NUMEL)]
    return found + [sum(some) for some in in_portions(first[::-1], OVERLAPPED_NUMEL)]


def _tensors(config: RunConfig) -> dict[tuple[bool, int, bool], list[int]]:
    """Sizes of a rank's tensors in each of the optimizer's groups, those of matrices in the order of the model."""
    tp, found = config.parallel.tensor_parallel, dict[tuple[bool, int, bool], list[int]]()
    for row in weight_table(config.model):
        if not row.matrix:
            size = row.size // (tp if row.sharded else 1)
            found.setdefault((False, row.update_period_steps, _decays(row)), []).extend([size] * row.copies)
    for _, shape, tags in matrix_params(config.model, tp):
        key = (True, tags.update_period_steps, tags.weight_decay)
        found.setdefault(key, []).append(math.prod(shape))
    return found


def _buckets(groups: dict[tuple[bool, int, bool], float]) -> list[list[float]]:
    """Groups that DeepSpeed reduces together."""
    found: list[list[float]] = [[]]
    for _, numbers in sorted(groups.items(), key=lambda item: (not item[0][0], item[0][1], not item[0][2])):
        if sum(found[-1]) > _BUCKET:
            found.append([])
        found[-1].append(numbers)
    return found


def _row_bytes(row: Weight, optimizer: str) -> float:
    """Bytes of the update per number of a shard, a step's share of what a slow level does at its ticks."""
    period = row.update_period_steps
    vector = not row.matrix or optimizer == "adamw"
    update = (
        _ADAM_BYTES + _DECAY_BYTES * _decays(row) if vector else _UPDATE_BYTES.get(optimizer, 160)
    )  # one added: a guess
    if row.matrix and optimizer == "m3":
        update = 0  # matrices/update.py
    slow = _PENDING_BYTES + _TICK_BYTES / period if period > 1 else 0
    return update / period + _GATHERED_BYTES + slow


def step_transfers(config: RunConfig, world_size: int) -> list[Transfer]:
    """Collectives of a step of rank 0. Neighbours share a layer, groups of these a sequence; gradients are summed over all ranks
    with the same part of the layers."""
    tp, times = config.parallel.tensor_parallel, config.accumulation_steps(world_size) * num_windows(config)
    local = num_parameters(config.model) / tp
    size = 4 if config.parallel.reduce_dtype == "fp32" or config.training.precision == "fp32" else 2
    found = []
    if config.replicas(world_size) > 1:
        ranks = tuple(range(0, world_size, tp))
        buckets = len(_buckets(_groups(config)))
        found += _over_data_parallel(config.parallel.zero_stage, ranks, times, size * local, 2 * local, buckets)
        if overlaps(config, config.replicas(world_size)):
            *under, last = _overlapped(config)
            kind = ("reduction", "allreduce", "data parallel", ranks)
            found[0] = Transfer(*kind, 1, size * last, False)
            found.append(Transfer(*kind, len(under), size * sum(under), True, "backward", 1 / times))
    if tp > 1:
        blocks = config.model.num_layers * (1 + len(config.model.cms.levels))
        each = 2.0 * slice_tokens(config) * config.model.hidden_size
        operators = ("allgather", "reduce_scatter") if config.parallel.sequence_parallel else ("allreduce",)
        for phase, operator in itertools.product(_passes(config), operators):
            calls, ranks = blocks * times, tuple(range(tp))
            found.append(Transfer(phase, operator, "tensor parallel", ranks, calls, calls * each, False))
    beside = _of_matrices(config, world_size) + _over_context_parallel(config, times) + _over_the_bus(config, times)
    return found + beside


def _of_matrices(config: RunConfig, world_size: int) -> list[Transfer]:
    """M3's momentum to the owners of matrices and back, and its means over matrices."""
    parallel = config.parallel
    if config.optim.name != "m3" or (world_size if parallel.zero_stage else parallel.tensor_parallel) == 1:
        return []
    found, ranks = (
        m3_update(config, world_size),
        tuple(range(world_size if parallel.zero_stage else parallel.tensor_parallel)),
    )
    group = "all ranks" if parallel.tensor_parallel > 1 else "data parallel"
    return [
        Transfer("update", "alltoall", group, ranks, found.exchanges, found.exchanged_bytes, False),
        Transfer("update", "allreduce", group, ranks, found.sums, found.summed_bytes, False),
    ]


def _over_the_bus(config: RunConfig, times: int) -> list[Transfer]:
    """The inputs of layers, to the host in forward and back in backward."""
    if not config.training.offload_activations:
        return []
    bytes_ = times * layer_input_bytes(config)
    return [Transfer(phase, HOST_COPY, "host", (0,), times, bytes_, False) for phase in ("forward", "backward")]


def _passes(config: RunConfig) -> tuple[str, ...]:
    return ("forward", "backward", *(["recompute"] if config.training.recompute == "layer" else []))


def _over_context_parallel(config: RunConfig, times: int) -> list[Transfer]:
    """Queries, keys, values and outputs of a mixer in all its heads, and the float32 logits of a memory's rates."""
    model, parallel = config.model, config.parallel
    if parallel.context_parallel == 1:
        return []
    ranks = tuple(range(0, parallel.ranks_per_sequence, parallel.tensor_parallel))
    n, heads = slice_tokens(config), model.num_heads / parallel.tensor_parallel
    number = 2 if config.training.precision == "bf16" else 4
    calls = bytes_ = 0.0
    for kind in model.mixers:
        keys = model.num_heads if kind == "memory" else model.attention.num_kv_heads or model.num_heads
        rates = 2 * 4 if kind == "memory" else 0  # eta and alpha of HOPE's own rule
        calls += 3 if kind == "memory" else 4
        bytes_ += n * heads * (number * model.head_dim * (2 + 2 * keys / model.num_heads) + rates)
    return [
        Transfer(phase, "alltoall", "context parallel", ranks, times * calls, times * bytes_, False)
        for phase in _passes(config)
    ]


def _over_data_parallel(
    stage: int, ranks: tuple[int, ...], accumulation: int, gradients: float, weights: float, buckets: int
) -> list[Transfer]:
    """Gradients, in buckets, and weights, in bytes of a rank's whole model. From stage 2 on gradients are reduced in each
    micro-batch; at stage 3 weights are gathered for each pass."""
    group = "data parallel"
    if stage < 2:
        found = [Transfer("reduction", "allreduce", group, ranks, buckets, gradients, False)]
    else:
        found = [Transfer("reduction", "reduce_scatter", group, ranks, accumulation, accumulation * gradients, False)]
    if stage == 3:
        passes = ("forward", "backward")
        return found + [
            Transfer(p, "allgather", group, ranks, accumulation, accumulation * weights, False) for p in passes
        ]
    return [*found, Transfer("update", "allgather", group, ranks, 8, weights, False)] if stage else found


def _flops(config: RunConfig) -> dict[str, dict[str, float]]:
    """Of a micro-batch on one rank, by phase and family."""
    model, training = config.model, config.training
    window = training.truncate_tokens or training.seq_length
    n = num_windows(config) * slice_tokens(config) / config.parallel.tensor_parallel
    forward = forward_flops(model, window)
    head = 2.0 * model.padded_vocab_size * model.hidden_size
    once = {"products": n * forward.outer, "attention": n * forward.attention, "memories": n * forward.memory}
    return {
        "forward": once,
        "recompute": once | {"products": n * (forward.outer - head)},
        "backward": {
            "products": 2 * once["products"],
            "attention": 2.5 * once["attention"],
            "memories": _MEMORY_BACKWARD * once["memories"],
        },
    }


def _loop_steps(config: RunConfig) -> float:
    """Chunks that the loop kernels of a micro-batch go through one after the other, in each of its phases: all of a sequence, for
    this rank's heads."""
    model, training = config.model, config.training
    streams = training.micro_batch_size * model.num_heads // config.parallel.ranks_per_sequence
    chunks = training.seq_length // model.memory.chunk_tokens
    rule = model.memory.rule
    programs = (streams, streams * (rule.num_vector + rule.num_scalar))  # of the main memory, and of the self-memories
    rounds = sum(-(-some // PROGRAMS_AT_ONCE) for some in programs)
    return model.mixers.count("memory") * chunks * rounds


def _further_launches(config: RunConfig) -> int:
    """Of the self-memories' loops in a phase: their programs wait for each other, so streams go in groups that fit the GPU."""
    model, rule = config.model, config.model.memory.rule
    streams = config.training.micro_batch_size * model.num_heads // config.parallel.ranks_per_sequence
    programs = rule.num_vector + rule.num_scalar
    if programs < 2:
        return 0
    wide = max(model.head_dim, model.memory_hidden, model.memory.chunk_tokens) > 64  # programs of eight warps then
    at_once = PROGRAMS_AT_ONCE // (2 if wide else 1) // programs
    return model.mixers.count("memory") * (-(-streams // at_once) - 1)


def _dtype(config: RunConfig) -> str:
    return "bfloat16" if config.training.precision == "bf16" else config.training.float32_products


def _add(counts: Counter[str], part: str, features: dict[str, float], times: float) -> None:
    for key, coefficients in _coefficients()[part].items():
        counts[key] += times * sum(x * features[name] for name, x in coefficients.items())  # type: ignore[assignment]


@functools.cache
def _coefficients() -> dict[str, dict[str, dict[str, float]]]:
    return dict(json.loads(_COUNTS.read_text(encoding="utf-8")))
