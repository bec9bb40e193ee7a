"""DGD, Delta Momentum and DMGD: what their equations say of cases that can be done by hand.

That they equal literal references, sharded and whole, is in tests/distributed/optim."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hope_megatron.ops.newton_schulz import newton_schulz
from hope_megatron.optim import DGD, DMGD, DeltaMomentum, OptimError
from hope_megatron.optim.deep_memory import learn_and_read, read, unit


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def gradient(param: nn.Parameter, step: int) -> Tensor:
    param.grad = 0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(step + 1))
    return param.grad


def test_dgd_with_the_gradient_of_one_token_is_the_delta_rule():
    """Equation 88 with a unit key x: W (I - eta x x^T) - eta e x^T."""
    w = weight(4, 6)
    x, e = torch.randn(6), torch.randn(4)
    x /= x.norm()
    expected = w.detach() @ (torch.eye(6) - 0.3 * torch.outer(x, x)) - 0.3 * torch.outer(e, x)
    w.grad = torch.outer(e, x)
    DGD([w], lr=0.3, form="paper", delta=1.0, momentum=0.0, nesterov=False, weight_decay=0.0).step()
    torch.testing.assert_close(w.detach(), expected)


def test_delta_momentum_is_equation_49():
    w = weight(4, 6)
    optimizer = DeltaMomentum([w], lr=0.1, momentum=0.9, delta=1.0, form="paper", weight_decay=0.0)
    expected, m = w.detach().clone(), torch.zeros(4, 6)
    for step in range(6):
        g = gradient(w, step)
        optimizer.step()
        m = m @ (0.9 * torch.eye(6) - g.T @ g) - 0.1 * g
        expected = expected + m
        torch.testing.assert_close(w.detach(), expected)


def test_without_the_delta_term_and_with_newton_schulz_it_is_muon():
    """Equation 52 with a linear memory, as the paper says."""
    w = weight(4, 6)
    optimizer = DeltaMomentum([w], lr=0.1, delta=0.0, momentum_output="newton_schulz", weight_decay=0.0)
    expected, m = w.detach().clone(), torch.zeros(4, 6)
    for step in range(4):
        m = 0.95 * m + 0.05 * gradient(w, step)
        optimizer.step()
        polar = newton_schulz(m, coefficients="quintic")
        expected = expected - 0.1 * 0.2 * polar / polar.square().mean().sqrt()
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "objective"), [((3, 5), "l2"), ((5, 3), "dot"), ((2, 4, 3), "l2")])
def test_the_memory_of_dmgd_makes_one_inner_step(shape, objective):
    """Equation 50 by finite differences: what it learns is the slope of the inner loss."""
    generator = torch.Generator().manual_seed(1)
    inner, outer, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    wide = (lambda t: t) if shape[-2] <= shape[-1] else (lambda t: t.mT)

    def loss(inner: Tensor, outer: Tensor) -> Tensor:
        keys = wide(unit(grad)) * min(shape[-2:]) ** 0.5
        values = read(wide(inner), wide(outer), keys)
        terms = (values + keys).square() / 2 if objective == "l2" else values * keys
        return terms.sum() / min(shape[-2:])

    new_inner, new_outer, _ = learn_and_read(inner, outer, grad, rate=0.3, decay=0.9, objective=objective)
    along = torch.randn(shape, generator=generator, dtype=torch.float64)
    for old, new, moved in (
        (inner, new_inner, lambda h: loss(inner + h * along, outer)),
        (outer, new_outer, lambda h: loss(inner, outer + h * along)),
    ):
        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert float(((0.9 * old - new) / 0.3 * along).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_dmgd_remembers_gradients_and_its_first_step_goes_down():
    w = weight(4, 6)
    optimizer, before, g = DMGD([w], lr=0.1, weight_decay=0.0), w.detach().clone(), gradient(w, 0)
    optimizer.step()
    assert float(((w.detach() - before) * g).sum()) < 0
    for _ in range(200):  # the same gradient again and again: the memory answers it with the direction of descent
        optimizer.step()
    before = w.detach().clone()
    optimizer.step()
    moved = w.detach() - before
    assert float(nn.functional.cosine_similarity(moved.flatten(), -g.flatten(), dim=0)) > 0.98


def test_wrong_settings_are_refused():
    w = [weight(2, 2)]
    for build, message in (
        (lambda: DGD(w, form="literal"), "form 'literal'"),
        (lambda: DGD(w, delta=3.0), "delta is 3"),
        (lambda: DeltaMomentum(w, momentum=0.5, delta=1.8), r"\[0, 1.5\]"),
        (lambda: DeltaMomentum(w, momentum_output="sign"), "momentum_output 'sign'"),
        (lambda: DMGD(w, inner_objective="mse"), "inner_objective 'mse'"),
        (lambda: DMGD(w, inner_lr=2.0), "inner_lr 2"),
    ):
        with pytest.raises(OptimError, match=message):
            build()
