"""Running the cells of a sweep on this machine: some at a time, each a `hope train` of its own.

Started again, it does what is missing. A failed cell is tried again after all others, and set aside when it fails too often.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType

from hope_megatron.config.secrets import tracking_environment
from hope_megatron.runtime.process import process_environment
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.plan import Cell, Plan
from hope_megatron.sweep.store import State, SweepDirectory
from launch.attempts import is_finished

_POLL_S = 0.2
_USER_ERROR = 2
"""Exit code of `hope train` for a mistake in what was asked: trying again would not help."""

Report = Callable[[str], None]


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    claim: int
    started: float


class LocalRunner:
    """Runs cells in processes on this machine."""

    def __init__(
        self,
        plan: Plan,
        directory: SweepDirectory,
        workers: int,
        *,
        say: Report = print,
        finished: Callable[[], object] = lambda: None,
        train: Sequence[str] = (sys.executable, "-m", "hope_megatron", "train"),
    ) -> None:
        """Set up; `prepare` has written the run files.

        Args:
            plan: the cells.
            directory: the sweep on disk.
            workers: how many cells run at a time.
            say: takes lines for the user.
            finished: called whenever a cell has finished.
            train: program that trains a run file; it gets `RUN_FILE --nproc N`.

        Raises:
            SweepError: if there is no worker.
        """
        if workers < 1:
            raise SweepError(f"--workers {workers}: give at least 1")
        self.plan, self.directory, self.workers, self.say, self.train = plan, directory, workers, say, train
        self.finished = finished
        self._running: list[_Running] = []
        self._stops = 0

    def run(self, *, retry: bool = False) -> int:
        """Run every cell that has not finished.

        Args:
            retry: take cells that were set aside up again.

        Returns:
            Exit code: 0 when all cells have finished, 1 when some were set aside, 130 when interrupted.
        """
        queue = deque(self._to_do(retry))
        done = len(self.plan.cells) - len(queue)
        self.say(f"{len(queue)} cells to run, {done} finished or set aside, {self.workers} at a time")
        previous = {number: signal.signal(number, self._note_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._running or (queue and not self._stops):
                while queue and len(self._running) < self.workers and not self._stops:
                    self._start(queue.popleft())
                time.sleep(_POLL_S)
                queue.extend(self._reap())
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._stops:
            self.say("stopped; the same command goes on with what is missing")
            return 130
        aside = [cell.name for cell in self.plan.cells if self.directory.state(cell) is State.SET_ASIDE]
        for name in aside:
            self.say(f"set aside: {name}: {self.directory.reason(self.plan.cell(name))}")
        return 1 if aside else 0

    def _to_do(self, retry: bool) -> list[Cell]:
        cells = []
        for cell in self.plan.cells:
            state = self.directory.state(cell)
            if state is State.FINISHED or (state is State.SET_ASIDE and not retry):
                continue
            if state is State.SET_ASIDE:
                self.directory.record(cell, replace(self.directory.attempts(cell), failures=0, set_aside=False))
            cells.append(cell)
        return cells

    def _start(self, cell: Cell) -> None:
        claim = self.directory.claim(cell)
        if claim is None:
            self.say(f"{cell.name} is being run by someone else")
            return
        if is_finished(self.directory.runs / cell.name, cell.config.training.steps):
            os.close(claim)  # another runner has just finished it
            return
        self.directory.record(cell, replace(self.directory.attempts(cell), started=True))
        command = [*self.train, str(self.directory.run_file(cell)), "--nproc", str(self.plan.sweep.hardware.devices)]
        environment = {**process_environment(cell.config.training.num_threads), **os.environ}
        environment |= tracking_environment(cell.config.tracking.uri)  # the run file has its password masked
        with open(self.directory.log(cell), "ab") as log:
            # A session of its own: Ctrl-C reaches this process only, which asks the cells to save and leave.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[claim],
                start_new_session=True,
            )
        self._running.append(_Running(cell, process, claim, time.monotonic()))

    def _reap(self) -> list[Cell]:
        """Account for processes that have ended. Returns cells to try again."""
        again = []
        for running in list(self._running):
            code = running.process.poll()
            if code is None:
                continue
            self._running.remove(running)
            if self._account(running, code):
                again.append(running.cell)
            os.close(running.claim)
        return again

    def _account(self, running: _Running, code: int) -> bool:
        """Record how a cell's process ended; whether it is to be tried again."""
        cell, seconds = running.cell, time.monotonic() - running.started
        if is_finished(self.directory.runs / cell.name, cell.config.training.steps):
            self.say(f"finished {cell.name} in {seconds:.0f} s")
            self.finished()
            return False
        if self._stops:
            return False
        attempts = self.directory.attempts(cell)
        failures, reason = attempts.failures + 1, self._why(cell, code)
        set_aside = code == _USER_ERROR or failures > self.plan.sweep.retries
        self.directory.record(cell, replace(attempts, failures=failures, reason=reason, set_aside=set_aside))
        self.say(f"failed {cell.name} ({reason}); " + ("set aside" if set_aside else "it will be tried again"))
        return not set_aside

    def _why(self, cell: Cell, code: int) -> str:
        """The last line of the cell's log, or the signal that ended it."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with open(self.directory.log(cell), "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode("utf-8", "replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return words[-1][:300] if words else f"exit code {code}, no output"

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        for running in self._running:
            running.process.send_signal(signal.SIGTERM if self._stops == 1 else signal.SIGKILL)
