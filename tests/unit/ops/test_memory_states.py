"""States: pieces of a stream, recomputed pieces, retention, and what a state says of the next chunk."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from hope_megatron.ops.memory import (
    MemoryCompute,
    MemoryParams,
    MemoryRule,
    RateLogits,
    initial_state,
    memory_chunked,
    memory_recurrent,
)
from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.manual.scan import MANUAL
from tests.unit.ops.memories import (
    HOPE,
    STATIC,
    B,
    alone,
    assert_same,
    leaves,
    make_inputs,
    make_params,
    outputs_and_gradients,
)


def test_stream_in_pieces_equals_one_piece():
    rule, T = MemoryRule(8, 16), 61
    params = make_params(rule)
    q, k, v, logits = make_inputs(T, momentum=True)
    whole, end = memory_chunked(q, k, v, logits, params, rule)

    def run(cuts):
        state, parts = None, []
        for a, b in itertools.pairwise([0, *cuts, T]):
            part = slice(a, b)
            rates = RateLogits(*(x[:, part] for x in logits))
            y, state = memory_chunked(q[:, part], k[:, part], v[:, part], rates, params, rule, state)
            parts.append(y)
        return torch.cat(parts, 1), state

    y, state = run([16, 48])  # at chunk borders: the same bits
    assert torch.equal(y, whole)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state.now), leaves(end.now)))
    y, state = run([1, 2, 13, 40])  # anywhere
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(leaves(state.now), leaves(end.now), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"decay_to": "zero"},
        {"decay_to": "zero", "dot_target": "full"},
        {"decay_to": "zero", "read_skip": True, "eta_max": 0.3},
        {},
        {"read_skip": True},
        {"decay_to": "zero", "written_layers": "output", "read_skip": True},
        {"written_layers": "output"},
    ],
    ids=str,
)
def test_the_written_out_backward_is_that_of_autograd(changes, warm, recompute):
    rule = MemoryRule(chunk_tokens=16, self_chunk_tokens=16, **changes)
    params = make_params(rule)
    inputs = make_inputs(75)
    state = memory_recurrent(*make_inputs(21), params, rule)[1] if warm else None
    by_hand, by_autograd = (
        outputs_and_gradients(
            functools.partial(alone(backend), recompute=recompute, compute=MemoryCompute(keep_every=2)),
            *inputs, params, rule, state,
        )
        for backend in (MANUAL, AUTOGRAD)
    )  # fmt: skip
    for a, b in zip(itertools.chain(*by_hand), itertools.chain(*by_autograd)):
        if a is None or b is None:
            assert all(x is None or not x.any() for x in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("T", [16, 21])
@pytest.mark.parametrize("rule", [HOPE, MemoryRule(4, 8), MemoryRule(8, 8, objective="l2", eta_max=0.1)], ids=str)
def test_a_recomputed_piece_leaves_the_state_of_a_plain_one(rule, T):
    """Also where it ends inside a chunk."""
    params, inputs, more = make_params(rule), make_inputs(T), make_inputs(9)
    for x in leaves(params):
        x.requires_grad_()
    plain = memory_chunked(*inputs, params, rule)[1]
    recomputed = memory_chunked(*inputs, params, rule, recompute=True, compute=MemoryCompute(keep_every=1))[1]
    assert recomputed.position == plain.position
    expected, found = (memory_chunked(*more, params, rule, state)[0] for state in (plain, recomputed))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("chunk, self_chunk, warm", [(8, 8, False), (4, 16, True), (8, 8, True)])
@pytest.mark.parametrize("keep_every", [None, 1, 1000])
@pytest.mark.parametrize("decay_to", ["zero", "initial"])
def test_recomputing_changes_no_gradient(decay_to, momentum, chunk, self_chunk, warm, keep_every):
    rule = MemoryRule(chunk, self_chunk, decay_to=decay_to)
    params = make_params(rule)
    q, k, v, logits = make_inputs(77, momentum=momentum)
    state = memory_recurrent(*make_inputs(11, momentum=momentum), params, rule)[1] if warm else None
    recomputing = functools.partial(memory_chunked, recompute=True, compute=MemoryCompute(keep_every=keep_every))
    plain = outputs_and_gradients(memory_chunked, q, k, v, logits, params, rule, state)
    bounded = outputs_and_gradients(recomputing, q, k, v, logits, params, rule, state)
    for a, b in zip(itertools.chain(*plain), itertools.chain(*bounded)):
        if a is None or b is None:
            assert all(x is None or not x.any() for x in (a, b))
        else:
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dgd_layers": "none", "eta_max": 0.05},
        {"decay_erased": True},
        {"self_chunk_tokens": 4},
        {"read": "chunk_start", "objective": "l2", "eta_max": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_retention_towards_the_initial_state(settings, momentum, layers):
    settings = {"chunk_tokens": 8, "self_chunk_tokens": 8, "decay_to": "initial"} | settings
    rule = MemoryRule(**(settings | STATIC | {"num_layers": 1} if layers == 1 else settings))
    assert_same(rule, 21, layers=layers, momentum=momentum, warm=True)


@pytest.mark.parametrize("decay_to, kept", [("zero", False), ("initial", True)])
def test_what_stays_when_nothing_is_written(decay_to, kept):
    """Without writes a stream of any length leaves the learned initial state alone, or fades it away."""
    rule = MemoryRule(8, 8, eta_max=0.0, decay_to=decay_to)
    params = make_params(rule)
    end = memory_chunked(*make_inputs(64), params, rule)[1]
    for reached, first in zip(leaves(end.now), leaves(params)):
        assert torch.allclose(reached, first.expand_as(reached), rtol=1e-12, atol=1e-14) == kept
        assert kept or reached.norm() < 0.1 * first.expand_as(reached).norm()


@pytest.mark.parametrize("cut", [8, 16, 21, 24])
@pytest.mark.parametrize("rule", [HOPE, MemoryRule(4, 8), MemoryRule(16, 8)], ids=str)
def test_the_start_in_a_state_is_that_of_the_next_tokens_chunk(rule, cut):
    """On every path: `now` at a border, else the weights at the last border."""
    params, (q, k, v, logits) = make_params(rule), make_inputs(cut)
    expected = {}
    for name, chunk in (("mem", rule.chunk_tokens), ("vector", rule.self_chunk), ("scalar", rule.self_chunk)):
        length = cut // chunk * chunk
        if length == 0:
            state = initial_state(params, B, momentum=False, dtype=torch.float64)
        else:
            rates = RateLogits(*(None if r is None else r[:, :length] for r in logits))
            state = memory_recurrent(q[:, :length], k[:, :length], v[:, :length], rates, params, rule)[1]
        expected[name] = getattr(state.now, name)
    for scan in (memory_recurrent, memory_chunked, alone(AUTOGRAD)):
        start = scan(q, k, v, logits, params, rule)[1].start
        for a, b in zip(leaves(start), leaves(MemoryParams(**expected))):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
