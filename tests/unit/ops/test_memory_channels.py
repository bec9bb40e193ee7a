"""Rates of channels: RWKV-7's recurrence as published, loop and chunk form alike, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hope_megatron.ops.memory import (
    MemoryCompute,
    MemoryRule,
    RateLogits,
    memory_chunked,
    memory_packed,
    memory_recurrent,
)
from hope_megatron.ops.memory.backends.registry import KernelError
from hope_megatron.ops.memory.rule import MemoryRuleError
from hope_megatron.ops.memory_trace import trace_memory
from tests.unit.ops.memories import STATIC, B, H, d, make_params, outputs_and_gradients

RULE = MemoryRule(
    8, num_layers=1, objective="dot", dgd_layers="input", rates_of="channel", decay_to="zero", eta_max=1.0, **STATIC
)


def inputs(T: int, dtype: torch.dtype = torch.float64):
    q, k, v, eta, alpha = (torch.randn(B, T, H, d, dtype=dtype) for _ in range(5))
    return q, k, v, RateLogits(eta, alpha)


def published(q, k, v, w, a, kk, state):
    """S_t = S_{t-1} (diag(w_t) - kk_t^T (a_t . kk_t)) + v_t^T k_t, o_t = S_t r_t (arXiv 2503.14456, eqs. 17, 19), token by token
    and head by head; with flash-linear-attention's names a and b that is a = -kk, b = kk . a, in its naive recurrence."""
    outputs = torch.empty_like(v)
    for b in range(B):
        for head in range(H):
            S = state[head]
            for t in range(q.size(1)):
                at = b, t, head
                transition = torch.diag(w[at]) - torch.outer(kk[at], a[at] * kk[at])
                S = S @ transition + torch.outer(v[at], k[at])
                outputs[at] = S @ q[at]
    return outputs


def test_rwkv7_is_its_published_recurrence():
    torch.manual_seed(0)
    q, k, v, logits = inputs(21)
    params = make_params(RULE, layers=1)
    w, a = torch.exp(-math.exp(-0.5) * torch.sigmoid(logits.alpha)), torch.sigmoid(logits.eta)
    unit_q, kk, unit_v = (F.normalize(x, dim=-1) for x in (q, k, v))
    expected = published(unit_q, kk * a, unit_v, w, a, kk, params.mem.w_out[:, 0])
    y, _ = memory_chunked(q, k, v, logits, params, RULE)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [1, 7, 21])
@pytest.mark.parametrize("warm", [False, True])
def test_chunk_form_is_the_loop(T, warm):
    torch.manual_seed(T)
    params, state = make_params(RULE, layers=1), None
    if warm:
        _, state = memory_recurrent(*inputs(11), params, RULE)
    slow, slow_grads = outputs_and_gradients(memory_recurrent, *inputs(T), params, RULE, state)
    torch.manual_seed(T)
    params = make_params(RULE, layers=1)
    if warm:
        inputs(11)
    fast, fast_grads = outputs_and_gradients(memory_chunked, *inputs(T), params, RULE, state)
    for found, expected in zip(fast + list(fast_grads), slow + list(slow_grads), strict=True):
        assert (found is None) == (expected is None) or not (found if expected is None else expected).any()
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_longest_chunk_with_the_strongest_retention_in_float32():
    """All channels fade as fast as they can: 64 tokens keep 1e-17, which float32 still gives back."""
    torch.manual_seed(3)
    q, k, v, logits = inputs(128, torch.float32)
    logits, params = logits._replace(alpha=torch.full_like(logits.alpha, 30.0)), make_params(RULE, layers=1)
    y, _ = memory_chunked(q, k, v, logits, params, replace(RULE, chunk_tokens=64))
    wide = RateLogits(logits.eta.double(), logits.alpha.double())
    expected, _ = memory_recurrent(q.double(), k.double(), v.double(), wide, params, RULE)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


def test_packed_documents_stand_alone():
    torch.manual_seed(4)
    q, k, v, logits = inputs(14)
    params = make_params(RULE, layers=1)
    documents = torch.tensor([[0] * 5 + [1] * 9] * B)
    y = memory_packed(q, k, v, logits, params, RULE, documents)
    for piece in (slice(0, 5), slice(5, 14)):
        rates = RateLogits(logits.eta[:, piece], logits.alpha[:, piece])
        alone, _ = memory_chunked(q[:, piece], k[:, piece], v[:, piece], rates, params, RULE)
        torch.testing.assert_close(y[:, piece], alone, rtol=1e-10, atol=1e-10)


def test_what_it_is_not():
    for changes in ({"dgd_layers": "none"}, {"decay_to": "initial"}, {"num_layers": 2}, {"chunk_tokens": 128}):
        with pytest.raises(MemoryRuleError, match="rates_of=channel"):
            replace(RULE, **changes)
    q, k, v, logits = inputs(4)
    with pytest.raises(MemoryRuleError, match=r"logits.eta has shape \[2, 4, 2\]"):
        memory_chunked(q, k, v, RateLogits(logits.eta[..., 0], logits.alpha), make_params(RULE, 1), RULE)
    with pytest.raises(KernelError, match="rates_of"):
        memory_chunked(q, k, v, logits, make_params(RULE, 1), RULE, compute=MemoryCompute(kernel="phases"))


def test_a_trace_shows_the_mean_of_channels():
    torch.manual_seed(5)
    q, k, v, logits = inputs(12)
    trace = trace_memory(q, k, v, logits, make_params(RULE, layers=1), RULE)
    torch.testing.assert_close(trace.eta, torch.sigmoid(logits.eta).mean(-1))
    torch.testing.assert_close(trace.alpha, (-math.exp(-0.5) * torch.sigmoid(logits.alpha)).mean(-1).exp())
