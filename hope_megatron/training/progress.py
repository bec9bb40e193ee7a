"""What a person sees of a run: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from hope_megatron.runtime.formatting import duration_text
from hope_megatron.runtime.patience import PatientWriter

steps_log = logging.getLogger("hope_megatron.steps")
"""Goes to train.log only: the screen has the line already."""

_SMOOTHING = 0.95
"""Weight of the steps before in the smoothed loss, about the mean of the last 20 steps."""
_ERASE_LINE = "\r\x1b[K"
_REFRESH_S = 0.1
_CLOSE_S = 10.0
"""So long the last lines are waited for where the disk hangs."""


class Progress:
    """Shows step, loss, learning rate, speed and time left. Used by rank 0 only.

    On a terminal the line renews itself after every step and log messages scroll above it; elsewhere every recorded
    step gives one line. train.log gets that line too. The loss is that of one step; the smoothed one beside it is a moving
    average over the steps of this process.
    """

    def __init__(self, num_steps: int, tokens_per_step: int, stream: TextIO | None = None) -> None:
        self.num_steps = num_steps
        self.tokens_per_step = tokens_per_step
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._clock = StepClock()
        self._latest: dict[str, float] = {}
        self._smoothed = self._weight = 0.0
        self._shown_at = 0.0
        self._line_is_up = False
        self._patiently = PatientWriter(None)

    def after_step(self, step: int, record: Mapping[str, float] | None, loss: float | None = None) -> None:
        """Show a finished step. `record` is what was measured, on steps that are recorded; `loss` is that of every step."""
        self._clock.tick(step)
        if loss is not None:
            self._smoothed = _SMOOTHING * self._smoothed + (1 - _SMOOTHING) * loss
            self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        if record is not None:
            self._latest.update(record)
            steps_log.info(self._line(step))
            if not self.live:
                self._write(self._line(step) + "\n")
        now = time.monotonic()
        if self.live and (now - self._shown_at >= _REFRESH_S or step == self.num_steps):
            self._write(_ERASE_LINE + self._line(step))
            self._shown_at, self._line_is_up = now, True

    def message(self, text: str) -> None:
        """A line of its own, above the live line."""
        self._write((_ERASE_LINE if self._line_is_up else "") + text + "\n")
        self._line_is_up = False

    def close(self) -> None:
        """Leave the last state of the live line on the screen."""
        self._patiently.flush(_CLOSE_S)
        if self._line_is_up:
            self._write("\n")
            self._line_is_up = False

    def _line(self, step: int) -> str:
        parts = [f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}"]
        for name, label, form in (
            ("train/loss", "loss", "{:.3f}"),
            ("heldout/loss", "held-out", "{:.3f}"),
            ("train/lr", "lr", "{:.2e}"),
        ):
            if name in self._latest:
                parts.append(f"{label} {form.format(self._latest[name])}")
            if label == "loss" and self._weight:
                parts.append(f"(smoothed {self._smoothed / self._weight:.3f})")
        for name, label, form in (("speed/mfu", "MFU", "{:.1%}"), ("gpu/peak_gib", "peak", "{:.1f} GiB")):
            if name in self._latest:
                parts.append(f"{label} {form.format(self._latest[name])}")
        seconds = self._clock.seconds_per_step
        if seconds:
            parts.append(f"{self.tokens_per_step / seconds:,.0f} tokens/s")
            parts.append(f"{duration_text((self.num_steps - step) * seconds)} left")
        return "  ".join(parts)

    def _write(self, text: str) -> None:
        if self.live:
            self._put(text)
        else:  # a file perhaps, on a disk that may hang
            self._patiently(lambda: self._put(text))

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError):  # where it goes may be a file on a full disk, or a terminal that is gone
            self.stream.write(text)
            self.stream.flush()


class StepClock:
    """Seconds per step, smoothed over about ten steps; the first step, which warms caches up, does not count."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self._last: tuple[int, float] | None = None

    def tick(self, step: int) -> None:
        """Note that a step has just ended."""
        now = time.monotonic()
        if self._last is not None and step > self._last[0]:
            seconds = (now - self._last[1]) / (step - self._last[0])
            self.seconds_per_step = (
                seconds if not self.seconds_per_step else 0.9 * self.seconds_per_step + 0.1 * seconds
            )
        self._last = (step, now)


class ProgressHandler(logging.Handler):
    """Sends log messages through the progress display, so that they do not tear its line."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.message(self.format(record))


class _LogFile(logging.FileHandler):
    """A log on a disk that may be full, or hang: what cannot be written is on the screen, and is nobody's traceback."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self._patiently = PatientWriter(None)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record) + self.terminator
        self._patiently(lambda: self._put(text))

    def close(self) -> None:
        if self._patiently.flush(_CLOSE_S):
            super().close()

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError):
            if self.stream is not None:  # closed
                self.stream.write(text)
                self.stream.flush()


def configure_logging(rank: int, log_file: Path, progress: Progress) -> None:
    """Rank 0 logs to the screen and to a file; other ranks only say what is wrong."""
    root = logging.getLogger("hope_megatron")
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = steps_log.propagate = False
    for logger in (root, steps_log):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
    screen = ProgressHandler(progress)
    screen.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    root.addHandler(screen)
    if rank == 0:
        try:
            to_file = _LogFile(log_file)
        except OSError as error:
            root.error("%s cannot be written: %s; the log goes to the screen alone", log_file, error.strerror)
            return
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(to_file)
        steps_log.addHandler(to_file)
