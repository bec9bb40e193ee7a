"""Delta Momentum against its equations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hope_megatron.ops.newton_schulz import newton_schulz
from hope_megatron.optim import OptimError
from hope_megatron.optim.research import DeltaMomentum


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def gradient(param: nn.Parameter, step: int) -> torch.Tensor:
    param.grad = 0.2 * torch.randn(param.shape, generator=torch.Generator().manual_seed(step + 1))
    return param.grad


def test_delta_momentum_is_equation_49():
    w = weight(4, 6)
    optimizer = DeltaMomentum([w], lr=0.1, alpha=0.9, literal=True)
    expected, m = w.detach().clone(), torch.zeros(4, 6)
    for step in range(6):
        g = gradient(w, step)
        optimizer.step()
        m = m @ (0.9 * torch.eye(6) - g.T @ g) - 0.1 * g
        expected = expected + m
        torch.testing.assert_close(w.detach(), expected)


def test_without_the_delta_term_it_is_heavy_ball():
    ours, theirs = weight(4, 6), weight(4, 6)
    first, second = DeltaMomentum([ours], lr=0.1, alpha=0.9, delta=0.0), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for step in range(6):
        gradient(ours, step), gradient(theirs, step)
        first.step(), second.step()
    torch.testing.assert_close(ours, theirs)


def test_newton_schulz_output_is_muon():
    """Equation 52 with a linear memory and sigma = Newton-Schulz, as the paper says."""
    w = weight(4, 6)
    optimizer = DeltaMomentum([w], lr=1.0, alpha=0.95, delta=0.0, output_map=lambda m: 0.01 * newton_schulz(m))
    expected, m = w.detach().clone(), torch.zeros(4, 6)
    for step in range(4):
        m = 0.95 * m + gradient(w, step)
        optimizer.step()
        expected = expected - 0.01 * newton_schulz(m)
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-6)


def test_feature_map_and_preconditioner_are_applied_in_order():
    """Equation 51: m - lr P phi(g)."""
    w = weight(3, 5)
    p = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = DeltaMomentum([w], lr=0.1, delta=0.0, preconditioner=lambda g: p @ g, feature_map=lambda g: g**3)
    before, g = w.detach().clone(), gradient(w, 0)
    optimizer.step()
    torch.testing.assert_close(w.detach(), before - 0.1 * p @ g**3)


def test_the_delta_term_forgets_the_direction_of_the_new_gradient():
    w = weight(1, 3)
    optimizer = DeltaMomentum([w], lr=1.0, alpha=1.0, delta=1.0)
    w.grad = torch.tensor([[3.0, 4.0, 0.0]])
    optimizer.step()
    w.grad = torch.tensor([[0.0, 0.5, 0.0]])
    optimizer.step()
    # the second component is overwritten, the others stay
    torch.testing.assert_close(optimizer.state[w]["memory"], torch.tensor([[-3.0, -0.5, 0.0]]))


def test_least_squares_falls_for_matrices_stacks_and_vectors():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 5, 2)), nn.Parameter(torch.randn(7))]
    targets = [torch.randn_like(p) for p in params]
    optimizer = DeltaMomentum(params, lr=0.05)
    losses = []
    for step in range(150):
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * (1 - step / 150)
        optimizer.zero_grad()
        loss = sum((p - t).square().sum() for p, t in zip(params, targets, strict=True))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.02 * losses[0]


def test_wrong_settings_are_refused():
    with pytest.raises(OptimError, match="alpha 2"):
        DeltaMomentum([weight(2, 2)], lr=0.1, alpha=2.0)
