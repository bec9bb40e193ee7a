"""DeepSpeed's own ZeRO checkpoints: the files that `engine.save_checkpoint` leaves in a layout, written by one process.

    DIR/latest                                         names the tag
    DIR/global_step40/...model_states.pt, ...          as in deepspeed_zero.py
    DIR/hope/                                          what the format has no place for

An engine of the same tensor-parallel size, data-parallel size and ZeRO stage loads everything with `load_checkpoint`, at
stage 3 too: no rank reads another's file. What the files say is in deepspeed_rank_files.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import MASTER
from hope_megatron.checkpoint.output import fresh_directory
from hope_megatron.checkpoint.placement import FlatVector, flat_vectors, shard_shape
from hope_megatron.checkpoint.skeleton import Skeleton, skeleton_of
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, UnshardedParameter, compare_unsharded
from hope_megatron.config import in_layout
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.convert.deepspeed.rank_files import VERSION, Module, Vectors, model_file, optimizer_file
from hope_megatron.convert.deepspeed.universal import read_universal
from hope_megatron.convert.deepspeed.zero import LATEST, ZeroDirectory, is_zero_checkpoint
from hope_megatron.convert.extras import Parameters, has_extras, read_extras, write_extras
from hope_megatron.optim import merge_shards, split_shards

_SCRATCH = ".scratch"


def write_native(unsharded: UnshardedCheckpoint, layout: ParallelLayout, out_dir: Path) -> int:
    """Write the files of every rank of `layout`, then read them back and compare every tensor.

    Vectors are filled in files that stand in for memory, and take the space once more: memory holds one whole tensor and
    its shards.

    Returns:
        Numbers compared.

    Raises:
        ConfigError: the layout does not divide the model or the batch.
        ConversionError: ZeRO is off; `out_dir` is taken or cannot be written, or what was written differs; nothing is left
            then.
    """
    if layout.zero_stage == 0:
        raise ConversionError("without ZeRO DeepSpeed has no files of its own for this; give --zero-stage 1, 2 or 3")
    config = in_layout(unsharded.config, layout)
    description = {**unsharded.description, "config": config.model_dump(mode="json")}
    unsharded = replace(unsharded, layout=layout, description=description)
    with fresh_directory(out_dir, has_extras) as directory:
        folder = directory / f"global_step{description['progress']['step']}"
        (folder / _SCRATCH).mkdir(parents=True)
        _write_ranks(unsharded, folder)
        shutil.rmtree(folder / _SCRATCH)
        (directory / LATEST).write_text(folder.name)
        write_extras(directory, unsharded)
        return compare_unsharded(unsharded, read_native(directory))


def read_deepspeed(directory: Path) -> UnshardedCheckpoint:
    """A checkpoint that was exported for DeepSpeed in either form, its digests verified first.

    Raises:
        ConversionError: it is not one, or a file is missing or damaged.
    """
    return read_native(directory) if is_zero_checkpoint(directory) else read_universal(directory)


def read_native(directory: Path) -> UnshardedCheckpoint:
    """A checkpoint that `write_native` made; see `read_extras`."""

    def open_reader(parameters: Parameters) -> Callable[[str, str], Tensor]:
        files = ZeroDirectory(directory)
        return lambda name, state: merge_shards(files.shards(name, state), parameters[name].tags)

    return read_extras(directory, open_reader, "deepspeed", "saved by DeepSpeed")


def _ranks(layout: ParallelLayout) -> Iterable[tuple[int, int]]:
    """(dp_rank, tp_rank) of all ranks."""
    return ((dp, tp) for dp in range(layout.data_parallel) for tp in range(layout.tensor_parallel))


def _write_ranks(unsharded: UnshardedCheckpoint, folder: Path) -> None:
    layout, skeleton = unsharded.layout, skeleton_of(unsharded)
    vectors = flat_vectors(unsharded.parameters, skeleton.members, layout)
    ranks = {
        rank: _empty_vectors(unsharded, vectors, folder / _SCRATCH / "{}-{}".format(*rank)) for rank in _ranks(layout)
    }
    modules = [
        _empty_module(unsharded, skeleton, folder / _SCRATCH / f"module-{tp}") for tp in range(layout.tensor_parallel)
    ]
    _fill(unsharded, vectors, ranks, modules)
    bf16 = "bf16_" if unsharded.config.training.precision == "bf16" else ""
    for (dp, tp), filled in ranks.items():
        state = optimizer_file(unsharded, skeleton, vectors, filled, is_last=dp == layout.data_parallel - 1)
        torch.save(
            {"optimizer_state_dict": state, "ds_version": VERSION},
            folder / f"{bf16}zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt",
        )
        if layout.zero_stage == 3 or dp == 0:
            prefix = f"zero_pp_rank_{dp}_" if layout.zero_stage == 3 else ""
            model = model_file(unsharded, vectors, modules[tp])
            torch.save(model, folder / f"{prefix}mp_rank_{tp:02d}_model_states.pt")


def _empty_vectors(unsharded: UnshardedCheckpoint, vectors: list[FlatVector], folder: Path) -> Vectors:
    """The flat vectors of one rank, full of zeros, in files."""
    folder.mkdir()
    return [
        {
            state: _in_file(folder / f"{index}-{state}", vector.numel, torch.float32)
            for state in unsharded.parameters[next(iter(vector.runs))].states
        }
        for index, vector in enumerate(vectors)
    ]


def _in_file(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    with open(path, "wb") as file:  # a full disk is an error here, and kills the process where the memory is written
        os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


def _empty_module(unsharded: UnshardedCheckpoint, skeleton: Skeleton, folder: Path) -> Module:
    """The state dict of a tensor-parallel rank's model. At stage 3 the parameters in it are empty."""
    folder.mkdir()
    module: Module = {}
    for index, key in enumerate(skeleton.module_keys):
        parameter = unsharded.parameters.get(key)
        if parameter is None:
            module[key] = None  # Megatron-Core's `_extra_state`
        elif unsharded.layout.zero_stage == 3:
            module[key] = torch.empty(0, dtype=_dtype(parameter))
        else:
            shape = torch.Size(shard_shape(parameter, unsharded.layout.tensor_parallel))
            module[key] = _in_file(folder / str(index), shape.numel(), _dtype(parameter)).view(shape)
    return module


def _dtype(parameter: UnshardedParameter) -> torch.dtype:
    found = getattr(torch, parameter.dtype)
    assert isinstance(found, torch.dtype)
    return found


def _fill(
    unsharded: UnshardedCheckpoint,
    vectors: list[FlatVector],
    ranks: Mapping[tuple[int, int], Vectors],
    modules: list[Module],
) -> None:
    """Read every tensor once, and put its pieces where they belong."""
    for index, vector in enumerate(vectors):
        for name, runs in vector.runs.items():
            parameter = unsharded.parameters[name]
            for state in parameter.states:
                shards = split_shards(unsharded.read(name, state), parameter.tags, unsharded.layout.tensor_parallel)
                for tp, shard in enumerate(shards):
                    for run in runs:
                        piece = shard.reshape(-1).narrow(0, run.shard_start, run.numel)
                        ranks[run.dp_rank, tp][index][state].narrow(0, run.flat_start, run.numel).copy_(piece)
                    module = modules[tp][name]
                    if state == MASTER and unsharded.layout.zero_stage < 3 and module is not None:
                        module.copy_(shard)
