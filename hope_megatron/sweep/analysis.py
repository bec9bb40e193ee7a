"""Every law of a sweep, family by family: fits, intervals, checks, and what could not be fitted and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hope_megatron.sweep.bootstrap import (
    Estimate,
    Indices,
    Resampled,
    predict_run,
    resample_loss_law,
    resample_noise,
    resample_runs,
)
from hope_megatron.sweep.collect import Observation, best_of_tuning
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.frontier import (
    SAME_COMPUTE,
    CurveTable,
    Frontier,
    Profile,
    fit_envelope,
    fit_isoflop,
    isoflop_profiles,
)
from hope_megatron.sweep.hyper import Trial, Tuned, TuningLaw, fit_tuning, tuned_batch, tuned_lr
from hope_megatron.sweep.laws import Array, ComputeLaw, DataConstrainedLaw, LossLaw
from hope_megatron.sweep.parametric import (
    MIN_RUNS,
    NUM_COEFFICIENTS,
    OUTLIER_SCALES,
    LossFit,
    fit_data_constrained,
    fit_without_outliers,
    outlier_scales,
)
from hope_megatron.sweep.schema import FitConfig

SINGLE_EPOCH = 1.05
"""Runs of more passes over their data count as repeating it."""


@dataclass(frozen=True)
class Outlier:
    """A run that the law does not explain."""

    name: str
    log_residual: float
    """log of the measured loss minus that of the law's."""
    scales: float
    """Size of the residual in robust standard deviations."""


@dataclass(frozen=True)
class HeldOut:
    """A run of the largest budget, predicted from the smaller ones."""

    name: str
    measured: float
    predicted: Estimate

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted.value / self.measured - 1

    @property
    def covered(self) -> bool:
        """Whether the prediction's interval holds the measurement."""
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass
class FamilyAnalysis:
    """The laws of one model family. What could not be fitted is None, and `notes` says why."""

    family: str
    runs: list[Observation]
    """One per size and length: well-tuned, mean over seeds."""
    compute: ComputeLaw
    fresh: list[Observation] = field(default_factory=list)
    """The runs that do not repeat their data, to which the loss law and the approaches are fitted, but for outliers."""
    fit: LossFit | None = None
    law: Resampled[LossLaw] | None = None
    """Approach 3."""
    outliers: list[Outlier] = field(default_factory=list)
    """Runs that the law does not explain: named, and left out of every law and interval."""
    heldout: list[HeldOut] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    isoflop: Resampled[Frontier] | None = None
    """Approach 2."""
    envelope: Resampled[Frontier] | None = None
    """Approach 1."""
    data_constrained: Resampled[DataConstrainedLaw] | None = None
    lr_valleys: list[Tuned] = field(default_factory=list)
    lr_law: Resampled[TuningLaw] | None = None
    batch_valleys: list[Tuned] = field(default_factory=list)
    batch_law: Resampled[TuningLaw] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def explained(self) -> list[Observation]:
        """The fresh runs without outliers."""
        named = {outlier.name for outlier in self.outliers}
        return [run for run in self.fresh if run.name not in named]

    def optimum(self, flops: float) -> dict[str, Estimate] | None:
        """N, D and loss of the best run that this compute buys (approach 3), or None without a law."""
        if self.law is None or not math.isfinite(self.law.point.optimum(flops, self.compute).loss):
            return None

        def quantity(name: str) -> Callable[[LossLaw], float]:
            return lambda law: getattr(law.optimum(flops, self.compute), name)

        return {name: self.law.estimate(quantity(name)) for name in ("parameters", "tokens", "loss")}

    def predict(self, parameters: float, tokens: float) -> Estimate:
        """Loss of a new run, with the interval that covers it, scatter included."""
        assert self.fit is not None and self.law is not None
        return predict_run(self.fit, self.law, parameters, tokens)


def analyse(observations: Sequence[Observation], config: FitConfig) -> list[FamilyAnalysis]:
    """Fit everything that the observations support, for each family in the order in which it first appears."""
    families = list(dict.fromkeys(observation.family for observation in observations))
    return [_analyse_family(name, [o for o in observations if o.family == name], config) for name in families]


def _analyse_family(family: str, observations: list[Observation], config: FitConfig) -> FamilyAnalysis:
    runs = sorted(best_of_tuning(observations), key=lambda run: (run.flops, run.parameters))
    n, d, c, _ = columns(runs)
    result = FamilyAnalysis(family, runs, ComputeLaw.fit(n, c / d))
    single = np.array([not run.epochs > SINGLE_EPOCH for run in runs])
    if not single.all():
        result.notes.append(
            f"{int((~single).sum())} runs repeat their data; "
            f"the loss law and the three approaches are fitted to the other {int(single.sum())}"
        )
    result.fresh = [run for run, is_single in zip(runs, single, strict=True) if is_single]
    _attempt(result, "approach 3", lambda: _fit_law(result, config))
    _attempt(result, "approach 2", lambda: _fit_isoflop(result, config))
    _attempt(result, "approach 1", lambda: _fit_envelope(result, config))
    _attempt(result, "held-out check", lambda: _check_heldout(result, config))
    if not single.all() and result.law is not None:
        _attempt(result, "data-constrained law", lambda: _fit_repeats(result, config))
    _fit_tuning(result, observations, config)
    return result


def columns(runs: Sequence[Observation]) -> tuple[Array, Array, Array, Array]:
    """Parameters, tokens, FLOPs and loss as arrays."""
    table = np.array([(run.parameters, run.tokens, run.flops, run.loss) for run in runs], dtype=np.float64).reshape(
        -1, 4
    )
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def find_outliers(names: Sequence[str], fit: LossFit) -> list[Outlier]:
    """The runs that a fit has left out, worst first."""
    scales = outlier_scales(fit.log_residuals, fit.kept)
    found = [
        Outlier(name, float(fit.log_residuals[i]), float(scales[i])) for i, name in enumerate(names) if not fit.kept[i]
    ]
    return sorted(found, key=lambda outlier: -outlier.scales)


def _attempt(result: FamilyAnalysis, what: str, fit: Callable[[], None]) -> None:
    try:
        fit()
    except SweepError as error:
        result.notes.append(f"{what}: not fitted: {error}")


def _fit_law(result: FamilyAnalysis, config: FitConfig) -> None:
    runs = result.fresh
    result.fit, result.law = _law_with_intervals(runs, config)
    result.outliers = find_outliers([run.name for run in runs], result.fit)
    if result.fit.at_bounds:
        result.notes.append(
            f"approach 3: the runs do not determine {', '.join(result.fit.at_bounds)}, which ended at the edge of what is allowed; "
            "spread sizes and tokens wider"
        )


def _law_with_intervals(runs: Sequence[Observation], config: FitConfig) -> tuple[LossFit, Resampled[LossLaw]]:
    n, d, _, loss = columns(runs)
    fit = fit_without_outliers(n, d, loss, delta=config.huber_delta)
    laws = resample_loss_law(
        fit, n, d, loss, delta=config.huber_delta, count=config.bootstrap, level=config.level, seed=config.seed
    )
    return fit, laws


def _fit_isoflop(result: FamilyAnalysis, config: FitConfig) -> None:
    runs = result.explained
    n, d, c, loss = columns(runs)
    result.profiles = isoflop_profiles(n, c, loss)

    def fit(factors: Array) -> Frontier:
        return fit_isoflop(n, d, c, loss * factors)

    result.isoflop = _with_noise(result, fit, runs, config)


def _fit_envelope(result: FamilyAnalysis, config: FitConfig) -> None:
    runs = result.explained
    runs = [run for run in runs if run.curve is not None]
    if not runs:
        raise SweepError("there are no training curves")
    table = CurveTable.build([run.curve for run in runs if run.curve is not None])

    def fit(factors: Array) -> Frontier:
        return fit_envelope(replace(table, loss=table.loss * factors[:, None]))

    result.envelope = _with_noise(result, fit, runs, config)


def _with_noise(
    result: FamilyAnalysis, fit: Callable[[Array], Frontier], runs: Sequence[Observation], config: FitConfig
) -> Resampled[Frontier]:
    """A frontier with intervals; without them where no loss law says how noisy runs are."""
    if result.law is None:
        return Resampled(fit(np.ones(len(runs))), (), config.level)
    n, d, _, loss = columns(runs)
    residuals = np.log(loss / result.law.point(n, d))
    return resample_noise(fit, residuals, count=config.bootstrap, level=config.level, seed=config.seed)


def _check_heldout(result: FamilyAnalysis, config: FitConfig) -> None:
    runs = result.fresh
    largest = max((run.flops for run in runs), default=0.0)
    smaller = [run for run in runs if run.flops < largest / (1 + SAME_COMPUTE)]
    if len(smaller) < MIN_RUNS:
        raise SweepError(f"{len(smaller)} runs lie below the largest budget, and the law needs {MIN_RUNS}")
    fit, laws = _law_with_intervals(smaller, config)
    for run in runs[len(smaller) :]:
        result.heldout.append(HeldOut(run.name, run.loss, predict_run(fit, laws, run.parameters, run.tokens)))


def _fit_repeats(result: FamilyAnalysis, config: FitConfig) -> None:
    assert result.law is not None
    named = {outlier.name for outlier in result.outliers}
    runs = [run for run in result.runs if run.name not in named]
    point, residuals = _repeats_law(runs, result, config)
    scales = outlier_scales(residuals, np.ones(len(runs), dtype=np.bool_), NUM_COEFFICIENTS + 2)
    found = [Outlier(run.name, float(r), float(s)) for run, r, s in zip(runs, residuals, scales) if s > OUTLIER_SCALES]
    if found and len(found) <= len(runs) // 4:
        result.outliers += sorted(found, key=lambda outlier: -outlier.scales)
        runs = [run for run, scale in zip(runs, scales) if scale <= OUTLIER_SCALES]
        point, residuals = _repeats_law(runs, result, config)
    n, d, _, loss = columns(runs)
    unique = _unique(runs)

    def refit(members: Indices) -> DataConstrainedLaw:
        if len(np.unique(members)) < MIN_RUNS + 2:
            raise SweepError("too few different runs")
        part = n[members], d[members], unique[members], loss[members]
        return fit_data_constrained(point.base, result.compute, *part, delta=config.huber_delta, start=point)

    result.data_constrained = resample_runs(
        refit, len(runs), count=config.bootstrap, level=config.level, seed=config.seed
    )


def _repeats_law(
    runs: Sequence[Observation], result: FamilyAnalysis, config: FitConfig
) -> tuple[DataConstrainedLaw, Array]:
    """The law of runs that repeat their data, and the residuals of log loss."""
    assert result.law is not None
    n, d, _, loss = columns(runs)
    law = fit_data_constrained(result.law.point, result.compute, n, d, _unique(runs), loss, delta=config.huber_delta)
    return law, np.log(loss / law(n, d, _unique(runs)))


def _unique(runs: Sequence[Observation]) -> Array:
    return np.array([min(run.unique_tokens, run.tokens) for run in runs])


def _fit_tuning(result: FamilyAnalysis, observations: list[Observation], config: FitConfig) -> None:
    trials = [
        Trial(o.parameters, o.tokens, o.flops, o.width, o.base_lr, o.batch_tokens, o.loss)
        for o in observations
        if math.isfinite(o.base_lr) and math.isfinite(o.batch_tokens)
    ]
    result.lr_valleys, result.batch_valleys = tuned_lr(trials), tuned_batch(trials)
    count, level, seed = config.bootstrap, config.level, config.seed
    result.lr_law = fit_tuning(result.lr_valleys, count=count, level=level, seed=seed)
    result.batch_law = fit_tuning(result.batch_valleys, count=count, level=level, seed=seed)
    for what, valleys in (("learning rate", result.lr_valleys), ("batch", result.batch_valleys)):
        for valley in valleys:
            if valley.valley.problem:
                result.notes.append(
                    f"{what} at N = {valley.parameters:.3g}, D = {valley.tokens:.3g}: {valley.valley.problem}; not counted"
                )
