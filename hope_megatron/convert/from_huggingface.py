"""An exported model as the starting point of a run: a checkpoint of step 0 with its weights, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hope_megatron.config import RunConfig
from hope_megatron.convert.errors import ConversionError
from hope_megatron.convert.huggingface import load_huggingface
from hope_megatron.engine.checkpoint_format import (
    DESCRIPTION,
    FORMAT,
    MASTER,
    list_checkpoints,
    rank_file_name,
    step_directory_name,
    sync_directory,
    write_json,
    write_manifest,
    write_safetensors,
)
from hope_megatron.engine.generators import generator_states
from hope_megatron.model import LanguageModel
from hope_megatron.optim import build_optimizer, read_tags


def import_huggingface(directory: Path, config: RunConfig, beginning: Mapping[str, Any]) -> Path:
    """Write RUN/checkpoints/step-00000000, from which `hope train` then starts, in any parallel layout.

    Args:
        directory: an exported model.
        config: the run that is to start from it; its model must be the exported one.
        beginning: what training writes into a checkpoint, before the first step: `progress`, `data`, `provenance`.

    Returns:
        The checkpoint.

    Raises:
        ConversionError: the architectures differ, or the run has checkpoints already.
    """
    loaded = load_huggingface(directory)
    _check_architecture(loaded.config.model_dump(), config.model.model_dump(), directory)
    checkpoints = config.run_dir / "checkpoints"
    if list_checkpoints(checkpoints):
        raise ConversionError(f"{config.run_dir} has checkpoints already; give the run another name")
    final = checkpoints / step_directory_name(0)
    temporary = checkpoints / f".tmp-{final.name}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        file = rank_file_name(0)
        tensors = {f"{MASTER}/{name}": parameter.detach().cpu() for name, parameter in loaded.model.named_parameters()}
        tensors = {name: tensor.flatten() for name, tensor in tensors.items()}
        tensors |= {f"generator/{name}": state for name, state in generator_states().items()}
        digests = {file: write_safetensors(temporary / file, tensors)}
        provenance = {**beginning["provenance"], "imported_from": str(directory)}
        description = {**_description(loaded.model, config, file), **beginning, "provenance": provenance}
        digests[DESCRIPTION] = write_json(temporary / DESCRIPTION, description)
        write_manifest(temporary, digests)
        os.rename(temporary, final)
        sync_directory(checkpoints)
    except OSError as error:
        raise ConversionError(f"cannot write {final}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _check_architecture(exported: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    differing = [key for key in wanted if key != "name" and exported[key] != wanted[key]]
    if differing:
        lines = "".join(f"\n  model.{key}: {exported[key]} there, {wanted[key]} in the run" for key in differing)
        raise ConversionError(
            f"{directory} is another model than the run's:{lines}\nUse its architecture in the run file"
        )


def _description(model: LanguageModel, config: RunConfig, file: str) -> dict[str, Any]:
    """checkpoint.json of one rank that holds everything, and an optimizer that has not made a step."""
    named = list(model.named_parameters())
    groups = build_optimizer(named, config.optim).param_groups
    return {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "layout": {
            "world_size": 1,
            "tensor_parallel": 1,
            "data_parallel": 1,
            "sequence_parallel": False,
            "zero_stage": config.parallel.zero_stage,
        },
        "optimizer": {"name": config.optim.name, "groups": {group["name"]: {"step": 0} for group in groups}},
        "parameters": [
            {
                "name": name,
                "full_shape": list(parameter.shape),
                "shard_shape": list(parameter.shape),
                "dtype": str(parameter.dtype).removeprefix("torch."),
                "tags": read_tags(parameter, name, parameter.shape).to_dict(),
            }
            for name, parameter in named
        ],
        "files": [
            {
                "file": file,
                "tp_rank": 0,
                "dp_rank": 0,
                "pieces": [[name, 0, parameter.numel(), [MASTER]] for name, parameter in named],
            }
        ],
    }
