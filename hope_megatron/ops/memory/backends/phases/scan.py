"""The memory operator in phases: a backend of few launches, in PyTorch's operators, for any device.

Memories that share chunks and depend on weights that change go through the loop of memories.py; M_mem, where its features do not
depend on such weights, through the short one of chain.py. Everything else is computed for all chunks at once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.backends.phases.chain import Chain
from hope_megatron.ops.memory.backends.phases.form import Form
from hope_megatron.ops.memory.backends.phases.memories import Memories
from hope_megatron.ops.memory.backends.phases.plan import Plan
from hope_megatron.ops.memory.backends.phases.stacks import ORDER, After, Stack, after, put, stack
from hope_megatron.ops.memory.backends.phases.tables import SMALLEST_LOG_RATE
from hope_megatron.ops.memory.backends.registry import Backend, Case
from hope_megatron.ops.memory.inner import unit
from hope_megatron.ops.memory.layout import Group
from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule, why_not_hopes_own


def why_not(case: Case) -> str | None:
    """See `Backend.why_not`."""
    rule, (_, _, theta) = case.rule, case.rates
    fixed = {"objective": ("dot", "l2"), "read": "causal", "normalize_targets": True, "adaptive_query": False}
    fixed |= {"rates_of": "head", "weights": "sum"}
    if (text := rule.differs(**fixed)) is not None:
        return text
    if theta and (rule.adaptive or not rule.writes_input or rule.dgd_layers != "none"):
        return "momentum, which it has for static projections, two layers, both written, and no DGD"
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
    tensors: list[Tensor | None], rule: MemoryRule, groups: tuple[Group, ...],
    *, compute: MemoryCompute, recompute: bool,
) -> tuple[Tensor, tuple[Group, ...]]:  # fmt: skip
    """See `Backend.scan`."""
    B, T, H, _ = tensors[0].shape
    q, k, v, *logits = (None if x is None else x.transpose(1, 2).flatten(0, 1).contiguous() for x in tensors)
    eta, alpha = (q.new_full((B * H, T), -SMALLEST_LOG_RATE) if x is None else x for x in logits[:2])
    q, own, main = unit(q), groups[0], groups[-1]
    how = dict(momentum=logits[2] is not None, low=compute.precision == "bf16")
    plan = lambda form: Plan.of(form, compute, recompute, q, main.now.w_vector.size(-1))  # noqa: E731
    together = rule.writes_input and rule.adaptive and len(groups) == 1
    found: dict[str, After] = {}
    if rule.adaptive:
        C, names = rule.self_chunk, ORDER if together else ORDER[:4]
        form = Form.of(rule, C, generates=True, mem=together, **how)
        weights = stack(own, names, form, B * H)
        y, k, v, logs, V, V_in = Memories.apply(
            form, plan(form), q if together else None, k, v, eta, alpha, None, *weights
        )
        found |= after(names, weights, V, V_in)
        if not together:
            logs = logs.transpose(1, 2).flatten(2, 3)  # [N, 2, T]
    else:
        k, v = unit(k), unit(v) if rule.normalize_values else v
        rates = [F.logsigmoid(x) for x in (eta, alpha, logits[2]) if x is not None]
        if len(rates) == 3:
            rates[2] = rates[2] + math.log(rule.momentum_max)
        logs = torch.stack(rates, 1).clamp(min=SMALLEST_LOG_RATE)
    if not together:
        form = Form.of(rule, rule.chunk_tokens, generates=False, mem=True, **how)
        y, mem = _main(form, plan(form), q, k, v, logs, stack(main, ("mem",), form, B * H))
        found |= mem
    if rule.read_skip and rule.num_layers == 2:
        y = y + q
    groups = tuple(put(group, found) for group in groups)
    return y.unflatten(0, (B, H)).transpose(1, 2), groups


PHASES = Backend("the chunk form in phases (PyTorch)", "phases", why_not, phases_scan, unwise)


def _main(form: Form, plan: Plan, q, k, v, logs, weights: Stack) -> tuple[Tensor, dict[str, After]]:
    """M_mem alone, of keys, values and log-rates [N, 2 or 3, T]."""
    if form.writes_in:
        rates = (*logs.unbind(1), None)[:3]
        y, _, _, _, V, V_in = Memories.apply(form, plan, q, k, v, *rates, *weights)
        return y, after(("mem",), weights, V, V_in)
    chunks = lambda x: x.unflatten(1, (-1, form.C))  # noqa: E731
    logs = logs.unflatten(2, (-1, form.C)).transpose(1, 2).contiguous()
    w_in = None if weights.w_in is None else weights.w_in[0]
    y, V = Chain.apply(form, plan, *map(chunks, (q, k, v)), logs, weights.V[0, :, 0], w_in, weights.A[0])
    return y.flatten(1, 2), after(("mem",), weights, V[None, :, None], None)
