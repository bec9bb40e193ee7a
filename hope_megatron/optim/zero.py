"""How parameters lie in the flat fp32 vectors of DeepSpeed's ZeRO: every private name of DeepSpeed is in this file.

DeepSpeed is not imported: its wrapper (`engine.optimizer`) comes as an argument. Written against DeepSpeed 0.17-0.19; a
missing attribute raises `ZeroLayoutError` with its name and the installed version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_megatron.config.matrices.runs import Run, partition_runs, split_runs
from hope_megatron.optim.errors import ZeroLayoutError


@dataclass(frozen=True)
class FlatVector:
    """One flat fp32 vector: what ZeRO hands to the client optimizer in the place of a parameter group."""

    tensor: Tensor
    group_index: int
    params: list[tuple[nn.Parameter, tuple[Run, ...]]]
    """Parameters in flat order with the runs of ALL data-parallel ranks."""
    dp_group: Any


def shard_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Shape of this rank's TP shard; ZeRO-3 leaves `param.shape` empty."""
    return tuple(getattr(param, "ds_shape", param.shape))


def flat_vectors(wrapper: Any) -> list[FlatVector]:
    """The flat vectors of a ZeRO-1, 2, 3 or BF16 wrapper with their layout."""
    return list(_kind(wrapper).layout(wrapper))


@torch.no_grad()
def refresh_model_params(wrapper: Any) -> None:
    """Write the fp32 master weights into the model's parameters, as at the end of a step (all ranks together)."""
    _kind(wrapper).refresh(wrapper)


def check_wrapper(wrapper: Any, optimizer: torch.optim.Optimizer, tp_size: int) -> None:
    """Raise ZeroLayoutError if the wrapper steps another optimizer, or knows of more tensor parallelism than the
    caller."""
    _kind(wrapper)
    if _get(wrapper, "optimizer") is not optimizer:
        raise ZeroLayoutError(
            "this ZeRO wrapper steps another optimizer; pass the engine.optimizer that wraps this one"
        )
    mpu = getattr(wrapper, "mpu", None)
    if mpu is not None and hasattr(mpu, "get_tensor_model_parallel_world_size"):
        known = mpu.get_tensor_model_parallel_world_size()
        if known != tp_size:
            raise ZeroLayoutError(
                f"the engine runs with tensor-parallel size {known}, bind_zero was given {tp_size}: shards would be "
                "treated as matrices; pass tp_group and exchange_group (the data-parallel x tensor-parallel group)"
            )


def _kind(wrapper: Any) -> Any:
    if getattr(wrapper, "zenflow", False):
        raise ZeroLayoutError("DeepSpeed's ZenFlow updates parameters without calling the optimizer; switch it off")
    for kind in (_Stage3, _Stage12, _Bf16):
        if hasattr(wrapper, kind.mark):
            return kind
    raise ZeroLayoutError(
        f"{type(wrapper).__name__} of DeepSpeed {_deepspeed_version()} is not a known ZeRO wrapper; use ZeRO stage "
        "1, 2 or 3 and pass engine.optimizer"
    )


def _deepspeed_version() -> str:
    return getattr(sys.modules.get("deepspeed"), "__version__", "(not imported)")


def _get(wrapper: Any, name: str) -> Any:
    if not hasattr(wrapper, name):
        raise ZeroLayoutError(
            f"DeepSpeed {_deepspeed_version()}: {type(wrapper).__name__} has no attribute {name!r}; this version's "
            "layout is unknown, install one of 0.17 to 0.19"
        )
    return getattr(wrapper, name)


class _Stage12:
    mark = "round_robin_bit16_groups"

    @staticmethod
    def layout(wrapper: Any) -> Iterator[FlatVector]:
        # The offsets are those of the round-robin order; `param._hp_mapping` is wrong with round_robin_gradients in
        # 0.19.8.
        groups, offsets = _get(wrapper, "round_robin_bit16_groups"), _get(wrapper, "round_robin_bit16_offsets")
        flats, sizes = _get(wrapper, "single_partition_of_fp32_groups"), _get(wrapper, "partition_size")
        for i, (params, starts) in enumerate(zip(groups, offsets)):
            dp_group, partition = _get(wrapper, "real_dp_process_group")[i], int(sizes[i])
            dp_size = dist.get_world_size(dp_group)
            pairs = [(p, split_runs(int(o), p.numel(), partition, dp_size)) for p, o in zip(params, starts)]
            yield FlatVector(flats[i], i, pairs, dp_group)

    @staticmethod
    def refresh(wrapper: Any) -> None:
        _get(wrapper, "update_lp_params")()


class _Bf16:
    mark = "bf16_groups"

    @staticmethod
    def layout(wrapper: Any) -> Iterator[FlatVector]:
        flats = _get(wrapper, "fp32_groups_flat_partition")
        for i, params in enumerate(_get(wrapper, "bf16_groups")):
            dp_group, offset, pairs = _get(wrapper, "real_dp_process_group")[i], 0, []
            dp_size = dist.get_world_size(dp_group)
            for p in params:
                pairs.append((p, split_runs(offset, p.numel(), flats[i].numel(), dp_size)))
                offset += p.numel()
            yield FlatVector(flats[i], i, pairs, dp_group)

    refresh = _Stage12.refresh


class _Stage3:
    mark = "fp32_partitioned_groups_flat"

    @staticmethod
    def layout(wrapper: Any) -> Iterator[FlatVector]:
        if _get(wrapper, "swap_optimizer"):
            raise ZeroLayoutError(
                "optimizer state on NVMe is not supported: matrices would be stepped while swapped out"
            )
        if _get(wrapper, "offload_optimizer") and getattr(wrapper, "partial_offload", 1.0) != 1.0:
            raise ZeroLayoutError("offload_optimizer.ratio below 1 silently steps some groups with AdamW; set it to 1")
        group_of, positions = _get(wrapper, "sub_group_to_group_id"), _get(wrapper, "grad_position")
        for i, params in enumerate(_get(wrapper, "fp16_groups")):
            dp_group, pairs = _get(wrapper, "_get_sub_group_process_group")(i), []
            for p in params:
                _, offset, partition = positions[_get(wrapper, "get_param_id")(p)]
                pairs.append((p, partition_runs(offset, partition, p.ds_numel, dist.get_world_size(dp_group))))
            yield FlatVector(_get(wrapper, "fp32_partitioned_groups_flat")[i], group_of[i], pairs, dp_group)

    @staticmethod
    def refresh(wrapper: Any) -> None:
        _get(
            wrapper, "_partition_all_parameters"
        )()  # small ones stay gathered after a pass, and are not gathered again
        for i in range(len(_get(wrapper, "fp16_groups"))):
            _get(wrapper, "_reassign_or_swap_out_partitioned_parameters")(i)
        persistent = _get(wrapper, "persistent_parameters")
        if persistent:
            persistent[0].all_gather(persistent)
