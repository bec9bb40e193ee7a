"""The chunk form equals the token loop for every rule; what that computes is checked in test_memory_inner.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_megatron.ops.memory import (
    Bank,
    MemoryParams,
    MemoryRule,
    RateLogits,
    memory_chunked,
    memory_recurrent,
)
from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.cpu.scan import CPU
from hope_megatron.ops.memory.backends.manual.scan import MANUAL
from hope_megatron.ops.memory.backends.phases.scan import PHASES
from hope_megatron.ops.memory.backends.registry import Case
from hope_megatron.ops.memory.inner import EPSILON, unit
from tests.unit.ops.memories import (
    HOPE,
    STATIC,
    B,
    H,
    assert_same,
    d,
    make_inputs,
    make_params,
)


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("dgd", ["none", "input", "all"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_chunk_matches_recurrent(objective, dgd, momentum, warm):
    rule = MemoryRule(8, 8, objective=objective, dgd_layers=dgd, eta_max=0.05)  # bounded for every combination
    assert_same(rule, 21, momentum=momentum, warm=warm)


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("dgd", ["none", "input", "all"])
@pytest.mark.parametrize("decay_to", ["zero", "initial"])
def test_output_layers_alone_are_written(objective, dgd, decay_to):
    rule = MemoryRule(
        8, 4, objective=objective, dgd_layers=dgd, decay_to=decay_to, written_layers="output", eta_max=0.05
    )
    assert_same(rule, 21, momentum=True, warm=True)
    rule = replace(rule, self_chunk_tokens=8)
    assert_same(rule, 21, warm=True)
    assert_same(replace(rule, read="chunk_start", read_skip=True), 21)
    params = make_params(rule)
    for scan in (memory_chunked, memory_recurrent):
        _, state = scan(*make_inputs(21), params, rule)
        for learned, now in zip(params, state.now):
            assert torch.equal(now.w_in, learned.w_in.expand_as(now.w_in)) and not torch.equal(
                now.w_out, learned.w_out.expand_as(now.w_out)
            )


@pytest.mark.parametrize("momentum", [False, True])
def test_gated_delta_rule(momentum):
    assert_same(MemoryRule(8, 8, decay_erased=True), 21, momentum=momentum, warm=True)


@pytest.mark.parametrize("changes", [{"decay_erased": True}, {}], ids=str)
def test_rates_up_to_two(changes):
    """A write may turn what its key holds into its negative."""
    assert_same(MemoryRule(8, 8, eta_max=2.0, **changes), 21)


def test_a_static_memory_has_one_chunk_length():
    assert_same(MemoryRule(4, 16, **STATIC), 21)
    assert MemoryRule(4, 16, **STATIC).period == 4


def test_bounded_momentum():
    rule = MemoryRule(8, 8, objective="l2", eta_max=0.1, momentum_max=0.7)
    assert_same(rule, 21, momentum=True, warm=True)
    params, inputs = make_params(rule), make_inputs(21, momentum=True)
    without = memory_recurrent(*inputs, params, MemoryRule(8, 8, objective="l2", eta_max=0.1))[0]
    assert not torch.allclose(memory_recurrent(*inputs, params, rule)[0], without)


@pytest.mark.parametrize("T", [1, 7, 8, 63])
def test_ragged_lengths(T):
    assert_same(HOPE, T, warm=True)


@pytest.mark.parametrize("chunk, self_chunk", [(4, 16), (16, 4), (1, 8), (32, 32)])
def test_two_chunk_lengths(chunk, self_chunk):
    assert_same(MemoryRule(chunk, self_chunk), 37, momentum=True, warm=True)
    assert_same(MemoryRule(chunk, self_chunk, adaptive_query=True), 37, warm=True)


def test_queries_are_read_through_their_own_memory():
    """By the formula: y = M_mem(unit(M_q(x_q))), both at the state that stood there; and other memories are as without it."""
    rule, T = MemoryRule(1, 1, adaptive_query=True), 9
    params = make_params(rule)
    q, k, v, logits = make_inputs(T)
    y, state = memory_recurrent(q, k, v, logits, params, rule)
    plain = replace(rule, adaptive_query=False)
    first_two = params._replace(vector=Bank(*(w[:, :2] for w in params.vector)))
    at = None
    for t in range(T):
        piece = RateLogits(*(None if r is None else r[:, t : t + 1] for r in logits))
        before = params.vector if at is None else at.start.vector
        w_in, w_out = (w[..., 2, :, :] for w in before)
        x = q[:, t]
        query = x + torch.einsum("...oh,...h->...o", w_out, F.silu(torch.einsum("...hd,...d->...h", w_in, x)))
        _, at = memory_recurrent(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], piece, params, rule, at)
        m_in, m_out = (w[..., 0, :, :] for w in at.now.mem)
        hidden = F.silu(torch.einsum("...hd,...d->...h", m_in, query / (query.norm(dim=-1, keepdim=True) + EPSILON)))
        torch.testing.assert_close(torch.einsum("...oh,...h->...o", m_out, hidden), y[:, t], rtol=1e-5, atol=1e-6)
    _, without = memory_recurrent(q, k, v, logits, first_two, plain)
    for name in ("mem", "scalar"):
        torch.testing.assert_close(getattr(state.now, name), getattr(without.now, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [CPU, MANUAL, PHASES], ids=lambda backend: backend.kernel)
def test_backends_that_have_no_query_memory_say_so(backend):
    rule = MemoryRule(16, 16, adaptive_query=True)
    case = Case(rule, (True, True, False), 4, 16, 16, torch.float32, "cpu", "fp32", True)
    assert "adaptive_query" in backend.why_not(case)
    assert AUTOGRAD.why_not(case) is None


@pytest.mark.parametrize(
    "read, read_skip, dot_target",
    list(itertools.product(["causal", "chunk_start"], [False, True], ["residual", "full"])),
)
def test_reads_and_targets(read, read_skip, dot_target):
    assert_same(MemoryRule(8, 8, read=read, read_skip=read_skip, dot_target=dot_target), 19)


ADAPTIVE = ("adaptive_key", "adaptive_value", "adaptive_query", "adaptive_eta", "adaptive_alpha")


@pytest.mark.parametrize("adaptive", list(itertools.product([False, True], repeat=5)))
def test_every_subset_of_self_memories(adaptive):
    rule = MemoryRule(8, 8, **dict(zip(ADAPTIVE, adaptive)))
    assert_same(rule, 13)
    assert_same(replace(rule, own_targets=False, normalize_values=False, eta_max=0.1), 13)


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("dgd", ["none", "input"])
@pytest.mark.parametrize("decay", [False, True])
def test_matrix_memory(objective, dgd, decay):
    assert_same(
        MemoryRule(8, 8, num_layers=1, objective=objective, dgd_layers=dgd, eta_max=0.1, **STATIC),
        29,
        layers=1,
        decay=decay,
        momentum=decay,
    )


@pytest.mark.parametrize("alpha", [1e-4, 1 - 1e-7])
def test_extreme_decay_over_a_long_chunk(alpha):
    rule = MemoryRule(512, 512)
    params = make_params(rule)
    q, k, v, logits = make_inputs(512)
    logits = logits._replace(alpha=torch.full_like(logits.alpha, alpha).logit())
    slow, _ = memory_recurrent(q, k, v, logits, params, rule)
    fast, _ = memory_chunked(q, k, v, logits, params, rule)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    T=st.sampled_from([1, 3, 8, 17, 63, 100]),
    chunks=st.sampled_from([(8, 8), (4, 16), (16, 8), (64, 64), (1, 1)]),
    objective=st.sampled_from(["dot", "l2"]),
    dgd=st.sampled_from(["none", "input", "all"]),
    read=st.sampled_from(["causal", "chunk_start"]),
    adaptive=st.tuples(*[st.booleans()] * 5),
    own_targets=st.booleans(),
    flags=st.tuples(*[st.booleans()] * 5),
    seed=st.integers(0, 2**31),
)
def test_any_rule_length_and_seed(T, chunks, objective, dgd, read, adaptive, own_targets, flags, seed):
    torch.manual_seed(seed)
    decay, momentum, warm, erased, normalize = flags
    rule = MemoryRule(
        *chunks,
        objective=objective,
        dgd_layers=dgd,
        read=read,
        own_targets=own_targets,
        decay_erased=erased and dgd != "none",
        normalize_steps=normalize,
        eta_max=0.1,  # also the rules that diverge at larger rates stay where float64 has digits left
        **dict(zip(ADAPTIVE, adaptive)),
    )
    assert_same(rule, T, decay=decay, momentum=momentum, warm=warm)


def test_delta_rule_of_a_matrix_memory_is_deltanet():
    """W = W (I - beta k k^T) + beta v k^T, y = W q: DeltaNet (arXiv 2406.06484), written independently."""
    rule = MemoryRule(8, 8, num_layers=1, dgd_layers="input", **STATIC)
    params = MemoryParams(Bank(None, torch.zeros(H, 1, d, d, dtype=torch.float64)))
    q, k, v, logits = make_inputs(30, decay=False)
    y, _ = memory_chunked(q, k, v, logits, params, rule)
    state, beta = torch.zeros(B, H, d, d, dtype=torch.float64), torch.sigmoid(logits.eta)
    for t in range(30):
        key, value, query = unit(k[:, t]), unit(v[:, t]), unit(q[:, t])
        old = torch.einsum("bhvk,bhk->bhv", state, key)
        state = state + beta[:, t, :, None, None] * (value - old)[..., None] * key[..., None, :]
        torch.testing.assert_close(y[:, t], torch.einsum("bhvk,bhk->bhv", state, query))
