"""The weights of another format as the starting point of a run: a checkpoint of step 0 with them, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import MASTER, list_checkpoints, step_directory_name
from hope_megatron.checkpoint.generators import fresh_generator_states
from hope_megatron.checkpoint.layout import Layout
from hope_megatron.checkpoint.local_model import build_from_shards, build_local_model
from hope_megatron.checkpoint.reshard import write_checkpoint
from hope_megatron.checkpoint.unsharded import WholeCheckpoint, WholeParameter
from hope_megatron.config import RunConfig
from hope_megatron.convert.deepspeed.universal import universal_weights
from hope_megatron.convert.deepspeed.zero import is_zero_checkpoint, zero_shards
from hope_megatron.convert.huggingface.export import load_huggingface
from hope_megatron.convert.llama import check_against_transformers, import_llama
from hope_megatron.convert.torch_dist import torch_dist_weights
from hope_megatron.engine.build import build_run_optimizer
from hope_megatron.model import LanguageModel
from hope_megatron.optim import read_tags

log = logging.getLogger(__name__)


def begin_run(source: Path, format_name: str, config: RunConfig, beginning: Mapping[str, Any]) -> Path:
    """Write RUN/checkpoints/step-00000000, from which `hope train` then starts, in any parallel layout.

    Args:
        source: a directory in a format whose weights can be read.
        format_name: `hf`, `hf-llama`, `torch_dist` or `deepspeed`.
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
    model = _READERS[format_name](source, config)
    whole = untrained_checkpoint(model, config, beginning, str(source)).with_history(f"import from {format_name}")
    return write_checkpoint(whole, whole.layout, checkpoints / step_directory_name(0)).directory


def _from_huggingface(source: Path, config: RunConfig) -> LanguageModel:
    loaded = load_huggingface(source)
    check_architecture(loaded.config.model_dump(), config.model.model_dump(), source)
    return loaded.model


def _from_torch_dist(source: Path, config: RunConfig) -> LanguageModel:
    return build_local_model(config.model, torch_dist_weights(source), source=str(source))


def _from_deepspeed(source: Path, config: RunConfig) -> LanguageModel:
    if is_zero_checkpoint(source):
        return build_from_shards(config.model, zero_shards(source), source=str(source))
    return build_local_model(config.model, universal_weights(source), source=str(source))


def _from_llama(source: Path, config: RunConfig) -> LanguageModel:
    model = import_llama(source, config.model)
    difference = check_against_transformers(model, source)
    if difference is None:
        log.warning("transformers is not installed: the logits were not compared with those of %s", source)
    else:
        log.info("checked: logits differ by at most %.1e from those of %s in transformers", difference, source)
    return model


_READERS: dict[str, Callable[[Path, RunConfig], LanguageModel]] = {
    "hf": _from_huggingface,
    "torch_dist": _from_torch_dist,
    "deepspeed": _from_deepspeed,
    "hf-llama": _from_llama,
}


def untrained_checkpoint(
    model: LanguageModel, config: RunConfig, beginning: Mapping[str, Any], origin: str
) -> WholeCheckpoint:
    """The weights of `model`, built on one tensor-parallel rank, and an optimizer that has not made a step."""
    named = dict(model.named_parameters())
    groups = build_run_optimizer(model, config).param_groups
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.training.precision]
    parallel = config.parallel
    return WholeCheckpoint(
        origin=origin,
        parameters={
            name: WholeParameter(
                name, tuple(parameter.shape), dtype, read_tags(parameter, name, parameter.shape), (MASTER,)
            )
            for name, parameter in named.items()
        },
        description={
            **beginning,
            "config": config.model_dump(mode="json"),
            "optimizer": {"name": config.optim.name, "groups": {group["name"]: {"step": 0} for group in groups}},
        },
        layout=Layout(parallel.tensor_parallel, 1, parallel.zero_stage, parallel.sequence_parallel),
        read=lambda name, state: named[name].detach().float().cpu(),
        generators=lambda dp_rank, tp_rank: fresh_generator_states(config.training.seed, dp_rank),
    )


def check_architecture(exported: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    """Refuse a run whose model is another one than `directory` holds, naming every key that differs."""
    differing = [key for key in wanted if key != "name" and exported[key] != wanted[key]]
    if differing:
        lines = "".join(f"\n  model.{key}: {exported[key]} there, {wanted[key]} in the run" for key in differing)
        raise ConversionError(
            f"{directory} is another model than the run's:{lines}\nUse its architecture in the run file"
        )
