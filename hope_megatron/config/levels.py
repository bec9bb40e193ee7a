"""One level of the continuum memory system, and its clocks.

Equation numbers refer to "Nested Learning" (arXiv 2512.24695).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.clock import UpdateClock, update_clock


class PeriodChange(Section):
    """From when on a level has another period."""

    from_step: int = Field(gt=0)
    """Optimizer steps before the change: a step of an update of the period until then."""
    period: int = Field(gt=0)
    """The period from then on, in optimizer steps."""


class AdaptivePeriod(Section):
    """Experiment: at each update a level's period follows how far its gathered gradient agrees with its momentum (their cosine)."""

    shortest: int = Field(default=1, gt=0)
    """Lower bound of the period, in optimizer steps."""
    longest: int = Field(default=64, gt=0)
    """Upper bound of the period."""
    halve_above: float = Field(default=0.3, ge=-1, le=1)
    """Halve the period where they agree by more."""
    double_below: float = Field(default=0.0, ge=-1, le=1)
    """Double the period where they agree by less."""


class CMSLevelConfig(Section):
    """One level of the continuum memory system (eqs. 70-74): a residual MLP with a clock of its own."""

    hidden_size: int = Field(gt=0)
    """Hidden width of the level's MLP (for swiglu: of each of gate and up)."""
    update_period_steps: int = Field(default=1, gt=0)
    """The level's parameters change every this many optimizer steps, by the sum of the gradients meanwhile (eq. 71)."""

    update_period_changes: tuple[PeriodChange, ...] = ()
    """Other periods later in the run, in order: `[{from_step: 400, period: 2}]`."""

    update_period_adaptive: AdaptivePeriod | None = None
    """Experiment: choose the period anew at every update of the level, by the agreement of gradients. None: as above."""

    inner_chunk_tokens: int | None = Field(default=None, gt=0)
    """In context: a fast copy of the level's matrices changes every this many tokens (eq. 71). None: never."""
    inner_rate: float = Field(default=0.0, ge=0.0)
    """In context: step size on the next-token loss, in nats summed over the chunk. 0 is the static level, bit for bit."""
    inner_rate_kind: Literal["constant", "learned", "per_channel"] = "constant"
    """inner_rate itself; or times a learned factor that starts at 1, one for the level or one per hidden channel."""
    inner_momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    """In context: momentum of the step, from one update to the next."""
    inner_weight_decay: float = Field(default=0.0, ge=0.0)
    """In context: decoupled weight decay of the step; the fast copy loses inner_rate times this per update."""

    @property
    def clock(self) -> UpdateClock:
        """When the level's parameters change over a run."""
        return update_clock(
            self.update_period_steps, tuple((change.from_step, change.period) for change in self.update_period_changes)
        )

    @property
    def period_text(self) -> str:
        """Its clock, for people."""
        rule = self.update_period_adaptive
        return (
            f"{self.clock.text()} at first, then {rule.shortest} to {rule.longest} by agreement"
            if rule
            else self.clock.text()
        )

    @property
    def gathers(self) -> bool:
        """Whether the optimizer keeps a sum of gradients for the level."""
        return self.clock.longest > 1 or self.update_period_adaptive is not None

    @property
    def ticks(self) -> bool:
        """Whether the level learns in context."""
        return self.inner_chunk_tokens is not None and self.inner_rate > 0

    @model_validator(mode="after")
    def _check(self) -> CMSLevelConfig:
        if (text := self.clock.conflict()) is not None:
            raise ConfigError(f"update_period_changes of a CMS level: {text}")
        self._check_adaptive()
        if self.inner_rate > 0 and self.inner_chunk_tokens is None:
            raise ConfigError(
                f"a CMS level has inner_rate={self.inner_rate:g} but no inner_chunk_tokens, so it never ticks in context; "
                "set inner_chunk_tokens, for example 64, or inner_rate=0"
            )
        if self.inner_rate * self.inner_weight_decay >= 1:
            raise ConfigError(
                f"inner_rate={self.inner_rate:g} times inner_weight_decay={self.inner_weight_decay:g} is 1 or more: an update "
                "would forget everything and overshoot; lower one of them"
            )
        return self

    def _check_adaptive(self) -> None:
        rule = self.update_period_adaptive
        if rule is None:
            return
        if self.update_period_changes:
            raise ConfigError("a CMS level has update_period_changes and update_period_adaptive; keep one of them")
        if not rule.shortest <= self.update_period_steps <= rule.longest or rule.double_below > rule.halve_above:
            raise ConfigError(
                f"update_period_adaptive wants shortest <= update_period_steps <= longest and double_below <= halve_above, found "
                f"{rule.shortest}, {self.update_period_steps}, {rule.longest} and {rule.double_below:g}, {rule.halve_above:g}"
            )
