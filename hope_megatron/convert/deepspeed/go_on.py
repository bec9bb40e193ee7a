"""A run that goes on from the directory of DeepSpeed's `engine.save_checkpoint`: weights, optimizer states and clocks.

The files say the optimizer's states and steps, and how many steps and samples the engine has counted. They do not say the model
or the data: those are the run file's. States of our optimizers keep their names; Adam's (PyTorch's, DeepSpeed's, apex's) are
those of our AdamW, whose moments are the same moving averages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import MASTER
from hope_megatron.checkpoint.skeleton import meta_model
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, UnshardedParameter
from hope_megatron.config import RunConfig
from hope_megatron.convert.deepspeed.zero import ZeroDirectory, is_zero_checkpoint
from hope_megatron.convert.untrained import untrained_checkpoint
from hope_megatron.engine.new_engine import build_run_optimizer
from hope_megatron.optim import BoundOptimizer, merge_shards

ADAM = {"exp_avg": "m1", "exp_avg_sq": "v"}
"""Names that Adam's states have elsewhere, and in our optimizers."""

_COMPARED = ("betas", "eps", "momentum", "nesterov", "slow_beta", "slow_period_steps", "slow_weight")

log = logging.getLogger(__name__)


def deepspeed_run(
    directory: Path, config: RunConfig, beginning: Callable[[int, int], Mapping[str, Any]]
) -> UnshardedCheckpoint:
    """The checkpoint that a run of ours would have written at that point; tensors are read when they are asked for.

    Args:
        directory: what was given to save_checkpoint, saved under ZeRO 1, 2 or 3 in any layout.
        config: the run that goes on; model and optimizer must be those that were saved.
        beginning: (steps, samples) -> `progress`, `data` and `provenance` there.

    Raises:
        ConversionError: parameters or optimizer states are not those of the run, or files are damaged or refused.
    """
    if not is_zero_checkpoint(directory):
        raise ConversionError(
            f"{directory} has no files that DeepSpeed saved under ZeRO 1, 2 or 3; only those bring optimizer states. "
            "Without --optimizer-states the weights alone are imported"
        )
    opened, model = ZeroDirectory(directory), meta_model(config)
    optimizer = build_run_optimizer(model, config)
    step, samples = opened.progress
    fresh = untrained_checkpoint(model, config, beginning(step, samples), str(directory))
    _check_names(opened, fresh.parameters)
    names = _translate(opened, optimizer, config)
    groups = {
        group["name"]: {"step": _clock(opened, [p.optim_name for p in group["params"]])}
        for group in optimizer.param_groups
    }
    _say_differences(opened.optimizer_settings, optimizer.param_groups)
    return replace(
        fresh,
        parameters={name: replace(p, states=(MASTER, *names[name])) for name, p in fresh.parameters.items()},
        description={**fresh.description, "optimizer": {"name": config.optim.name, "groups": groups}},
        read=_reader(opened, fresh.parameters, names),
    )


def _check_names(opened: ZeroDirectory, parameters: Mapping[str, UnshardedParameter]) -> None:
    if others := sorted(parameters.keys() ^ set(opened.names)):
        where = "only there" if others[0] in opened.names else "only in the run's model"
        raise ConversionError(
            f"{opened.directory} is of another model than the run's: {len(others)} parameters differ, the first is {others[0]}, "
            f"{where}"
        )


def _translate(opened: ZeroDirectory, optimizer: BoundOptimizer, config: RunConfig) -> dict[str, dict[str, str]]:
    """For every parameter the names of its states: ours, and theirs."""
    found: dict[str, dict[str, str]] = {}
    for group in optimizer.param_groups:
        wanted = set(optimizer.state_keys(group))
        for name in (param.optim_name for param in group["params"]):
            theirs = opened.optimizer_states(name)
            ours = {state if state in wanted else ADAM.get(state, state): state for state in theirs}
            if theirs and ours.keys() != wanted:
                raise ConversionError(
                    f"{opened.directory}: the optimizer there keeps {', '.join(theirs)} for {name}, the run's {config.optim.name} "
                    f"{', '.join(sorted(wanted))}. Set optim.name, training.ema and the update periods to those that were saved, "
                    "or import the weights alone, without --optimizer-states"
                )
            found[name] = ours
    return found


def _clock(opened: ZeroDirectory, names: Iterable[str]) -> int:
    """Steps of a group; its parameters were stepped together, or they cannot share a clock."""
    steps = {name: opened.optimizer_step(name) if opened.optimizer_states(name) else 0 for name in names}
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise ConversionError(
            f"{opened.directory}: the optimizer has made {steps[low]} steps on {low} and {steps[high]} on {high}, which are one "
            "group here; import the weights alone, without --optimizer-states"
        )
    return next(iter(steps.values()), 0)


def _say_differences(theirs: list[Mapping[str, Any]], ours: list[dict[str, Any]]) -> None:
    """The run file's settings hold; what was otherwise there is said once."""
    for key in _COMPARED:
        there = {repr(_plain(group[key])) for group in theirs if key in group}
        here = {repr(_plain(group[key])) for group in ours if key in group}
        if there and here and there != here:
            log.warning(
                "optimizer: %s was %s there and is %s in the run file, which holds",
                key,
                ", ".join(sorted(there)),
                ", ".join(sorted(here)),
            )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _reader(
    opened: ZeroDirectory, parameters: Mapping[str, UnshardedParameter], names: Mapping[str, Mapping[str, str]]
) -> Callable[[str, str], Tensor]:
    def read(name: str, state: str) -> Tensor:
        shards, tags = opened.shards(name, names[name].get(state, state)), parameters[name].tags
        if tags.partition_dim is None and any(not torch.equal(shard, shards[0]) for shard in shards):
            raise ConversionError(
                f"{opened.directory}: tensor-parallel ranks differ in {state} of {name}, which they should share"
            )
        return merge_shards(shards, tags)

    return read
