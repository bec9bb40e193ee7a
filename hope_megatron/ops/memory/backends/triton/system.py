"""Decay tables of a chunk, and the inverse of its triangular system."""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton.language import exp, mm, mm_exact


@triton.jit
def decay(later, earlier, STRICT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr):
    """exp(later_t - earlier_s) for s <= t (STRICT: s < t), 0 above: [C] twice -> [C, C]. Masked before exp, which may overflow."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    keep = (s < t) if STRICT else (s <= t)
    return exp(tl.where(keep, later[:, None] - earlier[None, :], float("-inf")), PRECISION)


@triton.jit
def decay_t(later, earlier, STRICT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr):
    """The transpose of `decay`."""
    s, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    keep = (s < t) if STRICT else (s <= t)
    return exp(tl.where(keep, later[None, :] - earlier[:, None], float("-inf")), PRECISION)


@triton.jit
def unit_upper_inverse(U, EXACT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr):
    """(I + U)^-1 of a strictly upper triangular U [C, C], C a power of two from 16 on, by block doubling.

    X_b inverts the diagonal blocks of size b; X_2b = X_b - X_b (U above the diagonal within blocks of 2b) X_b. No powers of U: as
    stable as substitution, where the Neumann product (I - U)(I + U^2)(I + U^4)... cancels binomials of C.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    X = tl.where(i == j, 1.0, 0.0) - tl.where((i // 2 == j // 2) & (i < j), U, 0.0)
    if C > 16:  # blocks up to 16 as [C / 16, 16, 16]: small products
        N: tl.constexpr = C // 16
        same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
        D = tl.sum(tl.where(same, tl.reshape(U, [N, 16, N, 16]), 0.0), 2)
        r, c = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
        B = tl.where(r == c, 1.0, 0.0) - tl.where((r // 2 == c // 2) & (r < c), D, 0.0)
        B = _double(_double(_double(B, D, r, c, 2, EXACT, PRECISION), D, r, c, 4, EXACT, PRECISION), D, r, c, 8, EXACT, PRECISION)
        X = tl.reshape(tl.where(same, B[:, :, None, :], 0.0), [C, C])
    else:
        X = _double(_double(_double(X, U, i, j, 2, EXACT, PRECISION), U, i, j, 4, EXACT, PRECISION), U, i, j, 8, EXACT, PRECISION)
    if C > 16:
        X = _double(X, U, i, j, 16, EXACT, PRECISION)
    if C > 32:
        X = _double(X, U, i, j, 32, EXACT, PRECISION)
    if C > 64:
        X = _double(X, U, i, j, 64, EXACT, PRECISION)
    return X


@triton.jit
def _double(X, U, i, j, BLOCK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """From inverse blocks of size BLOCK to twice that."""
    above = (i // (2 * BLOCK) == j // (2 * BLOCK)) & (i // BLOCK < j // BLOCK)
    corner = tl.where(above, U, 0.0)
    if EXACT:
        return X - mm_exact(mm_exact(X, corner, PRECISION), X, PRECISION)
    else:
        return X - mm(mm(X, corner, PRECISION), X, PRECISION)
