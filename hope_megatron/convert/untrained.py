"""A checkpoint of our own kind from a model that no run of ours has trained yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hope_megatron.checkpoint.format import MASTER
from hope_megatron.checkpoint.generators import fresh_generator_states
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, UnshardedParameter
from hope_megatron.config import RunConfig
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.engine.new_engine import build_run_optimizer
from hope_megatron.model import LanguageModel
from hope_megatron.optim import read_tags


def untrained_checkpoint(
    model: LanguageModel, config: RunConfig, beginning: Mapping[str, Any], origin: str
) -> UnshardedCheckpoint:
    """The weights of `model`, built on one tensor-parallel rank, and an optimizer that has not made a step."""
    named = dict(model.named_parameters())
    groups = build_run_optimizer(model, config).param_groups
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.training.precision]
    parallel = config.parallel
    return UnshardedCheckpoint(
        origin=origin,
        parameters={
            name: UnshardedParameter(
                name, tuple(parameter.shape), dtype, read_tags(parameter, name, parameter.shape), (MASTER,)
            )
            for name, parameter in named.items()
        },
        description={
            **beginning,
            "config": config.model_dump(mode="json"),
            "optimizer": {"name": config.optim.name, "groups": {group["name"]: {"step": 0} for group in groups}},
        },
        layout=ParallelLayout(parallel.tensor_parallel, 1, parallel.zero_stage, parallel.sequence_parallel),
        read=lambda name, state: named[name].detach().float().cpu(),
        generators=lambda dp_rank, tp_rank: fresh_generator_states(config.training.seed, dp_rank),
    )
