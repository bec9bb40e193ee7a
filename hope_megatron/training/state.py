"""How far a run has come. Everything else about its position follows from these numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainingState:
    """Progress of a run, over all its restarts.

    The data position is `samples`: the batch of any step is a pure function of it, whatever the number of ranks.
    """

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Training sequences consumed."""
    tokens: int = 0
    """Valid target tokens trained on."""
    wall_s: float = 0.0
    """Seconds spent in steps."""
    newton_schulz_calls: int = 0
    """Matrices orthogonalised, over all ranks; brought up to date when a checkpoint is saved."""

    skipped_steps: int = 0
    """Steps whose update was refused; each stands in the ledger."""
    skipped_in_a_row: int = 0
    """Those of them since the last accepted step."""
    high_losses: int = 0
    """Steps in a row whose loss was far above the usual."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the last accepted steps."""
    recent_losses: list[float] = field(default_factory=list)
    """Their losses."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take over the progress that a checkpoint recorded."""
        self.step, self.samples, self.tokens = int(values["step"]), int(values["samples"]), int(values["tokens"])
        self.wall_s = float(values["wall_s"])
        self.newton_schulz_calls = int(values["newton_schulz_calls"])
        for name in ("skipped_steps", "skipped_in_a_row", "high_losses"):  # not in older checkpoints
            setattr(self, name, int(values.get(name, 0)))
        self.recent_norms, self.recent_losses = (list(values.get(f"recent_{name}", ())) for name in ("norms", "losses"))
