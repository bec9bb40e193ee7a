"""A checkpoint without its layout: whole tensors by name and state, one at a time, and all that is said about them.

Every conversion reads one of these and writes another: whatever is not changed on the way is carried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.format import GENERATOR_PREFIX, MASTER, PROBE_NAME, Checkpoint
from hope_megatron.checkpoint.generators import fresh_generator_states
from hope_megatron.config import RunConfig, resolve_run_config
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.optim import ParamTags

CARRIED = ("progress", "data", "config", "provenance", "optimizer", "heldout_loss", "history")
"""What checkpoint.json says beside the layout."""


@dataclass(frozen=True)
class UnshardedParameter:
    """A parameter as one rank alone would have it."""

    name: str
    """As in `ParameterRecord`."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: str
    """Compute dtype; everything stored is float32."""
    tags: ParamTags
    states: tuple[str, ...]
    """What is stored for it: `master`, then the optimizer's states."""


@dataclass(frozen=True)
class UnshardedCheckpoint:
    """Tensors, clocks, progress and provenance, independent of ranks.

    Attributes:
        origin: where it comes from, for messages and the history.
        parameters: by name, in the model's order.
        description: checkpoint.json without what a layout says: `progress`, `data`, `config`, `provenance`, `optimizer`,
            `history`.
        layout: of the ranks that wrote it; those up to its data-parallel size have generators of their own.
        read: (parameter, state) -> the whole tensor, float32 on the host.
        generators: (dp_rank, tp_rank) -> states of that rank's random generators.
        extra_files: further files of the checkpoint, such as the probe.
    """

    origin: str
    parameters: Mapping[str, UnshardedParameter]
    description: dict[str, Any]
    layout: ParallelLayout
    read: Callable[[str, str], Tensor]
    generators: Callable[[int, int], dict[str, Tensor]]
    extra_files: tuple[Path, ...] = ()

    @property
    def config(self) -> RunConfig:
        """The configuration of the run that trained it."""
        return resolve_run_config(self.description["config"], source=f"the configuration in {self.origin}")

    def weights_only(self) -> UnshardedCheckpoint:
        """The same without the optimizer's states: its clocks stand at 0."""
        parameters = {name: replace(parameter, states=(MASTER,)) for name, parameter in self.parameters.items()}
        optimizer = self.description["optimizer"]
        clocks = {name: {"step": 0} for name in optimizer["groups"]}
        description = {**self.description, "optimizer": {**optimizer, "groups": clocks}}
        return replace(self, parameters=parameters, description=description)

    def with_history(self, operation: str, **details: Any) -> UnshardedCheckpoint:
        """The same with a line more in its history."""
        history = [*self.description.get("history", ()), {"operation": operation, "source": self.origin, **details}]
        return replace(self, description={**self.description, "history": history})


def read_unsharded(source: CheckpointSource) -> UnshardedCheckpoint:
    """A checkpoint of ours, its digests verified first. Of averaged weights: those, without optimizer states.

    Raises:
        CheckpointDamagedError: naming the file that is missing or differs.
    """
    checkpoint = source.checkpoint
    checkpoint.verify()
    checkpoint.check_description()
    parameters = {
        name: UnshardedParameter(
            name, record.full_shape(checkpoint.tp_size), record.dtype, record.tags, checkpoint.states(name)
        )
        for name, record in checkpoint.parameters.items()
    }
    description = {key: checkpoint.description[key] for key in CARRIED if key in checkpoint.description}
    unsharded = UnshardedCheckpoint(
        str(source.path),
        parameters,
        description,
        ParallelLayout.of(checkpoint.description["layout"]),
        checkpoint.full_tensor,
        lambda dp_rank, tp_rank: _generators(checkpoint, dp_rank, tp_rank),
        (source.path / PROBE_NAME,) if PROBE_NAME in checkpoint.digests else (),
    )
    if not source.averaged:
        return unsharded
    description.pop("heldout_loss", None)  # of the weights as they were last
    averaged = replace(unsharded, read=lambda name, state: checkpoint.full_tensor(name, source.state), extra_files=())
    return averaged.weights_only().with_history("average over steps", decay=checkpoint.config["training"]["ema"])


def _generators(checkpoint: Checkpoint, dp_rank: int, tp_rank: int) -> dict[str, Tensor]:
    """The generators of a rank of any layout.

    They are the data-parallel rank's: tensor-parallel ranks share them. Ranks that the old layout did not have start as
    they would in a new run, because two ranks must not draw the same numbers.
    """
    layout = checkpoint.description["layout"]
    tp_size = layout["tensor_parallel"]
    if dp_rank < layout["data_parallel"]:
        rank = dp_rank * tp_size + min(tp_rank, tp_size - 1)
        if states := checkpoint.rank_tensors(rank, GENERATOR_PREFIX):
            return states
    return fresh_generator_states(checkpoint.config["training"]["seed"], dp_rank)


def compare_unsharded(expected: UnshardedCheckpoint, found: UnshardedCheckpoint) -> int:
    """Compare every tensor of two checkpoints, bit by bit.

    Returns:
        Elements compared.

    Raises:
        ConversionError: naming the first tensor that differs.
    """
    states = {name: set(parameter.states) for name, parameter in expected.parameters.items()}
    if {name: set(parameter.states) for name, parameter in found.parameters.items()} != states:
        raise ConversionError(f"{found.origin} does not hold the parameters and states of {expected.origin}")
    num_elements = 0
    for name, names_of_states in states.items():
        for state in sorted(names_of_states):
            left, right = expected.read(name, state), found.read(name, state)
            # as integers: a NaN of a run that broke is carried too
            if left.shape != right.shape or not torch.equal(left.view(torch.int32), right.view(torch.int32)):
                raise ConversionError(
                    f"{found.origin}: {state} of {name} differs from {expected.origin}; nothing was kept"
                )
            num_elements += left.numel()
    return num_elements
