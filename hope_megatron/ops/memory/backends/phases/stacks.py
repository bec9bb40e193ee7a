"""Between the layout of groups (layout.py, by head) and that of the phases (by memory)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.layout import Group, Weights

ORDER = ("eta", "alpha", "k", "v", "mem")
"""Of the memories in a stack."""


class Stack(NamedTuple):
    """What `Memories` takes of weights; zeros for memories that there are not."""

    V: Tensor  # V and, with momentum, S: [n, N, parts, d, h]
    w_in: Tensor | None  # the same of input layers where they are written, [n, N, parts, h, d], else W2, [n, N, h, d]
    A: Tensor  # [n, N, d, h]
    A_in: Tensor | None  # [n, N, h, d]


def stack(group: Group, names: tuple[str, ...], form: Form, N: int) -> Stack:
    """The memories of these names, in their order."""
    out, inner = _stacked(group, group.now, names, N)
    if group.anchor is None:
        A, A_in = torch.zeros_like(out), None if inner is None else torch.zeros_like(inner)
    else:
        A, A_in = _stacked(group, group.anchor, names, N)
    V, V_in = [out - A], [inner - A_in] if form.writes_in else []
    if form.momentum:
        S, S_in = _stacked(group, group.speed, names, N)
        V, V_in = [*V, S], [*V_in, S_in]
    if form.writes_in:
        return Stack(torch.stack(V, 2), torch.stack(V_in, 2), A, A_in)
    return Stack(torch.stack(V, 2), inner, A, None)


def _stacked(group: Group, weights: Weights, names: tuple[str, ...], N: int) -> tuple[Tensor, Tensor | None]:
    """[n, N, d, h] and [n, N, h, d]; the row of a scalar memory becomes a matrix."""
    by_memory = lambda x: None if x is None else x.unflatten(0, (N, -1)).unbind(1)  # noqa: E731
    inner, vector, scalar = map(by_memory, weights)
    like = vector[0] if vector else scalar[0]
    d = inner[0].size(-1) if inner else like.size(-2)
    zeros = like.new_zeros(N, d, like.size(-1))
    out, found_in = [], []
    for name in names:
        at = group.names.index(name) if name in group.names else None
        if at is None:
            out.append(zeros)
        elif at < group.nv:
            out.append(vector[at])
        else:
            out.append(F.pad(scalar[at - group.nv], (0, 0, 0, d - 1)))
        if inner:
            found_in.append(torch.zeros_like(inner[0]) if at is None else inner[at])
    return torch.stack(out), torch.stack(found_in) if inner else None


class After(NamedTuple):
    """A memory after the last chunk; the input layer's None where it is not written, momentum's None without."""

    out: Tensor
    inner: Tensor | None
    speed: Tensor | None
    speed_in: Tensor | None


def after(names: tuple[str, ...], before: Stack, V: Tensor, V_in: Tensor | None) -> dict[str, After]:
    """Memories by name, of what changes of a stack: V [n, N, parts, d, h], V_in [n, N, parts, h, d]."""
    layers = [(V, before.A)] if V_in is None else [(V, before.A), (V_in, before.A_in)]
    weights = [x[:, :, 0] + A for x, A in layers]
    speeds = [x[:, :, 1] for x, _ in layers if x.size(2) > 1]
    at = lambda found, layer, i: found[layer][i] if layer < len(found) else None  # noqa: E731
    return {
        name: After(weights[0][i], at(weights, 1, i), at(speeds, 0, i), at(speeds, 1, i))
        for i, name in enumerate(names)
    }


def put(group: Group, found: dict[str, After]) -> Group:
    """The group with its memories as they are after the last chunk."""
    memories = [found[name] for name in group.names]
    now = _joined(group, group.now, [m.out for m in memories], [m.inner for m in memories])
    speed = group.speed
    if speed is not None:
        speed = _joined(group, speed, [m.speed for m in memories], [m.speed_in for m in memories])
    return group._replace(now=now, start=now, speed=speed)


def _joined(group: Group, like: Weights, out: list[Tensor], inner: list[Tensor | None]) -> Weights:
    join = lambda parts: torch.stack(parts, 1).flatten(0, 1) if parts else None  # noqa: E731
    w_in = like.w_in if inner[0] is None else join(inner)
    return Weights(w_in, join(out[: group.nv]), join([w[:, :1] for w in out[group.nv :]]))
