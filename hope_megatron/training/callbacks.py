"""The periodic work of a run, one class per job. Their order in `default_callbacks` is the order in which they run."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hope_megatron.checkpoint.format import PROBE_NAME
from hope_megatron.config.parallel import own_spans
from hope_megatron.eval.memory_health import cms_figure, measure_memories
from hope_megatron.optim.base import group_clock
from hope_megatron.runtime.disks import best_effort
from hope_megatron.runtime.files import write_json
from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.runtime.patience import PatientWriter
from hope_megatron.runtime.process import start_up_text
from hope_megatron.runtime.records import read_object
from hope_megatron.training.batches import SampleSource, heldout_batches, mesh_spans, micro_batches, rank_samples
from hope_megatron.training.epochs import passes_over
from hope_megatron.training.guard import Judgement
from hope_megatron.training.ledger import RunLedger
from hope_megatron.training.loop import Callback, Run
from hope_megatron.training.metrics import MetricsFile, read_metrics
from hope_megatron.training.plots import plot_curves
from hope_megatron.training.profiling import Profiling
from hope_megatron.training.progress import Progress
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.signals import signal_name
from hope_megatron.training.speed import in_gib, memory_bytes, speed_metrics
from hope_megatron.training.step import StepResult, evaluate
from hope_megatron.training.tracking import Trackers
from hope_megatron.training.watch import Replicas, Stragglers

log = logging.getLogger(__name__)


def default_callbacks(progress: Progress, tracker: Trackers | None) -> list[Callback]:
    """What every run does. The record of a step is written before the checkpoint of that step."""
    return [
        Profiling(),
        FirstStep(),
        Judgements(),
        HeldoutEvaluation(),
        MemoryHealth(),
        Stragglers(),
        MetricsRecord(progress, tracker),
        Replicas(),
        Checkpointing(),
        Summary(),
        Curves(),
        Tracking(tracker),
    ]


class FirstStep(Callback):
    """Times the first step, in which caches, buffers and kernels are made, and says how long the start-up took by phase."""

    def start(self, run: Run) -> None:
        self._seen = False

    def after_step(self, run: Run, result: StepResult) -> None:
        if self._seen:
            return
        run.phases.mark("first_step")
        self._seen = True
        if run.engine.mesh.rank == 0:
            phases = run.phases.start_up()
            log.info("started in %s", start_up_text(phases))
            content = {"step": run.state.step, "phases_s": phases}
            with best_effort(run.directory.start_up.name):
                PatientWriter(run.directory.start_up.name)(lambda: write_json(run.directory.start_up, content))

    def finish(self, run: Run) -> None:
        run.phases.mark("steps")


class Judgements(Callback):
    """Says what was bad about a step, and writes it to the ledger."""

    def start(self, run: Run) -> None:
        if run.engine.mesh.rank == 0:
            self._ledger, self._write = RunLedger(run.directory.ledger), PatientWriter(run.directory.ledger.name)

    def after_step(self, run: Run, result: StepResult) -> None:
        if result.skipped:
            run.metrics["train/skipped"] = 1.0
        if run.engine.mesh.rank != 0:
            return
        batch_size, what = run.config.training.global_batch_size, result.judgement.name.lower()
        where = (run.state.step, run.state.samples - batch_size, batch_size)
        norm = result.grad_norm if math.isfinite(result.grad_norm) else None
        if result.skipped:
            self._record("skipped step", *where, reason=f"{what} gradient", grad_norm=norm)
            log.warning("step %d skipped on all ranks: %s gradient, twice; nothing changed", run.state.step, what)
        elif result.recomputed:
            self._record("recomputed step", *where, reason=f"{what} gradient")
            log.warning("step %d computed twice: its gradient was %s the first time", run.state.step, what)
        elif result.judgement is Judgement.EXTREME:
            log.warning("step %d: extreme gradient norm %.3g", run.state.step, result.grad_norm)
        if result.spike:
            self._record("loss spike", *where, loss=result.loss)
            steps = run.config.resilience.spike.steps
            log.warning("step %d: loss %.3f, far above the usual for %d steps", run.state.step, result.loss, steps)
        if self._ledger.has_unwritten:
            self._write(self._ledger.flush)

    def finish(self, run: Run) -> None:
        if run.engine.mesh.rank == 0 and self._ledger.has_unwritten:
            self._write(self._ledger.flush)

    def _record(self, event: str, *where: int, **more: Any) -> None:
        self._write(lambda: self._ledger.record(event, *where, **more))


class HeldoutEvaluation(Callback):
    """Mean loss of the first held-out sequences, every `eval_every` steps and after the last; of averaged weights too, if kept."""

    def after_step(self, run: Run, result: StepResult) -> None:
        every, source = run.config.training.eval_every, run.heldout_source
        due = run.is_complete or (every > 0 and run.state.step % every == 0)
        if source is None or not due:
            return
        run.metrics |= self._losses(run, source)
        if run.config.training.ema:
            with run.engine.averaged_weights():
                run.metrics["heldout/loss_ema"] = self._losses(run, source)["heldout/loss"]

    @staticmethod
    def _losses(run: Run, source: SampleSource) -> dict[str, float]:
        HEART.enter("evaluate", HEART.limits.evaluation_s)
        training, mesh = run.config.training, run.engine.mesh
        spans = mesh_spans(run.config, mesh)
        batches = heldout_batches(
            source,
            training.eval_sequences,
            training.micro_batch_size,
            mesh.data_rank,
            mesh.data_size,
            mesh.device,
            spans,
        )
        return evaluate(run.engine, batches, source.end_id if run.config.data.reset_at_documents else None)


class MemoryHealth(Callback):
    """What memories do with a context, every `memory_every` steps and after the last: one sequence per data-parallel rank of
    the batch just trained on is read once more. And how far updates move CMS levels, each at its next update from there on.

    Training does not notice.
    """

    def before_step(self, run: Run) -> None:
        run.engine.optimizer.measure_updates = self._moves_due_level(run, run.state.step + 1)

    def after_step(self, run: Run, result: StepResult) -> None:
        run.metrics |= run.engine.adapted
        if run.engine.optimizer.measure_updates:
            run.metrics |= run.engine.optimizer.relative_updates(cms_figure)
        every, step = run.config.training.memory_every, run.state.step
        if every and (step % every == 0 or run.is_complete):
            HEART.enter("measure", HEART.limits.evaluation_s)
            batch_size, mesh = run.config.training.global_batch_size, run.engine.mesh
            first = rank_samples(run.state.samples - batch_size, batch_size, mesh.data_rank, mesh.data_size).start
            length = run.config.training.seq_length  # read in one piece: the inner clocks stand still
            spans = own_spans(length, length, mesh.cp_rank, mesh.cp_size)
            tokens, targets = micro_batches(run.train_source, range(first, first + 1), 1, mesh.device, spans)[0]
            run.metrics |= measure_memories(run.engine.model, lambda: run.engine.evaluate(tokens, targets, learn=False))

    @staticmethod
    def _moves_due_level(run: Run, step: int) -> bool:
        """Whether a level is updated in this step for the first time since a multiple of `memory_every`, or for the last."""
        every, last = run.config.training.memory_every, run.config.training.steps
        clocks = {group_clock(group) for group in run.engine.optimizer.param_groups}
        return every > 0 and any(
            clock.due(step)
            and (step // every > (step - clock.period(step)) // every or step + clock.period(step + 1) > last)
            for clock in clocks
        )


class MetricsRecord(Callback):
    """Writes the record of a step to metrics.jsonl, and shows it."""

    def __init__(self, progress: Progress, tracker: Trackers | None) -> None:
        self.progress = progress
        self.tracker = tracker

    def start(self, run: Run) -> None:
        self._last = (run.state.tokens, time.monotonic(), 0.0, HEART.waited_s)
        self._first = True
        if run.engine.mesh.rank == 0:
            self._file, self._write = MetricsFile(run.directory.metrics), PatientWriter(run.directory.metrics.name)
            with best_effort(run.directory.metrics.name):
                self._file.drop_after(run.state.step)

    def rolled_back(self, run: Run) -> None:
        self._last = (run.state.tokens, time.monotonic(), *self._last[2:])
        if run.engine.mesh.rank == 0:
            with best_effort(run.directory.metrics.name):
                self._write.flush(HEART.limits.save_s)  # what is on its way there must not come behind
                self._file.drop_after(run.state.step)

    def after_step(self, run: Run, result: StepResult) -> None:
        due = run.state.step % run.config.training.log_every == 0 or run.is_last_step or run.state.step == 1
        record = None
        if due or run.metrics:
            record = {**self._measure(run, result), **run.metrics, **self._start_up(run)}
        if run.engine.mesh.rank != 0:
            return
        if record is not None:
            self._write(partial(self._append, run.state.step, record))
        self.progress.after_step(run.state.step, record, result.loss)

    def finish(self, run: Run) -> None:
        if run.engine.mesh.rank == 0:
            self._write(self._file.flush)  # what has waited for a full disk; the last save may have found room
            self._write.flush(HEART.limits.save_s)  # the summary and the trackers read it
            self.progress.close()

    def _append(self, step: int, record: dict[str, float]) -> None:
        self._file.append(step, record)
        if self.tracker is not None:
            self.tracker.notify()

    def _start_up(self, run: Run) -> dict[str, float]:
        """Seconds of the start-up's phases, in the first record of a process."""
        phases = run.phases.start_up() if self._first else {}
        self._first = False
        return {f"time/start_{phase}_s": seconds for phase, seconds in phases.items()}

    def _measure(self, run: Run, result: StepResult) -> dict[str, float]:
        """Collective: the optimizer's statistics are over all ranks."""
        assert run.reader is not None
        now = time.monotonic()
        tokens, since, stalled, waited = self._last
        self._last = (run.state.tokens, now, run.reader.stall_s, HEART.waited_s)
        sizes, mesh = memory_bytes(run.engine.mesh.device), run.engine.mesh
        seconds = (run.reader.stall_s - stalled, HEART.waited_s - waited)
        stall_us, wait_us, *most = run.engine.control.maximum([*(round(1e6 * s) for s in seconds), *sizes.values()])
        tokens_per_s = (run.state.tokens - tokens) / max(now - since, 1e-9)
        stats = run.engine.optimizer.last_step_stats(reduce=True)
        stats.pop("optim/newton_schulz_calls_total", None)  # counts this process only
        measured = {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
        return {
            **{name: value for name, value in measured.items() if math.isfinite(value)},
            "train/lr": result.lr_multiplier * run.config.optim.lr,
            "train/tokens": run.state.tokens,
            "train/samples": run.state.samples,
            **stats,
            # of the saves since the last record; the one of this step follows
            "checkpoint/stall_s": run.checkpointer.take_stall_s(),
            "speed/tokens_per_s": tokens_per_s,
            **speed_metrics(run.config, tokens_per_s, mesh.world_size, mesh.device),
            **in_gib(dict(zip(sizes, most))),
            "time/data_stall_s": stall_us / 1e6,
            "time/communication_s": wait_us / 1e6,
            "time/wall_s": run.state.wall_s,
            "time/unix_s": time.time(),
        }


class Checkpointing(Callback):
    """Saves every `checkpoint.every` steps in the background, and after the last step before the run ends."""

    def after_step(self, run: Run, result: StepResult) -> None:
        HEART.enter("save", HEART.limits.save_s)
        self._announce(run, run.checkpointer.poll())
        due = run.state.step % run.config.checkpoint.every == 0 or self._try_again(run)
        if due or run.is_last_step:
            run.update_newton_schulz_calls()
        if run.is_last_step:
            if run.stop_signal and run.engine.mesh.rank == 0:
                log.warning("%s: saving at step %d, then leaving", signal_name(run.stop_signal), run.state.step)
            probe = self._probe(run) if run.is_complete else None
            self._announce(run, run.checkpointer.save_now(self._describe(run), probe))
        elif due:
            run.checkpointer.save(self._describe(run))

    _failed = 0
    _try_again_at = 0.0

    def _try_again(self, run: Run) -> bool:
        """Whether a save that failed shall be repeated now, after a pause that doubles. Collective while there was a failure."""
        failed, now = run.checkpointer.failed_saves, time.monotonic()
        if failed > self._failed:
            self._try_again_at = now + min(2.0**failed, 60.0)
        self._failed = failed
        if not failed or run.checkpointer.saving:
            return False
        return bool(run.engine.control.maximum([now >= self._try_again_at])[0])

    @staticmethod
    def _announce(run: Run, path: Path | None) -> None:
        if path is not None and run.engine.mesh.rank == 0:
            log.info("saved %s", path)

    @staticmethod
    def _describe(run: Run) -> dict[str, Any]:
        return {
            "progress": run.state.to_dict(),
            "data": run.train_source.state(run.state.samples),
            "config": run.config.model_dump(mode="json"),
            "provenance": run.provenance,
            "history": run.history,
            "heldout_loss": run.metrics.get("heldout/loss"),
        }

    @staticmethod
    def _probe(run: Run) -> dict[str, dict[str, torch.Tensor]] | None:
        """Logits of the first held-out sequence, by which an export can prove itself."""
        if run.heldout_source is None:
            return None
        tokens, _ = micro_batches(run.heldout_source, range(1), 1, run.engine.mesh.device)[0]
        logits = run.engine.logits(tokens)
        return {PROBE_NAME: {"tokens": tokens.cpu(), "logits": logits.float().cpu()}}


class Summary(Callback):
    """summary.json: what the run was and what came of it."""

    def finish(self, run: Run) -> None:
        mesh, config = run.engine.mesh, run.config
        if mesh.rank != 0:
            return
        records = read_metrics(run.directory.metrics)
        summary = {
            "name": config.name,
            "complete": run.is_complete,
            "parameters": run.engine.num_parameters,
            "world_size": mesh.world_size,
            "tensor_parallel": mesh.tp_size,
            "context_parallel": mesh.cp_size,
            "data_parallel": mesh.data_size,
            "sequence_parallel": config.parallel.sequence_parallel,
            "zero_stage": config.parallel.zero_stage,
            "precision": config.training.precision,
            "optimizer": config.optim.name,
            **run.state.to_dict(),
            "epochs": {one.name: one.epochs for one in passes_over(run.train_source, run.state.samples)},
            "tokens_per_s": run.state.tokens / max(run.state.wall_s, 1e-9),
            "train_loss": _last(records, "train/loss"),
            "heldout_loss": _last(records, "heldout/loss"),
            "phases_s": run.phases.rounded(),
            "provenance": run.provenance,
        }
        with best_effort(run.directory.summary.name):
            write_json(run.directory.summary, summary)


def is_summarized(directory: RunDirectory) -> bool:
    """Whether summary.json is there and says that the run is complete."""
    return (read_object(directory.summary) or {}).get("complete") is True


class Curves(Callback):
    """curves.png, when the run ends."""

    def finish(self, run: Run) -> None:
        if run.engine.mesh.rank == 0:
            with best_effort(run.directory.curves.name):
                plot_curves(run.directory.metrics, run.directory.curves, title=run.config.name)


class Tracking(Callback):
    """Hands the files of the run to its trackers and ends it there."""

    def __init__(self, tracker: Trackers | None) -> None:
        self.tracker = tracker

    def finish(self, run: Run) -> None:
        if self.tracker is not None:
            directory = run.directory
            self.tracker.close(
                "FINISHED" if run.is_complete else "KILLED",
                [
                    directory.config,
                    directory.history,
                    directory.metrics,
                    directory.summary,
                    directory.curves,
                    directory.log,
                ],
            )


def _last(records: list[dict[str, Any]], name: str) -> float | None:
    return next((record[name] for record in reversed(records) if name in record), None)
