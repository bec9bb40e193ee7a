"""`training.profile`: a trace of chosen steps on chosen ranks, and what lies in the memory of a GPU."""

from __future__ import annotations

import logging
from typing import Any

import torch

from hope_megatron.config.run import RunConfig
from hope_megatron.runtime.disks import best_effort
from hope_megatron.training.loop import Callback, Run
from hope_megatron.training.step import StepResult

log = logging.getLogger(__name__)

_MOST_EVENTS = 100_000
"""Allocations that a snapshot's history keeps."""


class Profiling(Callback):
    """Writes profile/step_N_rank_R.json, a trace for chrome://tracing or Perfetto; on GPUs also .pickle, a snapshot for
    pytorch.org/memory_viz."""

    def start(self, run: Run) -> None:
        self._profiler: Any = None

    def before_step(self, run: Run) -> None:
        step = run.state.step + 1
        if self._profiler is not None or not due(run.config, step, run.engine.mesh.rank):
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if run.engine.mesh.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profiler.start()

    def after_step(self, run: Run, result: StepResult) -> None:
        if self._profiler is None:
            return
        if run.engine.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        self._profiler.stop()
        stem = run.directory.path / "profile" / f"step_{run.state.step}_rank_{run.engine.mesh.rank}"
        with best_effort(str(stem)):
            stem.parent.mkdir(exist_ok=True)
            self._profiler.export_chrome_trace(str(stem.with_suffix(".json")))
            if run.engine.mesh.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(stem.with_suffix(".pickle")))
                torch.cuda.memory._record_memory_history(enabled=None)
            log.info("profile of step %d: %s", run.state.step, stem.with_suffix(".json"))
        self._profiler = None


def due(config: RunConfig, step: int, rank: int) -> bool:
    """Whether a step (1 is the first) of a rank is to be profiled."""
    profile = config.training.profile
    return step in profile.steps and rank in profile.ranks
