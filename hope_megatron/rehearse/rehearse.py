"""Rehearse a run: the recordings that `depth.py` puts together, all in one fake world."""

from __future__ import annotations

import contextlib
import gc
import warnings
from typing import Any

from hope_megatron.config.run import RunConfig
from hope_megatron.config.update_kinds import update_kinds
from hope_megatron.rehearse.cheap_pass import cheap_passes
from hope_megatron.rehearse.depth import Depths, shallow, short_tokens
from hope_megatron.rehearse.fake_world import fake_world, stand_in
from hope_megatron.rehearse.gpu_path import cpu_path, gpu_path
from hope_megatron.rehearse.step import Recording, Stage, staged
from hope_megatron.rehearse.watch import Watch


def rehearse(config: RunConfig, world_size: int, *, rank: int = 0, as_gpu: bool = True) -> tuple[Depths, Watch]:
    """Rehearse one training step of one rank. Leaves no process group behind.

    Args:
        config: the run; its data are not opened.
        world_size: number of ranks.
        rank: whose step.
        as_gpu: take the path that a GPU would take; False: that of a CPU, which a real run can be held against.

    Raises:
        ConfigError: if world, mesh and batch do not divide.
    """
    accumulation = config.accumulation_steps(world_size)
    watch = Watch(stand_in=stand_in, rounded=as_gpu)
    path = gpu_path(watch, config) if as_gpu else cpu_path()
    with warnings.catch_warnings(), path, fake_world(config.parallel, world_size, rank, watch) as mesh:
        warnings.simplefilter("ignore")

        def on_stage(variant: RunConfig, act: Any) -> Any:
            gc.collect()  # engines are full of cycles; the last one must not be counted with the next
            watch.begin_anew()
            with staged(variant, mesh, watch) as stage:
                return act(stage)

        found = {
            kind: on_stage(variant, lambda stage: _shallow_steps(stage, accumulation))
            for kind, variant in shallow(config).items()
        }
        # what backward recomputes is in the shallow recordings; windows matter by their number
        window = short_tokens(config) if config.training.truncate_tokens else None
        whole = with_training(config, recompute="none", truncate_tokens=window)
        updates = on_stage(whole, lambda stage: _whole_steps(stage, config, accumulation))
    return Depths(config, accumulation, found, updates[0][0], updates), watch


def _shallow_steps(stage: Stage, accumulation: int) -> tuple[Recording, Recording]:
    short, full = short_tokens(stage.config), stage.config.training.seq_length
    if accumulation == 1:
        return stage.step([short]), stage.step([full])
    return stage.step([short] * 3), stage.step([short, full])


def _whole_steps(stage: Stage, config: RunConfig, accumulation: int) -> list[tuple[Recording, float]]:
    """Steps of each kind; the first has up to three micro-batches.

    config: the run, whose windows the staged one has shortened.
    """
    windows = config.training.seq_length // (config.training.truncate_tokens or config.training.seq_length)
    short = [windows * short_tokens(config)]
    recordings: list[tuple[Recording, float]] = []
    partitioned = config.parallel.zero_stage == 3
    with contextlib.nullcontext() if partitioned else cheap_passes(stage.engine.model):
        stage.step(short)  # makes the optimizer's state
        for number, share in update_kinds(config):
            set_clock(stage, number)
            passes = 3 if accumulation > 1 and not recordings else 1
            recordings.append((stage.step(short * passes), share))
    return recordings


def with_training(config: RunConfig, **changes: Any) -> RunConfig:
    """The run with other values in its section `training`."""
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def set_clock(stage: Stage, number: int) -> None:
    """Let the next step be that of this number, counted from 1."""
    for state in stage.engine.optimizer.state.values():
        state["step"] = number - 1
