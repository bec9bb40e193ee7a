"""The memory operator in phases: a backend of few launches, in PyTorch's operators, for any device.

Memories that share chunks and depend on weights that change go through the loop of memories.py; M_mem, where its features do not
depend on such weights, through the short one of chain.py. Everything else is computed for all chunks at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.chain import Chain
from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.backends.phases.memories import Memories
from hope_megatron.ops.memory.backends.phases.plan import Plan
from hope_megatron.ops.memory.backends.phases.tables import SMALLEST_LOG_RATE
from hope_megatron.ops.memory.backends.registry import Backend, Case
from hope_megatron.ops.memory.inner import unit
from hope_megatron.ops.memory.layout import Group, Weights
from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule, why_not_hopes_own

ORDER = ("eta", "alpha", "k", "v", "mem")


def why_not(case: Case) -> str | None:
    """See `Backend.why_not`."""
    rule, (_, _, theta) = case.rule, case.rates
    if (text := rule.differs(read="causal", normalize_targets=True, adaptive_query=False)) is not None:
        return text
    if theta:
        return "it has no momentum"
    if rule.eta_max == 0:
        return "eta_max=0 writes nothing"
    if rule.adaptive and not rule.normalize_values:
        return "normalize_values=false with self-memories"
    if rule.decay_erased and rule.num_layers == 2:
        return "decay_erased=true with num_layers=2"
    return None


def unwise(case: Case) -> str | None:
    """See `Backend.unwise`: it moves more bytes to launch less."""
    if case.device == "cpu":
        return "on a CPU, where launches cost little, it takes several times longer"
    eta, alpha, theta = case.rates
    own = why_not_hopes_own(case.rule, eta=eta, alpha=alpha, theta=theta) is None
    if own and (sizes := case.streams * case.rule.chunk_tokens * max(case.d, case.h)) > _MOST_NUMBERS:
        return f"with streams * chunk * width = {sizes} its bytes cost more than the launches that it saves"
    return None


_MOST_NUMBERS = 96 * 64 * 64
"""Against the backward written out chunk by chunk. Counted at C = d = h = 64 for hope (and hope_w1): 79 (62) launches a chunk for
446 (345), and 60 (35) MB a chunk and stream for 38 (24). At 4 us a launch and 3 TB/s they are level at 200 (257) streams where
both wait for bytes, and at 89 (118) where the phases wait for bytes and the other for launches."""


def phases_scan(
    tensors: list[Tensor | None],
    rule: MemoryRule,
    groups: tuple[Group, ...],
    *,
    compute: MemoryCompute,
    recompute: bool,
) -> tuple[Tensor, tuple[Group, ...]]:
    """See `Backend.scan`."""
    B, T, H, _ = tensors[0].shape
    q, k, v, *logits = (None if x is None else x.transpose(1, 2).flatten(0, 1).contiguous() for x in tensors)
    eta, alpha = (q.new_full((B * H, T), -SMALLEST_LOG_RATE) if x is None else x for x in logits[:2])
    q, own, main = unit(q), groups[0], groups[-1]
    how = dict(momentum=False, low=compute.precision == "bf16")
    plan = lambda form: Plan.of(form, compute, recompute, q, main.now.w_vector.size(-1))  # noqa: E731
    together = rule.writes_input and rule.adaptive and len(groups) == 1
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if rule.adaptive:
        C, names = rule.self_chunk, ORDER if together else ORDER[:4]
        form = Form.of(rule, C, generates=True, mem=together, **how)
        y, k, v, logs, V, V_in = Memories.apply(
            form, plan(form), q if together else None, k, v, eta, alpha, *_given(own, names, form, B * H)
        )
        found |= _taken(own, names, form, V, V_in, B * H)
        if not together:
            logs = logs.transpose(1, 2).flatten(2, 3)  # [N, 2, T]
    else:
        k, v = unit(k), unit(v) if rule.normalize_values else v
        logs = torch.stack([F.logsigmoid(eta), F.logsigmoid(alpha)], 1).clamp(min=SMALLEST_LOG_RATE)
    if not together:
        form = Form.of(rule, rule.chunk_tokens, generates=False, mem=True, **how)
        y, weights = _main(form, plan(form), q, k, v, logs, main, B * H)
        found |= weights
    if rule.read_skip and rule.num_layers == 2:
        y = y + q
    groups = tuple(_put(group, found) for group in groups)
    return y.unflatten(0, (B, H)).transpose(1, 2), groups


PHASES = Backend("the chunk form in phases (PyTorch)", "phases", why_not, phases_scan, unwise)


def _main(form: Form, plan: Plan, q, k, v, logs, group: Group, N: int) -> tuple[Tensor, dict]:
    """M_mem alone, of keys, values and log-rates [N, 2, T]."""
    V, w_in, A, A_in = _given(group, ("mem",), form, N)
    if form.writes_in:
        y, _, _, _, V, V_in = Memories.apply(form, plan, q, k, v, *logs.unbind(1), V, w_in, A, A_in)
        return y, _taken(group, ("mem",), form, V, V_in, N)
    chunks = lambda x: x.unflatten(1, (-1, form.C))  # noqa: E731
    logs = logs.unflatten(2, (-1, form.C)).transpose(1, 2).contiguous()
    y, V = Chain.apply(form, plan, chunks(q), chunks(k), chunks(v), logs, V[0], None if w_in is None else w_in[0], A[0])
    return y.flatten(1, 2), _taken(group, ("mem",), form, V.unsqueeze(0), None, N)


def _given(group: Group, names: tuple[str, ...], form: Form, N: int) -> tuple[Tensor | None, ...]:
    """V, W2 (or V of the input layers), A and A_in, memories stacked in the order of `names`; zeros for those there are not."""
    out, inner = _stack(group, group.now, names, N)
    if group.anchor is None:
        A, A_in = torch.zeros_like(out), None if inner is None else torch.zeros_like(inner)
    else:
        A, A_in = _stack(group, group.anchor, names, N)
    if form.writes_in:
        return out - A, inner - A_in, A, A_in
    return out - A, inner, A, None


def _stack(group: Group, weights: Weights, names: tuple[str, ...], N: int) -> tuple[Tensor, Tensor | None]:
    """[n, N, d, h] and [n, N, h, d]; the row of a scalar memory becomes a matrix."""
    by_head = lambda x: None if x is None else x.unflatten(0, (N, -1)).unbind(1)  # noqa: E731
    inner, vector, scalar = map(by_head, weights)
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


def _taken(group: Group, names, form: Form, V: Tensor, V_in: Tensor | None, N: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights W = A + V by the names of their memories: output layer, input layer where it is written."""
    _, _, A, A_in = _given(group, names, form, N)
    out, found_in = V + A, None if V_in is None else V_in + A_in
    return {
        name: (out[i], None if found_in is None else found_in[i]) for i, name in enumerate(names) if name in group.names
    }


def _put(group: Group, found: dict[str, tuple[Tensor, Tensor]]) -> Group:
    """The group with its memories' new weights."""
    join = lambda parts: torch.stack(parts, 1).flatten(0, 1) if parts else None  # noqa: E731
    out, inner = zip(*(found[name] for name in group.names))
    now = Weights(
        group.now.w_in if inner[0] is None else join(inner),
        join(out[: group.nv]),
        join([w[:, :1] for w in out[group.nv :]]),
    )
    return group._replace(now=now, start=now)
