"""What memories do along a stream: rates, surprise, writes and drift. It looks on; the operator itself is `ops.memory`.

Shapes: B sequences, T tokens, H heads, n memories, P pieces (chunks of the shorter of the two chunk lengths).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, MemoryState, RateLogits, memory_chunked
from hope_megatron.ops.memory.channels import channel_rates
from hope_megatron.ops.memory.inner import apply_memory, features, has_skip, output_error, seen, unit
from hope_megatron.ops.memory.types import initial_state


class MemoryTrace(NamedTuple):
    """What one layer's memories did. Everything is detached."""

    names: tuple[str, ...]
    """The memories that there are, of "mem", "k", "v", "q", "eta", "alpha"; the order of n below."""
    ends: Tensor
    """[P] int64, tokens of the piece of stream that had been read when each piece ended."""
    eta: Tensor
    """[B, T, H] inner learning rates."""
    alpha: Tensor
    """[B, T, H] retention."""
    surprise: Tensor
    """[n, B, T, H] |M(k) - target| at the state that the token's inner gradient is taken at: what the memory did not know."""
    update: Tensor
    """[n, P, B, H] |W after - W before| / |W_0| of each piece; absolute for a memory whose W_0 is zero."""
    drift: Tensor
    """[n, P, B, H] |W after - W_0| / |W_0|, W_0 being the learned initial state; absolute where that is zero."""


@torch.no_grad()
def trace_memory(
    q: Tensor, k: Tensor, v: Tensor, logits: RateLogits,
    params: MemoryParams, rule: MemoryRule, state: MemoryState | None = None,
) -> MemoryTrace:  # fmt: skip
    """Follow the memories along a piece of a stream. Arguments are those of `memory_chunked`; nothing is changed."""
    B, T = q.shape[:2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    new = initial_state(params, B, momentum=logits.theta is not None, dtype=dtype)
    state = state or new
    scale = [torch.where(norm > 0, norm, 1.0) for norm in _norms(new.now)]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    rates, surprises, updates, drifts, ends = [], [], [], [], []
    at, period = 0, min(rule.chunk_tokens, rule.self_chunk)
    while at < T:
        stop = min(T, at + period - state.position % period)
        piece = RateLogits(*(None if r is None else r[:, at:stop].to(dtype) for r in logits))
        keys, values, eta, alpha = _inner_inputs(k[:, at:stop], v[:, at:stop], piece, rule, state.start)
        surprises.append(_surprise(keys, values, rule, state.start))
        rates.append((eta, alpha))
        _, after = memory_chunked(q[:, at:stop], k[:, at:stop], v[:, at:stop], piece, params, rule, state)
        updates.append(_ratio(after.now, state.now, scale))
        drifts.append(_ratio(after.now, new.now, scale))
        state, at = after, stop
        ends.append(at)
    eta, alpha = (torch.cat(parts, 2).transpose(1, 2) for parts in zip(*rates))
    return MemoryTrace(
        names=memory_names(rule),
        ends=torch.tensor(ends),
        eta=eta,
        alpha=alpha,
        surprise=torch.cat(surprises, 3).permute(2, 0, 3, 1),
        update=torch.stack(updates).permute(3, 0, 1, 2),
        drift=torch.stack(drifts).permute(3, 0, 1, 2),
    )


def memory_names(rule: MemoryRule) -> tuple[str, ...]:
    """The memories of a rule, in the order of the banks."""
    adaptive = {
        "k": rule.adaptive_key,
        "v": rule.adaptive_value,
        "q": rule.adaptive_query,
        "eta": rule.adaptive_eta,
        "alpha": rule.adaptive_alpha,
    }
    return ("mem", *(name for name, there in adaptive.items() if there))


def _inner_inputs(k: Tensor, v: Tensor, logits: RateLogits, rule: MemoryRule, start: MemoryParams):
    """Keys and values [B, H, 1, C, d] and rates [B, H, C] as the self-memories make them (eqs. 86-87)."""
    x_k, x_v = (x.transpose(1, 2).unsqueeze(2) for x in (k, v))
    adapted, gates = [], []
    chosen = [x for x, there in ((x_k, rule.adaptive_key), (x_v, rule.adaptive_value)) if there]
    if start.vector is not None and chosen:
        without_query = Bank(*(None if w is None else w[:, :, : len(chosen)] for w in start.vector))
        adapted = list(apply_memory(without_query, torch.cat(chosen, 2), skip=True).split(1, 2))
    if start.scalar is not None:
        gates = list(apply_memory(start.scalar, x_k, skip=False).squeeze(-1).unbind(2))
    keys = unit(adapted.pop(0) if rule.adaptive_key else x_k)
    values = adapted.pop(0) if rule.adaptive_value else x_v
    if rule.rates_of == "channel":  # a head shows the mean over its channels, of retention the geometric one
        eta, log_alpha = (rate.mean(-1).transpose(1, 2) for rate in channel_rates(logits, rule))
        return keys, unit(values) if rule.normalize_values else values, eta, log_alpha.exp()
    eta = torch.full_like(x_k[:, :, 0, :, 0], rule.eta_max)
    if logits.eta is not None:
        eta = rule.eta_max * torch.sigmoid(logits.eta.transpose(1, 2) + (gates.pop(0) if rule.adaptive_eta else 0.0))
    alpha = torch.ones_like(eta)
    if logits.alpha is not None:
        alpha = torch.sigmoid(logits.alpha.transpose(1, 2) + (gates.pop(0) if rule.adaptive_alpha else 0.0))
    return keys, unit(values) if rule.normalize_values else values, eta, alpha


def _surprise(k: Tensor, v: Tensor, rule: MemoryRule, start: MemoryParams) -> Tensor:
    """[B, H, n, C]. The gradient of the dot product does not see the prediction, so the error is always that of L2."""
    found = []
    for name in MemoryParams._fields:
        bank: Bank | None = getattr(start, name)
        if bank is None:
            continue
        bank, scalar = seen(bank, rule), name == "scalar"
        error = output_error(
            bank, k, v, features(bank, k)[0], replace(rule, objective="l2", rates_of="head"), scalar=scalar
        )
        if rule.objective == "dot" and rule.dot_target == "full" and has_skip(bank, scalar=scalar):
            error = error - k  # here the layers alone learn the target
        found.append(error.norm(dim=-1))
    return torch.cat(found, 2)


def _ratio(after: MemoryParams, before: MemoryParams, scale: list[Tensor]) -> Tensor:
    """|after - before| / scale for every memory: [B, H, n]."""
    return torch.cat([norm / unit_ for norm, unit_ in zip(_norms(after, before), scale)], 2)


def _norms(params: MemoryParams, minus: MemoryParams | None = None) -> list[Tensor]:
    """Frobenius norm over both layers of every memory, bank by bank: [B, H, n]."""
    norms = []
    for name in MemoryParams._fields:
        bank, other = getattr(params, name), minus and getattr(minus, name)
        if bank is None:
            continue
        pairs = zip(bank, other or (None,) * len(bank))
        squares = [(w if o is None else w - o).square().sum((-2, -1)) for w, o in pairs if w is not None]
        norms.append(torch.stack(squares).sum(0).sqrt())
    return norms
