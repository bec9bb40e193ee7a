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
from hope_megatron.config.step_time import StepTime, step_time

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
        return overrides_text(self.changes)


def overrides_text(changes: Changes) -> list[str]:
    """Values by dotted key as overrides of a command line."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]


def best_choices(
    config: RunConfig, world_size: int, hardware: Hardware, efficiency: Efficiency = DEFAULT, *, most: int = 5
) -> list[Choice]:
    """The fastest combinations that fit, the fastest first. What changes what is learned is varied only where nothing fits without:
    then gradients are cut between windows (`training.truncate_tokens`), the longest that fit.

    Raises:
        ConfigError: if none fits.
    """
    nearest: tuple[float, Changes] | None = None
    for window in windows(config):
        found = []
        for changes in candidates(config, world_size):
            changes = changes | window
            changed = changed_config(config, changes)
            memory = footprint(changed, world_size).total
            if nearest is None or memory < nearest[0]:
                nearest = (memory, changes)
            if memory <= HEADROOM * hardware.memory_bytes:
                time = step_time(changed, world_size, hardware, efficiency)
                found.append(Choice(changes=changes, time=time, memory_bytes=memory))
        if found:
            return sorted(found, key=lambda choice: (choice.time.seconds, choice.memory_bytes))[:most]
    raise ConfigError(_nothing_fits(config, world_size, hardware, nearest))


def _nothing_fits(config: RunConfig, world_size: int, hardware: Hardware, nearest: tuple[float, Changes] | None) -> str:
    if nearest is None:
        return (
            f"no layout divides {config.training.global_batch_size} sequences of {config.training.seq_length} tokens over "
            f"{world_size} devices; change training.global_batch_size or --world"
        )
    memory, changes = nearest
    return (
        f"nothing fits {world_size} x {hardware.name} ({hardware.memory_bytes / 1e9:.0f} GB): nearest is {memory / 1e9:.0f} GB "
        f"with {' '.join(overrides_text(changes))}; take more devices, a smaller model, or set training.truncate_tokens lower"
    )


def windows(config: RunConfig) -> Iterator[Changes]:
    """What is tried one after the other: the sequences as the run reads them, and windows of half the length, down to 4,096."""
    yield {}
    length = config.training.truncate_tokens or config.training.seq_length
    if config.data.reset_at_documents:  # reads sequences in one piece
        return
    while length % 2 == 0 and length > 4096:
        length //= 2
        yield {"training.truncate_tokens": length}


def candidates(config: RunConfig, world_size: int) -> Iterator[Changes]:
    """Combinations that divide. `memory.keep_every` is not among them: the Triton kernels keep the weights of every chunk."""
    batch = config.training.global_batch_size
    stages = (1, 2, 3) if config.parallel.zero_stage else (0,)
    sizes = [2**i for i in range(7)]
    for (tp, cp), size, recompute, stage in itertools.product(
        meshes(config, world_size), sizes, ("none", "layer"), stages
    ):
        if batch % (world_size // (tp * cp) * size):
            continue
        for sequence in (False, True) if tp > 1 else (False,):
            yield {
                "training.micro_batch_size": size,
                "training.recompute": recompute,
                "parallel.zero_stage": stage,
                "parallel.tensor_parallel": tp,
                "parallel.context_parallel": cp,
                "parallel.sequence_parallel": sequence,
            }


def meshes(config: RunConfig, world_size: int) -> list[tuple[int, int]]:
    """(tensor parallel, context parallel) that divide world, heads and tokens."""
    model, window = config.model, config.training.truncate_tokens or config.training.seq_length
    slices = (
        (1,)
        if config.training.reduction == "canonical" or model.cms.learns_in_context
        else (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    )
    groups = (model.attention.num_kv_heads if "attention" in model.mixers else None) or model.num_heads
    return [
        (tp, cp)
        for tp, cp in itertools.product((1, 2, 4, 8), slices)
        if not (world_size % (tp * cp) or model.num_heads % (tp * cp) or groups % (tp * cp) or window % (tp * cp))
    ]


def sequences_per_step(config: RunConfig, world_size: int, seq_length: int) -> int:
    """Sequences of another length for as many tokens a step; at least one for each group of ranks that can share one.

    Raises:
        ConfigError: for a length below 1.
    """
    if seq_length < 1:
        raise ConfigError(f"--seq {seq_length}: give the length of a sequence in tokens")
    groups = world_size // max((tp * cp for tp, cp in meshes(config, world_size)), default=1)
    return max(1, round(config.training.tokens_per_step / seq_length / groups)) * groups


def changed_config(config: RunConfig, changes: Changes) -> RunConfig:
    """The run with other values of some keys, which are valid."""
    for key, value in changes.items():
        config = _changed(config, key.split("."), value)
    return config


def _changed(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return section.model_copy(update={name: _changed(getattr(section, name), rest, value) if rest else value})
