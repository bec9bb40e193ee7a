"""What the last step did, in figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hope_megatron.optim.bound import BoundVector


def last_step_stats(vectors: Sequence[BoundVector], *, reduce: bool = False) -> dict[str, float]:
    """What the last step did. Synchronises with the device: call it on logging steps.

    optim/newton_schulz_calls        matrices orthogonalised by this rank in the last step
    optim/newton_schulz_calls_total  ... since the optimizer was built
    optim/exchange_bytes             bytes of matrices this rank sent to others in the last step
    optim/orthogonality_residual     ||O O^T - I||_F / sqrt(rank) of one matrix, another in every step
    optim/update_rms/<group>         root mean square of this rank's part of the update, before the learning rate

    With `reduce` (all ranks of the default group together) calls and bytes are summed, the residual is the largest,
    and the RMS is over all ranks.
    """
    sums: dict[str, float] = {}
    residual = -1.0
    for bound in vectors:
        if bound.update_norm is not None:
            for key, value in (("square", float(bound.update_norm) ** 2), ("numel", float(bound.numel))):
                name = f"{key}/{bound.group_name}"
                sums[name] = sums.get(name, 0.0) + value
    exchanges = [bound.exchange for bound in vectors if bound.exchange is not None]
    if exchanges:
        sums["newton_schulz_calls"] = float(sum(e.last_calls for e in exchanges))
        sums["newton_schulz_calls_total"] = float(sum(e.calls for e in exchanges))
        sums["exchange_bytes"] = float(sum(e.sent_bytes for e in exchanges))
        residual = max((float(e.residual) for e in exchanges if e.residual is not None), default=-1.0)
    if reduce and dist.is_initialized():
        sums, residual = _reduce_stats(sums, residual)
    stats = {f"optim/{key}": value for key, value in sums.items() if "/" not in key}
    if residual >= 0:
        stats["optim/orthogonality_residual"] = residual
    for key in [k for k in sums if k.startswith("square/")]:
        group_name = key.removeprefix("square/")
        stats[f"optim/update_rms/{group_name}"] = math.sqrt(sums[key] / max(sums[f"numel/{group_name}"], 1.0))
    return stats


def relative_updates(vectors: Sequence[BoundVector], label: Callable[[str], str | None]) -> dict[str, float]:
    """|lr update| / |weights| of the parameters that the last step changed, if it was to `measure_updates`. Collective.

    label: from a parameter's name to the name of a figure, which parameters may share, or None to leave it out.
    """
    found: dict[str, Tensor] = {}
    for bound in vectors:
        for param in bound.params:
            name = label(param.name)
            if name is not None and param.name in bound.changes:
                found[name] = found.get(name, 0.0) + bound.changes[param.name].double()
    if found and dist.is_initialized():
        joined = torch.stack(list(found.values()))
        dist.all_reduce(joined)
        found = dict(zip(found, joined))
    ratios = {name: (squares[0] / squares[1].clamp(min=1e-300)).sqrt() for name, squares in found.items()}
    return {name: float(ratio) for name, ratio in sorted(ratios.items())}


def _reduce_stats(sums: dict[str, float], residual: float) -> tuple[dict[str, float], float]:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
    values = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    largest = torch.tensor(residual, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(sums, values.tolist())), float(largest)
