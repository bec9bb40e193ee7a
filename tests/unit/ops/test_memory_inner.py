"""The inner problem: its gradients, step sizes, silent rates, small numbers and low precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hope_megatron.ops.memory import (
    Bank,
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
from tests.unit.ops.memories import (
    STATIC,
    B,
    H,
    alone,
    assert_same,
    d,
    h,
    leaves,
    make_inputs,
    make_params,
)


@pytest.mark.parametrize("objective", ["huber", "lp"])
@pytest.mark.parametrize(
    "changes",
    [
        {"huber_delta": 0.3},
        {"dgd_layers": "none", "lp_power": 1.5, "normalize_steps": False},
        {"written_layers": "output", "lp_power": 4.0, "decay_to": "zero"},
        {"num_layers": 1, "dgd_layers": "input", **STATIC},
    ],
    ids=str,
)
def test_huber_and_p_norm(objective, changes):
    rule = MemoryRule(8, objective=objective, eta_max=0.05, **changes)
    assert_same(rule, 21, layers=rule.num_layers, momentum=True, warm=True)


@pytest.mark.parametrize("objective", ["dot", "l2", "huber", "lp"])
@pytest.mark.parametrize("scalar", [False, True])
def test_inner_gradients_match_autograd(objective, scalar):
    """e, and the input layer's delta, are gradients of the inner loss as METHOD defines it, the target held constant."""
    rule = MemoryRule(objective=objective, dot_target="full", normalize_targets=False, huber_delta=1.5)
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
    r, length = prediction - target, (prediction - target).norm(dim=-1)
    loss = {
        "dot": -(prediction * target).sum(),
        "l2": 0.5 * r.square().sum(),
        "huber": torch.where(length <= 1.5, 0.5 * length.square(), 1.5 * (length - 0.75)).sum(),
        "lp": r.abs().pow(3).sum() / 3,
    }[objective]
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
