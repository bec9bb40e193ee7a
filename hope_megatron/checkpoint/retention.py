"""Which checkpoints of a run stay."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from hope_megatron.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    CheckpointDamagedError,
    checkpoint_step,
    list_checkpoints,
)

log = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
"""Prefix of directories that are being written or deleted: no checkpoints."""


@dataclass(frozen=True)
class Retention:
    """What is kept."""

    keep_last: int
    """Number of newest checkpoints that stay."""
    keep_every: int | None
    """Checkpoints at multiples of this many steps stay forever."""
    keep_best: int
    """Number of checkpoints with the lowest `heldout_loss` in their description that stay; of equal ones the newer."""

    def apply(self, directory: Path) -> None:
        """Delete what need not stay."""
        sealed = sealed_checkpoints(directory)
        best = self._best(sealed)
        for path in sealed[self.keep_last :]:
            if path not in best and (not self.keep_every or checkpoint_step(path) % self.keep_every):
                remove_checkpoint(path)

    def _best(self, sealed: list[Path]) -> list[Path]:
        if not self.keep_best:
            return []
        losses = [(loss, i) for i, path in enumerate(sealed) if (loss := _heldout_loss(path)) is not None]
        return [sealed[i] for _, i in sorted(losses)[: self.keep_best]]


def sealed_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that were written to their end, newest first."""
    return [path for path in list_checkpoints(directory) if (path / MANIFEST).is_file()]


def remove_checkpoint(directory: Path) -> None:
    """Take a checkpoint away at once, then delete its files: half of one is never seen."""
    doomed = directory.with_name(f"{TEMPORARY}deleted-{directory.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _heldout_loss(path: Path) -> float | None:
    try:
        return Checkpoint(path).description.get("heldout_loss")
    except CheckpointDamagedError as error:
        log.warning("checkpoint %s has no readable held-out loss: %s", path.name, error)
        return None
