"""The matrices of a model as its optimizer sees them: flat vectors of a run, from its configuration alone.

Tests hold it against the built model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hope_megatron.config.accounting import memory_banks
from hope_megatron.config.clock import Changes, UpdateClock
from hope_megatron.config.matrices.plan import ParamLayout
from hope_megatron.config.matrices.runs import Run, partition_runs, split_runs
from hope_megatron.config.matrices.tags import ParamTags
from hope_megatron.config.model import ModelConfig

_ALIGNMENT = 2
"""Numbers in bf16 that DeepSpeed aligns every partition to (nccl_start_alignment_factor)."""
SUMMED_NUMEL = 2**26
"""Gradients that are raised to float32 and added to their sums together: 256 MiB of them."""
OVERLAPPED_NUMEL = 2**25
"""Gradients that are summed over ranks together under backward: 128 MiB in float32, enough for the full speed of a link."""


class MatrixVector(NamedTuple):
    """A flat vector of matrices, and what is the same for all of them."""

    params: list[ParamLayout]
    clock: UpdateClock
    decays: bool
    numel: int
    """Numbers that one rank has of it, padding included."""


def matrix_params(model: ModelConfig, tp: int) -> Iterator[tuple[str, tuple[int, ...], ParamTags]]:
    """(name, shape of a tensor-parallel shard, tags) of every matrix or stack of matrices, in the order of the model."""
    for i, mixer in enumerate(model.mixers):
        layer = f"layers.{i}"
        yield from _memory(model, tp, layer) if mixer == "memory" else _attention(model, tp, layer)
        for number, level in enumerate(model.cms.levels):
            up_parts = 2 if model.cms.activation == "swiglu" else 1
            clock, mlp = level.clock, f"{layer}.mlp.levels.{number}"
            yield _column(f"{mlp}.up", model, tp, (level.hidden_size,) * up_parts, clock)
            yield _row(f"{mlp}.down", model, tp, level.hidden_size, clock)


_EVERY_STEP = UpdateClock(1)


def _column(
    name: str, model: ModelConfig, tp: int, parts: tuple[int, ...], clock: UpdateClock = _EVERY_STEP
) -> tuple[str, tuple[int, ...], ParamTags]:
    tags = ParamTags(
        partition_dim=0,
        partition_stride=len(parts),
        fused_parts=parts if len(parts) > 1 else (),
        update_period_steps=clock.first,
        update_period_changes=clock.changes,
    )
    return f"{name}.weight", (sum(parts) // tp, model.hidden_size), tags


def _row(
    name: str, model: ModelConfig, tp: int, inputs: int, clock: UpdateClock = _EVERY_STEP
) -> tuple[str, tuple[int, ...], ParamTags]:
    tags = ParamTags(partition_dim=1, update_period_steps=clock.first, update_period_changes=clock.changes)
    return f"{name}.weight", (model.hidden_size, inputs // tp), tags


def _memory(model: ModelConfig, tp: int, layer: str) -> Iterator[tuple[str, tuple[int, ...], ParamTags]]:
    width, memory, d, h = model.num_heads * model.head_dim, model.memory, model.head_dim, model.memory_hidden
    stack = ParamTags(partition_dim=0, weight_decay=False)
    yield _column(f"{layer}.mixer.qkv", model, tp, (width,) * 3)
    names = {"main memory": "mem", "projection memories": "vector", "rate memories": "scalar"}
    for bank in memory_banks(model):
        heads = (model.num_heads // tp, bank.memories)
        name = f"{layer}.mixer.memories.{names[bank.name]}"
        if memory.num_layers == 2:
            yield f"{name}_in", (*heads, h, d), stack
        if bank.outputs > 1:
            yield f"{name}_out", (*heads, bank.outputs, h if memory.num_layers == 2 else d), stack
    if memory.output_gate != "none":
        yield _column(f"{layer}.mixer.gate", model, tp, (width,))
    yield _row(f"{layer}.mixer.output", model, tp, width)


def _attention(model: ModelConfig, tp: int, layer: str) -> Iterator[tuple[str, tuple[int, ...], ParamTags]]:
    heads = model.num_heads + 2 * (model.attention.num_kv_heads or model.num_heads)
    yield _row(f"{layer}.mixer.attention.linear_proj", model, tp, model.num_heads * model.head_dim)
    yield _column(f"{layer}.mixer.attention.linear_qkv", model, tp, (heads * model.head_dim,))


def matrix_vectors(model: ModelConfig, tp: int, stage: int, replicas: int) -> list[MatrixVector]:
    """The vectors of matrices that an optimizer steps: one for each group under ZeRO, one for each parameter without."""
    groups: dict[tuple[int, bool, Changes], list[tuple[str, tuple[int, ...], ParamTags]]] = {}
    for name, shape, tags in matrix_params(model, tp):
        key = (tags.update_period_steps, not tags.weight_decay, tags.update_period_changes)
        groups.setdefault(key, []).append((name, shape, tags))
    found = []
    for (first, keeps, changes), members in sorted(groups.items()):
        for part in [members] if stage else [[member] for member in members]:
            params, numel = _placed(part, stage, replicas)
            found.append(MatrixVector(params, UpdateClock(first, changes), not keeps, numel))
    return found


def _placed(
    members: list[tuple[str, tuple[int, ...], ParamTags]], stage: int, replicas: int
) -> tuple[list[ParamLayout], int]:
    """Parameters with their runs, and numbers of a rank."""
    sizes = [math.prod(shape) for _, shape, _ in members]
    runs: list[tuple[Run, ...]] = []
    if stage == 0:
        runs, numel = [(Run(0, 0, 0, size),) for size in sizes], sum(sizes)
    elif stage == 3:
        pieces, numel = [-(-size // replicas) for size in sizes], 0
        for size, piece in zip(sizes, pieces):
            runs.append(partition_runs(numel, piece, size, replicas))
            numel += piece
    else:
        unit = _ALIGNMENT * replicas
        numel = -(-sum(sizes) // unit) * _ALIGNMENT
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        runs = [split_runs(start, size, numel, replicas) for start, size in zip(starts, sizes)]
    layouts = [ParamLayout(name, shape, tags, own) for (name, shape, tags), own in zip(members, runs)]
    return layouts, numel


def in_portions(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive sizes that add up to no more than `most`, or a single one."""
    portions: list[list[int]] = []
    room = 0
    for size in sizes:
        if size > room or not portions:
            portions.append([])
            room = most
        portions[-1].append(size)
        room -= size
    return portions
