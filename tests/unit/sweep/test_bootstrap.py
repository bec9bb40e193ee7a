from __future__ import annotations

import numpy as np
import pytest

from hope_megatron.sweep.bootstrap import interval, predict_run, resample_loss_law, resample_runs
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.laws import CHINCHILLA, LossLaw
from hope_megatron.sweep.parametric import fit_loss_law
from tests.unit.sweep.conftest import isoflop_design

QUANTITIES = {
    **{name: (lambda law, name=name: getattr(law, name)) for name in ("E", "A", "B", "alpha", "beta")},
    "exponent": lambda law: law.exponents()[0],
    "size": lambda law: law.optimum(1e23).parameters,
    "loss": lambda law: law.optimum(1e23).loss,
}


def test_intervals_cover_the_truth_at_their_rate() -> None:
    """50 simulated sweeps, 80 % intervals of every coefficient and prediction, and of a new run."""
    n, d = isoflop_design()
    sweeps, level, noise = 50, 0.8, 0.003
    covered = dict.fromkeys([*QUANTITIES, "new run"], 0)
    rng = np.random.default_rng(0)
    for number in range(sweeps):
        fit = fit_loss_law(n, d, CHINCHILLA(n, d) * np.exp(rng.normal(0, noise, len(n))), start=CHINCHILLA)
        laws = resample_loss_law(fit, n, d, delta=1e-3, count=29, level=level, seed=number)
        for name, quantity in QUANTITIES.items():
            estimate = laws.estimate(quantity)
            covered[name] += estimate.low <= quantity(CHINCHILLA) <= estimate.high
        new = float(CHINCHILLA(1e10, 2e11)) * float(np.exp(rng.normal(0, noise)))
        estimate = predict_run(fit, laws, 1e10, 2e11, seed=number)
        covered["new run"] += estimate.low <= new <= estimate.high
    rates = {name: count / sweeps for name, count in covered.items()}
    # Three standard errors of a rate of 0.8 over 50 sweeps are 0.17.
    assert all(0.63 <= rate <= 0.97 for rate in rates.values()), rates
    assert 0.72 <= np.mean(list(rates.values())) <= 0.93, rates


def test_same_seed_same_interval() -> None:
    n, d = isoflop_design()
    fit = fit_loss_law(n, d, CHINCHILLA(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.003, len(n))))
    first, second = (resample_loss_law(fit, n, d, delta=1e-3, count=5, level=0.9, seed=7).resamples for _ in range(2))
    assert first == second


def test_numbers_that_do_not_exist_have_no_interval() -> None:
    assert np.isnan(interval(1.0, [1.0, float("nan")], 0.9).low)
    without_optimum = LossLaw(1.0, 0.0, 1.0, 0.0, 0.3)
    assert np.isnan(without_optimum.optimum(1e20).loss)


def test_draws_that_cannot_be_fitted_are_drawn_again() -> None:
    def fit(members: np.ndarray) -> float:
        if len(np.unique(members)) < 3:
            raise SweepError("too few")
        return float(members.mean())

    resampled = resample_runs(fit, 4, count=20, level=0.9, seed=0)
    assert resampled.point == 1.5 and len(resampled.resamples) == 20

    def only_whole(members: np.ndarray) -> float:
        if len(np.unique(members)) < 30:
            raise SweepError("too few")
        return 1.0

    assert resample_runs(only_whole, 30, count=20, level=0.9, seed=0).resamples == ()
    with pytest.raises(SweepError, match="too few"):
        resample_runs(fit, 2, count=20, level=0.9, seed=0)
