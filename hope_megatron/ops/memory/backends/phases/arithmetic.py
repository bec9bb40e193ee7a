"""Products over all leading dims at once, and what else phases share. Every call of a function here is one launch or two."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hope_megatron.ops.memory.inner import EPSILON

aten = torch.ops.aten


def flat(x: Tensor) -> Tensor:
    """[..., r, c] -> [batch, r, c]; a view or an error, never a copy."""
    return x.view(-1, *x.shape[-2:])


class Products:
    """Matrix products. low: operands are rounded to bf16 first; sums stay what they are (fp32)."""

    def __init__(self, low: bool):
        self.low = low

    def round(self, x: Tensor) -> Tensor:
        """What an operand is after rounding."""
        return x.to(torch.bfloat16).to(x.dtype) if self.low else x

    def mm(self, a: Tensor, b: Tensor, base: Tensor | None = None, *, out: Tensor | None = None, alpha=1.0) -> Tensor:
        """[base +] alpha a b over all leading dims."""
        shape, to = (*a.shape[:-1], b.size(-1)), {} if out is None else {"out": flat(out)}
        a, b = flat(self.round(a)), flat(self.round(b))
        if base is None:
            return torch.bmm(a, b, **to).view(shape)
        return torch.baddbmm(flat(base), a, b, alpha=alpha, **to).view(shape)

    def add(self, total: Tensor, a: Tensor, b: Tensor, alpha=1.0) -> None:
        """total += alpha a b, in place."""
        flat(total).baddbmm_(flat(self.round(a)), flat(self.round(b)), alpha=alpha)


EXACT = Products(low=False)
"""For what must not be rounded: grams, and what the triangular systems make of them."""


def lower_solve(system: Tensor, right: Tensor) -> Tensor:
    """S^-1 right for lower triangular S."""
    return torch.linalg.solve_triangular(system, right, upper=False)


def lower_solve_transposed(system: Tensor, right: Tensor) -> Tensor:
    """S^-T right for lower triangular S."""
    return torch.linalg.solve_triangular(system.mT, right, upper=True)


def length(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """sqrt(|x|^2 + epsilon^2) along the last dim, which stays: what `unit` divides by."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.hypot(norm, _epsilon(x.dtype, x.device), **({} if out is None else {"out": out}))


@functools.lru_cache(maxsize=16)
def _epsilon(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(EPSILON, dtype=dtype, device=device)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product along the last dim, which stays."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def dsilu(z: Tensor) -> Tensor:
    """Derivative of SiLU."""
    return aten.silu_backward(torch.ones_like(z), z)


def d2silu(z: Tensor) -> Tensor:
    """Second derivative of SiLU."""
    s = torch.sigmoid(z)
    return (1 - 2 * s).mul_(z).add_(2).mul_(s).mul_(1 - s)
