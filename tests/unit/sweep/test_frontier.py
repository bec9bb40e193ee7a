from __future__ import annotations

import numpy as np
import pytest

from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.frontier import Curve, CurveTable, fit_envelope, fit_isoflop, isoflop_profiles
from hope_megatron.sweep.laws import CHINCHILLA
from tests.unit.sweep.conftest import isoflop_design


def curves(sizes: np.ndarray, tokens_per_parameter: float = 200.0) -> list[Curve]:
    made = []
    for n in sizes:
        d = np.geomspace(1e7, tokens_per_parameter * n, 200)
        made.append(Curve(n, 6 * n * d, d, CHINCHILLA(n, d)))
    return made


def test_approach_2_finds_the_exponents() -> None:
    n, d = isoflop_design(span=3)
    frontier = fit_isoflop(n, d, 6 * n * d, CHINCHILLA(n, d))
    a, b = CHINCHILLA.exponents()
    assert frontier.parameters.exponent == pytest.approx(a, abs=0.005) and frontier.tokens.exponent == pytest.approx(
        b, abs=0.005
    )
    assert frontier.points[:, 1] == pytest.approx(
        [CHINCHILLA.optimum(c).parameters for c in frontier.points[:, 0]], rel=0.05
    )


def test_runs_a_step_apart_share_a_profile() -> None:
    n, d = isoflop_design()
    d = d * np.random.default_rng(0).uniform(0.98, 1.02, len(d))
    assert len(isoflop_profiles(n, 6 * n * d, CHINCHILLA(n, d))) == 4


def test_minimum_outside_the_sizes_is_not_counted() -> None:
    n, d = isoflop_design()
    small = n < np.repeat([CHINCHILLA.optimum(c).parameters for c in (1e18, 1e19, 1e20, 1e21)], 5) * 0.99
    extra = n[small] / 2, d[small] * 2
    n, d = np.concatenate([n[small], extra[0]]), np.concatenate([d[small], extra[1]])
    profiles = isoflop_profiles(n, 6 * n * d, CHINCHILLA(n, d))
    assert [profile.valley.problem for profile in profiles] == ["the minimum lies above the largest value"] * 4
    with pytest.raises(SweepError, match="0 found"):
        fit_isoflop(n, d, 6 * n * d, CHINCHILLA(n, d))


def test_approach_1_finds_the_exponents() -> None:
    table = CurveTable.build(curves(np.geomspace(1e7, 1e10, 40)))
    frontier = fit_envelope(table)
    a, b = CHINCHILLA.exponents()
    assert frontier.parameters.exponent == pytest.approx(a, abs=0.02) and frontier.tokens.exponent == pytest.approx(
        b, abs=0.02
    )


def test_envelope_leaves_out_where_the_ladder_ends() -> None:
    table = CurveTable.build(curves(np.geomspace(1e8, 1e9, 5)))
    sizes = fit_envelope(table).points[:, 1]
    assert sizes.min() > 1e8 and sizes.max() < 1e9
    with pytest.raises(SweepError, match="at least two sizes"):
        fit_envelope(CurveTable.build(curves(np.array([1e8, 2e8]))))
