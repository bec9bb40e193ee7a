"""The training loop: steps, and callbacks after each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from hope_megatron.checkpoint.checkpointer import Checkpointer
from hope_megatron.checkpoint.format import checkpoint_step
from hope_megatron.config.run import RunConfig
from hope_megatron.engine.engine import Engine, NonFiniteError
from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.runtime.reports import report_ready
from hope_megatron.training.batches import BatchReader, SampleSource
from hope_megatron.training.ledger import RunLedger, next_sample
from hope_megatron.training.out_of_memory import explained, snapshot_beside
from hope_megatron.training.phases import PhaseClock
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.signals import StopRequest
from hope_megatron.training.state import TrainingState
from hope_megatron.training.step import StepResult, train_step

log = logging.getLogger(__name__)


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
    history: list[dict[str, Any]] = field(default_factory=list)
    """What the weights went through: conversions, and settings that changed when the run was resumed (config/changes.py)."""
    reader: BatchReader | None = None
    """Reads training batches ahead, while the loop runs."""
    stop_signal: int = 0
    """The signal that ended the run early, agreed by all ranks; 0 if none did."""
    skipped_samples: list[tuple[int, int]] = field(default_factory=list)
    """(first, end) of the samples that rollbacks left out; the same on all ranks."""
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
        self.state.newton_schulz_calls = self.newton_schulz_calls_before + self._newton_schulz_calls_here()

    def resume_newton_schulz_calls(self) -> None:
        """Count on from `state.newton_schulz_calls`, whatever this process has done before. Collective."""
        self.newton_schulz_calls_before = self.state.newton_schulz_calls - self._newton_schulz_calls_here()

    def _newton_schulz_calls_here(self) -> int:
        stats = self.engine.optimizer.last_step_stats(reduce=True)
        return int(stats.get("optim/newton_schulz_calls_total", 0))


class Callback:
    """Periodic work, by name. Every method is called on all ranks, in the order of the list of callbacks."""

    def start(self, run: Run) -> None:
        """Before the first step of this process, after a checkpoint has been loaded."""

    def before_step(self, run: Run) -> None:
        """Before each step."""

    def after_step(self, run: Run, result: StepResult) -> None:
        """After each step. Measurements go to `run.metrics`."""

    def rolled_back(self, run: Run) -> None:
        """After the run has gone back to an earlier checkpoint; `run.state` is of that one."""

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
            HEART.begin_step(run.state.step + 1)
            HEART.enter("before step")
            for callback in callbacks:
                callback.before_step(run)
            started = time.monotonic()
            result = _step(run, stop)
            run.state.wall_s += time.monotonic() - started
            HEART.enter("after step")
            # Ranks get their signals at different moments; they have agreed on one beside the gradient norm.
            run.stop_signal = result.stop_signal
            run.metrics.clear()
            for callback in callbacks:
                callback.after_step(run, result)
            if result.spike and not run.is_last_step and roll_back(run):
                for callback in callbacks:
                    callback.rolled_back(run)
            HEART.end_step()
        HEART.enter("finish", HEART.limits.save_s)
        for callback in callbacks:
            callback.finish(run)
    return Outcome.COMPLETE if run.is_complete else Outcome.STOPPED


def roll_back(run: Run) -> bool:
    """After a loss spike: back to the last checkpoint before it, and on without the batches in between. Collective.

    Returns:
        Whether it was done. Not without the rule `act`, a checkpoint from before, a ledger that can be written, or after
        `max_rollbacks`.
    """
    rules, batch_size, step = run.config.resilience.spike, run.config.training.global_batch_size, run.state.step
    begun = step - rules.steps  # the update after this step is the last one that nobody suspects
    run.checkpointer.wait()
    target: Path | None = None
    if run.engine.mesh.rank == 0 and rules.action == "act":
        ledger = RunLedger(run.directory.ledger)
        earlier = [path for path in run.checkpointer.sealed() if checkpoint_step(path) < begun]
        first = run.state.samples - (rules.steps + 1) * batch_size
        if not earlier or ledger.count("rollback") >= rules.max_rollbacks:
            log.warning(
                "no rollback: %s", "there is no checkpoint before the spike" if not earlier else "there were enough"
            )
        elif ledger.record("rollback", step, first, run.state.samples - first, to_step=checkpoint_step(earlier[0])):
            target = earlier[0]
    name = run.engine.control.broadcast(None if target is None else str(target))
    if name is None:
        return False
    checkpoint = run.checkpointer.load(Path(name))
    run.state.load_dict(checkpoint.description["progress"])
    run.resume_newton_schulz_calls()
    run.skipped_samples = read_skipped_samples(run)
    if run.engine.mesh.rank == 0:
        log.warning("loss spike at step %d: back to step %d; its batches are skipped", step, run.state.step)
    return True


def read_skipped_samples(run: Run) -> list[tuple[int, int]]:
    """What rollbacks left out, from the ledger, as rank 0 reads it. Collective."""
    mine = RunLedger(run.directory.ledger).skipped_samples() if run.engine.mesh.rank == 0 else None
    return [(first, end) for first, end in run.engine.control.broadcast(mine)]


def _step(run: Run, stop: StopRequest) -> StepResult:
    step, batch_size = run.state.step + 1, run.config.training.global_batch_size
    assert run.reader is not None
    run.state.samples = next_sample(run.state.samples, batch_size, run.skipped_samples)
    try:
        return train_step(run.engine, run.reader, run.state, run.config, lambda: stop.signal_number)
    except torch.OutOfMemoryError as error:
        mesh = run.engine.mesh
        snapshot = snapshot_beside(run.directory.path, mesh.rank)
        raise explained(error, run.config, mesh.world_size, mesh.rank, snapshot) from error
    except NonFiniteError as error:
        run.checkpointer.wait()
        raise NonFiniteError(
            f"step {step}: {error}. No parameter was changed. Lower optim.lr, lengthen optim.warmup_steps, or look at the "
            f"samples {run.state.samples} to {run.state.samples + batch_size - 1}; then resume"
        ) from None
