"""Callbacks that watch the ranks: replicas that differ, and ranks that are slow."""

from __future__ import annotations

import logging
import statistics
import time

from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.training.batches import micro_batches, rank_samples
from hope_megatron.training.ledger import RunLedger, next_sample
from hope_megatron.training.loop import Callback, Run
from hope_megatron.training.replicas import Replay, SilentCorruptionError, check_replicas
from hope_megatron.training.step import StepResult

log = logging.getLogger(__name__)

_STRAGGLER_STEPS = 25
_NOISE_S = 0.005
"""Differences per step below this are the machine's noise."""


class Replicas(Callback):
    """Compares replicas every `resilience.replicas.every` steps and before every save, and has a micro-batch computed twice."""

    def start(self, run: Run) -> None:
        self._replay = Replay(run.engine)
        self._replaying = False
        self._count = 0

    def before_step(self, run: Run) -> None:
        rules, mesh = run.config.resilience.replicas, run.engine.mesh
        whole = run.config.training.truncate_tokens in (None, run.config.training.seq_length)
        due = bool(rules.every) and (run.state.step + 1) % rules.every == 0
        self._replaying = (
            rules.replay
            and due
            and mesh.dp_size > mesh.cp_size == 1
            and whole
            and not run.config.model.cms.learns_in_context
        )
        if not self._replaying:
            return
        assert run.reader is not None
        owner = self._replay.owner(self._count)
        batch_size = run.config.training.global_batch_size
        first = next_sample(run.state.samples, batch_size, run.skipped_samples)
        numbers = rank_samples(first, batch_size, owner, mesh.dp_size)[: run.config.training.micro_batch_size]
        ((tokens, targets),) = micro_batches(run.train_source, numbers, len(numbers), mesh.device)
        self._count += 1
        self._guarded(run, lambda: self._replay.before_step(owner, tokens, targets, run.reader.documents(tokens)))

    def after_step(self, run: Run, result: StepResult) -> None:
        if self._replaying:
            self._guarded(run, self._replay.after_step)
        every, step = run.config.resilience.replicas.every, run.state.step
        saves = step % run.config.checkpoint.every == 0 or run.is_last_step
        if every and (step % every == 0 or saves):
            self._guarded(run, lambda: check_replicas(run.engine))

    @staticmethod
    def _guarded(run: Run, check: object) -> None:
        try:
            check()  # type: ignore[operator]
        except SilentCorruptionError as error:
            if run.engine.mesh.rank == 0:
                ledger = RunLedger(run.directory.ledger)
                ledger.record("silent corruption", run.state.step, run.state.samples, 0, reason=str(error))
            raise


class Stragglers(Callback):
    """Names a rank whose steps compute longer than those of the median rank; waiting for others does not count."""

    def start(self, run: Run) -> None:
        self._begin()

    def before_step(self, run: Run) -> None:
        self._step_began, self._waited = time.monotonic(), HEART.waited_s

    def after_step(self, run: Run, result: StepResult) -> None:
        self._computed += time.monotonic() - self._step_began - (HEART.waited_s - self._waited)
        self._steps += 1
        if run.state.step % _STRAGGLER_STEPS or run.engine.mesh.world_size == 1:
            return
        seconds = run.engine.control.gather(self._computed / self._steps)
        self._begin()
        usual = statistics.median_low(seconds)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        run.metrics["straggler/ratio"] = seconds[slowest] / max(usual, 1e-9)
        if seconds[slowest] < run.config.resilience.straggler_ratio * usual or seconds[slowest] - usual < _NOISE_S:
            return
        run.metrics["straggler/rank"] = float(slowest)
        if run.engine.mesh.rank == 0:
            log.warning(
                "rank %d is slow: %.0f ms of computation per step, the median rank takes %.0f ms",
                slowest,
                1000 * seconds[slowest],
                1000 * usual,
            )

    def _begin(self) -> None:
        self._computed, self._steps = 0.0, 0
        self._step_began, self._waited = time.monotonic(), HEART.waited_s
