"""From a run's configuration to an engine: model, optimizer, DeepSpeed, and the optimizer bound to what ZeRO made."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import nn

from hope_megatron.config.run import RunConfig
from hope_megatron.engine.engine import Engine
from hope_megatron.engine.libraries import choose_libraries
from hope_megatron.engine.policy import apply_policy
from hope_megatron.model import build_model
from hope_megatron.optim import BoundOptimizer, build_optimizer
from hope_megatron.optim.trainable import hold_still
from hope_megatron.optim.width import scale_learning_rates
from hope_megatron.parallel.distributed import Mesh

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """Build model and optimizer of a run on this rank; `init_distributed` comes first. Collective.

    Raises:
        ConfigError: if world, mesh and batch do not divide.
        LibraryError: a library that is asked for cannot serve.
    """
    apply_policy(config.training, mesh.device)
    choose_libraries(config, mesh.device.type)
    model = build_model(
        config.model,
        config.parallel,
        dtype=_DTYPES[config.training.precision],
        seed=config.training.seed,
        recompute=config.training.recompute,
        offload=config.training.offload_activations,
    ).to(mesh.device)
    optimizer = build_run_optimizer(model, config)
    engine = Engine(model, optimizer, config, mesh)
    tp_group = mesh.tp_group if mesh.tp_size > 1 else None
    if config.parallel.zero_stage == 0:
        optimizer.bind_plain(tp_group)
    else:
        exchange_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        optimizer.bind_zero(engine.zero, tp_group=tp_group, exchange_group=exchange_group)
    return engine


def build_run_optimizer(model: nn.Module, config: RunConfig) -> BoundOptimizer:
    """The optimizer of a run with its parameter groups, learning rates scaled for the width."""
    hold_still(model, config.optim.trainable)
    optimizer = build_optimizer(model.named_parameters(), config.optim)
    optimizer.ema_decay = config.training.ema
    scale_learning_rates(optimizer, config.model.width_multiplier)
    return optimizer
