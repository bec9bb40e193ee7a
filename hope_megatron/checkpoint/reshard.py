"""Writing a checkpoint for any layout from one process, tensor by tensor, and the proof that nothing changed.

Memory holds one whole tensor and its shards, whatever the size of the checkpoint: all ranks' files are open at once, and
every file has its tensors in the model's order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hope_megatron.checkpoint.digested_file import DigestedFile, FileDigest, SafetensorsFile
from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.format import (
    DESCRIPTION,
    FORMAT,
    GENERATOR_PREFIX,
    rank_file_name,
    write_json,
    write_manifest,
)
from hope_megatron.checkpoint.output import fresh_directory
from hope_megatron.checkpoint.placement import place, shard_shape
from hope_megatron.checkpoint.skeleton import skeleton_of
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, compare_unsharded, read_unsharded
from hope_megatron.config import in_layout
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.config.matrices.runs import Run
from hope_megatron.optim import split_shards


@dataclass(frozen=True)
class Rewritten:
    """What `write_checkpoint` made and how it proved itself."""

    directory: Path
    layout: ParallelLayout
    num_files: int
    num_elements: int
    """Elements compared with the source after writing."""


def reshard(source: CheckpointSource, layout: ParallelLayout, out_dir: Path) -> Rewritten:
    """Rewrite a checkpoint for another layout: weights, optimizer states, clocks, data position, generators, probe.

    Raises:
        CheckpointDamagedError: a file of the source is missing or differs from its digest.
        ConfigError, ConversionError: as for `write_checkpoint`.
    """
    unsharded = read_unsharded(source)
    before, after = unsharded.layout.describe(), layout.describe()
    return write_checkpoint(unsharded.with_history("reshard", before=before, after=after), layout, out_dir)


def write_checkpoint(
    unsharded: UnshardedCheckpoint,
    layout: ParallelLayout,
    out_dir: Path,
    replaceable: Callable[[Path], bool] = lambda _: False,
) -> Rewritten:
    """Write a checkpoint of ours, as training in `layout` would have, then read it back and compare every tensor.

    Args:
        unsharded: what to write.
        layout: the ranks that are to find their pieces in their files.
        out_dir: the step directory, made new; `hope train FILE --resume OUT_DIR` starts from it.
        replaceable: whether an existing directory may go.

    Raises:
        ConfigError: the layout does not divide the model or the batch.
        ConversionError: `out_dir` is taken or cannot be written, or what was written differs; nothing is left then.
    """
    config = in_layout(unsharded.config, layout)
    with fresh_directory(out_dir, replaceable) as directory:
        runs = place(unsharded.parameters, skeleton_of(unsharded).members, layout)
        digests = _write_ranks(unsharded, layout, runs, directory)
        for extra in unsharded.extra_files:
            digests[extra.name] = _copy(extra, directory / extra.name)
        description = {
            **unsharded.description,
            "config": config.model_dump(mode="json"),
            **_describe(unsharded, layout, runs),
        }
        digests[DESCRIPTION] = write_json(directory / DESCRIPTION, description)
        write_manifest(directory, digests)
        num_elements = compare_unsharded(unsharded, read_unsharded(CheckpointSource(directory)))
    return Rewritten(out_dir, layout, len(digests), num_elements)


def _ranks(layout: ParallelLayout) -> list[tuple[int, int, int]]:
    """(rank, dp_rank, tp_rank): tensor-parallel ranks are neighbours."""
    tp_size = layout.tensor_parallel
    return [(rank, rank // tp_size, rank % tp_size) for rank in range(layout.world_size)]


def _write_ranks(
    unsharded: UnshardedCheckpoint, layout: ParallelLayout, runs: dict[str, tuple[Run, ...]], directory: Path
) -> dict[str, FileDigest]:
    """The files of all ranks, filled in one pass over the tensors."""
    files: dict[tuple[int, int], SafetensorsFile] = {}
    with ExitStack() as stack:
        for rank, dp_rank, tp_rank in _ranks(layout):
            generators = {f"{GENERATOR_PREFIX}{k}": v for k, v in unsharded.generators(dp_rank, tp_rank).items()}
            entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in generators.items()]
            entries += [
                (f"{state}/{parameter.name}", torch.float32, (run.numel,))
                for parameter in unsharded.parameters.values()
                for state in parameter.states
                for run in runs[parameter.name]
                if run.dp_rank == dp_rank
            ]
            file = stack.enter_context(SafetensorsFile(directory / rank_file_name(rank), entries))
            files[dp_rank, tp_rank] = file
            for name, tensor in generators.items():
                file.append(name, tensor)
        for parameter in unsharded.parameters.values():
            for state in parameter.states:
                _write_tensor(unsharded, parameter.name, state, layout.tensor_parallel, runs[parameter.name], files)
        return {rank_file_name(rank): files[dp_rank, tp_rank].close() for rank, dp_rank, tp_rank in _ranks(layout)}


def _write_tensor(
    unsharded: UnshardedCheckpoint,
    name: str,
    state: str,
    tp_size: int,
    runs: tuple[Run, ...],
    files: dict[tuple[int, int], SafetensorsFile],
) -> None:
    """One state of one parameter into all files that hold a piece of it."""
    parameter, tensor = unsharded.parameters[name], unsharded.read(name, state)
    if tensor.shape != parameter.shape or tensor.dtype != torch.float32:
        raise ConversionError(
            f"{unsharded.origin}: {state} of {name} is {tensor.dtype} {list(tensor.shape)}, not float32 {list(parameter.shape)}"
        )
    for tp_rank, shard in enumerate(split_shards(tensor, parameter.tags, tp_size)):
        flat = shard.reshape(-1)
        for run in runs:
            files[run.dp_rank, tp_rank].append(f"{state}/{name}", flat.narrow(0, run.shard_start, run.numel))


def _describe(
    unsharded: UnshardedCheckpoint, layout: ParallelLayout, runs: dict[str, tuple[Run, ...]]
) -> dict[str, Any]:
    """The part of checkpoint.json that a layout determines."""
    files = []
    for rank, dp_rank, tp_rank in _ranks(layout):
        pieces = [
            [name, run.shard_start, run.numel, list(parameter.states)]
            for name, parameter in unsharded.parameters.items()
            for run in runs[name]
            if run.dp_rank == dp_rank
        ]
        if pieces:
            files.append({"file": rank_file_name(rank), "tp_rank": tp_rank, "dp_rank": dp_rank, "pieces": pieces})
    return {
        "format": FORMAT,
        "layout": layout.describe(),
        "parameters": [
            {
                "name": parameter.name,
                "full_shape": list(parameter.shape),
                "shard_shape": list(shard_shape(parameter, layout.tensor_parallel)),
                "dtype": parameter.dtype,
                "tags": parameter.tags.to_dict(),
            }
            for parameter in unsharded.parameters.values()
        ],
        "files": files,
    }


def _copy(source: Path, target: Path) -> FileDigest:
    with open(source, "rb") as reader, DigestedFile(target) as writer:
        while block := reader.read(1 << 20):
            writer.write(block)
    return writer.close()
