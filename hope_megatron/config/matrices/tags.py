"""What an optimizer knows about a parameter beside its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hope_megatron.config.clock import Changes


@dataclass(frozen=True)
class ParamTags:
    """The tags of one parameter, checked and with defaults filled in."""

    role: str = "matrix"
    update_period_steps: int = 1
    weight_decay: bool = True
    partition_dim: int | None = None
    """Sharded dimension, non-negative; None: replicated over tensor-parallel ranks."""
    partition_stride: int = 1
    fused_parts: tuple[int, ...] = ()
    update_period_changes: Changes = ()
    adaptive_level: int = 0

    @property
    def group_name(self) -> str:
        """Name of the parameter group that parameters with these tags are in."""
        slow = self.update_period_steps > 1 or self.update_period_changes or self.adaptive_level
        period = f"/period_{self.update_period_steps}" if slow else ""
        period += "".join(f"_then_{period}_at_{step}" for step, period in self.update_period_changes)
        period += f"/adaptive_{self.adaptive_level}" if self.adaptive_level else ""
        return self.role + period + ("" if self.weight_decay else "/no_decay")

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON; `from_dict` is the inverse."""
        changes = [list(change) for change in self.update_period_changes]
        return {**asdict(self), "fused_parts": list(self.fused_parts), "update_period_changes": changes}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParamTags:
        changes = tuple((step, period) for step, period in values.get("update_period_changes", ()))
        return cls(**{**values, "fused_parts": tuple(values["fused_parts"]), "update_period_changes": changes})
