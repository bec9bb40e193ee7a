"""A rehearsal of a run on a CPU, held against that run: the same operators, the same memory."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from hope_megatron.config import ModelConfig, RunConfig
from hope_megatron.config.hardware import find_hardware
from hope_megatron.parallel.distributed import init_distributed, shutdown_distributed
from hope_megatron.rehearse.depth import Depths
from hope_megatron.rehearse.gpu_path import cpu_path
from hope_megatron.rehearse.rehearse import rehearse
from hope_megatron.rehearse.step import Recording, Stage, staged
from hope_megatron.rehearse.tally import Tally, combined, grouped
from hope_megatron.rehearse.verdict import verdict
from hope_megatron.rehearse.watch import Watch
from hope_megatron.testing.tiny import tiny_run_config


def run_config(precision: str, *, model: dict[str, Any], training: dict[str, Any], **changes: Any) -> RunConfig:
    """Several layers, and an optimizer whose steps are alike but for the slow level that ticks every second one."""
    training = {"seq_length": 16, "global_batch_size": 3} | training
    config = tiny_run_config(precision=precision, training=training, optim={"slow_period_steps": 1}, **changes)
    values = config.model.model_dump() | {"vocab_size": 2048, "vocab_multiple": 128} | model
    return config.model_copy(update={"model": ModelConfig(**values)})


RUNS = {
    "both mixers, layers recomputed": lambda: run_config(
        "bf16", model={"num_layers": 3, "layer_pattern": ("memory", "attention")}, training={"recompute": "layer"}
    ),
    "one micro-batch in windows, ZeRO 2": lambda: run_config(
        "fp32",
        zero_stage=2,
        model={"num_layers": 4, "layer_pattern": ("attention",)},
        training={"seq_length": 48, "micro_batch_size": 3, "truncate_tokens": 16},
    ),
}


class Pair(NamedTuple):
    """A rehearsal and the real thing."""

    config: RunConfig
    depths: Depths
    foretold_peak: int
    real: list[Recording]
    real_peak: int


@pytest.fixture(scope="module", params=RUNS)
def pair(request: pytest.FixtureRequest) -> Pair:
    config = RUNS[request.param]()
    depths, watch = rehearse(config, 1, as_gpu=False)
    foretold = verdict(depths, watch.groups, 1, find_hardware("h100"))["peak_memory_bytes"]
    return Pair(config, depths, foretold, *real_steps(config))


@contextlib.contextmanager
def on_this_machine(config: RunConfig, watch: Watch) -> Iterator[Stage]:
    """The engine of the run, in a world of one, on real tensors."""
    mesh = init_distributed(config.parallel)
    try:
        with cpu_path(), watch, staged(config, mesh, watch) as stage:
            yield stage
    finally:
        shutdown_distributed()


def real_steps(config: RunConfig) -> tuple[list[Recording], int]:
    """Two consecutive steps, after another; and the most bytes that PyTorch's allocator had given away at once during the
    last one, as PyTorch's own profiler saw it."""
    lengths = [config.training.seq_length] * config.accumulation_steps(1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with on_this_machine(config, Watch(rounded=False)) as stage:
        stage.step(lengths)
        first = stage.step(lengths)
        gc.collect()  # what only cycles hold is no part of a step
        at_rest = stage.watch.memory.live_bytes()
        recordings, peaks = [], []
        for _ in range(3):  # on a busy machine single peaks come out larger
            with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
                recordings.append(stage.step(lengths))
            level = most = 0
            for event in profile.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    level += event.nbytes()
                    most = max(most, level)
            peaks.append(most)
    return [first, recordings[0]], at_rest + min(peaks[::2])  # the slow level ticks in the other one


def test_operators_of_a_micro_batch(pair: Pair) -> None:
    passes = pair.real[0].passes
    assert operators(pair.depths.micro_batch()) == operators(passes[len(passes) // 2])


def test_operators_of_a_step(pair: Pair) -> None:
    tallies = [tally for recording in pair.real for tally in (*recording.passes, recording.rest)]
    assert operators(pair.depths.step()) == operators(combined(*((0.5, tally) for tally in tallies)))


def test_peak(pair: Pair) -> None:
    assert pair.foretold_peak == pytest.approx(pair.real_peak, rel=0.05)


def operators(tally: Tally) -> Counter[tuple[str, ...]]:
    """Calls by phase and operator."""
    return Counter({key: round(n, 6) for key, n in grouped(tally, "op", "phase", "operator").items() if abs(n) > 1e-6})
