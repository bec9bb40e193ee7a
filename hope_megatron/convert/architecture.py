"""Whether two models are the same architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ConversionError


def check_architecture(exported: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    """Refuse a run whose model is another one than `directory` holds, naming every key that differs."""
    differing = [key for key in wanted if key != "name" and exported[key] != wanted[key]]
    if differing:
        lines = "".join(f"\n  model.{key}: {exported[key]} there, {wanted[key]} in the run" for key in differing)
        raise ConversionError(
            f"{directory} is another model than the run's:{lines}\nUse its architecture in the run file"
        )
