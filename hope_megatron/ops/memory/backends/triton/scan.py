"""The memory operator by Triton kernels: rule and weights as registry.py hands them over, cut into self-memories and M_mem."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.backends.triton.bank import launch as bank
from hope_megatron.ops.memory.backends.triton.bank.launch import Layers, Made
from hope_megatron.ops.memory.backends.triton.descent import launch as descent
from hope_megatron.ops.memory.backends.triton.fixed import launch as fixed
from hope_megatron.ops.memory.backends.triton.moving_memory import moving_memory
from hope_megatron.ops.memory.backends.triton.self_memories import self_memories
from hope_megatron.ops.memory.backends.triton.sizes import tile_rows
from hope_megatron.ops.memory.inner import unit
from hope_megatron.ops.memory.layout import Group, Weights
from hope_megatron.ops.memory.rule import MemoryRule

Begins = dict[int, Tensor]
"""Where streams start anew, by chunk length: [N, chunks + 1] int8, the last column 0."""


def triton_scan(
    tensors: list[Tensor | None],
    rule: MemoryRule,
    groups: tuple[Group, ...],
    *,
    precision: str,
    recompute: bool = False,
    begins: Begins | None = None,
) -> tuple[Tensor, tuple[Group, ...]]:
    """See `Backend.scan`."""
    q, x_k, x_v, eta, alpha, _ = (None if x is None else x.contiguous() for x in tensors)
    begins = begins or {}
    if descends(rule):
        return _descend(tensors, rule, groups[0], precision, begins.get(rule.chunk_tokens))
    own, main = _split(groups)
    log_eta = eta if rule.adaptive_eta else _log_rate(eta, x_k, math.log(rule.eta_max))
    log_alpha = alpha if rule.adaptive_alpha else _log_rate(alpha, x_k, 0.0)
    if own is None:
        made = Made(unit(x_k), unit(x_v) if rule.normalize_values else x_v, log_eta, log_alpha)
    else:
        made, own = _make(own, Made(x_k, x_v, log_eta, log_alpha), rule, begins.get(rule.self_chunk), precision)
    setting = dict(precision=precision, recompute=recompute, begins=begins.get(rule.chunk_tokens))
    y, main = _write_and_read(main, unit(q), made, rule, **setting)
    return y, _join(groups, own, main)


def descends(rule: MemoryRule) -> bool:
    """Whether M_mem is of descent/launch.py."""
    return rule.objective == "l2" and rule.writes_input


def _descend(
    tensors: list[Tensor | None], rule: MemoryRule, group: Group, precision: str, begins: Tensor | None
) -> tuple[Tensor, tuple[Group, ...]]:
    q, x_k, x_v, eta, alpha, theta = tensors
    T, chunk, rows = q.size(1), rule.chunk_tokens, tile_rows(rule.chunk_tokens)
    setting = descent.Setting(rows, theta is not None, rule.normalizes_steps, rule.read_skip, precision)
    tables = descent.tables_of(eta, alpha, theta, rule, rows, q)
    tokens = (unit(q), unit(x_k), unit(x_v) if rule.normalize_values else x_v)
    parts = (
        [group.now.w_vector, group.speed.w_vector, group.now.w_in, group.speed.w_in]
        if setting.momentum
        else group.now[1::-1]
    )
    first = tuple(w.mT.contiguous() for w in parts)
    y, ends = descent.descending_memory(
        setting, *(_padded(x.contiguous(), chunk) for x in tokens), tables, first, begins
    )
    found = [w.mT for w in ends]
    out, inner = found[0], found[2 if setting.momentum else 1]
    now = Weights(inner, out, None)
    speed = Weights(found[3], found[1], None) if setting.momentum else group.speed
    return _cut(y, chunk, T), (group._replace(now=now, start=now, speed=speed),)


def _log_rate(logits: Tensor | None, like: Tensor, log_max: float) -> Tensor:
    if logits is None:
        return torch.full(like.shape[:3], log_max, dtype=like.dtype, device=like.device)
    return F.logsigmoid(logits) + log_max


def _padded(x: Tensor, chunk: int, value: float = 0.0) -> Tensor:
    """Tokens [B, T, ...] with every chunk filled up to the rows of a tile. What is filled in writes nothing and keeps all."""
    T, rows = x.size(1), tile_rows(chunk)
    if T % chunk == 0 and rows == chunk:
        return x
    after = (0, 0) * (x.dim() - 2)
    whole = F.pad(x, (*after, 0, -T % chunk), value=value).unflatten(1, (-1, chunk))
    return F.pad(whole, (*after, 0, rows - chunk), value=value).flatten(1, 2)


def _filled(made: Made, rule: MemoryRule, chunk: int, *, logits: bool) -> Made:
    """With rates of zero, retention of one. logits: of eta and alpha, where memories make the rates."""
    kept = math.inf if logits and rule.adaptive_alpha else 0.0
    values = (0.0, 0.0, -math.inf, kept)
    return Made(*(_padded(x, chunk, value) for x, value in zip(made, values)))


def _cut(x: Tensor, chunk: int, T: int) -> Tensor:
    """The inverse of `_padded`."""
    rows = tile_rows(chunk)
    if x.size(1) == T:
        return x
    return x.unflatten(1, (-1, rows))[:, :, :chunk].flatten(1, 2)[:, :T].contiguous()


class _Bank(NamedTuple):
    """Some memories of all streams. Weights as the operator has them: W2 [N, n, h, d], W1 [N, NV, d, h], scalar [N, NS, h]."""

    now: Layers
    anchor: Layers | None

    def moved(self, changed: tuple[Tensor, ...]) -> _Bank:
        """With other weights: V, as kernels have it, of the layers that change, which are the last ones of `Layers`."""
        first = len(self.now) - len(changed)
        changed = (*(v.mT for v in changed[:-1]), changed[-1])
        if self.anchor is not None:
            changed = tuple(v + a for v, a in zip(changed, self.anchor[first:]))
        return self._replace(now=Layers(*self.now[:first], *changed))

    def for_kernels(self, *, moving: bool) -> tuple[Layers, Layers]:
        """V = W - A of output layers (moving: of input layers too), and A. Without an anchor: W, and anything of A's shape."""
        v, a = self.now, self.anchor
        if a is not None:
            v = Layers(v.w_in - a.w_in if moving else v.w_in, v.vector - a.vector, v.scalar - a.scalar)
        transposed = lambda w: Layers(w.w_in.mT.contiguous(), w.vector.mT.contiguous(), w.scalar.contiguous())  # noqa: E731
        v = transposed(v)
        return v, Layers(*(x.detach() for x in v)) if a is None else transposed(a)


def _make(own: _Bank, x: Made, rule: MemoryRule, begins: Tensor | None, precision: str) -> tuple[Made, _Bank]:
    """Keys, values and rates, by the self-memories, and those after the last token."""
    T, chunk = x.k.size(1), rule.self_chunk
    s = _bank_setting(rule, chunk, precision, own=True, anchored=own.anchor is not None)
    made, now = self_memories(s, _filled(x, rule, chunk, logits=True), *own.for_kernels(moving=s.moving), begins)
    return Made(*(_cut(x, chunk, T) for x in made)), own.moved(now)


def _write_and_read(
    main: _Bank, q: Tensor, made: Made, rule: MemoryRule, *, precision: str, recompute: bool, begins: Tensor | None
):
    """y, and M_mem after the last token."""
    T, chunk, anchored = q.size(1), rule.chunk_tokens, main.anchor is not None
    q, made = _padded(q, chunk), _filled(made, rule, chunk, logits=False)
    first, anchor = main.for_kernels(moving=rule.writes_input)
    if rule.writes_input:
        s = _bank_setting(rule, chunk, precision, own=False, anchored=anchored)
        y, now = moving_memory(
            s, q, made, first, anchor, causal=rule.read == "causal", skip=rule.read_skip, begins=begins
        )
    else:
        setting = _fixed_setting(rule, precision, anchored=anchored, recompute=recompute)
        w_in = first.w_in[:, 0] if setting.two_layers else None
        y, end = fixed.fixed_memory(
            setting, fixed.Inputs(q, *made), w_in, first.vector[:, 0], anchor.vector[:, 0] if anchored else None, begins
        )
        now = (end.unsqueeze(1),)
    scalar = main.now.scalar  # none
    return _cut(y, chunk, T), main.moved((*now, scalar))


def _bank_setting(rule: MemoryRule, chunk: int, precision: str, *, own: bool, anchored: bool) -> bank.Setting:
    numbers, at = [], 0
    for there in (rule.adaptive_key, rule.adaptive_value, rule.adaptive_eta, rule.adaptive_alpha):
        numbers.append(at if own and there else -1)
        at += there
    return bank.Setting(
        tile_rows(chunk), own, *numbers, *((rule.num_vector, rule.num_scalar) if own else (1, 0)),
        moving=rule.writes_input, dgd=rule.dgd_layers == "all", dgd_in=rule.writes_input and rule.dgd_layers != "none",
        own=rule.own_targets, unit_target=rule.normalize_targets, unit_value=rule.normalize_values,
        residual=rule.dot_target == "residual", anchored=anchored, exact=rule.writes_input,
        log_eta_max=math.log(rule.eta_max), precision=precision,
    )  # fmt: skip


def _fixed_setting(rule: MemoryRule, precision: str, *, anchored: bool, recompute: bool) -> fixed.Setting:
    two = rule.num_layers == 2
    return fixed.Setting(
        tile_rows(rule.chunk_tokens), two, unit=two and rule.dgd_layers == "all", dgd=rule.output_uses_dgd,
        erased=rule.decay_erased, l2=rule.objective == "l2", own=rule.own_targets, unit_target=rule.normalize_targets,
        residual=two and (rule.objective == "l2" or rule.dot_target == "residual"), anchored=anchored,
        causal=rule.read == "causal", skip=two and rule.read_skip, recompute=recompute, precision=precision,
    )  # fmt: skip


def _split(groups: tuple[Group, ...]) -> tuple[_Bank | None, _Bank]:
    """The self-memories, if there are any, and M_mem."""
    banks = [_bank(group) for group in groups]
    if len(groups) == 2:
        return banks[0], banks[1]
    if groups[0].n == 1:
        return None, banks[0]

    def cut(part: slice, scalars: slice) -> _Bank:
        parts = (part, part, scalars)
        return _Bank(*(None if w is None else Layers(*(x[:, i] for x, i in zip(w, parts))) for w in banks[0]))

    return cut(slice(1, None), slice(None)), cut(slice(0, 1), slice(0))


def _bank(group: Group) -> _Bank:
    def layers(w: Weights | None) -> Layers | None:
        if w is None:
            return None
        some = w.w_scalar if w.w_vector is None else w.w_vector
        N, h = some.size(0) // (group.ns if w.w_vector is None else group.nv), some.size(-1)
        vector = some.new_empty(N, 0, 1, h) if w.w_vector is None else w.w_vector.unflatten(0, (N, -1))
        scalar = some.new_empty(N, 0, h) if w.w_scalar is None else w.w_scalar.squeeze(1).unflatten(0, (N, -1))
        return Layers(vector.detach() if w.w_in is None else w.w_in.unflatten(0, (N, -1)), vector, scalar)

    return _Bank(layers(group.now), layers(group.anchor))


def _join(groups: tuple[Group, ...], own: _Bank | None, main: _Bank) -> tuple[Group, ...]:
    """The inverse of `_split`, with the weights of `own` and `main`."""

    def joined(group: Group, *parts: Layers) -> Weights:
        w_in, vector, scalar = (torch.cat(x, 1).flatten(0, 1) for x in zip(*parts))
        like = group.now
        return Weights(
            None if like.w_in is None else w_in,
            None if like.w_vector is None else vector,
            None if like.w_scalar is None else scalar.unsqueeze(1),
        )

    parts = [[main]] if own is None else [[own], [main]] if len(groups) == 2 else [[main, own]]
    weights = [joined(group, *(x.now for x in some)) for group, some in zip(groups, parts)]
    return tuple(group._replace(now=w, start=w) for group, w in zip(groups, weights))
