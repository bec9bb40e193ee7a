"""The weights of another format as the starting point of a run: a checkpoint of step 0 with them, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import MASTER, list_checkpoints, step_directory_name
from hope_megatron.checkpoint.generators import fresh_generator_states
from hope_megatron.checkpoint.reshard import write_checkpoint
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, UnshardedParameter
from hope_megatron.config import RunConfig
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.convert.formats import open_format
from hope_megatron.engine.build import build_run_optimizer
from hope_megatron.model import LanguageModel
from hope_megatron.optim import read_tags


def begin_run(source: Path, format_name: str, config: RunConfig, beginning: Mapping[str, Any]) -> Path:
    """Write RUN/checkpoints/step-00000000, from which `hope train` then starts, in any parallel layout.

    Args:
        source: a directory in a format whose weights can be read.
        format_name: one of convert/formats.py.
        config: the run that is to start from it; its model must be the one that `source` holds.
        beginning: what training writes into a checkpoint, before the first step: `progress`, `data`, `provenance`.

    Returns:
        The checkpoint.

    Raises:
        ConversionError: the architectures differ, or the run has checkpoints already.
    """
    checkpoints = config.run_dir / "checkpoints"
    if list_checkpoints(checkpoints):
        raise ConversionError(f"{config.run_dir} has checkpoints already; give the run another name")
    load_model = open_format(format_name).load_model
    if load_model is None:
        raise ConversionError(
            f"a run cannot be started from the format {format_name}; `hope list formats` names the others"
        )
    model = load_model(source, config)
    unsharded = untrained_checkpoint(model, config, beginning, str(source)).with_history(f"import from {format_name}")
    return write_checkpoint(unsharded, unsharded.layout, checkpoints / step_directory_name(0)).directory


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
