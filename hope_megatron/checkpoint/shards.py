"""Between the optimizer's flat vectors and the pieces of a checkpoint. Neither direction moves data between ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hope_megatron.checkpoint.format import MASTER, Checkpoint, CheckpointError
from hope_megatron.config.matrices.geometry import full_shape
from hope_megatron.config.matrices.plan import ParamLayout
from hope_megatron.engine.engine import Engine
from hope_megatron.optim.bound import BoundVector
from hope_megatron.optim.zero import refresh_model_params


@dataclass(frozen=True)
class LiveShard:
    """A piece that this rank owns, as views of the tensors that are being trained."""

    parameter: str
    offset: int
    """Elements before it in the flattened shard of this tensor-parallel rank."""
    numel: int
    tensors: dict[str, Tensor]
    """Flat views by state."""


def live_shards(engine: Engine) -> Iterator[LiveShard]:
    """Pieces that this rank writes. At ZeRO stage 0 all data-parallel ranks hold the same, and only the first writes."""
    if engine.config.parallel.zero_stage == 0 and engine.mesh.dp_rank > 0:
        return
    for bound in engine.optimizer.bound_vectors():
        flats = _flat_states(engine, bound)
        for param in bound.params:
            for run in param.runs:
                if run.dp_rank == bound.dp_rank:
                    views = {state: flat.narrow(0, run.flat_start, run.numel) for state, flat in flats.items()}
                    yield LiveShard(param.name, run.shard_start, run.numel, views)


def group_scalars(engine: Engine) -> dict[str, dict[str, Any]]:
    """Clocks of each parameter group. All vectors of a group have been stepped equally often. An adaptive group's clock has the
    changes of its period so far."""
    found: dict[str, dict[str, Any]] = {}
    for bound in engine.optimizer.bound_vectors():
        group = _group(engine, bound)
        found[bound.group_name] = {"step": int(engine.optimizer.state.get(bound.tensor, {}).get("step", 0))}
        if group["adaptive_level"]:
            found[bound.group_name]["period_changes"] = [list(change) for change in group["update_period_changes"]]
    return found


def parameter_table(engine: Engine) -> list[dict[str, Any]]:
    """What a checkpoint says of each parameter, in the model's order."""
    layouts = {param.name: param for bound in engine.optimizer.bound_vectors() for param in bound.params}
    return [
        {
            "name": name,
            "full_shape": list(full_shape(layouts[name].shape, layouts[name].tags, engine.mesh.tp_size)),
            "shard_shape": list(layouts[name].shape),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "tags": layouts[name].tags.to_dict(),
        }
        for name, parameter in engine.model.named_parameters()
        if name in layouts
    ]


@torch.no_grad()
def load_shards(engine: Engine, checkpoint: Checkpoint, *, weights_only: bool = False) -> None:
    """Fill master weights and optimizer state from a checkpoint of any layout, then the model's parameters. Collective.

    Args:
        weights_only: leave optimizer and clocks as new; they may then be others than the checkpoint's.

    Raises:
        CheckpointError: if parameters, shapes or optimizer states are not those of this run; nothing is loaded then.
    """
    bound_vectors = engine.optimizer.bound_vectors()
    _check_parameters(engine, checkpoint, bound_vectors, weights_only)
    for bound in bound_vectors:
        clock: dict[str, Any] = (
            {"step": 0} if weights_only else checkpoint.description["optimizer"]["groups"][bound.group_name]
        )
        step, group = clock["step"], _group(engine, bound)
        if group["adaptive_level"]:
            group["update_period_changes"] = tuple((at, period) for at, period in clock.get("period_changes", ()))
        state = engine.optimizer.state[bound.tensor]
        state.clear()
        if step > 0:
            engine.optimizer.init_state(state, bound.tensor.detach().view(-1), _group(engine, bound))
            state["step"] = step
        for name, flat in _flat_states(engine, bound).items():
            for param in bound.params:
                _load_param(engine, checkpoint, param, name, flat, bound.dp_rank)
    if engine.config.parallel.zero_stage > 0:
        refresh_model_params(engine.zero)


def _load_param(
    engine: Engine, checkpoint: Checkpoint, param: ParamLayout, state: str, flat: Tensor, dp_rank: int
) -> None:
    mesh = engine.mesh
    for run in param.runs:
        if run.dp_rank == dp_rank:
            values = checkpoint.reshard_range(param.name, state, mesh.tp_size, mesh.tp_rank, run.shard_start, run.numel)
            flat.narrow(0, run.flat_start, run.numel).copy_(values)


def _flat_states(engine: Engine, bound: BoundVector) -> dict[str, Tensor]:
    """Master weights and optimizer state of a vector, flat."""
    state = engine.optimizer.state.get(bound.tensor, {})
    moments = {key: value.view(-1) for key, value in state.items() if isinstance(value, Tensor)}
    return {MASTER: bound.tensor.detach().view(-1)} | moments


def _group(engine: Engine, bound: BoundVector) -> dict[str, Any]:
    return next(group for group in engine.optimizer.param_groups if group["name"] == bound.group_name)


def _check_parameters(
    engine: Engine, checkpoint: Checkpoint, bound_vectors: list[BoundVector], weights_only: bool
) -> None:
    problems = []
    groups = checkpoint.description["optimizer"]["groups"]
    for bound in bound_vectors:
        if bound.group_name not in groups and not weights_only:
            problems.append(
                f"parameter group {bound.group_name} is not in the checkpoint, which has {', '.join(groups)}"
            )
            continue
        stepped = not weights_only and groups[bound.group_name]["step"] > 0
        wanted = {MASTER, *(engine.optimizer.state_keys(_group(engine, bound)) if stepped else ())}
        for param in bound.params:
            record = checkpoint.parameters.get(param.name)
            shape = full_shape(param.shape, param.tags, engine.mesh.tp_size)
            if record is None:
                problems.append(f"{param.name} is not in the checkpoint")
            elif record.full_shape(checkpoint.tp_size) != shape:
                problems.append(f"{param.name} is {record.full_shape(checkpoint.tp_size)} there, {shape} here")
            elif not weights_only and set(checkpoint.states(param.name)) != wanted:
                found = ", ".join(sorted(checkpoint.states(param.name)))
                problems.append(f"{param.name} has the states {found} there, {', '.join(sorted(wanted))} here")
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{checkpoint.path} does not fit this run:\n  " + "\n  ".join(problems[:8]) + more + "\n"
            "Resume with the model, optimizer, update periods and training.ema it was written with, "
            "or start a new run under another name."
        )
