"""Judges every step before it changes anything: is the gradient finite, is it of a usual size, does the loss stay where it was?

The statistics are medians over the last accepted steps, so that neither a NaN nor a spike moves them; they are part of the
training state, so that a resumed run judges as the undisturbed one did.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from enum import Enum

from hope_megatron.config.resilience import BadStepConfig, SpikeConfig
from hope_megatron.training.state import TrainingState

MIN_STEPS = 16
"""Steps before which there are no usual values."""
_TO_DEVIATION = 1.4826
"""From the median absolute deviation to the standard deviation of a normal distribution."""
_NORM_FLOOR = 0.1
"""Smallest deviation of log norms that is believed."""
_LOSS_FLOOR = 0.02
"""Smallest deviation of losses that is believed, in nats per token."""


class Judgement(Enum):
    """Of a step's gradient."""

    GOOD = 0
    EXTREME = 1
    NONFINITE = 2


def deviations_above(value: float, usual: Sequence[float], floor: float) -> float:
    """By how many robust standard deviations a value exceeds the median of usual ones; 0 while there are too few."""
    if len(usual) < MIN_STEPS:
        return 0.0
    median = statistics.median(usual)
    deviation = _TO_DEVIATION * statistics.median(abs(other - median) for other in usual)
    return (value - median) / max(deviation, floor)


class Guard:
    """The rules of one run; what it remembers is in the training state."""

    def __init__(self, bad_step: BadStepConfig, spike: SpikeConfig) -> None:
        self.bad_step, self.spike = bad_step, spike

    def judge(self, state: TrainingState, loss: float, norm: float) -> Judgement:
        """Judge a step by its loss (of this rank or of all) and its global gradient norm."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Judgement.NONFINITE
        if self.bad_step.extreme == "off" or norm <= 0:
            return Judgement.GOOD
        usual = [math.log(other) for other in state.recent_norms if other > 0]
        beyond = deviations_above(math.log(norm), usual, _NORM_FLOOR)
        return Judgement.EXTREME if beyond > self.bad_step.extreme_deviations else Judgement.GOOD

    def refuses(self, judgement: Judgement) -> bool:
        """Whether a step so judged must not change anything."""
        return judgement is Judgement.NONFINITE or (judgement is Judgement.EXTREME and self.bad_step.extreme == "act")

    def accept(self, state: TrainingState, loss: float, norm: float) -> bool:
        """Remember an accepted step. Whether the loss has been too high for so many steps in a row that this is a spike."""
        high = (
            self.spike.action != "off"
            and deviations_above(loss, state.recent_losses, _LOSS_FLOOR) > self.spike.deviations
        )
        state.skipped_in_a_row = 0
        if high:
            state.high_losses += 1
            return state.high_losses % self.spike.steps == 0
        state.high_losses = 0
        for recent, value in ((state.recent_norms, norm), (state.recent_losses, loss)):
            recent.append(value)
            del recent[: -self.bad_step.window]
        return False
