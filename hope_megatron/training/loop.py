"""The training loop: steps, and callbacks after each of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hope_megatron.checkpoint.checkpointer import Checkpointer
from hope_megatron.config.run import RunConfig
from hope_megatron.engine.engine import Engine, NonFiniteError
from hope_megatron.runtime.reports import report_ready
from hope_megatron.training.batches import BatchReader, SampleSource
from hope_megatron.training.phases import PhaseClock
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.signals import StopRequest
from hope_megatron.training.state import TrainingState
from hope_megatron.training.step import StepResult, train_step


@dataclass
class Run:
    """Everything that a step and a callback may look at."""

    config: RunConfig
    engine: Engine
    checkpointer: Checkpointer
    directory: RunDirectory
    train_source: SampleSource
    heldout_source: SampleSource | None
    provenance: dict[str, Any]
    state: TrainingState = field(default_factory=TrainingState)
    phases: PhaseClock = field(default_factory=PhaseClock)
    metrics: dict[str, float] = field(default_factory=dict)
    """What callbacks measured after this step, by metric name; emptied before the next."""
    reader: BatchReader | None = None
    """Reads training batches ahead, while the loop runs."""
    stop_signal: int = 0
    """The signal that ended the run early, agreed by all ranks; 0 if none did."""
    newton_schulz_calls_before: int = 0
    """Matrices orthogonalised before this process resumed the run."""

    @property
    def is_last_step(self) -> bool:
        """Whether no step will follow: the run is complete, or has been asked to stop."""
        return self.state.step >= self.config.training.steps or self.stop_signal != 0

    @property
    def is_complete(self) -> bool:
        """Whether all steps have been done."""
        return self.state.step >= self.config.training.steps

    def update_newton_schulz_calls(self) -> None:
        """Bring `state.newton_schulz_calls` up to date. Collective."""
        stats = self.engine.optimizer.last_step_stats(reduce=True)
        calls = int(stats.get("optim/newton_schulz_calls_total", 0))
        self.state.newton_schulz_calls = self.newton_schulz_calls_before + calls


class Callback:
    """Periodic work, by name. Every method is called on all ranks, in the order of the list of callbacks."""

    def start(self, run: Run) -> None:
        """Before the first step of this process, after a checkpoint has been loaded."""

    def before_step(self, run: Run) -> None:
        """Before each step."""

    def after_step(self, run: Run, result: StepResult) -> None:
        """After each step. Measurements go to `run.metrics`."""

    def finish(self, run: Run) -> None:
        """After the last step, unless the run failed."""


class Outcome(Enum):
    """How a run ended."""

    COMPLETE = "complete"
    STOPPED = "stopped"


def train(run: Run, callbacks: Sequence[Callback]) -> Outcome:
    """Train until the last step or a stop signal.

    Raises:
        NonFiniteError: naming the step, on all ranks; the checkpoints so far are kept.
        CheckpointSaveError: when several saves in a row have failed.
    """
    with StopRequest() as stop, BatchReader(run.train_source, run.config, run.engine.mesh) as run.reader:
        stop.signal_number = report_ready(run.engine.mesh.rank) or stop.signal_number
        for callback in callbacks:
            callback.start(run)
        while not run.is_last_step:
            for callback in callbacks:
                callback.before_step(run)
            started = time.monotonic()
            result = _step(run)
            run.state.wall_s += time.monotonic() - started
            # Ranks get their signals at different moments; they leave after the same step.
            run.stop_signal = run.engine.control.maximum([stop.signal_number])[0]
            run.metrics.clear()
            for callback in callbacks:
                callback.after_step(run, result)
        for callback in callbacks:
            callback.finish(run)
    return Outcome.COMPLETE if run.is_complete else Outcome.STOPPED


def _step(run: Run) -> StepResult:
    step = run.state.step + 1
    assert run.reader is not None
    try:
        return train_step(run.engine, run.reader, run.state, run.config)
    except NonFiniteError as error:
        run.checkpointer.wait()
        raise NonFiniteError(
            f"step {step}: {error}. No parameter was changed. Lower optim.lr, lengthen optim.warmup_steps, or look at the "
            f"samples {run.state.samples} to {run.state.samples + run.config.training.global_batch_size - 1}; then resume"
        ) from None
