"""What a user names when a command wants a model: a run, a run at a step, a checkpoint, or a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import (
    MANIFEST,
    PROBE_NAME,
    Checkpoint,
    checkpoint_step,
    list_checkpoints,
    read_full_tensors,
    step_directory_name,
)
from hope_megatron.config import RunConfig, resolve_run_config


@dataclass(frozen=True)
class Probe:
    """What the training processes computed at the end of a run.

    Attributes:
        tokens: [1, T] int64, a held-out sequence.
        logits: [1, T, V] float32.
    """

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint directory and what it says about itself."""

    path: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened."""
        return Checkpoint(self.path)

    @cached_property
    def config(self) -> RunConfig:
        """The resolved configuration of the run."""
        return resolve_run_config(self.checkpoint.config, source=f"the configuration in {self.path}")

    @cached_property
    def probe(self) -> Probe | None:
        """The probe beside the checkpoint; None for a checkpoint from the middle of a run."""
        path = self.path / PROBE_NAME
        return Probe(**load_file(path)) if path.is_file() else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Full float32 weights by name, digests verified first."""
        return read_full_tensors(self.path)


def find_checkpoint(reference: str) -> CheckpointSource:
    """The checkpoint that `RUN`, `RUN@STEP` or a step directory names; RUN alone means its newest complete one.

    Raises:
        ConversionError: there is none; says which there are.
    """
    text, _, step = reference.partition("@")
    path = Path(text)
    if not step and (path / MANIFEST).is_file():
        return CheckpointSource(path)
    found = [candidate for candidate in list_checkpoints(path / "checkpoints") if (candidate / MANIFEST).is_file()]
    if not found:
        raise ConversionError(
            f"{text} is no run directory with a complete checkpoint, no checkpoint and no exported model; "
            f"give for example runs/NAME, runs/NAME@STEP or the directory of an export"
        )
    if not step:
        return CheckpointSource(found[0])
    if not step.isdigit() or path / "checkpoints" / step_directory_name(int(step)) not in found:
        steps = ", ".join(str(checkpoint_step(candidate)) for candidate in reversed(found))
        raise ConversionError(f"{text} has no complete checkpoint of step {step!r}; it has {steps}")
    return CheckpointSource(path / "checkpoints" / step_directory_name(int(step)))
