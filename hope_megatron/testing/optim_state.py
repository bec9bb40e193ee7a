"""For tests: optimizer state by parameter name, independent of ZeRO stage, data-parallel size and order in the flat vectors.

Exported tensors have the shape of this rank's tensor-parallel shard; `merge_shards` and `split_shards` of
`hope_megatron.optim.geometry` change the tensor-parallel size. Keys of one parameter:

    fp32          the master weight                     step          calls of `step` (an int)
    m1, v         fast momentum, second moment          m2, o2        M3's slow momentum and its polar factor
    pending_grad  sum of gradients since the last update (groups with update_period_steps > 1)

Tensors come and go bit by bit. A parameter that has not been stepped has `fp32` and `step` 0 only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hope_megatron.config.matrices.plan import ParamLayout
from hope_megatron.optim.base import BoundOptimizer
from hope_megatron.optim.bound import BoundVector
from hope_megatron.optim.errors import OptimError
from hope_megatron.optim.tags import ParamTags
from hope_megatron.optim.zero import refresh_model_params

ParamState = dict[str, Any]


def export_layout(optimizer: BoundOptimizer) -> dict[str, dict[str, Any]]:
    """{parameter name: {'shape': TP shard shape, 'tags': dict}} for JSON: what resharding needs beside the state."""
    return {
        param.name: {"shape": list(param.shape), "tags": param.tags.to_dict()}
        for bound in optimizer.bound_vectors()
        for param in bound.params
    }


def layout_tags(entry: Mapping[str, Any]) -> ParamTags:
    """The tags of one entry of `export_layout`."""
    return ParamTags.from_dict(entry["tags"])


def iter_state(optimizer: BoundOptimizer, *, dp_rank: int | None = None) -> Iterator[tuple[str, ParamState | None]]:
    """State parameter by parameter, so that never more than one is in memory twice. Collective over data-parallel
    ranks.

    Every rank must exhaust the iterator. With `dp_rank` only that data-parallel rank gets the tensors, the others None.
    """
    for bound in optimizer.bound_vectors():
        state = optimizer.state.get(bound.tensor, {})
        flats = {"fp32": bound.tensor.detach().view(-1)}
        flats.update({key: value.view(-1) for key, value in state.items() if isinstance(value, Tensor)})
        for param in bound.params:
            tensors = _gather_param(param, flats, bound, dp_rank)
            if tensors is None:
                yield param.name, None
            else:
                yield param.name, {**tensors, "step": state.get("step", 0)}


def export_state(optimizer: BoundOptimizer, *, dp_rank: int | None = None) -> dict[str, ParamState]:
    """`iter_state` as a dictionary on the CPU. Empty on ranks other than `dp_rank`, if that is given."""
    exported = {}
    for name, entry in iter_state(optimizer, dp_rank=dp_rank):
        if entry is not None:
            exported[name] = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in entry.items()}
    return exported


def _gather_param(
    param: ParamLayout, flats: Mapping[str, Tensor], bound: BoundVector, dp_rank: int | None
) -> dict[str, Tensor] | None:
    first = next(iter(flats.values()))
    numel = int(torch.Size(param.shape).numel())
    full = first.new_zeros(len(flats), numel)
    for run in param.runs:
        if run.dp_rank == bound.dp_rank:
            for row, flat in zip(full, flats.values()):
                row.narrow(0, run.shard_start, run.numel).copy_(flat.narrow(0, run.flat_start, run.numel))
    if bound.dp_group is not None and dist.get_world_size(bound.dp_group) > 1:
        full = _sum_bits(full, bound.dp_group, dp_rank)
    if dp_rank is not None and bound.dp_rank != dp_rank:
        return None
    return {key: row.view(param.shape) for key, row in zip(flats, full)}


def _sum_bits(values: Tensor, group: Any, dp_rank: int | None) -> Tensor:
    """Add up as integers: every element is non-zero on one rank at most, so each keeps its bits, -0.0 and NaN
    included."""
    home = values.device
    bits = values.view(torch.int32)
    if dist.get_backend(group) == "nccl":
        bits = bits.cuda()
    if dp_rank is None:
        dist.all_reduce(bits, group=group)
    else:
        dist.reduce(bits, dist.get_global_rank(group, dp_rank), group=group)
    return bits.view(values.dtype).to(home)


@torch.no_grad()
def import_state(optimizer: BoundOptimizer, state: Mapping[str, ParamState]) -> None:
    """Load what `export_state` gave, into any layout; then refresh the model's parameters from the master weights.
    Collective.

    state: parameter name -> entry with tensors of this rank's TP shard shape; it may be a lazy mapping. Raises
    OptimError on a missing parameter, a wrong shape, or moments that this optimizer does not have or lacks.
    """
    for bound in optimizer.bound_vectors():
        group = next(g for g in optimizer.param_groups if g["name"] == bound.group_name)
        steps = set()
        target = optimizer.state[bound.tensor]
        target.clear()
        optimizer.init_state(target, bound.tensor.view(-1), group)
        for param in bound.params:
            if param.name not in state:
                raise OptimError(
                    f"the checkpoint has no optimizer state for parameter {param.name}; was it saved by another model?"
                )
            entry = state[param.name]
            _load_param(param, entry, bound, target, optimizer.state_keys(group))
            steps.add(int(entry["step"]))
        if len(steps) > 1:
            raise OptimError(f"parameters of group {bound.group_name!r} were saved at different steps: {sorted(steps)}")
        target["step"] = steps.pop()
        if target["step"] == 0:
            target.clear()
    if optimizer.zero_wrapper is not None:
        refresh_model_params(optimizer.zero_wrapper)


def _load_param(
    param: ParamLayout, entry: ParamState, bound: BoundVector, target: dict[str, Any], keys: tuple[str, ...]
) -> None:
    stepped = int(entry["step"]) > 0
    wanted = {"fp32", *keys} if stepped else {"fp32"}
    found = {key for key, value in entry.items() if isinstance(value, Tensor)}
    if found != wanted:
        raise OptimError(
            f"{param.name}: the checkpoint has {', '.join(sorted(found))}, this optimizer needs "
            f"{', '.join(sorted(wanted))}; resume with the optimizer and update periods it was saved with, or load weights only"
        )
    for key in sorted(wanted):
        source = entry[key]
        if tuple(source.shape) != param.shape:
            raise OptimError(
                f"{param.name}: {key} has shape {tuple(source.shape)} in the checkpoint, {param.shape} in this run"
            )
        flat = bound.tensor.data.view(-1) if key == "fp32" else target[key].view(-1)
        source_flat = source.reshape(-1)
        for run in param.runs:
            if run.dp_rank == bound.dp_rank:
                flat.narrow(0, run.flat_start, run.numel).copy_(source_flat.narrow(0, run.shard_start, run.numel))
