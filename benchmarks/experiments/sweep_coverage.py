"""Do the intervals of `hope sweep fit` hold the truth as often as they say, with and without outliers?

    python benchmarks/experiments/sweep_coverage.py --json coverage.json             400 sweeps of each kind, 90 % intervals
    python benchmarks/experiments/sweep_coverage.py --designs "16 runs" --noises normal --sweeps 1000 --level 0.8

Losses are Chinchilla's law times noise, on two designs: 16 runs (4 sizes x 4 lengths) and 20 runs (4 budgets x 5 sizes). Outliers
are 20 % or 1 % off, up or down, at a random run; heavy tails are Student's t with 3 degrees of freedom, of the same standard
deviation. For each, the share of sweeps whose interval holds the truth, for the law's coefficients, the exponent of the compute-
optimal size, size and loss of the optimum at ten times the largest compute, and the loss of one more run.

`--parts allocation`: approaches 1 and 2, on the 20 runs: the exponent of the compute-optimal size, and that size at ten times the
largest compute. Approach 1 reads training curves; those are the law along the run, times the noise of the run.

`--parts repeats`: the law of repeated data, 20 runs and 12 more that repeat theirs 4 to 32 times: R_D, R_N, and the loss of the
largest size after 64 repetitions.

`--parts tuning`: the law of the best learning rate (that of the batch is fitted in the same way), from valleys of five rates at 4
to 8 budgets: its exponent, and the rate at ten times the largest compute.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hope_megatron.sweep.analysis import analyse
from hope_megatron.sweep.bootstrap import predict_run, resample_loss_law, resample_noise
from hope_megatron.sweep.collect import Observation
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.frontier import Curve, CurveTable, Frontier, fit_envelope, fit_isoflop
from hope_megatron.sweep.hyper import Trial, TuningLaw, fit_tuning, tuned_lr
from hope_megatron.sweep.laws import CHINCHILLA, DataConstrainedLaw, LossLaw, PowerLaw
from hope_megatron.sweep.parametric import fit_without_outliers
from hope_megatron.sweep.schema import FitConfig
from hope_megatron.testing.benchmark import machine, print_table, write_json

Array = NDArray[np.float64]
FLOPS_PER_TOKEN = 6.0


@dataclass(frozen=True)
class Design:
    """Runs of a sweep and the noise of their log loss."""

    parameters: Array
    tokens: Array
    noise: float

    @property
    def flops(self) -> float:
        """Of the largest run."""
        return float((FLOPS_PER_TOKEN * self.parameters * self.tokens).max())


def grid() -> Design:
    """4 sizes x 4 lengths."""
    n, d = np.meshgrid([1e6, 2e6, 4e6, 8e6], [1e8, 2e8, 4e8, 8e8], indexing="ij")
    return Design(n.ravel(), d.ravel(), 1e-3)


def isoflop() -> Design:
    """4 budgets x 5 sizes around the optimum."""
    budgets = (1e18, 1e19, 1e20, 1e21)
    n = np.concatenate([CHINCHILLA.optimum(c).parameters * np.geomspace(1 / 6, 6, 5) for c in budgets])
    return Design(n, np.repeat(budgets, 5) / (FLOPS_PER_TOKEN * n), 3e-3)


DESIGNS = {"16 runs": grid, "20 runs": isoflop}


def normal(rng: np.random.Generator, design: Design) -> Array:
    """Normal noise."""
    return rng.normal(0, design.noise, len(design.tokens))


def heavy(rng: np.random.Generator, design: Design) -> Array:
    """Student's t with 3 degrees of freedom."""
    return design.noise * rng.standard_t(3, len(design.tokens)) / math.sqrt(3)


def one_off(size: float, runs: int = 1) -> Callable[[np.random.Generator, Design], Array]:
    """Normal noise, and some runs off by a factor of 1 + size, up or down."""

    def noise(rng: np.random.Generator, design: Design) -> Array:
        errors = normal(rng, design)
        errors[rng.choice(len(errors), runs, replace=False)] += rng.choice([-1, 1], runs) * math.log1p(size)
        return errors

    return noise


NOISES = {
    "normal": normal,
    "one run 20 % off": one_off(0.2),
    "two runs 20 % off": one_off(0.2, 2),
    "one run 1 % off": one_off(0.01),
    "heavy tails": heavy,
}


def quantities(design: Design) -> dict[str, Callable[[LossLaw], float]]:
    """What a sweep is run for, as functions of a law."""
    far = 10 * design.flops
    return {
        **{name: (lambda law, name=name: getattr(law, name)) for name in ("E", "A", "B", "alpha", "beta")},
        "exponent": lambda law: law.exponents()[0],
        "size": lambda law: law.optimum(far).parameters,
        "loss": lambda law: law.optimum(far).loss,
    }


def coverage(
    design: Design, noise: Callable[[np.random.Generator, Design], Array], *, sweeps: int, resamples: int, level: float
) -> dict[str, float]:
    """Share of simulated sweeps whose intervals hold the truth, by quantity; `named`: outliers per sweep."""
    wanted, named = quantities(design), 0
    covered = dict.fromkeys([*wanted, "new run"], 0)
    n, d = design.parameters, design.tokens
    for seed in range(sweeps):
        rng = np.random.default_rng(seed)
        loss = CHINCHILLA(n, d) * np.exp(noise(rng, design))
        fit = fit_without_outliers(n, d, loss, start=CHINCHILLA)
        laws = resample_loss_law(fit, n, d, loss, delta=1e-3, count=resamples, level=level, seed=seed)
        for name, quantity in wanted.items():
            estimate = laws.estimate(quantity)
            covered[name] += estimate.low <= quantity(CHINCHILLA) <= estimate.high
        new = 2 * n.max(), 2 * d.max()
        measured = float(CHINCHILLA(*new)) * math.exp(rng.normal(0, design.noise))
        estimate = predict_run(fit, laws, *new, seed=seed)
        covered["new run"] += estimate.low <= measured <= estimate.high
        named += int((~fit.kept).sum())
    return {**{name: count / sweeps for name, count in covered.items()}, "named": named / sweeps}


BEST_LR = PowerLaw(0.2, -0.125)
"""The true law of the simulated learning rates."""


def tuning_trials(rng: np.random.Generator, budgets: Array, noise: float) -> list[Trial]:
    """Five rates, a factor of two apart, around a rate that is guessed badly; the loss is a parabola in log lr, times noise."""
    trials = []
    for c in budgets:
        n = 1e6 * (c / 1e15) ** 0.5
        guess = float(BEST_LR(c)) * (c / 1e15) ** 0.025 * math.exp(rng.uniform(-0.3, 0.3))
        for lr in guess * 2.0 ** np.arange(-2, 3):
            loss = 3 * (1 + 0.03 * math.log(lr / float(BEST_LR(c))) ** 2) * math.exp(rng.normal(0, noise))
            trials.append(Trial(n, c / (FLOPS_PER_TOKEN * n), c, 64, float(lr), 2.0**14, loss))
    return trials


def tuning_coverage(budgets: Array, noise: float, *, sweeps: int, resamples: int, level: float) -> dict[str, float]:
    """Share of simulated sweeps whose intervals hold the true exponent, and the best rate at ten times the largest budget."""
    far = 10 * float(budgets.max())
    wanted: dict[str, tuple[Callable[[TuningLaw], float], float]] = {
        "exponent": (lambda law: law.by_compute.exponent, BEST_LR.exponent),
        "rate": (lambda law: float(law.by_compute(far)), float(BEST_LR(far))),
    }
    covered = dict.fromkeys(wanted, 0)
    for seed in range(sweeps):
        trials = tuning_trials(np.random.default_rng(seed), budgets, noise)
        law = fit_tuning(tuned_lr(trials), count=resamples, level=level, seed=seed)
        for name, (quantity, truth) in wanted.items():
            if law is not None:  # otherwise no interval, which holds nothing
                estimate = law.estimate(quantity)
                covered[name] += estimate.low <= truth <= estimate.high
    return {name: count / sweeps for name, count in covered.items()}


def allocation_coverage(
    noise: Callable[[np.random.Generator, Design], Array], *, sweeps: int, resamples: int, level: float
) -> dict[str, float]:
    """Share of simulated sweeps whose intervals of approaches 1 and 2 hold the truth, by approach and quantity."""
    design = isoflop()
    n, d, far = design.parameters, design.tokens, 10 * design.flops
    wanted: dict[str, tuple[Callable[[Frontier], float], float]] = {
        "exponent": (lambda found: found.parameters.exponent, CHINCHILLA.exponents()[0]),
        "size": (lambda found: float(found.parameters(far)), CHINCHILLA.optimum(far).parameters),
    }
    covered = {f"{approach}: {name}": 0 for approach in ("curves", "profiles") for name in wanted}
    for seed in range(sweeps):
        rng = np.random.default_rng(seed)
        factor = np.exp(noise(rng, design))
        law = fit_without_outliers(n, d, CHINCHILLA(n, d) * factor, start=CHINCHILLA)
        size, tokens, factor = n[law.kept], d[law.kept], factor[law.kept]
        flops, loss = FLOPS_PER_TOKEN * size * tokens, CHINCHILLA(size, tokens) * factor
        curves = CurveTable.build([_curve(*run) for run in zip(size, tokens, factor, strict=True)])
        fits: dict[str, Callable[[Array], Frontier]] = {
            "curves": partial(_by_curves, curves),
            "profiles": partial(_by_profiles, size, tokens, flops, loss),
        }
        residuals = law.log_residuals[law.kept]
        for approach, fit in fits.items():
            try:
                found = resample_noise(fit, residuals, count=resamples, level=level, seed=seed)
            except SweepError:
                continue  # no interval, which holds nothing
            for name, (quantity, truth) in wanted.items():
                estimate = found.estimate(quantity)
                covered[f"{approach}: {name}"] += estimate.low <= truth <= estimate.high
    return {name: count / sweeps for name, count in covered.items()}


def _by_curves(curves: CurveTable, factors: Array) -> Frontier:
    return fit_envelope(replace(curves, loss=curves.loss * factors[:, None]))


def _by_profiles(size: Array, tokens: Array, flops: Array, loss: Array, factors: Array) -> Frontier:
    return fit_isoflop(size, tokens, flops, loss * factors)


def _curve(size: float, tokens: float, factor: float) -> Curve:
    along = np.geomspace(tokens / 100, tokens, 40)
    return Curve(size, FLOPS_PER_TOKEN * size * along, along, CHINCHILLA(size, along) * factor)


REPEATS = DataConstrainedLaw(CHINCHILLA, R_D=15.4, R_N=5.3)
"""Muennighoff et al., arXiv 2305.16264."""


def repeats_coverage(
    noise: Callable[[np.random.Generator, Design], Array], *, sweeps: int, resamples: int, level: float
) -> dict[str, float]:
    """Share of simulated sweeps whose intervals of the law of repeated data hold the truth, by quantity."""
    fresh = isoflop()
    budget = np.array([1e18, 1e19, 1e20])
    sizes, tokens = CHINCHILLA.optimum(1e19).parameters * np.array([1, 4, 16]), budget / 1e9
    n, unique = np.repeat(sizes, 4), np.repeat(tokens, 4)
    d = unique * np.tile([4.0, 8.0, 16.0, 32.0], 3)
    design = Design(np.append(fresh.parameters, n), np.append(fresh.tokens, d), fresh.noise)
    unique = np.append(fresh.tokens, unique)
    far = sizes[-1], 64 * tokens[-1], tokens[-1]
    wanted: dict[str, Callable[[DataConstrainedLaw], float]] = {
        "R_D": lambda law: law.R_D,
        "R_N": lambda law: law.R_N,
        "loss": lambda law: float(law(*far)),
    }
    covered = dict.fromkeys(wanted, 0)
    config = FitConfig(bootstrap=resamples, level=level)
    for seed in range(sweeps):
        loss = REPEATS(design.parameters, design.tokens, unique) * np.exp(noise(np.random.default_rng(seed), design))
        runs = [
            Observation(
                name=f"run {i}",
                family="runs",
                parameters=float(design.parameters[i]),
                tokens=float(design.tokens[i]),
                flops=float(FLOPS_PER_TOKEN * design.parameters[i] * design.tokens[i]),
                loss=float(loss[i]),
                unique_tokens=float(unique[i]),
            )
            for i in range(len(loss))
        ]
        (found,) = analyse(runs, config)
        for name, quantity in wanted.items():
            if found.data_constrained is not None:
                estimate = found.data_constrained.estimate(quantity)
                covered[name] += estimate.low <= quantity(REPEATS) <= estimate.high
    return {name: count / sweeps for name, count in covered.items()}


def loss_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per design and noise."""
    for design, noise in itertools.product(args.designs, args.noises):
        found = coverage(
            DESIGNS[design](), NOISES[noise], sweeps=args.sweeps, resamples=args.resamples, level=args.level
        )
        yield {"design": design, "noise": noise, **found}


def tuning_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per number of budgets and noise."""
    for count, noise in itertools.product((4, 5, 6, 8), (0.001, 0.003, 0.01)):
        budgets = np.geomspace(1e15, 1e18, count)
        found = tuning_coverage(budgets, noise, sweeps=args.sweeps, resamples=args.resamples, level=args.level)
        yield {"budgets": count, "noise": noise, **found}


def noise_rows(args: argparse.Namespace, measure: Callable[..., dict[str, float]]) -> Iterator[dict[str, Any]]:
    """A row per noise."""
    for noise in args.noises:
        found = measure(NOISES[noise], sweeps=args.sweeps, resamples=args.resamples, level=args.level)
        yield {"noise": noise, **found}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "loss": loss_rows,
    "tuning": tuning_rows,
    "allocation": lambda args: noise_rows(args, allocation_coverage),
    "repeats": lambda args: noise_rows(args, repeats_coverage),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=400, help="simulated sweeps of each kind (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=39, help="resamples behind an interval (default: %(default)s)")
    parser.add_argument("--level", type=float, default=0.9, help="nominal coverage (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="laws to simulate (default: all)")
    parser.add_argument(
        "--designs", nargs="+", choices=DESIGNS, default=[*DESIGNS], help="of the sweeps (default: all)"
    )
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=[*NOISES], help="of the losses (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in args.parts}
    for part in args.parts:
        for row in PARTS[part](args):
            rows[part].append(row)
            print(f"{part}, {', '.join(map(str, list(row.values())[:2]))}: done", flush=True)
            write_json(args.json, {"machine": machine(), "arguments": vars(args), "rows": rows})
        print_table(list(rows[part][0]), [list(row.values()) for row in rows[part]])
    error = math.sqrt(args.level * (1 - args.level) / args.sweeps)
    print(f"nominal {args.level:.2f}; a standard error of a share over {args.sweeps} sweeps is {error:.3f}")


if __name__ == "__main__":
    main()
