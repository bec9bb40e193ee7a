"""Laws for the learning rate and the batch: the best value at each size and length, and how it moves with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hope_megatron.sweep.bootstrap import Resampled, widened
from hope_megatron.sweep.laws import Array, PowerLaw
from hope_megatron.sweep.parabola import LogParabola


@dataclass(frozen=True)
class Trial:
    """A run as tuning sees it."""

    parameters: float
    tokens: float
    flops: float
    width: int
    lr: float
    """Peak learning rate of matrices, before any transfer across width."""
    batch_tokens: float
    loss: float


@dataclass(frozen=True)
class Tuned:
    """The valley of a hyperparameter at one size and length."""

    parameters: float
    tokens: float
    flops: float
    width: int
    valley: LogParabola


@dataclass(frozen=True)
class TuningLaw:
    """The best value against compute, as in DeepSeek LLM (arXiv 2401.02954, section 3.1), and against N and D where both vary."""

    by_compute: PowerLaw
    factor: float
    """Of factor * N^n_exponent * D^d_exponent, the form of arXiv 2503.04715; NaN where the runs do not tell N from D."""
    n_exponent: float
    d_exponent: float

    def __call__(self, parameters: float, tokens: float, flops: float) -> float:
        """The best value for a run."""
        if np.isfinite(self.factor):
            return float(self.factor * parameters**self.n_exponent * tokens**self.d_exponent)
        return float(self.by_compute(flops))


def tuned_lr(trials: Sequence[Trial]) -> list[Tuned]:
    """The learning-rate valley at each (size, length, batch) that tried at least three rates; of several batches the best one."""
    return _best_per_size(_valleys(trials, "lr", ("parameters", "tokens", "flops", "width", "batch_tokens")))


def tuned_batch(trials: Sequence[Trial]) -> list[Tuned]:
    """The batch valley at each (size, length), every batch at its best learning rate."""
    best: dict[tuple[float, ...], Trial] = {}
    for trial in trials:
        key = (trial.parameters, trial.tokens, trial.batch_tokens)
        if key not in best or trial.loss < best[key].loss:
            best[key] = trial
    return _best_per_size(_valleys(list(best.values()), "batch_tokens", ("parameters", "tokens", "flops", "width")))


def fit_tuning(tuned: Sequence[Tuned], *, count: int, level: float, seed: int) -> Resampled[TuningLaw] | None:
    """The law through the minima that lie inside the values tried, or None if fewer than two do.

    Intervals come from resampled residuals around the law, and need at least four minima.
    """
    good = [point for point in tuned if not point.valley.problem]
    if len(good) < 2 or len({point.flops for point in good}) < 2:
        return None
    n, d, c, best = (
        np.array(column)
        for column in zip(*((p.parameters, p.tokens, p.flops, p.valley.minimum[0]) for p in good), strict=True)
    )
    point = _fit_law(n, d, c, best)
    fitted = np.array([point(*at) for at in zip(n, d, c, strict=True)])
    num_coefficients = 3 if np.isfinite(point.factor) else 2
    resamples: list[TuningLaw] = []
    if len(good) >= num_coefficients + 2:
        rng = np.random.default_rng(seed)
        residuals = widened(np.log(best / fitted), num_coefficients, level)
        resamples = [_fit_law(n, d, c, fitted * np.exp(rng.choice(residuals, len(best)))) for _ in range(count)]
    return Resampled(point, tuple(resamples), level)


def grid_steps_moved(tuned: Sequence[Tuned]) -> float:
    """How far the optimum moves over the sizes, in steps of the grid: within one, a small size's rate transfers to a large one.

    NaN with fewer than two minima that count: then nothing is known.
    """
    minima = [np.log(point.valley.minimum[0]) for point in tuned if not point.valley.problem]
    steps = [np.diff(np.unique(np.log(point.valley.x))).mean() for point in tuned]
    return float(np.ptp(minima) / np.mean(steps)) if len(minima) > 1 else float("nan")


def _fit_law(n: Array, d: Array, c: Array, best: Array) -> TuningLaw:
    by_compute = PowerLaw.fit(c, best)
    design = np.column_stack([np.ones(len(n)), np.log(n), np.log(d)])
    centred = design[:, 1:] - design[:, 1:].mean(axis=0)
    # N and D must vary apart from each other: along one line through log N and log D their exponents are arbitrary.
    spread = np.linalg.svd(centred, compute_uv=False)
    if len(n) < 4 or spread[-1] < 0.1 * spread[0]:
        return TuningLaw(by_compute, float("nan"), float("nan"), float("nan"))
    constant, n_exponent, d_exponent = map(float, np.linalg.lstsq(design, np.log(best), rcond=None)[0])
    return TuningLaw(by_compute, float(np.exp(constant)), n_exponent, d_exponent)


def _valleys(trials: Sequence[Trial], varied: str, fixed: tuple[str, ...]) -> list[Tuned]:
    groups: dict[tuple[float, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(getattr(trial, name) for name in fixed), []).append(trial)
    tuned = []
    for members in groups.values():
        x = np.array([getattr(trial, varied) for trial in members], dtype=np.float64)
        if len(np.unique(x)) >= 3:
            first = members[0]
            valley = LogParabola.fit(x, np.array([trial.loss for trial in members]))
            tuned.append(Tuned(first.parameters, first.tokens, first.flops, first.width, valley))
    return tuned


def _best_per_size(tuned: list[Tuned]) -> list[Tuned]:
    best: dict[tuple[float, float], Tuned] = {}
    for point in tuned:
        key = (point.parameters, point.tokens)
        if key not in best or point.valley.loss.min() < best[key].valley.loss.min():
            best[key] = point
    return sorted(best.values(), key=lambda point: (point.parameters, point.tokens))
