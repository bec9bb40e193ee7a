"""Intervals by resampling: what a fit might have been, had the noise fallen otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.laws import Array, LossLaw
from hope_megatron.sweep.parametric import MIN_RUNS, NUM_COEFFICIENTS, LossFit, fit_loss_law

FitT = TypeVar("FitT")

Indices = NDArray[np.intp]
FEWEST_DRAWN = 2 * NUM_COEFFICIENTS
"""Runs that whole runs are drawn from; with fewer, residuals are."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; `low` and `high` are NaN where the resamples do not give one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampled(Generic[FitT]):
    """A fit, and the same fit to resampled data."""

    point: FitT
    resamples: tuple[FitT, ...]
    level: float
    """Coverage that the intervals aim at."""

    def estimate(self, quantity: Callable[[FitT], float]) -> Estimate:
        """Any number that follows from the fit, with its percentile interval."""
        return interval(float(quantity(self.point)), [float(quantity(fit)) for fit in self.resamples], self.level)


def interval(value: float, samples: list[float], level: float) -> Estimate:
    """Percentile interval. Resamples that have no such number (an optimum of a law without one) make it unbounded: NaN."""
    if not samples or not np.isfinite(samples).all():
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], method="weibull")
    return Estimate(value, float(low), float(high))


def resample_loss_law(
    fit: LossFit, parameters: Array, tokens: Array, loss: Array, *, delta: float, count: int, level: float, seed: int
) -> Resampled[LossLaw]:
    """The law of whole runs drawn again with replacement; runs that are outliers have no part.

    Whole runs keep what residuals lose: runs of some sizes are noisier than others, and heavy tails. Sweeps of fewer than
    FEWEST_DRAWN runs draw residuals around the fitted law instead, as too few different runs would be left for the coefficients.
    """
    rng = np.random.default_rng(seed)
    parameters, tokens, loss = parameters[fit.kept], tokens[fit.kept], loss[fit.kept]
    if len(loss) < FEWEST_DRAWN:
        return _resample_residuals(fit, parameters, tokens, rng, delta=delta, count=count, level=level)

    def refit(members: Indices) -> LossLaw:
        if len(np.unique(members)) < MIN_RUNS:
            raise SweepError("too few different runs")
        return fit_loss_law(parameters[members], tokens[members], loss[members], delta=delta, start=fit.law).law

    return Resampled(fit.law, _drawn(lambda: refit(_runs_drawn(rng, len(loss))), count), level)


def _resample_residuals(
    fit: LossFit, parameters: Array, tokens: Array, rng: np.random.Generator, *, delta: float, count: int, level: float
) -> Resampled[LossLaw]:
    residuals = widened(fit.log_residuals[fit.kept], NUM_COEFFICIENTS, level)
    fitted = np.log(fit.law(parameters, tokens))
    laws = []
    for _ in range(count):
        drawn = np.exp(fitted + rng.choice(residuals, len(residuals)))
        laws.append(fit_loss_law(parameters, tokens, drawn, delta=delta, start=fit.law).law)
    return Resampled(fit.law, tuple(laws), level)


def predict_run(fit: LossFit, laws: Resampled[LossLaw], parameters: float, tokens: float, *, seed: int = 0) -> Estimate:
    """Loss of one more run that is no outlier: the law's interval, and the scatter of runs around the law."""
    rng = np.random.default_rng(seed)
    residuals = widened(fit.log_residuals[fit.kept], NUM_COEFFICIENTS, laws.level)
    samples = [float(law(parameters, tokens)) * float(np.exp(rng.choice(residuals))) for law in laws.resamples]
    return interval(float(laws.point(parameters, tokens)), samples, laws.level)


def resample_runs(
    fit: Callable[[Indices], FitT], num_runs: int, *, count: int, level: float, seed: int
) -> Resampled[FitT]:
    """Case bootstrap: `fit` gets the indices of the runs, drawn with replacement.

    Draws that cannot be fitted (a size or budget is missing) are drawn again, at most ten times as often as asked.

    Raises:
        SweepError: if the fit to all runs fails, or most draws do.
    """
    point = fit(np.arange(num_runs))
    rng = np.random.default_rng(seed)
    return Resampled(point, _drawn(lambda: fit(_runs_drawn(rng, num_runs)), count), level)


def _runs_drawn(rng: np.random.Generator, num_runs: int) -> Indices:
    return np.sort(rng.integers(num_runs, size=num_runs))


def resample_noise(
    fit: Callable[[Array], FitT], residuals: Array, *, count: int, level: float, seed: int
) -> Resampled[FitT]:
    """`fit` gets a factor for the loss of each run: 1, and then the noise of runs once more on top of what they have.

    A budget has few sizes, and a minimum without one of them is another minimum: whole runs drawn again make approaches 1 and 2
    look less certain than they are (intervals of 90 % held the truth in 95 to 100 %).

    Args:
        fit: takes [runs] factors.
        residuals: of the loss law, one per run: the noise that is drawn.
        count: resamples.
        level: coverage that the intervals aim at.
        seed: of the draws.

    Raises:
        SweepError: if the fit to the runs as they are fails.
    """
    rng, pool = np.random.default_rng(seed), widened(residuals, NUM_COEFFICIENTS, level)
    point = fit(np.ones(len(residuals)))
    return Resampled(point, _drawn(lambda: fit(np.exp(rng.choice(pool, len(residuals)))), count), level)


def _drawn(draw: Callable[[], FitT], count: int) -> tuple[FitT, ...]:
    """Fits to resampled runs; none if too many of them cannot be fitted."""
    resamples: list[FitT] = []
    for _ in range(10 * count):
        if len(resamples) == count:
            break
        try:
            resamples.append(draw())
        except SweepError:
            continue
    return tuple(resamples) if len(resamples) == count else ()


def widened(residuals: Array, num_coefficients: int, level: float) -> Array:
    """Residuals as large as the noise they stand for.

    A fit with p coefficients to n runs leaves residuals too small by sqrt((n - p) / n); and n - p of them say little about the
    size of the noise, which Student's t makes up for.
    """
    n = len(residuals)
    freedom = max(n - num_coefficients, 1)
    student = stats.t.ppf((1 + level) / 2, freedom) / stats.norm.ppf((1 + level) / 2)
    return (residuals - residuals.mean()) * np.sqrt(n / freedom) * student
