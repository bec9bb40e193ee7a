from __future__ import annotations

import numpy as np
import pytest

from hope_megatron.sweep.analysis import find_outliers
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.laws import CHINCHILLA, ComputeLaw, DataConstrainedLaw, LossLaw
from hope_megatron.sweep.parametric import _Problem, fit_data_constrained, fit_loss_law, fit_without_outliers
from tests.unit.sweep.conftest import isoflop_design

NAMES = ("E", "A", "B", "alpha", "beta")


def values(law: LossLaw) -> list[float]:
    return [getattr(law, name) for name in NAMES]


def test_recovers_the_published_coefficients_without_noise() -> None:
    n, d = isoflop_design()
    fit = fit_loss_law(n, d, CHINCHILLA(n, d))
    assert values(fit.law) == pytest.approx(values(CHINCHILLA), rel=1e-4)
    assert np.abs(fit.log_residuals).max() < 1e-7 and fit.at_bounds == ()


def test_recovers_them_under_noise() -> None:
    n, d = isoflop_design(budgets=(1e18, 3e18, 1e19, 3e19, 1e20, 3e20, 1e21, 3e21), sizes=8, span=10)
    loss = CHINCHILLA(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.002, len(n)))
    law = fit_loss_law(n, d, loss).law
    assert pytest.approx(1.69, abs=0.03) == law.E
    assert law.alpha == pytest.approx(0.34, abs=0.015) and law.beta == pytest.approx(0.28, abs=0.015)
    assert law.optimum(1e22).parameters == pytest.approx(CHINCHILLA.optimum(1e22).parameters, rel=0.1)


def test_outliers_neither_bend_the_law_nor_go_unnamed() -> None:
    n, d = isoflop_design()
    loss = CHINCHILLA(n, d) * np.exp(np.random.default_rng(1).normal(0, 1e-4, len(n)))
    wrong = [2, 9, 17]
    loss[wrong] *= [1.3, 0.9, 1.15]
    assert values(fit_loss_law(n, d, loss).law) == pytest.approx(values(CHINCHILLA), rel=0.05)
    fit = fit_without_outliers(n, d, loss)
    named = find_outliers([str(i) for i in range(len(n))], fit)
    assert {outlier.name for outlier in named} == {"2", "9", "17"} and named[0].name == "2"
    assert np.flatnonzero(~fit.kept).tolist() == wrong
    rest = fit_loss_law(n[fit.kept], d[fit.kept], loss[fit.kept])
    assert fit.law == rest.law  # the law is that of the other runs
    assert fit.log_residuals[wrong] == pytest.approx(np.log([1.3, 0.9, 1.15]), abs=1e-3)


def test_no_more_than_a_quarter_is_called_outliers_and_six_runs_stay() -> None:
    n, d = isoflop_design()
    rng = np.random.default_rng(3)
    loss = CHINCHILLA(n, d) * np.exp(1e-4 * rng.normal(size=len(n)) + 0.05 * (rng.random(len(n)) < 0.4))
    assert (~fit_without_outliers(n, d, loss).kept).sum() <= len(n) // 4
    loss = CHINCHILLA(n[:6], d[:6]) * np.array([1, 1, 1, 1, 1, 1.3])
    assert fit_without_outliers(n[:6], d[:6], loss).kept.all()


def test_gradient_is_the_derivative_of_the_objective() -> None:
    n, d = isoflop_design()
    problem = _Problem(n, d, CHINCHILLA(n, d) * 1.01, delta=1e-2)
    x = problem.encode(CHINCHILLA) + np.array([0.1, -0.2, 0.1, 0.05, -0.03])
    _, gradient = problem.objective(x)
    step = 1e-6 * np.eye(5)
    numeric = [(problem.objective(x + s)[0] - problem.objective(x - s)[0]) / 2e-6 for s in step]
    assert gradient == pytest.approx(np.array(numeric), rel=1e-5)


def test_undetermined_coefficients_are_reported() -> None:
    n, d = isoflop_design()
    law = LossLaw(E=2.0, A=0.0, B=410.0, alpha=0.3, beta=0.28)
    assert fit_loss_law(n, d, law(n, d)).at_bounds


def test_too_few_runs_and_designs_without_spread_are_refused() -> None:
    n, d = isoflop_design()
    with pytest.raises(SweepError, match="at least 6 finished runs, not 5"):
        fit_loss_law(n[:5], d[:5], CHINCHILLA(n[:5], d[:5]))
    with pytest.raises(SweepError, match="same model size"):
        fit_loss_law(np.full_like(d, 1e8), d, CHINCHILLA(1e8, d))


def test_data_constrained_rates_are_recovered() -> None:
    """R_D = 15.4 and R_N = 5.3 as in Muennighoff et al. (arXiv 2305.16264), on up to 64 epochs and oversized models."""
    truth = DataConstrainedLaw(CHINCHILLA, R_D=15.4, R_N=5.3)
    unique, epochs, size = (grid.ravel() for grid in np.meshgrid([1e8, 1e9], [1.0, 4.0, 16.0, 64.0], [0.5, 4.0, 30.0]))
    n, d = truth.matching_parameters(unique) * size, unique * epochs
    fit = fit_data_constrained(CHINCHILLA, ComputeLaw(), n, d, unique, truth(n, d, unique))
    assert pytest.approx((15.4, 5.3), rel=0.01) == (fit.R_D, fit.R_N)
    with pytest.raises(SweepError, match="no run repeats"):
        fit_data_constrained(CHINCHILLA, ComputeLaw(), n, unique, unique, CHINCHILLA(n, unique))
