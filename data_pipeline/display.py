"""Progress on standard error: a bar for a person, a line every ten seconds for a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LINE_SECONDS = 10.0


class Progress:
    """Shows how far one long piece of work is. Use as a context; call `update` as often as convenient."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:  # lines do as well
                return self
            columns = ("{task.description}", BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=None)
            self._bar.start()
        return self

    def update(self, text: str, part: float | None) -> None:
        """Show a text and the part that is done, from 0 to 1, or None when it is not known."""
        if self._bar is not None:
            total = None if part is None else 1.0
            self._bar.update(self._task, description=f"{self._title}: {text}", completed=part or 0.0, total=total)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            done = "" if part is None else f" {part:.0%}"
            print(f"{self._title}:{done} {text}, {self._last_line - self._started:.0f} s", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
