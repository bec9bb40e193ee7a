"""The bottom of a valley: a parabola of loss in the logarithm of what was varied (size, learning rate, batch)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.laws import Array


@dataclass(frozen=True)
class LogParabola:
    """loss = curvature z^2 + slope z + constant, z = log(x / centre)."""

    x: Array
    loss: Array
    curvature: float
    slope: float
    constant: float
    centre: float

    @classmethod
    def fit(cls, x: Array, loss: Array) -> LogParabola:
        """Least squares.

        Raises:
            SweepError: if fewer than three values of x were tried.
        """
        if len(np.unique(x)) < 3:
            raise SweepError(f"a parabola needs three different values, not {sorted(set(map(float, x)))}")
        centre = float(np.exp(np.log(x).mean()))
        curvature, slope, constant = map(float, np.polyfit(np.log(x / centre), loss, 2))
        return cls(x, loss, curvature, slope, constant, centre)

    def __call__(self, x: Array) -> Array:
        """Loss at x."""
        z = np.log(x / self.centre)
        return (self.curvature * z + self.slope) * z + self.constant

    @property
    def minimum(self) -> tuple[float, float]:
        """(x, loss) at the vertex; a minimum only if there is no `problem`."""
        shift = -self.slope / (2 * self.curvature)
        return self.centre * float(np.exp(shift)), self.constant + self.slope * shift / 2

    @property
    def problem(self) -> str:
        """Why the minimum does not count; empty when it does."""
        if self.curvature <= 0:
            return "the loss is not convex"
        if self.minimum[0] < self.x.min():
            return "the minimum lies below the smallest value"
        if self.minimum[0] > self.x.max():
            return "the minimum lies above the largest value"
        return ""
