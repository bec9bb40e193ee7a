"""The ranks of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.config import RunConfig, resolve_run_config


@dataclass(frozen=True)
class Layout:
    """A mesh of data parallel x tensor parallel, and what ZeRO shards over it."""

    tensor_parallel: int = 1
    data_parallel: int = 1
    zero_stage: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor_parallel * self.data_parallel

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Layout:
        """The layout that checkpoint.json describes."""
        names = ("tensor_parallel", "data_parallel", "zero_stage", "sequence_parallel")
        return cls(*(description[name] for name in names))

    def describe(self) -> dict[str, Any]:
        """As checkpoint.json says it."""
        return {
            "world_size": self.world_size,
            "tensor_parallel": self.tensor_parallel,
            "data_parallel": self.data_parallel,
            "sequence_parallel": self.sequence_parallel,
            "zero_stage": self.zero_stage,
        }

    def apply(self, config: RunConfig) -> RunConfig:
        """The configuration of a run in this layout.

        Raises:
            ConfigError: the layout does not divide the model or the batch.
        """
        parallel = {
            **config.parallel.model_dump(),
            "tensor_parallel": self.tensor_parallel,
            "sequence_parallel": self.sequence_parallel,
            "zero_stage": self.zero_stage,
        }
        changed = resolve_run_config({**config.model_dump(mode="json"), "parallel": parallel}, source="the new layout")
        changed.accumulation_steps(self.world_size)
        return changed

    def changed(
        self,
        tensor_parallel: int | None = None,
        data_parallel: int | None = None,
        zero_stage: int | None = None,
        sequence_parallel: bool = False,
    ) -> Layout:
        """Another layout; what is None stays as it is, and the number of ranks too unless `data_parallel` is given.

        Raises:
            ConversionError: the ranks cannot be divided so.
        """
        tp_size = tensor_parallel or self.tensor_parallel
        if data_parallel is None and self.world_size % tp_size:
            raise ConversionError(
                f"the checkpoint's {self.world_size} ranks do not divide into tensor-parallel groups of {tp_size}; "
                "give --dp N for another number of ranks"
            )
        return Layout(
            tp_size,
            data_parallel or self.world_size // tp_size,
            self.zero_stage if zero_stage is None else zero_stage,
            sequence_parallel,
        )
