"""Newton-Schulz iterations that push the singular values of a matrix towards one.

Legend: `B` batch of matrices, `M` rows, `N` columns. Every step is an odd polynomial of the singular values,

    X <- a X + b (X X^T) X + c (X X^T)^2 X            with ||X||_F = 1 at the start,

which needs matrix products only. The result is not the exact polar factor U V^T (that is `polar_factor`, by SVD) but
U S V^T with S close to one: 0.68-1.20 for `quintic`, 0.87-1.15 for `varying` and `polar_express`, all after five steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.ops.newton_schulz_cost import GRAM_RESTART_STEP, Form, preferred_form

Coefficients = tuple[tuple[float, float, float], ...]

# Keller Jordan, Muon (2024): one polynomial with the steepest slope at zero, repeated.
_QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),)
# You Jiacheng (2025): one polynomial per step, optimised together for five steps.
_VARYING: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Polar Express (arXiv 2505.16932, algorithm 1): minimax polynomials for singular values in [1e-3, 1]. All but the last
# are shrunk by 1.01, so that rounding in half precision cannot push a singular value out of the region of convergence.
_POLAR_EXPRESS: Coefficients = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    )
) + ((1.875, -1.25, 0.375),)

COEFFICIENTS: dict[str, Coefficients] = {"quintic": _QUINTIC, "varying": _VARYING, "polar_express": _POLAR_EXPRESS}

# Zero matrices stay zero, and smaller ones come out small. Norms are summed in float64: squares of entries below 1e-19 are zero in
# float32, and a matrix divided by a norm that is too small diverges.
_SMALLEST_NORM = 1e-30


def newton_schulz(
    matrices: Tensor,
    *,
    steps: int = 5,
    coefficients: str = "quintic",
    dtype: torch.dtype = torch.float32,
    form: Form = "auto",
) -> Tensor:
    """Approximate polar factor of each matrix of a batch; independent of the scale of the input.

    matrices: [..., M, N], any float dtype. `dtype` is that of the products. `coefficients` is a key of `COEFFICIENTS`;
    its last row is repeated when `steps` is larger than the table. `form`: "direct" iterates on X, "gram" on the
    smaller Gram matrix, "auto" takes the one with fewer operations. Returns [..., M, N] in `dtype`.
    """
    if matrices.ndim < 2:
        raise ValueError(f"newton_schulz needs [..., M, N], got shape {tuple(matrices.shape)}")
    table = coefficient_steps(coefficients, steps)
    rows, cols = matrices.shape[-2:]
    x_BMN = matrices.reshape(-1, rows, cols)
    if not x_BMN.dtype.is_floating_point or x_BMN.dtype.itemsize < 4:
        x_BMN = x_BMN.float()
    if rows > cols:
        x_BMN = x_BMN.mT
    norm_B11 = torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True, dtype=torch.float64).clamp_min_(
        _SMALLEST_NORM
    )
    x_BMN = (x_BMN / norm_B11.to(x_BMN.dtype)).to(dtype)
    if form == "auto":
        form = preferred_form(rows, cols, steps)
    x_BMN = _iterate_gram(x_BMN, table) if form == "gram" else _iterate_direct(x_BMN, table)
    if rows > cols:
        x_BMN = x_BMN.mT
    return x_BMN.reshape(matrices.shape)


def coefficient_steps(coefficients: str, steps: int) -> Coefficients:
    """The (a, b, c) of every step; raises ValueError on an unknown table or fewer than one step."""
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"unknown Newton-Schulz coefficients {coefficients!r}; choose from {', '.join(COEFFICIENTS)}")
    if steps < 1:
        raise ValueError(f"Newton-Schulz needs at least one step, got {steps}")
    table = COEFFICIENTS[coefficients]
    return tuple(table[min(i, len(table) - 1)] for i in range(steps))


def _iterate_direct(x_BMN: Tensor, table: Coefficients) -> Tensor:
    for a, b, c in table:
        gram_BMM = x_BMN @ x_BMN.mT
        poly_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, poly_BMM, x_BMN, beta=a)
    return x_BMN


def _iterate_gram(x_BMN: Tensor, table: Coefficients) -> Tensor:
    """The same polynomials on R = X X^T: with P = a I + b R + c R^2, X <- P X means R <- P R P, and the P multiply
    up."""
    start, total = 0, len(table)
    while start < total:
        stop = min(total, GRAM_RESTART_STEP) if start == 0 else total
        x_BMN = _gram_segment(x_BMN, table[start:stop])
        start = stop
    return x_BMN


def _gram_segment(x_BMN: Tensor, table: Coefficients) -> Tensor:
    gram_BMM = x_BMN @ x_BMN.mT
    product_BMM: Tensor | None = None
    for i, (a, b, c) in enumerate(table):
        factor_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        factor_BMM.diagonal(dim1=-2, dim2=-1).add_(a)
        product_BMM = factor_BMM if product_BMM is None else factor_BMM @ product_BMM
        if i + 1 < len(table):
            gram_BMM = factor_BMM @ gram_BMM @ factor_BMM
    assert product_BMM is not None
    return product_BMM @ x_BMN


def polar_factor(matrices: Tensor) -> Tensor:
    """The exact orthogonal factor U V^T by SVD: the reference for `newton_schulz`. [..., M, N] -> [..., M, N], same
    dtype."""
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u @ vh


def orthogonality_residual(matrices: Tensor) -> Tensor:
    """||O O^T - I||_F / sqrt(min(M, N)) per matrix: the root mean square of sigma^2 - 1. [..., M, N] -> [...], float32.

    A matrix that Newton-Schulz has treated lies below about 0.5. Rank-deficient momentum has residual 1 per missing
    direction.
    """
    x = matrices.float()
    if x.shape[-2] > x.shape[-1]:
        x = x.mT
    gram = x @ x.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return torch.linalg.vector_norm(gram, dim=(-2, -1)) / x.shape[-2] ** 0.5
