"""What DeepSpeed's engine says in the files of a rank. Written against DeepSpeed 0.19.8; file:line refers to that version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hope_megatron.checkpoint.format import MASTER
from hope_megatron.checkpoint.placement import FlatVector, shard_shape
from hope_megatron.checkpoint.skeleton import Skeleton
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint
from hope_megatron.engine.deepspeed_setup import static_loss_scaler

VERSION = "0.19.8"

Vectors = list[dict[str, Tensor]]
"""Of one rank: for each flat vector its states."""

Module = dict[str, Tensor | None]
"""A model's state dict; None is what Megatron-Core keeps as `_extra_state`."""


def optimizer_file(
    unsharded: UnshardedCheckpoint, skeleton: Skeleton, vectors: list[FlatVector], filled: Vectors, is_last: bool
) -> dict[str, Any]:
    """What DeepSpeed's wrapper of the optimizer says of itself in this layout."""
    layout, config = unsharded.layout, unsharded.config
    optimizer, weights = _base_optimizer(unsharded, skeleton, vectors, filled), [states[MASTER] for states in filled]
    scaler = {"loss_scaler": static_loss_scaler(), "dynamic_loss_scale": False, "overflow": False}
    if layout.zero_stage == 3:  # stage3.py:3431
        return {
            "zero_stage": 3,
            **scaler,
            "partition_count": layout.data_parallel,
            "optimizer_state_dict": optimizer,
            "fp32_flat_groups": weights,
        }
    paddings = [v.numel * layout.data_parallel - v.num_used if is_last else 0 for v in vectors]
    common = {
        "clip_grad": config.optim.grad_clip,
        "base_optimizer_state": optimizer,
        "group_paddings": paddings,
        "partition_count": [layout.data_parallel] * len(vectors),
        "ds_version": VERSION,
    }
    if layout.zero_stage == 1 and config.training.precision == "bf16" and not config.parallel.cpu_offload:
        return {**common, "single_partition_of_fp32_groups": weights}  # bf16_optimizer.py:629
    return {  # stage_1_and_2.py:3364
        **common,
        **scaler,
        "single_partition_of_fp32_groups": [w[: w.numel() - padding] for w, padding in zip(weights, paddings)],
        "zero_stage": layout.zero_stage,
        "param_alignment_paddings": [[0] * len(vector.runs) for vector in vectors],
    }


def _base_optimizer(
    unsharded: UnshardedCheckpoint, skeleton: Skeleton, vectors: list[FlatVector], filled: Vectors
) -> dict[str, Any]:
    """The state dict of our optimizer over the flat vectors; learning rates are those before the schedule."""
    clocks = unsharded.description["optimizer"]["groups"]
    states = {
        index: {
            "step": clocks[vector.group]["step"],
            **{name: state for name, state in tensors.items() if name != MASTER},
        }
        for index, (vector, tensors) in enumerate(zip(vectors, filled, strict=True))
        if len(tensors) > 1
    }
    groups = [
        {**settings, "params": [i for i, vector in enumerate(vectors) if vector.group == name]}
        for name, settings in skeleton.groups.items()
    ]
    return {"state": states, "param_groups": groups}


def model_file(unsharded: UnshardedCheckpoint, vectors: list[FlatVector], module: Module) -> dict[str, Any]:
    """The counters of the engine, and its model (engine.py:5017)."""
    layout, progress = unsharded.layout, unsharded.description["progress"]
    frozen: dict[str, Tensor] | None = {} if layout.zero_stage > 1 else None  # nothing is, which stage 1 does not say
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": list(_shapes(unsharded, vectors)),
        "frozen_param_shapes": frozen,
        "shared_params": {},
        "frozen_param_fragments": frozen,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": progress["step"],
        "global_samples": progress["samples"],
        "dp_world_size": layout.data_parallel,
        "mp_world_size": layout.tensor_parallel,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": layout.tensor_parallel},
        "ds_version": VERSION,
    }


def _shapes(unsharded: UnshardedCheckpoint, vectors: list[FlatVector]) -> Iterator[dict[str, torch.Size]]:
    """Shapes of the shards by name, for each vector; their order is that of the vectors' elements."""
    tp_size = unsharded.layout.tensor_parallel
    for vector in vectors:
        yield {name: torch.Size(shard_shape(unsharded.parameters[name], tp_size)) for name in vector.runs}
