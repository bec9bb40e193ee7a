"""The chunk form equals the token loop, and the token loop equals autograd on the inner loss."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_megatron.ops.memory import (
    Bank,
    MemoryCompute,
    MemoryParams,
    MemoryRule,
    RateLogits,
    initial_state,
    memory_chunked,
    memory_recurrent,
)
from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.cpu.scan import CPU
from hope_megatron.ops.memory.backends.manual.scan import MANUAL
from hope_megatron.ops.memory.inner import EPSILON, dsilu, output_error, unit
from hope_megatron.ops.memory.types import map_params

B, H, d, h = 2, 2, 6, 5
HOPE = MemoryRule(chunk_tokens=8, self_chunk_tokens=8)
STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)


def alone(backend):
    """`memory_chunked` with one backend and no other: an error where that cannot take a case."""
    return functools.partial(memory_chunked, backends=(backend,))


def make_params(rule: MemoryRule, layers: int = 2, scale: float = 0.3) -> MemoryParams:
    def bank(n: int, outputs: int) -> Bank | None:
        if n == 0:
            return None
        if layers == 1:
            return Bank(None, scale * torch.randn(H, n, outputs, d, dtype=torch.float64))
        return Bank(
            torch.randn(H, n, h, d, dtype=torch.float64), scale * torch.randn(H, n, outputs, h, dtype=torch.float64)
        )

    return MemoryParams(
        bank(1, d), bank(rule.adaptive_key + rule.adaptive_value, d), bank(rule.adaptive_eta + rule.adaptive_alpha, 1)
    )


def make_inputs(T: int, *, decay: bool = True, momentum: bool = False):
    q, k, v = (torch.randn(B, T, H, d, dtype=torch.float64) for _ in range(3))
    rate = lambda shift: torch.randn(B, T, H, dtype=torch.float64) + shift  # noqa: E731
    return q, k, v, RateLogits(rate(0.0), rate(3.0) if decay else None, rate(0.0) if momentum else None)


def leaves(*trees) -> list[torch.Tensor]:
    found = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, tuple):
            found += leaves(*tree)
    return found


def outputs_and_gradients(fn, q, k, v, logits, params, rule, state):
    """y, final state and the gradient of every input for a fixed random functional of y and the state."""
    inputs = leaves(q, k, v, logits, params, *((state.now, state.start, state.momentum) if state else ()))
    inputs = [x.detach().requires_grad_() for x in inputs]
    rebuilt = iter(inputs)

    def rebuild(tree):
        if isinstance(tree, torch.Tensor):
            return next(rebuilt)
        if isinstance(tree, tuple):
            parts = [rebuild(x) for x in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
        return tree

    args = [rebuild(x) for x in (q, k, v, logits, params)]
    if state is not None:
        state = state._replace(now=rebuild(state.now), start=rebuild(state.start), momentum=rebuild(state.momentum))
    y, end = fn(*args, rule, state)
    results = leaves(y, end.now, end.momentum)
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in results)
    return results, torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_same(
    rule: MemoryRule, T: int, *, layers: int = 2, decay: bool = True, momentum: bool = False, warm: bool = False
):
    params = make_params(rule, layers)
    q, k, v, logits = make_inputs(T, decay=decay, momentum=momentum)
    state = None
    if warm:  # a state in the middle of a chunk, with weights of its own
        _, state = memory_recurrent(*make_inputs(11, decay=decay, momentum=momentum), params, rule)
    slow, slow_grads = outputs_and_gradients(memory_recurrent, q, k, v, logits, params, rule, state)
    fast, fast_grads = outputs_and_gradients(memory_chunked, q, k, v, logits, params, rule, state)
    for a, b in zip(slow + list(slow_grads), fast + list(fast_grads)):
        if a is None or b is None:  # an unused input has no gradient, or an exactly zero one
            assert a is None or not a.any()
            assert b is None or not b.any()
        else:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize(
    "read, read_skip, dot_target",
    list(itertools.product(["causal", "chunk_start"], [False, True], ["residual", "full"])),
)
def test_reads_and_targets(read, read_skip, dot_target):
    assert_same(MemoryRule(8, 8, read=read, read_skip=read_skip, dot_target=dot_target), 19)


@pytest.mark.parametrize("adaptive", list(itertools.product([False, True], repeat=4)))
def test_every_subset_of_self_memories(adaptive):
    key, value, eta, alpha = adaptive
    rule = MemoryRule(8, 8, adaptive_key=key, adaptive_value=value, adaptive_eta=eta, adaptive_alpha=alpha)
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
    adaptive=st.tuples(*[st.booleans()] * 4),
    own_targets=st.booleans(),
    flags=st.tuples(*[st.booleans()] * 5),
    seed=st.integers(0, 2**31),
)
def test_any_rule_length_and_seed(T, chunks, objective, dgd, read, adaptive, own_targets, flags, seed):
    torch.manual_seed(seed)
    decay, momentum, warm, erased, normalize = flags
    names = ("adaptive_key", "adaptive_value", "adaptive_eta", "adaptive_alpha")
    rule = MemoryRule(
        *chunks,
        objective=objective,
        dgd_layers=dgd,
        read=read,
        own_targets=own_targets,
        decay_erased=erased and dgd != "none",
        normalize_steps=normalize,
        eta_max=0.1,  # also the rules that diverge at larger rates stay where float64 has digits left
        **dict(zip(names, adaptive)),
    )
    assert_same(rule, T, decay=decay, momentum=momentum, warm=warm)


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


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("scalar", [False, True])
def test_inner_gradients_match_autograd(objective, scalar):
    """e, and the input layer's delta, are gradients of the inner loss as METHOD defines it, the target held constant."""
    rule = MemoryRule(objective=objective, dot_target="full", normalize_targets=False)
    outputs = 1 if scalar else d
    bank = Bank(
        torch.randn(H, 1, h, d, dtype=torch.float64, requires_grad=True),
        torch.randn(H, 1, outputs, h, dtype=torch.float64, requires_grad=True),
    )
    k, v = unit(torch.randn(H, 1, 1, d, dtype=torch.float64)), unit(torch.randn(H, 1, 1, d, dtype=torch.float64))

    def memory(x):
        y = F.silu(x @ bank.w_in.mT) @ bank.w_out.mT
        return y if scalar else x + y

    target, prediction = memory(v).detach(), memory(k)
    loss = 0.5 * (prediction - target).square().sum() if objective == "l2" else -(prediction * target).sum()
    grad_in, grad_out = torch.autograd.grad(loss, [bank.w_in, bank.w_out])
    z = k @ bank.w_in.mT
    phi = F.silu(z)
    error = output_error(bank, k, v, phi, rule, scalar=scalar)
    torch.testing.assert_close(error.mT @ phi, grad_out)
    torch.testing.assert_close(((error @ bank.w_out) * dsilu(z)).mT @ k, grad_in)


@pytest.mark.parametrize(("normalize", "grows"), [(True, False), (False, True)])
def test_normalized_steps_bound_what_large_weights_do(normalize, grows):
    """Weights that the outer loop has made large: the same rate overshoots without, and not with normalised steps."""
    torch.manual_seed(0)
    rule = MemoryRule(
        8, 8, objective="l2", dgd_layers="none", eta_max=0.1, normalize_steps=normalize, own_targets=False
    )
    rule = replace(rule, adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False)
    params = make_params(rule, scale=3.0)
    key, value = (torch.randn(B, 1, H, d, dtype=torch.float64).expand(B, 160, H, d) for _ in range(2))
    y, _ = memory_chunked(key, key, value, RateLogits(), params, replace(rule, read_skip=True))
    error = (y - unit(value)).norm(dim=-1)
    assert (error.max() > 5 * error[:, 0].max()) == grows
    assert grows or error[:, -1].max() < 0.5 * error[:, 0].max()


def test_silent_rates_have_gradients():
    assert_same(MemoryRule(8, 8, eta_max=0.0), 21)


def test_silent_rates_leave_the_initial_state():
    rule = MemoryRule(8, 8, eta_max=0.0)
    params = make_params(rule)
    q, k, v, logits = make_inputs(20, decay=False)
    _, state = memory_chunked(q, k, v, logits, params, rule)
    fresh = initial_state(params, B, momentum=False, dtype=torch.float64)
    torch.testing.assert_close(leaves(state.now), leaves(fresh.now))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
def test_low_precision_inputs(dtype, tolerance):
    """State, decays and solve are float32: the error against float64 is that of rounding the inputs."""
    rule = MemoryRule(32, 32)
    params = make_params(rule)
    q, k, v, logits = make_inputs(96)
    exact, _ = memory_chunked(q, k, v, logits, params, rule)
    low = [x.to(dtype) for x in (q, k, v)]
    y, state = memory_chunked(*low, logits, map_params(lambda w: w.float(), params), rule)
    assert y.dtype == dtype
    assert state.now.mem.w_out.dtype == torch.float32
    assert (y.double() - exact).norm() < tolerance * exact.norm()


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


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0])
def test_a_memory_that_has_faded_is_the_same_on_every_path(scale):
    """Features, keys and targets near and far below epsilon: unit(x) = x / sqrt(|x|^2 + epsilon^2) everywhere."""
    rule = MemoryRule(chunk_tokens=16, self_chunk_tokens=16, decay_to="zero")
    bank = lambda n, o: Bank(scale * torch.randn(H, n, 16, 16).double(), scale * torch.randn(H, n, o, 16).double())  # noqa: E731
    params = MemoryParams(bank(1, 16), bank(2, 16), bank(2, 1))
    qkv, (_, _, _, logits) = [scale * torch.randn(B, 48, H, 16).double() for _ in range(3)], make_inputs(48)
    exact, state = memory_recurrent(*qkv, logits, params, rule)
    torch.testing.assert_close(unit(qkv[0]), qkv[0] / (qkv[0].square().sum(-1, keepdim=True) + EPSILON**2).sqrt())
    for backend in (MANUAL, AUTOGRAD, CPU):
        dtype = torch.float32 if backend is CPU else torch.float64
        cast = lambda x, dtype=dtype: x.to(dtype)  # noqa: E731
        rates = RateLogits(*(r if r is None else cast(r) for r in logits))
        y, end = alone(backend)(*map(cast, qkv), rates, map_params(cast, params), rule)
        found = leaves(y, end.now)
        for a, b in zip(found, leaves(exact, state.now)):
            assert (a.double() - b).abs().max() <= (1e-4 if backend is CPU else 1e-10) * b.abs().max()


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
