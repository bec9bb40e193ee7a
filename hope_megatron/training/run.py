"""A whole training run in this process: set up, resume, train, and leave everything in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.checkpointer import Checkpointer
from hope_megatron.checkpoint.format import Checkpoint, list_checkpoints
from hope_megatron.checkpoint.generators import seed_generators
from hope_megatron.config import RunConfig, dump_config
from hope_megatron.engine.engine import Engine
from hope_megatron.engine.new_engine import build_engine
from hope_megatron.parallel.control import ControlGroup
from hope_megatron.parallel.distributed import Mesh, init_distributed
from hope_megatron.runtime.disks import best_effort
from hope_megatron.runtime.files import write_text
from hope_megatron.runtime.formatting import duration_text
from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.training.batches import SampleSource
from hope_megatron.training.callbacks import default_callbacks, is_summarized
from hope_megatron.training.epochs import passes_over, passes_text, planned_passes, repetition_warning
from hope_megatron.training.history import (
    announce_changes,
    completed_config,
    history_tags,
    learning_rate_rise,
    resumed_history,
    write_history,
)
from hope_megatron.training.loop import Callback, Outcome, Run, read_skipped_samples, train
from hope_megatron.training.metrics import read_metrics
from hope_megatron.training.phases import PhaseClock
from hope_megatron.training.progress import Progress, configure_logging
from hope_megatron.training.provenance import provenance
from hope_megatron.training.run_directory import RunDirectory, RunDirectoryError
from hope_megatron.training.tracking import Trackers

log = logging.getLogger(__name__)

ContinueData = Callable[[SampleSource, Mapping[str, Any]], SampleSource]
"""From the source as configured and a saved position to the source to continue with; raises if they do not fit."""


def same_data(source: SampleSource, state: Mapping[str, Any]) -> SampleSource:
    """Continue with the very data that the position belongs to."""
    source.check_state(state)
    return source


def run_training(
    config: RunConfig,
    train_source: SampleSource,
    heldout_source: SampleSource | None = None,
    *,
    resume: str = "auto",
    continue_data: ContinueData = same_data,
    phases: PhaseClock | None = None,
    weights_of: Path | None = None,
    prepare: Callable[[Run], None] = lambda run: None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train as configured, on all ranks of the world together.

    Args:
        config: the resolved configuration.
        train_source: training samples, the same on every rank.
        heldout_source: held-out samples, for evaluations and the probe.
        resume: `auto` continues from the run's newest good checkpoint if there is one; `never` insists on a fresh run.
            Otherwise the path of a checkpoint (a step directory): of this run, to go back to it; of another, to begin
            from it as long as this run has no checkpoint of its own.
        continue_data: takes the data up again at the position of the checkpoint; the same on all ranks.
        phases: times the phases of the start.
        weights_of: checkpoint whose weights a run begins with that has no checkpoint of its own.
        prepare: called on all ranks when the weights are there; may give the run its `train_source`.
        callbacks: beside the default ones, before them.

    Returns:
        The finished run.

    Raises:
        exceptions with `is_user_error`, on all ranks: a directory in use, a damaged or foreign checkpoint, changed data,
        a loss that is not finite, ...
    """
    phases = phases or PhaseClock()
    mesh = init_distributed(
        config.parallel,
        num_threads=config.training.num_threads,
        timeout_s=config.resilience.hang.collective_timeout_s,
    )
    phases.mark("rendezvous")
    engine = build_engine(config, mesh)
    seed_generators(config.training.seed, mesh.dp_rank)
    if HEART.listeners:
        HEART.listeners[0].engine = engine  # type: ignore[attr-defined]  # of the fault injector
    phases.mark("model")

    directory = RunDirectory(config.run_dir)
    _acquire(directory, engine.control, mesh, resume)
    progress = Progress(config.training.steps, config.training.tokens_per_step)
    configure_logging(mesh.rank, directory.log, progress)
    checkpointer = _checkpointer(engine, directory)
    run = Run(config, engine, checkpointer, directory, train_source, heldout_source, provenance(), phases=phases)
    tracker = None
    try:
        _resume(run, resume, continue_data, weights_of)
        prepare(run)
        run.skipped_samples = read_skipped_samples(run)
        phases.mark("checkpoint")
        if run.is_complete and is_summarized(directory):
            if mesh.rank == 0:
                log.info("%s is complete: all %d steps are done", config.name, run.state.step)
            return run
        if mesh.rank == 0:
            with best_effort(directory.config.name):
                write_text(directory.config, dump_config(config))
                write_history(directory.history, config, run.history)
            if config.tracking.names:
                tags = {"hope_megatron.commit": str(run.provenance["commit"]), **history_tags(run.history)}
                tracker = Trackers(config, directory, tags)
        _announce(run)
        outcome = train(run, [*callbacks, *default_callbacks(progress, tracker)])
        tracker = None  # its callback has closed it
        _report(run, outcome)
    finally:
        progress.close()
        if tracker is not None:
            tracker.close("FAILED", [directory.config, directory.metrics, directory.log], timeout_s=10.0)
        directory.release()
    return run


def _checkpointer(engine: Engine, directory: RunDirectory) -> Checkpointer:
    keep = engine.config.checkpoint
    return Checkpointer(
        engine,
        directory.checkpoints,
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        keep_best=keep.keep_best,
        max_failed_saves=engine.config.resilience.max_failed_saves,
    )


def _acquire(directory: RunDirectory, control: ControlGroup, mesh: Mesh, resume: str) -> None:
    """Take the run directory, or fail on all ranks with the same message."""
    error: Exception | None = None
    if mesh.rank == 0:
        try:
            directory.acquire()
            if resume == "never" and (list_checkpoints(directory.checkpoints) or read_metrics(directory.metrics)):
                raise RunDirectoryError(
                    f"{directory.path} already holds a run and --resume never forbids to continue it; "
                    "give this one another name, or remove that directory"
                )
        except RunDirectoryError as found:
            error = found
    control.raise_together(error)


def _resume(run: Run, resume: str, continue_data: ContinueData, weights_of: Path | None) -> None:
    """Load the checkpoint that `resume` means, and take its progress and data position over; or the weights of `weights_of`."""
    if resume == "never":
        return
    start = None if resume == "auto" else Path(resume)
    if start is not None and start.resolve().parent == run.directory.checkpoints.resolve():
        checkpoint: Checkpoint | None = run.checkpointer.load(start)  # back to an earlier step of this very run
    else:
        # A run that has begun continues where it is: a requeued job repeats its command line.
        checkpoint = run.checkpointer.load_latest()
        if checkpoint is None and start is not None:
            checkpoint = run.checkpointer.load(start)
    if checkpoint is None:
        if weights_of is not None:
            begun = run.checkpointer.load_weights(weights_of)
            run.history = [
                *begun.description.get("history", ()),
                {"operation": "begun with weights", "source": str(weights_of)},
            ]
        return
    run.state.load_dict(checkpoint.description["progress"])
    run.newton_schulz_calls_before = run.state.newton_schulz_calls
    run.train_source = continue_data(run.train_source, checkpoint.description["data"])
    if run.engine.mesh.rank == 0:
        log.info("resumed from %s", checkpoint.path)
    _compare_settings(run, checkpoint)


def _compare_settings(run: Run, checkpoint: Checkpoint) -> None:
    """Say and note what this start does otherwise than the steps before."""
    mesh, step = run.engine.mesh, run.state.step
    run.history, changes = resumed_history(checkpoint.description, run.config, mesh.world_size)
    if mesh.rank == 0 and not run.is_complete:
        announce_changes(changes, step, run.directory.history)
        rise = learning_rate_rise(completed_config(checkpoint.config), run.config, step)
        if rise is not None:
            log.warning("%s", rise)


def _announce(run: Run) -> None:
    if run.engine.mesh.rank != 0:
        return
    mesh, config, training = run.engine.mesh, run.config, run.config.training
    log.info(
        "%s: %s parameters; %d x %s, tensor parallel %d%s%s, data parallel %d, ZeRO %d, %s, %s",
        config.name,
        f"{run.engine.num_parameters:,}",
        mesh.world_size,
        mesh.device.type,
        mesh.tp_size,
        " with sequence parallel" if config.parallel.sequence_parallel else "",
        f", context parallel {mesh.cp_size}" if mesh.cp_size > 1 else "",
        mesh.data_size,
        config.parallel.zero_stage,
        training.precision,
        config.optim.name,
    )
    log.info(
        "steps %d to %d of %s tokens each, in %s",
        run.state.step + 1,
        training.steps,
        f"{training.tokens_per_step:,}",
        run.directory.path,
    )
    passes = planned_passes(run.train_source, config, run.state.samples, run.state.step)
    log.info("data: %s by the last step", passes_text(passes))
    if warning := repetition_warning(passes):
        log.warning("%s", warning)


def _report(run: Run, outcome: Outcome) -> None:
    if run.engine.mesh.rank != 0:
        return
    if outcome is Outcome.STOPPED:
        log.info("stopped after step %d of %d; the same command resumes it", run.state.step, run.config.training.steps)
    else:
        passes = passes_text(passes_over(run.train_source, run.state.samples))
        log.info("done in %s of steps, %s; curves in %s", duration_text(run.state.wall_s), passes, run.directory.curves)
