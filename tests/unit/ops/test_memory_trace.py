"""The trace tells what the token loop does, token by token, and surprise means what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, RateLogits, initial_state, memory_recurrent
from hope_megatron.ops.memory.inner import apply_memory, unit
from hope_megatron.ops.memory_trace import trace_memory

B, H, T, d, h = 2, 3, 29, 6, 5
RULE = MemoryRule(chunk_tokens=8, self_chunk_tokens=4)


def make_params(rule: MemoryRule) -> MemoryParams:
    def bank(n: int, outputs: int) -> Bank | None:
        make = lambda *shape: torch.randn(H, n, *shape, dtype=torch.float64)  # noqa: E731
        return Bank(make(h, d), 0.3 * make(outputs, h)) if n else None

    return MemoryParams(
        bank(1, d), bank(rule.adaptive_key + rule.adaptive_value, d), bank(rule.adaptive_eta + rule.adaptive_alpha, 1)
    )


def make_inputs(tokens: int = T):
    q, k, v = (torch.randn(B, tokens, H, d, dtype=torch.float64) for _ in range(3))
    rate = lambda shift: torch.randn(B, tokens, H, dtype=torch.float64) + shift  # noqa: E731
    return q, k, v, RateLogits(rate(0.0), rate(3.0), None)


def distance(after: Bank, before: Bank) -> torch.Tensor:
    """[B, H, n]."""
    return sum((x - y).square().sum((-2, -1)) for x, y in zip(after, before)).sqrt()


def errors(start: MemoryParams, x_k: torch.Tensor, x_v: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    """|M(key) - target| of every memory at one token, [n, B, H]: unit targets M(value), tanh for scalars."""
    single = lambda bank: [Bank(*(w[:, :, [i]] for w in bank)) for i in range(bank.w_out.size(2))]  # noqa: E731
    vectors, scalars = ([] if bank is None else single(bank) for bank in (start.vector, start.scalar))
    key = unit(apply_memory(vectors[0], x_k, skip=True) if rule.adaptive_key else x_k)
    value = unit(apply_memory(vectors[-1], x_v, skip=True) if rule.adaptive_value else x_v)
    found = []
    for bank in [start.mem, *vectors]:
        found.append((apply_memory(bank, key, skip=True) - unit(apply_memory(bank, value, skip=True))).norm(dim=-1))
    for bank in scalars:
        error = apply_memory(bank, key, skip=False) - torch.tanh(apply_memory(bank, value, skip=False))
        found.append(error.abs().squeeze(-1))
    return torch.cat(found, 2)[..., 0].permute(2, 0, 1)


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        replace(RULE, chunk_tokens=4, self_chunk_tokens=8),
        replace(RULE, adaptive_value=False, adaptive_eta=False),
        replace(RULE, adaptive_key=False, adaptive_alpha=False, objective="l2", eta_max=0.1),
    ],
    ids=["two-lengths", "long-self-chunks", "key-alpha", "value-eta-l2"],
)
def test_trace_equals_the_token_loop(rule):
    torch.manual_seed(0)
    params, (q, k, v, logits) = make_params(rule), make_inputs()
    trace = trace_memory(q, k, v, logits, params, rule)
    state = first = initial_state(params, B, momentum=False, dtype=torch.float64)
    names = ["mem"] + [n for n in ("k", "v") if n in trace.names] + [n for n in ("eta", "alpha") if n in trace.names]
    assert list(trace.names) == names
    ends = trace.ends.tolist()
    for t in range(T):
        x_k, start = k[:, t, :, None, None], state.start
        piece = RateLogits(logits.eta[:, t : t + 1], logits.alpha[:, t : t + 1], None)
        _, state = memory_recurrent(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], piece, params, rule, state)
        gate = {} if start.scalar is None else dict(
            zip([n for n in names if n in ("eta", "alpha")], apply_memory(start.scalar, x_k, skip=False).unbind(2))
        )  # fmt: skip
        flat = lambda name: gate[name][..., 0, 0] if name in gate else 0.0  # noqa: B023, E731
        torch.testing.assert_close(trace.eta[:, t], rule.eta_max * torch.sigmoid(logits.eta[:, t] + flat("eta")))
        torch.testing.assert_close(trace.alpha[:, t], torch.sigmoid(logits.alpha[:, t] + flat("alpha")))
        torch.testing.assert_close(trace.surprise[:, :, t], errors(start, x_k, v[:, t, :, None, None], rule))
        if t + 1 in ends:
            at = ends.index(t + 1)
            banks = [(n, s) for n, s in zip(state.now, first.now) if n is not None]
            drift = torch.cat([distance(n, s) / distance(s, Bank(*(0 * w for w in s))) for n, s in banks], 2)
            torch.testing.assert_close(trace.drift[:, at], drift.permute(2, 0, 1))
    assert ends[-1] == T and all(end % 4 == 0 for end in ends[:-1])


def test_a_stream_in_two_pieces_has_the_trace_of_the_whole():
    torch.manual_seed(1)
    params, (q, k, v, logits) = make_params(RULE), make_inputs()
    whole = trace_memory(q, k, v, logits, params, RULE)
    cut = 13
    head, tail = ([x[:, part] for x in (q, k, v)] for part in (slice(cut), slice(cut, None)))
    rates = [RateLogits(logits.eta[:, part], logits.alpha[:, part], None) for part in (slice(cut), slice(cut, None))]
    _, state = memory_recurrent(*head, rates[0], params, RULE)
    rest = trace_memory(*tail, rates[1], params, RULE, state)
    torch.testing.assert_close(rest.surprise, whole.surprise[:, :, cut:])
    torch.testing.assert_close(rest.drift[:, -1], whole.drift[:, -1])


def test_what_was_written_surprises_less():
    torch.manual_seed(2)
    rule = replace(RULE, chunk_tokens=8, self_chunk_tokens=8, adaptive_eta=False, adaptive_alpha=False)
    rule = replace(rule, own_targets=False, adaptive_key=False, adaptive_value=False)
    q, k, v, _ = make_inputs(8)
    k, v = unit(k), unit(v)
    twice = [torch.cat([x, x], 1) for x in (q, k, v)]
    logits = RateLogits(torch.full((B, 16, H), 1.0, dtype=torch.float64), None, None)
    surprise = trace_memory(*twice, logits, make_params(rule), rule).surprise[0]
    assert (surprise[:, 8:].mean() < 0.9 * surprise[:, :8].mean()).item()


def test_silent_memories_stand_still():
    torch.manual_seed(3)
    q, k, v, logits = make_inputs()
    rule = replace(RULE, eta_max=0.0, adaptive_alpha=False)
    trace = trace_memory(q, k, v, logits._replace(alpha=None), make_params(rule), rule)
    assert not trace.update.any() and not trace.drift.any() and not trace.eta.any() and (trace.alpha == 1).all()
