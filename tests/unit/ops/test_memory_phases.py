"""The operator in phases equals the chunk form under autograd, and launches a fifth of what the written-out form does."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hope_megatron.config import load_model_config
from hope_megatron.ops.memory import (
    Bank,
    MemoryCompute,
    MemoryParams,
    MemoryRule,
    RateLogits,
    memory_chunked,
    memory_recurrent,
)
from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.installed import BACKENDS
from hope_megatron.ops.memory.backends.manual.scan import MANUAL
from hope_megatron.ops.memory.backends.phases.scan import PHASES
from hope_megatron.ops.memory.backends.registry import Case, choose
from hope_megatron.ops.memory.rule import AUTO
from hope_megatron.testing.launches import CountLaunches

H, d, h = 2, 6, 5
STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)


@pytest.fixture(autouse=True)
def nothing_is_read_before_it_is_written():
    """Deterministic mode fills what is allocated with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def alone(backend):
    """`memory_chunked` with one backend and no other: an error where that cannot take a case."""
    return functools.partial(memory_chunked, backends=(backend,))


def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64) + shift).requires_grad_()


def memories(rule: MemoryRule) -> MemoryParams:
    def bank(n: int, outputs: int) -> Bank | None:
        if rule.num_layers == 1:
            return Bank(None, normal(H, n, outputs, d, scale=0.3)) if n else None
        return Bank(normal(H, n, h, d), normal(H, n, outputs, h, scale=0.3)) if n else None

    return MemoryParams(bank(1, d), bank(rule.num_vector, d), bank(rule.num_scalar, 1))


def stream(B: int, T: int, *, eta=True, alpha=True, theta=False):
    rates = [normal(B, T, H, shift=s) if there else None for there, s in ((eta, 0.0), (alpha, 3.0), (theta, 0.0))]
    return *(normal(B, T, H, d) for _ in range(3)), RateLogits(*rates)


def tensors_of(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [x for part in tree for x in tensors_of(part)] if isinstance(tree, tuple) else []


def case_of(rule: MemoryRule, rates: tuple[bool, bool, bool]) -> Case:
    return Case(rule, rates, 4, d, h if rule.num_layers == 2 else d, torch.float64, "cuda", "fp32", True)


def assert_same(rule: MemoryRule, T: int, *, B=2, warm=0, compute=AUTO, recompute=False, **rates):
    """y, the state after it, and every gradient: also those of a state that comes in, cut inside a chunk."""
    params, inputs, state = memories(rule), stream(B, T, **rates), None
    if warm:
        made = memory_recurrent(*stream(B, warm, **rates), params, rule)[1]
        leaf = lambda tree: (  # noqa: E731
            tree.detach().requires_grad_()
            if isinstance(tree, torch.Tensor)
            else type(tree)(*map(leaf, tree))
            if isinstance(tree, tuple)
            else tree
        )
        state = leaf(made)
    leaves, found = tensors_of((*inputs, params)) + tensors_of(state), []
    for scan in (
        alone(AUTOGRAD),
        functools.partial(alone(PHASES), compute=compute, recompute=recompute),
    ):
        y, end = scan(*inputs, params, rule, state)
        results = [y, *tensors_of(end.now), *tensors_of(end.momentum)]
        generator = torch.Generator().manual_seed(7)
        loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in results)
        found.append((results, torch.autograd.grad(loss, leaves, allow_unused=True)))
    for exact, x in zip(itertools.chain(*found[0]), itertools.chain(*found[1])):
        if exact is None or x is None:  # an unused input has no gradient, or an exactly zero one
            assert all(g is None or not g.any() for g in (exact, x))
        else:
            assert (x - exact).norm() <= 1e-10 * exact.norm()  # a NaN fails


OPTIONS = st.fixed_dictionaries(
    {
        "objective": st.sampled_from(["dot", "l2"]),
        "dgd_layers": st.sampled_from(["none", "input", "all"]),
        "written_layers": st.sampled_from(["all", "output"]),
        "decay_to": st.sampled_from(["zero", "initial"]),
        "dot_target": st.sampled_from(["residual", "full"]),
        **dict.fromkeys(("read_skip", "normalize_steps", "own_targets", "decay_erased"), st.booleans()),
        **dict.fromkeys(("adaptive_key", "adaptive_value", "adaptive_eta", "adaptive_alpha"), st.booleans()),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    options=OPTIONS,
    layers=st.sampled_from([1, 2, 2, 2]),
    chunks=st.sampled_from([(8, 8), (4, 16), (16, 4), (1, 4), (5, 5)]),
    T=st.sampled_from([1, 7, 16, 24, 37]),
    B=st.sampled_from([1, 2]),
    warm=st.sampled_from([0, 3, 16]),
    keep_every=st.sampled_from([None, 1, 2, 3]),
    rates=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 2**31),
)
def test_any_rule_length_and_state(options, layers, chunks, T, B, warm, keep_every, rates, seed):
    torch.manual_seed(seed)
    rule = MemoryRule(*chunks, num_layers=layers, eta_max=0.1, **options | (STATIC if layers == 1 else {}))
    assume(PHASES.why_not(case_of(rule, rates)) is None)
    compute = MemoryCompute(keep_every=keep_every)
    eta, alpha, theta = rates
    assert_same(rule, T, B=B, warm=warm, compute=compute, eta=eta, alpha=alpha, theta=theta)


FAMILIES = (
    "hope",
    "hope_w1",
    "titans",
    "ttt_mlp",
    "ttt_linear",
    "deltanet",
    "gated_deltanet",
    "retnet",
    "linear_attention",
    "samba",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_taken(family):
    memory = load_model_config(f"{family}_60m").memory
    rates = (memory.eta != "fixed", memory.decay != "none", memory.momentum != "none")
    rule = replace(memory.rule, chunk_tokens=8, self_chunk_tokens=None)
    assert PHASES.why_not(case_of(rule, rates)) is None
    assert_same(rule, 43, warm=5, **dict(zip(("eta", "alpha", "theta"), rates)))


@pytest.mark.parametrize("written", ["all", "output"])
def test_rates_of_any_size_stay_finite(written):
    rule = MemoryRule(8, written_layers=written)
    params, (q, k, v, _) = memories(rule), stream(1, 16)
    for size in (-300.0, 300.0):
        rates = [torch.full((1, 16, H), size).requires_grad_() for _ in range(2)]
        found = []
        for backend in (AUTOGRAD, PHASES):
            inputs = [x.float() for x in (q, k, v)]
            floats = MemoryParams(*(Bank(*(w.float() for w in bank)) for bank in params))
            y, end = alone(backend)(*inputs, RateLogits(*rates), floats, rule)
            gradients = torch.autograd.grad(y.sum() + sum(x.sum() for x in tensors_of(end.now)), [q, k, v, *rates])
            found.append([y, *gradients])
        for exact, x in zip(*found):
            assert x.isfinite().all()
            torch.testing.assert_close(x, exact, rtol=1e-3, atol=1e-3 * float(exact.detach().abs().max()) + 1e-6)


def launches(scan, rule: MemoryRule, T: int) -> int:
    """Of forward and backward with recomputation, at hope_760m's shape of a head."""
    new = lambda *shape: torch.randn(*shape).requires_grad_()  # noqa: E731
    bank = lambda n, outputs: Bank(new(1, n, 64, 64), new(1, n, outputs, 64))  # noqa: E731
    params, x = MemoryParams(bank(1, 64), bank(2, 64), bank(2, 1)), [new(1, T, 1, 64) for _ in range(3)]
    logits = RateLogits(new(1, T, 1), new(1, T, 1))
    with CountLaunches() as counted:
        y = scan(*x, logits, params, rule, recompute=True)[0]
        torch.autograd.grad(y, tensors_of((*x, logits, params)), torch.ones_like(y))
    return counted.found


@pytest.mark.parametrize("written", ["output", "all"])
def test_at_most_a_fifth_of_the_launches(written):
    """4096 tokens in chunks of 64. Both are linear in the number of chunks, so that shorter streams tell."""
    torch.use_deterministic_algorithms(False)  # whose filling would be counted
    rule, counts = MemoryRule(64, written_layers=written), []
    for backend in (MANUAL, PHASES):
        scan = alone(backend)
        launches(scan, rule, 64)  # constants are made once
        short, long = (launches(scan, rule, T) for T in (512, 1024))
        counts.append(long + (long - short) / 8 * 48)
    assert counts[1] <= 0.2 * counts[0]


def test_the_registry_takes_them_on_a_gpu_and_by_counts():
    """By what a case says of its device: nothing here needs one."""
    hope, ttt = MemoryRule(64), MemoryRule(16, objective="l2", dgd_layers="none", eta_max=0.06, **STATIC)

    def chosen(rule: MemoryRule, streams: int, device: str) -> str:
        case = Case(rule, (True, True, False), streams, 64, 64, torch.float32, device, "fp32", True)
        return choose(case, AUTO, BACKENDS).name

    assert chosen(hope, 24, "cuda") == PHASES.name
    assert chosen(hope, 16 * 24, "cuda") == MANUAL.name
    assert chosen(ttt, 16 * 24, "cuda") == PHASES.name
    assert chosen(ttt, 24, "cpu") == AUTOGRAD.name


@pytest.mark.parametrize("different", [1, 8])
@pytest.mark.parametrize("written", ["all", "output"])
def test_bf16_keeps_every_gradient_of_keys_that_come_back(written, different):
    """Few keys, each read and written again and again at rates near 1: the hardest case for the triangular systems."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    T, width, rule = 256, 64, MemoryRule(64, written_layers=written)
    new = lambda *shape, scale=1.0, shift=0.0: scale * torch.randn(*shape, dtype=torch.float64) + shift  # noqa: E731
    bank = lambda n, o: Bank(new(2, n, width, width, scale=0.19), new(2, n, o, width, scale=0.06))  # noqa: E731
    keys = new(1, different, 2, width)[:, torch.randint(different, (T,))]
    tree = (keys, keys, new(1, T, 2, width), RateLogits(new(1, T, 2, shift=4.0), new(1, T, 2, shift=4.0)))
    tree = (*tree, MemoryParams(bank(1, width), bank(2, width), bank(2, 1)))
    found = []
    for dtype, compute in ((torch.float64, AUTO), (torch.float32, MemoryCompute(precision="bf16"))):
        leaf = lambda x, dtype=dtype: None if x is None else x.to(dtype, copy=True).requires_grad_()  # noqa: E731
        build = lambda x: type(x)(*map(build, x)) if isinstance(x, tuple) else leaf(x)  # noqa: B023, E731
        inputs = [build(x) for x in tree]
        y = alone(PHASES)(*inputs, rule, compute=compute)[0]
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        found.append([y, *torch.autograd.grad((y * weight).sum(), tensors_of(tuple(inputs)))])
    for exact, x in zip(*found):
        assert (x.double() - exact).norm() < 0.1 * exact.norm()
    assert not torch.equal(found[0][0].float(), found[1][0])  # something was rounded
