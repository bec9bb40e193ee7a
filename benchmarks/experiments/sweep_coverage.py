"""Do the intervals of `hope sweep fit` hold the truth as often as they say, with and without outliers?

    python benchmarks/experiments/sweep_coverage.py --json coverage.json             400 sweeps of each kind, 90 % intervals
    python benchmarks/experiments/sweep_coverage.py --designs "16 runs" --noises normal --sweeps 1000 --level 0.8

Losses are Chinchilla's law times noise, on two designs: 16 runs (4 sizes x 4 lengths) and 20 runs (4 budgets x 5 sizes). Outliers
are 20 % or 1 % off, up or down, at a random run; heavy tails are Student's t with 3 degrees of freedom, of the same standard
deviation. For each, the share of sweeps whose interval holds the truth, for the law's coefficients, the exponent of the compute-
optimal size, size and loss of the optimum at ten times the largest compute, and the loss of one more run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hope_megatron.sweep.bootstrap import predict_run, resample_loss_law
from hope_megatron.sweep.laws import CHINCHILLA, LossLaw
from hope_megatron.sweep.parametric import fit_without_outliers
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=400, help="simulated sweeps of each kind (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=39, help="resamples behind an interval (default: %(default)s)")
    parser.add_argument("--level", type=float, default=0.9, help="nominal coverage (default: %(default)s)")
    parser.add_argument(
        "--designs", nargs="+", choices=DESIGNS, default=[*DESIGNS], help="of the sweeps (default: all)"
    )
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=[*NOISES], help="of the losses (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for design_name in args.designs:
        for noise_name in args.noises:
            design, noise = DESIGNS[design_name], NOISES[noise_name]
            found = coverage(design(), noise, sweeps=args.sweeps, resamples=args.resamples, level=args.level)
            rows.append({"design": design_name, "noise": noise_name, **found})
            print(f"{design_name}, {noise_name}: done", flush=True)
            write_json(args.json, {"machine": machine(), "arguments": vars(args), "rows": rows})
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    error = math.sqrt(args.level * (1 - args.level) / args.sweeps)
    print(f"nominal {args.level:.2f}; a standard error of a share over {args.sweeps} sweeps is {error:.3f}")


if __name__ == "__main__":
    main()
