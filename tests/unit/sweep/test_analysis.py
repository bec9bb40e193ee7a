from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hope_megatron.sweep.analysis import analyse
from hope_megatron.sweep.collect import best_of_tuning
from hope_megatron.sweep.laws import CHINCHILLA, DataConstrainedLaw, LossLaw
from hope_megatron.sweep.schema import FitConfig
from tests.unit.sweep.conftest import simulated_runs

FIT = FitConfig(bootstrap=20)


def test_all_three_approaches_agree_on_simulated_runs() -> None:
    (family,) = analyse(simulated_runs(noise=1e-4), FIT)
    a = CHINCHILLA.exponents()[0]
    assert family.law is not None and family.isoflop is not None and family.envelope is not None
    assert family.law.point.exponents(family.compute)[0] == pytest.approx(a, abs=0.02)
    assert family.isoflop.point.parameters.exponent == pytest.approx(a, abs=0.02)
    assert family.envelope.point.parameters.exponent == pytest.approx(a, abs=0.1)
    optimum = family.optimum(1e22)
    assert optimum is not None and optimum["loss"].low <= CHINCHILLA.optimum(1e22).loss <= optimum["loss"].high
    assert family.outliers == [] and family.notes == []


def test_heldout_check_predicts_the_largest_budget() -> None:
    (family,) = analyse(simulated_runs(noise=1e-4), FIT)
    assert len(family.heldout) == 5
    assert all(abs(check.error) < 0.003 for check in family.heldout)
    runs = simulated_runs(noise=1e-4)
    runs[-1] = replace(runs[-1], loss=1.1 * runs[-1].loss)
    (broken,) = analyse(runs, FIT)
    assert not next(check for check in broken.heldout if check.name == runs[-1].name).covered
    assert [outlier.name for outlier in broken.outliers] == [runs[-1].name]


def test_families_are_fitted_apart() -> None:
    better = LossLaw(E=1.6, A=300.0, B=410.7, alpha=0.34, beta=0.28)
    first, second = analyse([*simulated_runs(family="x"), *simulated_runs(better, family="y")], FIT)
    assert (first.family, second.family) == ("x", "y")
    assert first.law is not None and second.law is not None
    assert pytest.approx(1.69, abs=1e-3) == first.law.point.E and pytest.approx(1.6, abs=1e-3) == second.law.point.E


def test_what_cannot_be_fitted_is_said() -> None:
    (family,) = analyse([replace(run, curve=None) for run in simulated_runs()[:4]], FIT)
    assert family.law is None and family.isoflop is None and family.envelope is None and family.optimum(1e20) is None
    assert [note.split(":")[0] for note in family.notes] == ["approach 3", "approach 2", "approach 1", "held-out check"]
    assert "at least 6 finished runs, not 4" in family.notes[0]


def test_repeated_data_is_kept_out_of_the_law_and_gets_its_own() -> None:
    fresh = [replace(run, unique_tokens=2 * run.tokens) for run in simulated_runs()]
    repeated = [
        replace(run, name=f"r{i}", unique_tokens=run.tokens / 8, loss=1.05 * run.loss, curve=None)
        for i, run in enumerate(fresh[::3])
    ]
    (family,) = analyse([*fresh, *repeated], FIT)
    assert family.law is not None and pytest.approx(1.69, abs=1e-3) == family.law.point.E
    assert family.data_constrained is not None and family.data_constrained.point.R_D < 100
    assert f"{len(repeated)} runs repeat their data" in family.notes[0]


def test_rates_of_repetition_are_found_though_large_fresh_runs_lose_too() -> None:
    truth = DataConstrainedLaw(CHINCHILLA, R_D=15.4, R_N=5.3)
    fresh = [replace(run, unique_tokens=run.tokens) for run in simulated_runs()]
    repeated = [replace(run, name=f"r{run.name}", unique_tokens=run.tokens / 16) for run in fresh[::2]]
    runs = [
        replace(run, loss=float(truth(run.parameters, run.tokens, run.unique_tokens))) for run in [*fresh, *repeated]
    ]
    (family,) = analyse(runs, FIT)
    assert family.data_constrained is not None
    found = family.data_constrained.point
    assert pytest.approx((15.4, 5.3, 1.69), rel=1e-4) == (found.R_D, found.R_N, found.base.E)


def test_the_best_setting_counts_and_seeds_are_averaged() -> None:
    run = simulated_runs()[0]
    tried = [
        replace(run, loss=loss, settings={"optim.lr": lr, "seed": seed})
        for lr, seed, loss in ((1e-3, 1, 3.0), (1e-3, 2, 3.2), (1e-2, 1, 2.9), (1e-2, 2, 3.5))
    ]
    (best,) = best_of_tuning(tried)
    assert best.loss == pytest.approx(3.1) and best.settings["optim.lr"] == 1e-3


def test_learning_rates_are_fitted_with_the_rest() -> None:
    runs = []
    for run in simulated_runs()[::2]:
        for lr in (1e-3, 2e-3, 4e-3, 8e-3):
            penalty = 0.01 * math.log(lr / 3e-3) ** 2
            runs.append(replace(run, loss=run.loss + penalty, base_lr=lr, batch_tokens=1e5, settings={"optim.lr": lr}))
    (family,) = analyse(runs, FIT)
    assert family.lr_law is not None and family.lr_law.point.by_compute.exponent == pytest.approx(0.0, abs=1e-6)
    assert family.lr_law.point(1e9, 1e10, 1e20) == pytest.approx(3e-3, rel=1e-6)
    assert len(family.runs) == len(runs) // 4 and family.runs[0].base_lr == 4e-3
