"""Newton-Schulz against the exact polar factor, its two forms against each other."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.ops.newton_schulz import (
    COEFFICIENTS,
    newton_schulz,
    orthogonality_residual,
    polar_factor,
)
from hope_megatron.ops.newton_schulz_cost import newton_schulz_flops, preferred_form

SHAPES = [(32, 32), (24, 60), (60, 24), (16, 100), (5, 1)]
# What five steps leave of singular values between 0.05 and 1 of the norm; measured, with a margin of 0.02.
SINGULAR_VALUES = {"quintic": (0.66, 1.22), "varying": (0.85, 1.17), "polar_express": (0.85, 1.17)}


def with_singular_values(rows: int, cols: int, smallest: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * cols)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64))[0]
    rank = min(rows, cols)
    s = torch.logspace(0, torch.log10(torch.tensor(smallest)), rank, dtype=torch.float64)
    return (u[:, :rank] * s) @ v[:rank]


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_close_to_one_and_singular_vectors_stay(shape, coefficients):
    matrix = with_singular_values(*shape, smallest=0.2)
    result = newton_schulz(matrix, coefficients=coefficients, dtype=torch.float64)
    values = torch.linalg.svdvals(result)
    low, high = SINGULAR_VALUES[coefficients]
    assert low < values.min() and values.max() < high
    # the polar factor of the result is that of the input: only singular values moved
    torch.testing.assert_close(polar_factor(result), polar_factor(matrix), rtol=0, atol=1e-9)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
def test_gram_form_equals_direct_form(shape, coefficients, steps):
    matrix = with_singular_values(*shape, smallest=0.01)
    settings = {"coefficients": coefficients, "steps": steps, "dtype": torch.float64}
    direct, gram = (newton_schulz(matrix, form=form, **settings) for form in ("direct", "gram"))
    torch.testing.assert_close(gram, direct, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_low_precision_stays_close_to_float64(form, dtype, tolerance):
    """Without the restart the Gram form misses this in bfloat16 by orders of magnitude."""
    matrix = with_singular_values(48, 200, smallest=0.003)
    exact = newton_schulz(matrix, coefficients="quintic", dtype=torch.float64)
    rounded = newton_schulz(matrix, coefficients="quintic", dtype=dtype, form=form).double()
    assert rounded.dtype == torch.float64 and (rounded - exact).abs().max() < tolerance


def test_batch_equals_one_by_one_and_scale_does_not_matter():
    batch = torch.stack(
        [with_singular_values(12, 20, s) * scale for s, scale in ((0.3, 1.0), (0.1, 1e8), (0.05, 1e-8))]
    )
    together = newton_schulz(batch.float())
    for matrix, result in zip(batch, together, strict=True):
        torch.testing.assert_close(newton_schulz(matrix.float()), result, rtol=0, atol=1e-5)
    torch.testing.assert_close(newton_schulz(batch.float() * 1e-6), together, rtol=0, atol=1e-5)
    assert newton_schulz(batch.reshape(3, 1, 12, 20)).shape == (3, 1, 12, 20)


@pytest.mark.parametrize("scale", [1e-28, 1e-25, 1e-20, 1e15])
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_any_scale_gives_the_same(scale, form):
    """The squares of entries below 1e-19 are zero in float32, and so would be the norm."""
    x = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(newton_schulz(scale * x, form=form), newton_schulz(x, form=form), rtol=1e-3, atol=1e-4)


def test_zero_matrix_stays_zero():
    assert newton_schulz(torch.zeros(2, 4, 6)).eq(0).all()


def test_one_step_by_hand():
    """A diagonal matrix: the iteration is the scalar polynomial on each entry."""
    x = torch.tensor([0.6, 0.8], dtype=torch.float64)  # Frobenius norm one
    a, b, c = COEFFICIENTS["quintic"][0]
    expected = torch.diag(a * x + b * x**3 + c * x**5)
    torch.testing.assert_close(newton_schulz(torch.diag(x), steps=1, dtype=torch.float64), expected)


def test_residual_tells_orthogonal_from_not():
    orthogonal = polar_factor(with_singular_values(10, 30, 0.1))
    assert orthogonality_residual(orthogonal) < 1e-6
    assert orthogonality_residual(orthogonal.mT) < 1e-6
    assert orthogonality_residual(torch.zeros(3, 4)) == 1.0
    residual = orthogonality_residual(torch.diag(torch.tensor([1.0, 0.5])))
    assert residual == pytest.approx(0.75 / 2**0.5)


def test_flops_count_the_products_that_run(monkeypatch):
    counted = []
    real_bmm, real_baddbmm = torch.Tensor.__matmul__, torch.baddbmm

    def count(a, b):
        counted.append(2 * a.shape[-2] * a.shape[-1] * b.shape[-1])

    def matmul(a, b):
        count(a, b)
        return real_bmm(a, b)

    def baddbmm(base, a, b, **kwargs):
        count(a, b)
        return real_baddbmm(base, a, b, **kwargs)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    monkeypatch.setattr(torch, "baddbmm", baddbmm)
    for form in ("direct", "gram"):
        for steps in (1, 2, 5):
            counted.clear()
            newton_schulz(torch.randn(6, 10), steps=steps, form=form)
            assert sum(counted) == newton_schulz_flops(6, 10, steps, form)


def test_gram_form_is_preferred_for_elongated_matrices_only():
    assert preferred_form(64, 64, 5) == "direct"
    assert preferred_form(64, 256, 5) == preferred_form(256, 64, 5) == "gram"


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="cubic"):
        newton_schulz(torch.randn(3, 3), coefficients="cubic")
    with pytest.raises(ValueError, match="at least one step"):
        newton_schulz(torch.randn(3, 3), steps=0)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        newton_schulz(torch.randn(3))
