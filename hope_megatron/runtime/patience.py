"""Writes that training can do without, on a thread of their own: a disk that hangs does not hang whoever writes.

A write to a network file system whose server is gone returns when the server does: after minutes, or never. Whoever has something
to write waits for the thread a moment, so that on a healthy disk everything happens in its order, and then goes on without it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long the first write that hangs is waited for; none is, until those before it are done."""
MAX_WAITING = 10_000
"""Writes that wait for a disk; later ones are dropped, which is said once it answers."""


class PatientWriter:
    """Carries writes out in their order.

    Args:
        what: the file, for the log; None says nothing.
        patience_s: see `PATIENCE_S`.
    """

    def __init__(self, what: str | None, patience_s: float = PATIENCE_S) -> None:
        self.what, self.patience_s = what, patience_s
        self.is_late = False
        """Whether a write hangs."""
        self._tasks: queue.SimpleQueue[tuple[Callable[[], object], threading.Event]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last = threading.Event()
        self._last.set()
        self._error: BaseException | None = None
        self._dropped = 0

    def __call__(self, write: Callable[[], object]) -> bool:
        """Write, or leave it to the thread where the disk hangs. Returns whether it is done.

        Raises:
            what `write` raises, and what an earlier one raised meanwhile.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"writer of {self.what}", daemon=True)
            self._thread.start()
        if self.is_late and self._last.is_set():
            self.is_late = False
            lost, self._dropped = self._dropped, 0
            self._say("%s is written again" + (f"; {lost} writes were dropped" if lost else ""))
        if self._tasks.qsize() < MAX_WAITING:
            self._last = threading.Event()
            self._tasks.put((write, self._last))
        else:
            self._dropped += 1
        return self.flush(0.0 if self.is_late else self.patience_s)

    def flush(self, timeout_s: float) -> bool:
        """Wait for all writes, so long at most. Whether they are done."""
        done = self._last.wait(timeout_s)
        if not done and not self.is_late:
            self.is_late = True
            self._say("%s cannot be written: the disk does not answer. Writes wait in memory, training goes on")
        error, self._error = self._error, None
        if error is not None:
            raise error
        return done

    def _say(self, message: str) -> None:
        if self.what is not None:
            log.warning(message, self.what)

    def _work(self) -> None:
        while True:
            write, done = self._tasks.get()
            try:
                write()
            except BaseException as error:
                self._error = error
            done.set()
