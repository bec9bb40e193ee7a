"""The closed forms of config/accounting.py equal what a built model has."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from hope_megatron.config import load_model_config
from hope_megatron.config.accounting import num_parameters, weight_table
from hope_megatron.config.model import AttentionConfig, CMSConfig, CMSLevelConfig, MemoryConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.config.presets import config_names, family_names
from hope_megatron.layers.transformer_config import megatron_config
from hope_megatron.model.language_model import LanguageModel
from hope_megatron.testing.models import tiny_model

STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)
VARIANTS = {
    "gate": tiny_model(memory=MemoryConfig(output_gate="silu")),
    "constant_rates": tiny_model(memory=MemoryConfig(decay="constant", momentum="constant", query_correction=0.5)),
    "momentum": tiny_model(memory=MemoryConfig(momentum="data", hidden_size=12)),
    "partly_adaptive": tiny_model(memory=MemoryConfig(adaptive_key=False, adaptive_alpha=False)),
    "adaptive_query": tiny_model(memory=MemoryConfig(adaptive_query=True)),
    "matrix": tiny_model(memory=MemoryConfig(num_layers=1, dgd_layers="all", conv_width=1, **STATIC)),
    "untied": tiny_model(tie_embeddings=False),
    "inner_rates": tiny_model(
        cms=CMSConfig(
            levels=(
                CMSLevelConfig(hidden_size=24, inner_chunk_tokens=4, inner_rate=0.1, inner_rate_kind="per_channel"),
                CMSLevelConfig(hidden_size=16, inner_chunk_tokens=8, inner_rate=0.1, inner_rate_kind="learned"),
            )
        )
    ),
    "independent": tiny_model(cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=8),) * 3, connection="independent")),
    "grouped_attention": tiny_model(layer_pattern=("attention", "memory"), attention=AttentionConfig(num_kv_heads=1)),
    "segments": tiny_model(
        layer_pattern=("attention",), attention=AttentionConfig(segment_tokens=8, memory_tokens=3, memory_key_size=5)
    ),
    "biased_attention": tiny_model(
        layer_pattern=("attention",), attention=AttentionConfig(qkv_bias=True, qk_norm=True)
    ),
}


pytestmark = pytest.mark.usefixtures("world_of_one")


def build_on_meta(config):
    with torch.device("meta"):
        return LanguageModel(megatron_config(config, ParallelConfig(), torch.float32), config)


@pytest.mark.parametrize("config", [*config_names("models"), *family_names(), *VARIANTS])
def test_closed_form_equals_the_built_model(config):
    config = VARIANTS[config] if config in VARIANTS else load_model_config(config)
    model = build_on_meta(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    by_period = Counter()
    for p in model.parameters():
        by_period[getattr(p, "update_period_steps", 1)] += p.numel()
    table = itertools.groupby(
        sorted(weight_table(config), key=lambda w: w.update_period_steps), lambda w: w.update_period_steps
    )
    assert dict(by_period) == {period: sum(w.total for w in rows) for period, rows in table}
    matrices = sum(p.numel() for p in model.parameters() if p.optim_role == "matrix")
    assert matrices == sum(w.total for w in weight_table(config) if w.matrix)
