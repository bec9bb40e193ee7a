"""What training makes of a configuration, without its numbers: names in the model, and the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint
from hope_megatron.config import ParallelConfig, RunConfig
from hope_megatron.engine.new_engine import build_run_optimizer
from hope_megatron.layers.transformer_config import megatron_config
from hope_megatron.model import LanguageModel
from hope_megatron.parallel.distributed import init_distributed


@dataclass(frozen=True)
class Skeleton:
    """A model and its optimizer on the meta device.

    Attributes:
        module_keys: keys of the model's state dict, in order.
        groups: the optimizer's settings by group name, in order, without `params`.
        members: names of the parameters of each group, in order.
    """

    module_keys: tuple[str, ...]
    groups: Mapping[str, Mapping[str, Any]]
    members: Mapping[str, tuple[str, ...]]

    @property
    def group_of(self) -> dict[str, str]:
        """Group name by parameter name."""
        return {name: group for group, names in self.members.items() for name in names}


def skeleton_of(unsharded: UnshardedCheckpoint) -> Skeleton:
    """The outline of the run that a checkpoint belongs to.

    Raises:
        ConversionError: the parameters are not those of its configuration.
    """
    found = skeleton(unsharded.config)
    if found.group_of.keys() != unsharded.parameters.keys():
        others = sorted(found.group_of.keys() ^ unsharded.parameters.keys())
        raise ConversionError(
            f"{unsharded.origin} and the model of its configuration differ in {', '.join(others[:5])}"
        )
    return found


def skeleton(config: RunConfig) -> Skeleton:
    """The outline of a run; nothing of it depends on the layout."""
    model = meta_model(config)
    optimizer = build_run_optimizer(model, config)
    groups = {group["name"]: group for group in optimizer.param_groups}
    return Skeleton(
        tuple(model.state_dict()),
        {name: {key: value for key, value in group.items() if key != "params"} for name, group in groups.items()},
        {name: tuple(param.optim_name for param in group["params"]) for name, group in groups.items()},
    )


def meta_model(config: RunConfig) -> LanguageModel:
    """The model of a run without its numbers, on the tensor-parallel ranks that there are."""
    if not parallel_state.model_parallel_is_initialized():
        init_distributed(ParallelConfig(), num_threads=torch.get_num_threads())
    parallel = ParallelConfig(tensor_parallel=parallel_state.get_tensor_model_parallel_world_size())
    with torch.device("meta"):
        return LanguageModel(megatron_config(config.model, parallel, torch.float32), config.model)
