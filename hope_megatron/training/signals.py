"""Requests to stop: SIGTERM, SIGINT and SIGUSR1 end a run after a step that all ranks agree on, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first stop signal. A second Ctrl-C raises KeyboardInterrupt and so quits at once.

    The flag belongs to one process; ranks get their signals at different moments, or not at all. They take the
    maximum over all of them before each update, so that they leave together.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number


def signal_name(number: int) -> str:
    """SIGTERM for 15; Ctrl-C for 2."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
