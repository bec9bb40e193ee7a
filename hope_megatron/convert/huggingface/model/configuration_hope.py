"""Configuration of a HOPE model for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class HopeConfig(PretrainedConfig):
    """A decoder with self-modifying memories ("Nested Learning", arXiv 2512.24695).

    Args:
        architecture: the resolved architecture, in the names of hope_megatron's `ModelConfig`. It decides everything; the
            usual attributes (`hidden_size`, ...) repeat parts of it for tools that look for them.
        train_tokens_per_sequence: sequence length in training. It is no limit: the recurrent state has one size at any length.
    """

    model_type = "hope"

    def __init__(
        self, architecture: dict[str, Any] | None = None, train_tokens_per_sequence: int = 0, **kwargs: Any
    ) -> None:
        self.architecture = architecture or {}
        self.train_tokens_per_sequence = train_tokens_per_sequence
        super().__init__(**kwargs)
