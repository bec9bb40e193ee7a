"""Approach 3: the parametric loss law by Huber loss on log residuals, L-BFGS from many starts (arXiv 2203.15556, section 3.3).

Internally log N and log D are centred, so that the five parameters do not trade against each other, and the many starts are
screened by their objective before the best are polished. Stopping early is what made the published coefficients differ from
the data they were fitted to (arXiv 2404.10102), hence the tight tolerances.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, minimize

from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.laws import Array, ComputeLaw, DataConstrainedLaw, LossLaw

NUM_COEFFICIENTS = 5
MIN_RUNS = NUM_COEFFICIENTS + 1

OUTLIER_SCALES = 4.0
"""A run is an outlier when its residual exceeds this many robust standard deviations."""
_SMALLEST_SCALE = 1e-6
_MAX_ROUNDS = 5
_MAX_EXPONENT = 3.0
_POLISHED_STARTS = 12
_SMALLEST_EXPONENT = 0.02
_OPTIONS = {"maxiter": 2000, "maxfun": 4000, "maxcor": 20, "ftol": 1e-15, "gtol": 1e-9}


@dataclass(frozen=True)
class LossFit:
    """A fitted law and how it sits on its data."""

    law: LossLaw
    log_residuals: Array
    """log L measured - log L fitted, per run, of outliers too."""
    kept: NDArray[np.bool_]
    """The runs that the law is fitted to: all but outliers."""
    objective: float
    at_bounds: tuple[str, ...]
    """Coefficients that ended at the edge of what is allowed: the data do not determine them."""


def fit_loss_law(
    parameters: Array, tokens: Array, loss: Array, *, delta: float = 1e-3, start: LossLaw | None = None
) -> LossFit:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta.

    Args:
        parameters: N of each run.
        tokens: D of each run.
        loss: L of each run, nats per token.
        delta: residual of log loss where the Huber loss turns from quadratic to linear.
        start: begin only there, instead of at many starts (for resamples of data that were fitted already).

    Raises:
        SweepError: too few runs, or all of one size or length.
    """
    _check_data(parameters, tokens, loss)
    problem = _Problem(parameters, tokens, loss, delta)
    starts = [problem.encode(start)] if start is not None else problem.best_starts(_POLISHED_STARTS)
    solutions = [problem.solve(x) for x in starts]
    best = min(solutions, key=lambda x: problem.objective(x)[0])
    law = problem.decode(best)
    residuals = np.log(loss) - np.log(law(parameters, tokens))
    return LossFit(
        law, residuals, np.ones(len(loss), dtype=np.bool_), problem.objective(best)[0], problem.at_bounds(best)
    )


def fit_without_outliers(
    parameters: Array, tokens: Array, loss: Array, *, delta: float = 1e-3, start: LossLaw | None = None
) -> LossFit:
    """`fit_loss_law`, and again without the runs that it does not explain, until no further one shows.

    The Huber loss bounds how far an outlier pulls, but not to nothing: without it the law is that of the other runs. At most a
    quarter of the runs is left out, the worst first; more would be no outliers.
    """
    fit = fit_loss_law(parameters, tokens, loss, delta=delta, start=start)
    most = min(len(loss) // 4, len(loss) - MIN_RUNS)
    for _ in range(_MAX_ROUNDS):
        sizes = outlier_scales(fit.log_residuals, fit.kept)
        worst = np.argsort(-sizes)[:most]
        kept = np.ones(len(loss), dtype=np.bool_)
        kept[worst[sizes[worst] > OUTLIER_SCALES]] = False
        if (kept == fit.kept).all():
            break
        part = fit_loss_law(parameters[kept], tokens[kept], loss[kept], delta=delta, start=start)
        residuals = np.log(loss) - np.log(part.law(parameters, tokens))
        fit = replace(part, log_residuals=residuals, kept=kept)
    return fit


def outlier_scales(log_residuals: Array, kept: NDArray[np.bool_], num_coefficients: int = NUM_COEFFICIENTS) -> Array:
    """Sizes of residuals in robust standard deviations of the kept ones.

    The scale is 1.4826 times the median size, the smallest p left out: a robust fit passes through about as many points as it has
    coefficients, and their zeros say nothing about the noise.
    """
    sizes = np.sort(np.abs(log_residuals[kept]))[num_coefficients:]
    scale = max(1.4826 * float(np.median(sizes)), _SMALLEST_SCALE) if len(sizes) else np.inf
    return np.abs(log_residuals) / scale


def fit_data_constrained(
    base: LossLaw,
    compute: ComputeLaw,
    parameters: Array,
    tokens: Array,
    unique: Array,
    loss: Array,
    *,
    delta: float = 1e-3,
    start: DataConstrainedLaw | None = None,
) -> DataConstrainedLaw:
    """Fit all seven coefficients to runs of which some repeat their data.

    Muennighoff et al. hold the law of single-epoch runs fixed. Under their law a run with more parameters than its tokens can use
    loses by that in its first epoch too, so that such a base absorbs part of R_N: for runs that follow the law with R_N 5.3 to
    the last digit it finds 31. Here both parts are fitted at once.

    Args:
        base: where to begin: the law of runs that do not repeat their data.
        compute: FLOPs of the family, which the optimal size for U tokens depends on.
        parameters: N of each run.
        tokens: D of each run, repetitions counted.
        unique: U of each run, at most D.
        loss: L of each run, nats per token.
        delta: as in `fit_loss_law`.
        start: begin only there.

    Raises:
        SweepError: if no run repeats its data, or there are too few.
    """
    if not (tokens > 1.05 * unique).any():
        raise SweepError(
            "no run repeats its data; add cells with more tokens than the data has to learn what repetition costs"
        )
    _check_data(parameters, tokens, loss)
    problem = _Problem(parameters, tokens, loss, delta)

    def law_at(x: Array) -> DataConstrainedLaw:
        return DataConstrainedLaw(problem.decode(x[:-2]), float(np.exp(x[-2])), float(np.exp(x[-1])), compute)

    def residuals(x: Array) -> Array:
        return np.log(law_at(x)(parameters, tokens, unique)) - np.log(loss)

    # A size that the tokens can use needs both exponents.
    bounds = [*problem.bounds[:3], *[(_SMALLEST_EXPONENT, _MAX_EXPONENT)] * 2, *[(np.log(0.1), np.log(1e4))] * 2]
    low, high = (np.array(side) for side in zip(*bounds, strict=True))
    if start is not None:
        starts = [np.append(problem.encode(start.base), np.log([start.R_D, start.R_N]))]
    else:
        grid = (np.log(rates) for rates in itertools.product((1.0, 5.0, 20.0, 100.0), repeat=2))
        starts = [np.append(problem.encode(base), rates) for rates in grid]
        starts.sort(key=lambda x: float(_huber(residuals(x), delta).sum()))
    found = [
        least_squares(
            residuals, np.clip(x, low + 1e-9, high - 1e-9), bounds=(low, high), loss="huber", f_scale=delta, x_scale="jac",
            xtol=1e-12, ftol=1e-12, gtol=1e-14, max_nfev=300,
        )
        for x in starts[:_POLISHED_STARTS]
    ]  # fmt: skip
    return law_at(min(found, key=lambda solution: solution.cost).x)


class _Problem:
    """The objective over x = (e, a, b, alpha, beta): E = exp(e); exp(a), exp(b) are the two terms at the centre of the data."""

    def __init__(self, parameters: Array, tokens: Array, loss: Array, delta: float) -> None:
        self.log_n, self.log_d, self.log_loss, self.delta = np.log(parameters), np.log(tokens), np.log(loss), delta
        self.centre_n, self.centre_d = self.log_n.mean(), self.log_d.mean()
        self.n, self.d = self.log_n - self.centre_n, self.log_d - self.centre_d
        lowest = float(self.log_loss.min())
        self.bounds = [(lowest - 7, float(self.log_loss.max())), (lowest - 12, 20.0), (lowest - 12, 20.0)]
        self.bounds += [(0.0, _MAX_EXPONENT)] * 2

    def objective(self, x: Array) -> tuple[float, Array]:
        """Sum of Huber losses over delta, and its gradient."""
        e, a, b, alpha, beta = x
        terms = np.stack([np.full_like(self.n, e), a - alpha * self.n, b - beta * self.d])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        residual = top + np.log(total) - self.log_loss
        shares /= total
        pull = np.clip(residual / self.delta, -1.0, 1.0)
        by_term = shares * pull
        gradient = np.array([*by_term.sum(axis=1), -(by_term[1] @ self.n), -(by_term[2] @ self.d)])
        return float(_huber(residual, self.delta).sum() / self.delta), gradient

    def best_starts(self, count: int) -> list[Array]:
        """The most promising points of a grid over E, the split of the rest between size and tokens, and both exponents."""
        typical, lowest = float(np.exp(np.median(self.log_loss))), float(np.exp(self.log_loss.min()))
        exponents = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
        grid = []
        for floor, share, alpha, beta in itertools.product((0.1, 0.4, 0.7, 0.9), (0.2, 0.5, 0.8), exponents, exponents):
            E = floor * lowest
            rest = typical - E
            grid.append(np.array([np.log(E), np.log(share * rest), np.log((1 - share) * rest), alpha, beta]))
        return sorted(grid, key=lambda x: self.objective(x)[0])[:count]

    def solve(self, x: Array) -> Array:
        """L-BFGS, restarted until it gains nothing: each restart forgets a curvature estimate that kinks have spoilt."""
        value = np.inf
        for _ in range(5):
            found = minimize(self.objective, x, jac=True, method="L-BFGS-B", bounds=self.bounds, options=_OPTIONS)
            x = found.x
            if value - found.fun <= 1e-9 * max(abs(found.fun), 1.0):
                break
            value = found.fun
        return x

    def encode(self, law: LossLaw) -> Array:
        low = [lower for lower, _ in self.bounds]
        high = [upper for _, upper in self.bounds]
        with np.errstate(divide="ignore"):
            x = [
                np.log(law.E),
                np.log(law.A) - law.alpha * self.centre_n,
                np.log(law.B) - law.beta * self.centre_d,
                law.alpha,
                law.beta,
            ]
        return np.clip(x, low, high)

    def decode(self, x: Array) -> LossLaw:
        e, a, b, alpha, beta = map(float, x)
        A, B = np.exp(a + alpha * self.centre_n), np.exp(b + beta * self.centre_d)
        return LossLaw(float(np.exp(e)), float(A), float(B), alpha, beta)

    def at_bounds(self, x: Array) -> tuple[str, ...]:
        near = [min(value - low, high - value) < 1e-4 for value, (low, high) in zip(x, self.bounds, strict=True)]
        return tuple(name for name, is_near in zip(("E", "A", "B", "alpha", "beta"), near, strict=True) if is_near)


def _huber(residual: Array, delta: float) -> Array:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def _check_data(parameters: Array, tokens: Array, loss: Array) -> None:
    if len(loss) < MIN_RUNS:
        raise SweepError(
            f"the loss law has {NUM_COEFFICIENTS} coefficients and needs at least {MIN_RUNS} finished runs, not {len(loss)}"
        )
    for what, values in (("model size", parameters), ("number of tokens", tokens)):
        if len(np.unique(values)) < 2:
            raise SweepError(f"all runs have the same {what}; the loss law needs at least two")
