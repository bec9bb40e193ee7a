"""Settings for the hardware at hand: every combination is priced by the closed forms, and the best that fit are kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hope_megatron.config.base import ConfigError
from hope_megatron.config.efficiency import DEFAULT, Efficiency
from hope_megatron.config.footprint import footprint
from hope_megatron.config.hardware import Hardware
from hope_megatron.config.run import RunConfig
from hope_megatron.config.step_time import StepTime, kernel_tape_bytes, step_time

HEADROOM = 0.85
"""Share of the memory that a plan may take: temporaries, fragments and NCCL's buffers are not in it."""

Changes = dict[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One combination of settings."""

    changes: Changes
    time: StepTime
    memory_bytes: float

    @property
    def overrides(self) -> list[str]:
        """The changes as overrides of a command line."""
        text = lambda value: str(value).lower() if isinstance(value, bool) else str(value)  # noqa: E731
        return [f"{key}={text(value)}" for key, value in self.changes.items()]


def best_choices(
    config: RunConfig, world_size: int, hardware: Hardware, efficiency: Efficiency = DEFAULT, *, most: int = 5
) -> list[Choice]:
    """The fastest combinations that fit, the fastest first. Nothing that changes what is learned is varied.

    Raises:
        ConfigError: if none fits.
    """
    found = []
    for changes in candidates(config, world_size):
        changed = changed_config(config, changes)
        memory = footprint(changed, world_size).total + kernel_tape_bytes(changed)
        if memory <= HEADROOM * hardware.memory_bytes:
            time = step_time(changed, world_size, hardware, efficiency)
            found.append(Choice(changes=changes, time=time, memory_bytes=memory))
    if not found:
        raise ConfigError(f"nothing fits {world_size} x {hardware.name}: take more devices or a smaller model")
    return sorted(found, key=lambda choice: (choice.time.seconds, choice.memory_bytes))[:most]


def candidates(config: RunConfig, world_size: int) -> Iterator[Changes]:
    """Combinations that divide. `memory.keep_every` is not among them: the Triton kernels keep the weights of every chunk."""
    model, batch = config.model, config.training.global_batch_size
    tensor = [n for n in (1, 2, 4, 8) if world_size % n == 0 and model.num_heads % n == 0]
    stages = (1, 2, 3) if config.parallel.zero_stage else (0,)
    sizes = [2**i for i in range(7)]
    for tp, size, recompute, stage in itertools.product(tensor, sizes, ("none", "layer"), stages):
        if batch % (world_size // tp * size):
            continue
        for sequence in (False, True) if tp > 1 else (False,):
            yield {
                "training.micro_batch_size": size,
                "training.recompute": recompute,
                "parallel.zero_stage": stage,
                "parallel.tensor_parallel": tp,
                "parallel.sequence_parallel": sequence,
            }


def changed_config(config: RunConfig, changes: Changes) -> RunConfig:
    """The run with other values of some keys, which are valid."""
    for key, value in changes.items():
        config = _changed(config, key.split("."), value)
    return config


def _changed(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return section.model_copy(update={name: _changed(getattr(section, name), rest, value) if rest else value})
