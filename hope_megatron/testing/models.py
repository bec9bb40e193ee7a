"""Tiny models and batches for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from hope_megatron.config.model import AttentionConfig, CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig


def tiny_model(*, memory: MemoryConfig | None = None, **changes) -> ModelConfig:
    """Two layers, width 32, 4 heads of 8, vocabulary 61 (so that it is padded), two CMS levels."""
    values = dict(
        name="test",
        vocab_size=61,
        vocab_multiple=16,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        memory=memory or MemoryConfig(chunk_tokens=8),  # type: ignore[call-arg]
        attention=AttentionConfig(num_kv_heads=2),
        cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=24), CMSLevelConfig(hidden_size=16, update_period_steps=4))),
    )
    return ModelConfig(**(values | changes))


def random_batch(model: ModelConfig, batch_size: int = 2, seq_length: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and next-token targets, each [batch_size, seq_length] int64."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size, (batch_size, seq_length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].contiguous()
