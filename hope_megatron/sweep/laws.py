"""The laws themselves, without data: loss against size and tokens, FLOPs against both, and the optimum under a budget.

Symbols: N parameters, D training tokens, C training FLOPs, L loss in nats per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x^exponent."""

    factor: float
    exponent: float

    def __call__(self, x: ArrayLike) -> Array:
        """y at x."""
        return self.factor * np.asarray(x, dtype=np.float64) ** self.exponent

    @classmethod
    def fit(cls, x: ArrayLike, y: ArrayLike) -> PowerLaw:
        """Least squares in logarithms; with a single x the exponent is 0."""
        log_x, log_y = np.log(np.asarray(x, dtype=np.float64)), np.log(np.asarray(y, dtype=np.float64))
        if np.ptp(log_x) < 1e-9:
            return cls(float(np.exp(log_y.mean())), 0.0)
        exponent, intercept = np.polyfit(log_x, log_y, 1)
        return cls(float(np.exp(intercept)), float(exponent))


@dataclass(frozen=True)
class ComputeLaw:
    """C = kappa N^exponent D. The usual approximation is 6 N D; small models, embeddings and inner memories deviate from it."""

    kappa: float = 6.0
    exponent: float = 1.0

    def flops(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """C of training N parameters on D tokens."""
        return (
            self.kappa
            * np.asarray(parameters, dtype=np.float64) ** self.exponent
            * np.asarray(tokens, dtype=np.float64)
        )

    def tokens(self, parameters: ArrayLike, flops: ArrayLike) -> Array:
        """D that C buys a model of N parameters."""
        return np.asarray(flops, dtype=np.float64) / (
            self.kappa * np.asarray(parameters, dtype=np.float64) ** self.exponent
        )

    @classmethod
    def fit(cls, parameters: ArrayLike, flops_per_token: ArrayLike) -> ComputeLaw:
        """From the sizes of a family and their training FLOPs per token."""
        law = PowerLaw.fit(parameters, flops_per_token)
        return cls(law.factor, law.exponent)


@dataclass(frozen=True)
class Optimum:
    """The best use of a compute budget."""

    flops: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv 2203.15556, eq. 2)."""

    E: float
    """Loss of a perfect model: the entropy of the text."""
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """L at N and D."""
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def optimum(self, flops: float, compute: ComputeLaw | None = None) -> Optimum:
        """N and D that minimise L at a given C (eq. 4, for C = kappa N^p D).

        With D = C / (kappa N^p), dL/dN = 0 gives N^(alpha + p beta) = alpha A / (p beta B) * (C / kappa)^beta.
        Without curvature in one of the terms there is no optimum, and the result is not finite.
        """
        compute = compute or ComputeLaw()
        p = compute.exponent
        if min(self.alpha, self.beta, self.A, self.B) <= 0:
            return Optimum(flops, math.nan, math.nan, math.nan)
        log_n = (
            math.log(self.alpha * self.A)
            - math.log(p * self.beta * self.B)
            + self.beta * math.log(flops / compute.kappa)
        ) / (self.alpha + p * self.beta)
        parameters = math.exp(min(log_n, 600.0))
        tokens = float(compute.tokens(parameters, flops))
        return Optimum(flops, parameters, tokens, float(self(parameters, tokens)))

    def exponents(self, compute: ComputeLaw | None = None) -> tuple[float, float]:
        """(a, b) of N_opt ~ C^a and D_opt ~ C^b."""
        p = (compute or ComputeLaw()).exponent
        total = self.alpha + p * self.beta
        if total <= 0:
            return math.nan, math.nan
        return self.beta / total, self.alpha / total


CHINCHILLA = LossLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""Hoffmann et al., arXiv 2203.15556, eq. 10."""


@dataclass(frozen=True)
class DataConstrainedLaw:
    """Loss when D tokens are repetitions of U unique ones (Muennighoff et al., arXiv 2305.16264, eqs. 5, 10 and 11).

    Repeated tokens and parameters beyond those that U tokens can use lose their worth exponentially:
    D' = U + U R_D (1 - exp(-(D / U - 1) / R_D)), and the same for N with U_N, the optimal size for U tokens.
    """

    base: LossLaw
    R_D: float
    """Repetitions after which most of the worth of more repetitions is gone."""
    R_N: float
    """The same for excess parameters."""
    compute: ComputeLaw = ComputeLaw()

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike, unique_tokens: ArrayLike) -> Array:
        """L at N and D with U unique tokens."""
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        unique = np.minimum(np.asarray(unique_tokens, dtype=np.float64), d)
        useful_n = np.minimum(self.matching_parameters(unique), n)
        return self.base(effective(n, useful_n, self.R_N), effective(d, unique, self.R_D))

    def matching_parameters(self, tokens: ArrayLike) -> Array:
        """U_N: the size for which this many tokens are compute-optimal.

        At the optimum alpha A N^-alpha = p beta B D^-beta, whatever the budget.
        """
        law, p = self.base, self.compute.exponent
        ratio = law.alpha * law.A / (p * law.beta * law.B)
        return (ratio * np.asarray(tokens, dtype=np.float64) ** law.beta) ** (1 / law.alpha)


def effective(total: Array, unique: Array, decay: float) -> Array:
    """U + U R (1 - exp(-(X / U - 1) / R)): the worth of X when only U of it is new."""
    repeats = np.maximum(total / unique - 1, 0.0)
    return unique + unique * decay * -np.expm1(-repeats / decay)
