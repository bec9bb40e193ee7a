"""What a run does about faults while it trains. What restarts it is the launcher's business."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

from pydantic import Field

from hope_megatron.config.base import Section
from hope_megatron.runtime.heartbeat import Limits

Action = Literal["off", "warn", "act"]


class HangConfig(Section):
    """After how long a rank that makes no progress is ended, and the run started again."""

    min_s: float = Field(default=30.0, gt=0)
    """Shortest limit of a phase of a step, in seconds."""
    step_factor: float = Field(default=5.0, ge=1)
    """A phase of a step may take so many times the median step."""
    start_up_s: float = Field(default=900.0, gt=0)
    """Limit of each phase of the start: imports, rendezvous, building the model, loading a checkpoint."""
    first_step_s: float = Field(default=1800.0, gt=0)
    """Limit of each phase of the first step, in which kernels are compiled."""
    evaluation_s: float = Field(default=1800.0, gt=0)
    """Limit of an evaluation, and of a measurement of the memories."""
    save_s: float = Field(default=1800.0, gt=0)
    """Limit of what training waits for in a save."""
    collective_timeout_s: float = Field(default=1800.0, gt=0)
    """Time-out of every process group: what ends a collective that a peer never joins where nobody watches."""

    @property
    def limits(self) -> Limits:
        """How long each kind of phase may take."""
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})


class BadStepConfig(Section):
    """What happens when the gradient of a step is not finite, or far larger than usual."""

    nonfinite: Action = "act"
    """A loss or gradient that is NaN or infinite. The step is computed once more; if it comes again, `act` skips the step on all
    ranks, `warn` and `off` end the run (`off` at once)."""
    extreme: Action = "warn"
    """A gradient norm beyond `extreme_deviations`: `warn` says so, `act` skips the step."""
    extreme_deviations: float = Field(default=12.0, gt=0)
    """How many robust standard deviations (of the logarithm of the norm) above the median count as extreme."""
    window: int = Field(default=128, ge=16)
    """Steps whose norms and losses make the statistics; skipped ones are left out."""
    max_in_a_row: int = Field(default=5, gt=0)
    """Skipped steps in a row after which the run stops."""


class SpikeConfig(Section):
    """What happens when the loss rises far above its usual values, and stays there."""

    action: Action = "warn"
    """`warn` says so; `act` goes back to the last checkpoint before the spike and skips the batches in between."""
    deviations: float = Field(default=8.0, gt=0)
    """How many robust standard deviations above the median a loss must be."""
    steps: int = Field(default=5, gt=0)
    """For how many steps in a row."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Rollbacks of one run; after them a spike is only said."""


class ReplicaConfig(Section):
    """The search for silent corruption: what should be equal on several ranks is compared."""

    every: int = Field(default=100, ge=0)
    """Steps between comparisons, which also precede every save; 0: never."""
    replay: bool = True
    """One micro-batch is computed again by another data-parallel rank, and its loss and gradient are compared bit by bit."""


class ResilienceConfig(Section):
    """Faults: hangs, bad steps, loss spikes, silent corruption, stragglers."""

    hang: HangConfig = HangConfig()
    bad_step: BadStepConfig = BadStepConfig()
    spike: SpikeConfig = SpikeConfig()
    replicas: ReplicaConfig = ReplicaConfig()
    straggler_ratio: float = Field(default=1.2, gt=1)
    """A rank that computes so many times longer than the median rank is named; looked at every 25 steps."""
    max_failed_saves: int = Field(default=5, gt=0)
    """Failed saves in a row after which the run stops, with its older checkpoints."""
    allow_faults: bool = False
    """Let the variable HOPE_FAULTS inject faults into this run, for drills (hope_megatron/testing/faults.py)."""
