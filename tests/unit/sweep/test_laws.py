from __future__ import annotations

import numpy as np
import pytest

from hope_megatron.sweep.laws import CHINCHILLA, ComputeLaw, DataConstrainedLaw, LossLaw, PowerLaw, effective


@pytest.mark.parametrize("compute", [ComputeLaw(), ComputeLaw(kappa=40.0, exponent=0.85)])
@pytest.mark.parametrize("flops", [1e15, 1e21])
def test_optimum_is_the_minimum_along_the_budget(compute: ComputeLaw, flops: float) -> None:
    best = CHINCHILLA.optimum(flops, compute)
    sizes = best.parameters * np.geomspace(0.5, 2, 2001)
    losses = CHINCHILLA(sizes, compute.tokens(sizes, flops))
    assert sizes[np.argmin(losses)] == pytest.approx(best.parameters, rel=1e-3)
    assert losses.min() == pytest.approx(best.loss, rel=1e-9)
    assert float(compute.flops(best.parameters, best.tokens)) == pytest.approx(flops)


def test_exponents_are_those_of_the_paper() -> None:
    """arXiv 2203.15556, section 3.3: a = 0.46, b = 0.54 with the unrounded coefficients; 0.45 and 0.55 with the printed ones."""
    a, b = CHINCHILLA.exponents()
    assert (round(a, 2), round(b, 2)) == (0.45, 0.55)
    grown = CHINCHILLA.optimum(1e22).parameters / CHINCHILLA.optimum(1e21).parameters
    assert grown == pytest.approx(10**a)


def test_law_without_a_size_term_has_no_optimum() -> None:
    assert np.isnan(LossLaw(1.0, 0.0, 10.0, 0.3, 0.3).optimum(1e20).parameters)


# Hoffmann et al., arXiv 2203.15556, table 3 (projections of approach 1): parameters, FLOPs, tokens.
TABLE_3 = np.array(
    [
        (400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9), (67e9, 5.76e23, 1.5e12),
        (175e9, 3.85e24, 3.7e12), (280e9, 9.90e24, 5.9e12), (520e9, 3.43e25, 11.0e12),
        (1e12, 1.27e26, 21.2e12), (10e12, 1.30e28, 216.2e12),
    ]
)  # fmt: skip


def test_published_table_gives_the_published_optimum() -> None:
    """a = b = 0.50 for approach 1 (table 2), and about 20 tokens per parameter; 67B parameters for Gopher's budget."""
    n, c, d = TABLE_3.T
    sizes, tokens = PowerLaw.fit(c, n), PowerLaw.fit(c, d)
    assert sizes.exponent == pytest.approx(0.50, abs=0.005) and tokens.exponent == pytest.approx(0.50, abs=0.005)
    assert float(sizes(5.76e23)) == pytest.approx(67e9, rel=0.02)
    assert float(tokens(5.76e23) / sizes(5.76e23)) == pytest.approx(22, rel=0.05)
    fitted = ComputeLaw.fit(n, c / d)
    assert fitted.exponent == pytest.approx(1.0, abs=0.01) and fitted.kappa == pytest.approx(6.0, rel=0.15)


def test_repeating_data_never_helps_as_much_as_new_data() -> None:
    """With Muennighoff's R_D = 15.4, four epochs are nearly as good as new data, and forty are not (arXiv 2305.16264)."""
    unique = np.array([1e9, 1e9, 1e9])
    worth = effective(np.array([1e9, 4e9, 40e9]), unique, 15.4) / 1e9
    assert worth[0] == 1.0 and 3.6 < worth[1] < 4.0 and 15 < worth[2] < 16.4
    law = DataConstrainedLaw(CHINCHILLA, R_D=15.4, R_N=5.3)
    small = law.matching_parameters(1e9) / 2
    assert float(law(small, 1e9, 1e9)) == pytest.approx(float(CHINCHILLA(small, 1e9)))
    assert float(law(small, 4e9, 1e9)) > float(CHINCHILLA(small, 4e9))
    at_optimum = CHINCHILLA.optimum(1e21)
    assert float(law.matching_parameters(at_optimum.tokens)) == pytest.approx(at_optimum.parameters)
