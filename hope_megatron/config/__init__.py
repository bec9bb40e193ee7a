"""Configuration: pydantic models, strict YAML, dotted overrides, closed forms for cost. Imports no torch."""

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.config.load import (
    dump_config,
    in_layout,
    load_model_config,
    load_run_config,
    resolve_run_config,
)
from hope_megatron.config.model import AttentionConfig, CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig, MupConfig
from hope_megatron.config.optim import OptimConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.config.run import RunConfig
from hope_megatron.config.training import CheckpointConfig, DataConfig, TrackingConfig, TrainingConfig

__all__ = [
    "AttentionConfig",
    "CMSConfig",
    "CMSLevelConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "MemoryConfig",
    "ModelConfig",
    "MupConfig",
    "OptimConfig",
    "ParallelConfig",
    "ParallelLayout",
    "RunConfig",
    "Section",
    "TrackingConfig",
    "TrainingConfig",
    "dump_config",
    "in_layout",
    "load_model_config",
    "load_run_config",
    "resolve_run_config",
]
