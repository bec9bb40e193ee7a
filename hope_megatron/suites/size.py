"""The size of a suite's models: the suite's own, or what the options say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.models import small_hope
from hope_megatron.suites.suite import SuiteOptions


@dataclass(frozen=True)
class ModelSize:
    """What `small_hope` takes beside the vocabulary."""

    width: int
    layers: int
    heads: int
    chunk_tokens: int

    @classmethod
    def of(cls, options: SuiteOptions, *, width: int, chunk_tokens: int) -> ModelSize:
        """width, chunk_tokens: where the options do not say; layers and heads are 2 then."""
        return cls(
            options.width or width, options.layers or 2, options.heads or 2, options.chunk_tokens or chunk_tokens
        )

    def hope(self, vocab_size: int) -> ModelConfig:
        """HOPE of this size."""
        return small_hope(vocab_size, **self.settings)

    @property
    def settings(self) -> dict[str, int]:
        """For `Suite.settings`."""
        return asdict(self)


class Described(TypedDict):
    """Two fields of a `Suite`."""

    parameters: dict[str, int]
    models: dict[str, dict[str, Any]]


def described(models: Mapping[str, ModelConfig]) -> Described:
    """What a suite says of each subject's model in its first task."""
    return Described(
        parameters={name: num_parameters(model) for name, model in models.items()},
        models={name: model.model_dump(mode="json") for name, model in models.items()},
    )
