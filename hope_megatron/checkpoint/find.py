"""What a user names when a command wants a model: a run, a run at a step, a checkpoint, or a Hugging Face directory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import (
    MANIFEST,
    MASTER,
    PROBE_NAME,
    Checkpoint,
    CheckpointDamagedError,
    checkpoint_step,
    list_checkpoints,
    read_full_tensors,
    step_directory_name,
)
from hope_megatron.config import RunConfig, resolve_run_config
from hope_megatron.optim.average import EMA

_AVERAGED = f":{EMA}"

log = logging.getLogger(__name__)


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
    state: str = MASTER
    """Which weights: `master`, or `ema`, their exponential average."""

    @property
    def averaged(self) -> bool:
        """Whether it stands for averaged weights."""
        return self.state != MASTER

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
        """The probe beside the checkpoint; None for a checkpoint from the middle of a run, and for averaged weights."""
        if PROBE_NAME not in self.checkpoint.digests or self.averaged:
            return None
        self.checkpoint.verify([PROBE_NAME])
        return Probe(**load_file(self.path / PROBE_NAME))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Full float32 weights by name, digests verified first."""
        return read_full_tensors(self.checkpoint, self.state)


def find_checkpoint(reference: str | Path) -> CheckpointSource:
    """The checkpoint that `RUN`, `RUN@STEP` or a step directory names; RUN alone means its newest good one.

    With `:ema` at the end it stands for the exponential average of the weights (`training.ema`).

    Raises:
        ConversionError: there is none, says which there are; or it has no averaged weights.
        CheckpointDamagedError: RUN alone was given, and all of its checkpoints are damaged.
    """
    reference = str(reference)
    if not reference.endswith(_AVERAGED):
        return CheckpointSource(_find_directory(reference))
    source = CheckpointSource(_find_directory(reference.removesuffix(_AVERAGED)), EMA)
    lacking = [name for name in source.checkpoint.parameters if EMA not in source.checkpoint.states(name)]
    if lacking:
        raise ConversionError(
            f"{source.path} has no averaged weights of {lacking[0]}; train with training.ema above 0, or leave out {_AVERAGED}"
        )
    return source


def _find_directory(reference: str) -> Path:
    text, _, step = reference.partition("@")
    path = Path(text)
    if not step and (path / MANIFEST).is_file():
        return path
    found = [candidate for candidate in list_checkpoints(path / "checkpoints") if (candidate / MANIFEST).is_file()]
    if not found:
        raise ConversionError(
            f"{text} is no run directory with a complete checkpoint, no checkpoint and no exported model; "
            f"give for example runs/NAME, runs/NAME@STEP or the directory of an export"
        )
    if not step:
        return _newest_good(found)
    if not step.isdigit() or path / "checkpoints" / step_directory_name(int(step)) not in found:
        steps = ", ".join(str(checkpoint_step(candidate)) for candidate in reversed(found))
        raise ConversionError(f"{text} has no complete checkpoint of step {step!r}; it has {steps}")
    return path / "checkpoints" / step_directory_name(int(step))


def _newest_good(candidates: list[Path]) -> Path:
    """The first whose files are all as they were written; damaged ones are named in the log."""
    problems = []
    for path in candidates:
        try:
            checkpoint = Checkpoint(path)
            checkpoint.verify()
            checkpoint.check_description()
        except CheckpointDamagedError as error:
            problems.append(str(error))
            log.warning("checkpoint %s is damaged and left out: %s", path.name, error)
        else:
            return path
    raise CheckpointDamagedError("every checkpoint there is damaged:\n  " + "\n  ".join(problems))
