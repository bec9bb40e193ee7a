"""What a layer tells the optimizer about a parameter, by attributes on the parameter. Module classes are never looked
at.

    tensor_model_parallel   Megatron's: True if the tensor is a shard of a larger one (default: replicated over TP)
    partition_dim           Megatron's: the sharded dimension of the tensor as it is
    partition_stride        Megatron's: the full dimension is this many parts, and each rank holds its slice of each
    sequence_parallel       Megatron's: gradients must be summed over TP before the step (the engine does it)
    optim_role              'matrix' is orthogonalised, 'vector' takes AdamW (default: 'matrix' from 2 dimensions on)
    optim_fused_parts       sizes along dim 0 of the FULL matrix that are orthogonalised apart (q, k, v)
    update_period_steps     this parameter is updated every so many optimizer steps (default 1)
    update_period_changes   ((steps before it, another period), ...) later in the run (default none)
    adaptive_level          number of a level whose period is chosen anew at every update (default 0: none)
    no_weight_decay         True: never decayed (default: decayed from 2 dimensions on)
    optim_name              written by `build_param_groups`: the name in the model, key of its state in checkpoints

A tensor [..., M, N] of three or more dimensions is a stack of matrices [M, N], orthogonalised one by one. Embeddings,
the output head and convolutions have two or more dimensions too: their layers tag them 'vector'.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hope_megatron.config.clock import update_clock
from hope_megatron.config.matrices.tags import ParamTags
from hope_megatron.optim.errors import OptimError

ROLES = ("matrix", "vector")


def read_tags(param: nn.Parameter, name: str, shape: Sequence[int]) -> ParamTags:
    """Read and check the tags of a parameter. `shape` is that of this rank's TP shard (ZeRO-3 hides it from
    `param.shape`)."""
    ndim = len(shape)
    role = getattr(param, "optim_role", None) or ("matrix" if ndim >= 2 else "vector")
    if role not in ROLES:
        raise OptimError(f"{name}: optim_role is {role!r}; use one of {', '.join(ROLES)}")
    if role == "matrix" and ndim < 2:
        raise OptimError(f"{name}: shape {tuple(shape)} is not a matrix; tag it optim_role='vector'")
    period = int(getattr(param, "update_period_steps", 1))
    if period < 1:
        raise OptimError(f"{name}: update_period_steps is {period}; it must be at least 1")
    changes = tuple((int(step), int(length)) for step, length in getattr(param, "update_period_changes", ()))
    if any(length < 1 for _, length in changes) or (text := update_clock(period, changes).conflict()) is not None:
        raise OptimError(
            f"{name}: update_period_changes: {text if all(n > 0 for _, n in changes) else 'a period is below 1'}"
        )
    parts = tuple(int(size) for size in getattr(param, "optim_fused_parts", ()) or ())
    if parts and ndim != 2:
        raise OptimError(f"{name}: optim_fused_parts is for two-dimensional parameters, the shape is {tuple(shape)}")
    return ParamTags(
        role=role,
        update_period_steps=period,
        weight_decay=ndim >= 2 and not getattr(param, "no_weight_decay", False),
        partition_dim=_partition_dim(param, name, ndim),
        partition_stride=int(getattr(param, "partition_stride", 1)) if _is_sharded(param) else 1,
        fused_parts=parts,
        update_period_changes=changes,
        adaptive_level=int(getattr(param, "adaptive_level", 0)),
    )


def _is_sharded(param: nn.Parameter) -> bool:
    return bool(getattr(param, "tensor_model_parallel", False))


def _partition_dim(param: nn.Parameter, name: str, ndim: int) -> int | None:
    if not _is_sharded(param):
        return None
    dim = int(getattr(param, "partition_dim", -1))
    if not 0 <= dim < ndim:
        raise OptimError(f"{name}: tensor_model_parallel is set but partition_dim is {dim} for {ndim} dimensions")
    return dim
