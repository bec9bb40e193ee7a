from __future__ import annotations

import numpy as np
import pytest

from hope_megatron.sweep.bootstrap import FEWEST_DRAWN, interval, predict_run, resample_loss_law, resample_runs
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
    """25 simulated sweeps, 80 % intervals of every coefficient and prediction, and of a new run."""
    n, d = isoflop_design()
    sweeps, level, noise = 25, 0.8, 0.003
    covered = dict.fromkeys([*QUANTITIES, "new run"], 0)
    rng = np.random.default_rng(0)
    for number in range(sweeps):
        loss = CHINCHILLA(n, d) * np.exp(rng.normal(0, noise, len(n)))
        fit = fit_loss_law(n, d, loss, start=CHINCHILLA)
        laws = resample_loss_law(fit, n, d, loss, delta=1e-3, count=19, level=level, seed=number)
        for name, quantity in QUANTITIES.items():
            estimate = laws.estimate(quantity)
            covered[name] += estimate.low <= quantity(CHINCHILLA) <= estimate.high
        new = float(CHINCHILLA(1e10, 2e11)) * float(np.exp(rng.normal(0, noise)))
        estimate = predict_run(fit, laws, 1e10, 2e11, seed=number)
        covered["new run"] += estimate.low <= new <= estimate.high
    rates = {name: count / sweeps for name, count in covered.items()}
    # Three standard errors of a rate of 0.8 over 25 sweeps are 0.24. Whole runs are a little wide at 80 %.
    assert all(rate >= 0.6 for rate in rates.values()), rates
    assert 0.72 <= np.mean(list(rates.values())) <= 0.95, rates


def test_same_seed_same_interval() -> None:
    n, d = isoflop_design()
    loss = CHINCHILLA(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.003, len(n)))
    fit = fit_loss_law(n, d, loss)
    first, second = (
        resample_loss_law(fit, n, d, loss, delta=1e-3, count=5, level=0.9, seed=7).resamples for _ in range(2)
    )
    assert first == second


def test_few_runs_have_intervals_too() -> None:
    """Seven runs: drawn whole, too few different ones would be left for five coefficients."""
    n, d = (axis[::3] for axis in isoflop_design())
    loss = CHINCHILLA(n, d) * np.exp(np.random.default_rng(1).normal(0, 0.003, len(n)))
    fit = fit_loss_law(n, d, loss, start=CHINCHILLA)
    laws = resample_loss_law(fit, n, d, loss, delta=1e-3, count=19, level=0.9, seed=0)
    estimate = laws.estimate(lambda law: float(law(1e9, 2e10)))
    assert len(n) < FEWEST_DRAWN and estimate.low < estimate.value < estimate.high


def test_runs_are_drawn_whole() -> None:
    """Every resample is a law of the runs themselves: one wild run, in about two thirds of them, spreads the laws to one side."""
    n, d = isoflop_design()
    loss = CHINCHILLA(n, d) * np.exp(np.random.default_rng(1).normal(0, 1e-4, len(n)))
    loss[0] *= 1.01
    fit = fit_loss_law(n, d, loss, start=CHINCHILLA)
    laws = resample_loss_law(fit, n, d, loss, delta=1e-3, count=39, level=0.9, seed=0)
    without = fit_loss_law(n[1:], d[1:], loss[1:], start=CHINCHILLA).law
    apart = [abs(law.E / without.E - 1) for law in laws.resamples]
    assert np.mean(np.array(apart) < 1e-3) == pytest.approx(0.37, abs=0.2)


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
