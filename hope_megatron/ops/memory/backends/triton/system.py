"""Decay tables of a chunk, and the inverse of its triangular system."""

from __future__ import annotations

import triton
import triton.language as tl

from hope_megatron.ops.memory.backends.triton import language as p


@triton.jit
def decay(later, earlier, STRICT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr):
    """exp(later_t - earlier_s) for s <= t (STRICT: s < t), 0 above: [C] twice -> [C, C]. Masked before exp, which may overflow."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    keep = (s < t) if STRICT else (s <= t)
    return p.exp(tl.where(keep, later[:, None] - earlier[None, :], float("-inf")), PRECISION)


@triton.jit
def decay_t(later, earlier, STRICT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr):
    """The transpose of `decay`."""
    s, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    keep = (s < t) if STRICT else (s <= t)
    return p.exp(tl.where(keep, later[None, :] - earlier[:, None], float("-inf")), PRECISION)


@triton.jit
def unit_lower_inverse(L, EXACT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L [C, C], C a power of two from 16 on, by block doubling.

    X_b inverts the diagonal blocks of size b; X_2b = X_b - X_b (L below the diagonal within blocks of 2b) X_b. No powers of L: as
    stable as substitution, where the Neumann product (I - L)(I + L^2)(I + L^4)... cancels binomials of C.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if C > 16:  # blocks up to 16 as [C / 16, 16, 16]: small products
        N: tl.constexpr = C // 16
        same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
        D = tl.sum(tl.where(same, tl.reshape(L, [N, 16, N, 16]), 0.0), 2)
        r, c = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
        X = tl.reshape(tl.where(same, _up_to_16(D, r, c, EXACT, PRECISION)[:, :, None, :], 0.0), [C, C])
        X = _double(X, L, i, j, 16, EXACT, PRECISION)
        if C > 32:
            X = _double(X, L, i, j, 32, EXACT, PRECISION)
        if C > 64:
            X = _double(X, L, i, j, 64, EXACT, PRECISION)
        return X
    else:
        return _up_to_16(L, i, j, EXACT, PRECISION)


@triton.jit
def _up_to_16(L, i, j, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    X = tl.where(i == j, 1.0, 0.0) - tl.where((i // 2 == j // 2) & (i > j), L, 0.0)
    X = _double(X, L, i, j, 2, EXACT, PRECISION)
    X = _double(X, L, i, j, 4, EXACT, PRECISION)
    return _double(X, L, i, j, 8, EXACT, PRECISION)


@triton.jit
def _double(X, L, i, j, BLOCK: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """From inverse blocks of size BLOCK to twice that."""
    below = (i // (2 * BLOCK) == j // (2 * BLOCK)) & (i // BLOCK > j // BLOCK)
    corner = tl.where(below, L, 0.0)
    if EXACT:
        return X - p.mm_exact(p.mm_exact(X, corner, PRECISION), X, PRECISION)
    else:
        return X - p.mm(p.mm(X, corner, PRECISION), X, PRECISION)
