"""The search for silent corruption: what should be equal on several ranks is compared, and some work is done twice.

Parameters are the same on all data-parallel ranks (ZeRO 0 to 2). What tensor-parallel ranks share is the same on them,
optimizer state included. Any single flipped bit changes the sum of a tensor's words, so the sums are compared: two small
reductions for all tensors together. And pairs of data-parallel ranks compute the same micro-batch, whose loss must be that of the
step itself. A shard of the optimizer's state that only one rank holds has no replica: a flip there shows in no comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from hope_megatron.checkpoint.shards import live_shards
from hope_megatron.engine.engine import Engine
from hope_megatron.runtime.failures import TRANSIENT

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class SilentCorruptionError(Exception):
    """Ranks that should hold or compute the same do not. Another machine may; the last checkpoint was agreed on."""

    is_user_error = True
    failure_kind = TRANSIENT

    def __init__(self, message: str, bad_rank: int | None = None) -> None:
        super().__init__(message)
        self.bad_rank = bad_rank
        """The rank that differs from the majority; None if there is none."""


def fingerprint(tensor: Tensor) -> Tensor:
    """Sum of a tensor's words, int64 [] on its device: any single flipped bit changes it."""
    flat = tensor.detach().reshape(-1)
    return flat.view(_WORDS[flat.element_size()]).sum(dtype=torch.int64)


def replicated_tensors(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What must be equal over data-parallel ranks, and over tensor-parallel ranks, by name."""
    stage, mesh = engine.config.parallel.zero_stage, engine.mesh
    named = {name: parameter for name, parameter in engine.model.named_parameters() if parameter.numel()}
    over_data = {name: parameter.data for name, parameter in named.items()} if stage < 3 else {}
    over_tensor: dict[str, Tensor] = {}
    if mesh.tp_size > 1 and stage < 3:
        shared = {name for name, p in named.items() if not getattr(p, "tensor_model_parallel", False)}
        over_tensor = {name: named[name].data for name in shared}
        for piece in live_shards(engine):
            if piece.parameter in shared:
                over_tensor |= {f"{state} of {piece.parameter}": tensor for state, tensor in piece.tensors.items()}
    if stage == 0:
        for number, bound in enumerate(engine.optimizer.bound_vectors()):
            states = engine.optimizer.state.get(bound.tensor, {})
            name = "+".join(param.name for param in bound.params[:2]) or str(number)
            over_data |= {f"{state} of {name}": t for state, t in states.items() if isinstance(t, Tensor) and t.numel()}
    return over_data, over_tensor


def check_replicas(engine: Engine) -> int:
    """Compare all replicas. Collective.

    Returns:
        Tensors compared by this rank.

    Raises:
        SilentCorruptionError: on all ranks, naming rank and tensor.
    """
    mesh = engine.mesh
    over_data, over_tensor = replicated_tensors(engine)
    found = {
        **_differing(over_data, mesh.dp_group, mesh.dp_size),
        **_differing(over_tensor, mesh.tp_group, mesh.tp_size),
    }
    if engine.control.maximum([bool(found)])[0]:
        raise _corruption(engine, found)
    return len(over_data) * (mesh.dp_size > 1) + len(over_tensor)


def _differing(tensors: Mapping[str, Tensor], group: dist.ProcessGroup, size: int) -> dict[str, int]:
    """Names of tensors that are not the same on all ranks of a group, with this rank's fingerprints."""
    if size == 1 or not tensors:
        return {}
    names = sorted(tensors)
    own = torch.stack([fingerprint(tensors[name]) for name in names])
    low, high = own.clone(), own.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    differing = (low != high).nonzero().flatten().tolist()
    return {names[i]: int(own[i]) for i in differing}


def _corruption(engine: Engine, found: Mapping[str, int]) -> SilentCorruptionError:
    """The error, from what every rank found. Collective."""
    by_rank = engine.control.gather(dict(sorted(found.items())[:8]))
    name = min(name for entry in by_rank for name in entry)
    values = {rank: entry[name] for rank, entry in enumerate(by_rank) if name in entry}
    counts = Counter(values.values()).most_common()
    odd = [rank for rank, value in values.items() if value != counts[0][0]]
    if len(counts) > 1 and counts[0][1] > counts[1][1] and len(odd) == 1:
        return SilentCorruptionError(
            f"silent corruption: {name} on rank {odd[0]} is not what {len(values) - 1} other ranks hold", odd[0]
        )
    ranks = " and ".join(map(str, values)) if len(values) < 5 else f"{len(values)} ranks"
    return SilentCorruptionError(
        f"silent corruption: {name} differs between ranks {ranks}; nothing tells which is right"
    )


class Replay:
    """One micro-batch computed by pairs of data-parallel ranks, and by the step itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._expected: Tensor | None = None

    def owner(self, count: int) -> int:
        """Data-parallel rank whose micro-batch this rank computes in the replay with this number: its own or its partner's."""
        first = self.engine.mesh.dp_rank // 2 * 2
        return min(first + count % 2, self.engine.mesh.dp_size - 1)

    def before_step(self, owner: int, tokens: Tensor, targets: Tensor, documents: Tensor | None) -> None:
        """Compute the first micro-batch of `owner`, and compare with the partner. Collective.

        Raises:
            SilentCorruptionError: on all ranks, naming the pair.
        """
        loss, gradients = self.engine.replay(tokens, targets, documents)
        self._expected = loss if owner == self.engine.mesh.dp_rank else None
        words = [int(fingerprint(loss)), *(int(fingerprint(gradient)) for gradient in gradients)]
        self._compare(
            {"pair": [owner, self.engine.mesh.tp_rank], "words": words}, "the same micro-batch gave other bits"
        )

    def after_step(self) -> None:
        """The step itself must have computed the same loss. Collective."""
        own, again = self.engine.first_loss, self._expected
        same = own is None or again is None or torch.equal(own.view(torch.int32), again.view(torch.int32))
        self._expected = None
        ranks = [rank for rank, good in enumerate(self.engine.control.gather(bool(same))) if not good]
        if ranks:
            bad = ranks[0] if len(ranks) == 1 else None
            raise SilentCorruptionError(
                f"silent corruption: rank {', '.join(map(str, ranks))} computed one loss in the step and another in its replay",
                bad,
            )

    def _compare(self, entry: dict[str, list[int]], what: str) -> None:
        found: dict[tuple[int, ...], tuple[int, list[int]]] = {}
        for rank, other in enumerate(self.engine.control.gather(entry)):
            pair = tuple(other["pair"])
            first = found.setdefault(pair, (rank, other["words"]))
            if first[1] != other["words"]:
                raise SilentCorruptionError(
                    f"silent corruption: {what} on ranks {first[0]} and {rank}; one of them is wrong"
                )
