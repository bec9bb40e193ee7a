"""How far a run has come. Everything else about its position follows from these numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take over the progress that a checkpoint recorded."""
        self.step, self.samples, self.tokens = int(values["step"]), int(values["samples"]), int(values["tokens"])
        self.wall_s = float(values["wall_s"])
        self.newton_schulz_calls = int(values["newton_schulz_calls"])
