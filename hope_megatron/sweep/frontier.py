"""Approaches 1 and 2: the optimal size and number of tokens against compute, from curves and from isoFLOP profiles
(Hoffmann et al., arXiv 2203.15556, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.laws import Array, ComputeLaw, PowerLaw
from hope_megatron.sweep.parabola import LogParabola

SAME_COMPUTE = 0.1
"""Runs whose FLOPs differ by less than this share belong to one profile: steps are whole numbers."""

_ENVELOPE_POINTS = 300


@dataclass(frozen=True)
class Frontier:
    """Optimal allocation as power laws of compute."""

    parameters: PowerLaw
    """N_opt against C; the exponent is the paper's a."""
    tokens: PowerLaw
    """D_opt against C; the exponent is the paper's b."""
    points: Array
    """[points, 4]: C, N_opt, D_opt and loss, to which the laws were fitted."""


@dataclass(frozen=True)
class Profile:
    """Runs of equal compute: the parabola of their loss in log N."""

    flops: float
    valley: LogParabola


def isoflop_profiles(parameters: Array, flops: Array, loss: Array) -> list[Profile]:
    """Group runs by compute and fit a parabola to each group of at least three sizes, smallest budget first."""
    return [
        Profile(float(np.exp(np.log(flops[members]).mean())), LogParabola.fit(parameters[members], loss[members]))
        for members in _groups(np.log(flops))
        if len(np.unique(parameters[members])) >= 3
    ]


def fit_isoflop(parameters: Array, tokens: Array, flops: Array, loss: Array) -> Frontier:
    """Approach 2: a power law through the minima of the profiles.

    Raises:
        SweepError: if fewer than two profiles have a minimum inside their sizes.
    """
    profiles = isoflop_profiles(parameters, flops, loss)
    good = [profile for profile in profiles if not profile.valley.problem]
    if len(good) < 2:
        found = "; ".join(
            f"at {profile.flops:.2g} FLOPs {profile.valley.problem}" for profile in profiles if profile.valley.problem
        )
        raise SweepError(
            f"isoFLOP profiles need two budgets with three sizes around the minimum each; {len(good)} found"
            + (f" ({found})" if found else "")
        )
    compute = ComputeLaw.fit(parameters, flops / tokens)
    minima = [(profile.flops, *profile.valley.minimum) for profile in good]
    points = np.array([(c, n, float(compute.tokens(n, c)), best) for c, n, best in minima])
    return _frontier(points)


@dataclass(frozen=True)
class Curve:
    """Training loss of a run along the way."""

    parameters: float
    flops: Array
    """Spent so far, increasing."""
    tokens: Array
    loss: Array
    """Smoothed training loss."""


@dataclass(frozen=True)
class CurveTable:
    """Curves of several runs, read off at common values of compute; NaN where a curve does not reach."""

    flops: Array
    """[points]"""
    parameters: Array
    """[runs]"""
    tokens: Array
    """[runs, points]"""
    loss: Array
    """[runs, points]"""

    @classmethod
    def build(cls, curves: Sequence[Curve]) -> CurveTable:
        """Interpolate all curves at points evenly spaced in log C."""
        low, high = min(curve.flops[0] for curve in curves), max(curve.flops[-1] for curve in curves)
        flops = np.geomspace(low, high, _ENVELOPE_POINTS)

        def read_off(curve: Curve, values: Array) -> Array:
            return np.interp(np.log(flops), np.log(curve.flops), values, left=np.nan, right=np.nan)

        return cls(
            flops,
            np.array([curve.parameters for curve in curves]),
            np.array([read_off(curve, curve.tokens) for curve in curves]),
            np.array([read_off(curve, curve.loss) for curve in curves]),
        )

    def take(self, runs: NDArray[np.intp]) -> CurveTable:
        """Some of the runs."""
        return CurveTable(self.flops, self.parameters[runs], self.tokens[runs], self.loss[runs])


def fit_envelope(table: CurveTable) -> Frontier:
    """Approach 1: at each compute, which run had the lowest loss there, and of what size was it.

    Where the winner is the smallest or the largest size that reaches this compute, the true optimum may lie outside the
    sizes; such points are left out.

    Raises:
        SweepError: if fewer than two sizes win somewhere with a smaller and a larger one beside them.
    """
    there = np.isfinite(table.loss)
    winner = np.argmin(np.where(there, table.loss, np.inf), axis=0)
    sizes = table.parameters[:, None]
    best = table.parameters[winner]
    inside = (np.where(there, sizes, np.inf).min(axis=0) < best) & (best < np.where(there, sizes, -np.inf).max(axis=0))
    at = np.flatnonzero(inside)
    if len(np.unique(best[at])) < 2:
        raise SweepError(
            "the envelope of the training curves needs at least two sizes that win somewhere, with a smaller and a larger one "
            "beside them; add sizes, or train the small ones longer"
        )
    return _frontier(
        np.column_stack([table.flops[at], best[at], table.tokens[winner[at], at], table.loss[winner[at], at]])
    )


def _frontier(points: Array) -> Frontier:
    return Frontier(PowerLaw.fit(points[:, 0], points[:, 1]), PowerLaw.fit(points[:, 0], points[:, 2]), points)


def _groups(log_flops: Array) -> list[NDArray[np.intp]]:
    """Indices of runs of nearly equal compute, smallest first: a gap of more than SAME_COMPUTE opens a new group."""
    order = np.argsort(log_flops, kind="stable")
    breaks = np.flatnonzero(np.diff(log_flops[order]) > np.log1p(SAME_COMPUTE)) + 1
    return np.split(order, breaks)
