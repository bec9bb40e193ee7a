"""How the chunk form lays memories out: one group per set of chunk borders, banks stacked in the batch dim of products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.rule import MemoryRule
from hope_megatron.ops.memory.types import Bank, MemoryParams, MemoryState


class Weights(NamedTuple):
    """Weights of a group. n = nv + ns memories, vector ones first."""

    w_in: Tensor | None  # [N n, h, d]
    w_vector: Tensor | None  # [N nv, d, h]
    w_scalar: Tensor | None  # [N ns, 1, h]


class Group(NamedTuple):
    """Memories that share their chunk borders. N = B H."""

    now: Weights
    start: Weights
    speed: Weights | None
    names: tuple[str, ...]  # of "mem", "k", "v", "eta", "alpha": vector memories first
    nv: int
    anchor: Weights | None = None  # what retention forgets towards, of the shapes of `now`; None: zero

    @property
    def n(self) -> int:
        return len(self.names)

    @property
    def ns(self) -> int:
        return self.n - self.nv

    def at(self, position: int, chunk: int) -> Group:
        """The group as a chunk that begins at stream position `position` (or goes on there) sees it."""
        return self._replace(start=self.now) if position % chunk == 0 else self

    def cut(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """[N n, ...] -> the vector memories' [N nv, ...] and the scalar ones' [N ns, ...]; None where there are none."""
        if self.ns == 0 or self.nv == 0:
            return (x, None) if self.ns == 0 else (None, x)
        vector, scalar = x.unflatten(0, (-1, self.n)).split([self.nv, self.ns], 1)
        return vector.flatten(0, 1), scalar.flatten(0, 1)

    def stack(self, vector: Tensor | None, scalar: Tensor | None) -> Tensor:
        """The inverse of `cut`."""
        if vector is None or scalar is None:
            return vector if scalar is None else scalar
        parts = [vector.unflatten(0, (-1, self.nv)), scalar.unflatten(0, (-1, self.ns))]
        return torch.cat(parts, 1).flatten(0, 1)

    def features_of(self, name: str, x: Tensor, weights: Weights) -> Tensor:
        """What one memory's output layer is applied to: x [N, C, d] -> silu(w_in x) [N, C, h]; one layer: x."""
        if weights.w_in is None:
            return x
        w_in = weights.w_in.unflatten(0, (-1, self.n)).select(1, self.names.index(name))
        return F.silu(torch.bmm(x, w_in.mT))

    def layers_of(self, name: str, x: Tensor) -> Tensor:
        """Output of one memory's layers at the chunk's start, without skip: x [N, C, d] -> [N, C, o]."""
        i = self.names.index(name)
        x = self.features_of(name, x, self.start)
        if i < self.nv:
            w = self.start.w_vector.unflatten(0, (-1, self.nv)).select(1, i)
        else:
            w = self.start.w_scalar.unflatten(0, (-1, self.ns)).select(1, i - self.nv)
        return torch.bmm(x, w.mT)


def split_state(state: MemoryState, rule: MemoryRule, anchor: MemoryParams | None) -> tuple[Group, ...]:
    """One group of all memories if they share their borders, else the self-memories and M_mem.

    anchor: what retention forgets towards, [B, H, n, ...]; None: zero.
    """
    vector = [name for name, there in (("k", rule.adaptive_key), ("v", rule.adaptive_value)) if there]
    scalar = [name for name, there in (("eta", rule.adaptive_eta), ("alpha", rule.adaptive_alpha)) if there]
    if not vector and not scalar:
        return (_group(state, anchor, ["mem"], []),)
    if rule.chunk_tokens == rule.self_chunk:
        return (_group(state, anchor, ["mem", *vector], scalar),)
    return (_group(state, anchor, vector, scalar), _group(state, anchor, ["mem"], []))


def join_state(groups: tuple[Group, ...], rule: MemoryRule, batch_size: int, position: int) -> MemoryState:
    """The inverse of `split_state`. At a border of a memory's chunk, `start` is `now`: the next chunk begins there."""
    groups = tuple(g.at(position, rule.chunk_tokens if "mem" in g.names else rule.self_chunk) for g in groups)
    start = None if all(g.start is g.now for g in groups) else _params([(g, g.start) for g in groups], batch_size)
    now = _params([(g, g.now) for g in groups], batch_size)
    momentum = None
    if groups[0].speed is not None:
        momentum = _params([(g, g.speed) for g in groups], batch_size)
    return MemoryState(now, now if start is None else start, momentum, position)


def _group(state: MemoryState, anchor: MemoryParams | None, vector: list[str], scalar: list[str]) -> Group:
    def weights(params: MemoryParams) -> Weights:
        vectors = [params.mem] if "mem" in vector else []
        vectors += [params.vector] if params.vector is not None and vector != ["mem"] else []
        scalars = [params.scalar] if params.scalar is not None and scalar else []
        return Weights(
            _stack([bank.w_in for bank in vectors + scalars]),
            _stack([bank.w_out for bank in vectors]),
            _stack([bank.w_out for bank in scalars]),
        )

    now = weights(state.now)
    start = now if state.start is state.now else weights(state.start)
    speed = None if state.momentum is None else weights(state.momentum)
    return Group(now, start, speed, (*vector, *scalar), len(vector), None if anchor is None else weights(anchor))


def _stack(banks: list[Tensor | None]) -> Tensor | None:
    """Banks [B, H, n_i, ...] -> [B H sum(n_i), ...]."""
    if not banks or banks[0] is None:
        return None
    return torch.cat(banks, 2).flatten(0, 2)


def _params(groups: list[tuple[Group, Weights]], batch_size: int) -> MemoryParams:
    found: dict[str, Bank] = {}
    for group, weights in groups:
        banks: list[tuple[str, int]] = [("mem", 1)] if group.names[0] == "mem" else []
        banks += [("vector", group.nv - len(banks))] if group.nv > len(banks) else []
        pick = lambda x, n: None if x is None else x.unflatten(0, (batch_size, -1, n))  # noqa: E731
        w_in, w_out = pick(weights.w_in, group.n), pick(weights.w_vector, group.nv)
        at = 0
        for name, count in banks:
            span = slice(at, at + count)
            found[name] = Bank(None if w_in is None else w_in[:, :, span], w_out[:, :, span])
            at += count
        if group.ns:
            found["scalar"] = Bank(w_in[:, :, at:], pick(weights.w_scalar, group.ns))
    return MemoryParams(found["mem"], found.get("vector"), found.get("scalar"))
