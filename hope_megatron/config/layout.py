"""How a run's ranks are arranged: one value that configuration, checkpoints, conversion and plans all take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hope_megatron.config.base import ConfigError


@dataclass(frozen=True)
class ParallelLayout:
    """A mesh of data parallel x tensor parallel, and what ZeRO shards over data parallelism.

    Neighbours among the data-parallel ranks may share sequences (context parallelism). They hold the same weights, so checkpoints
    do not know of it, and layouts that differ in it alone are equal.
    """

    tensor_parallel: int = 1
    data_parallel: int = 1
    zero_stage: int = 1
    sequence_parallel: bool = False
    context_parallel: int = field(default=1, compare=False)

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor_parallel * self.data_parallel

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> ParallelLayout:
        """The layout that checkpoint.json describes."""
        return cls(**{name: description[name] for name in _SAVED})

    def describe(self) -> dict[str, Any]:
        """As checkpoint.json says it."""
        return {"world_size": self.world_size, **{name: getattr(self, name) for name in _SAVED}}

    def in_words(self) -> str:
        """For a line of output."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.describe().items())

    def changed(
        self,
        tensor_parallel: int | None = None,
        data_parallel: int | None = None,
        zero_stage: int | None = None,
        sequence_parallel: bool = False,
    ) -> ParallelLayout:
        """Another layout; what is None stays as it is, and the number of ranks too unless `data_parallel` is given.

        Raises:
            ConfigError: the ranks cannot be divided so.
        """
        tp_size = tensor_parallel or self.tensor_parallel
        if data_parallel is None and self.world_size % tp_size:
            raise ConfigError(
                f"the checkpoint's {self.world_size} ranks do not divide into tensor-parallel groups of {tp_size}; "
                "give --dp N for another number of ranks"
            )
        return ParallelLayout(
            tp_size,
            data_parallel or self.world_size // tp_size,
            self.zero_stage if zero_stage is None else zero_stage,
            sequence_parallel,
        )


_SAVED = tuple(item.name for item in fields(ParallelLayout) if item.compare)
"""What checkpoints say."""
