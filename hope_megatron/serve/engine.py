"""Continuous batching: one thread reads prompts piece by piece and steps all running streams together.

Every row of a batch stands at its own position, with a state of its own; rows join and leave between steps. The batch's state is
put together only when they do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hope_megatron.serve.errors import ServeError
from hope_megatron.serve.streams import Stream

log = logging.getLogger(__name__)

PREFILL_TOKENS = 256
"""Tokens of a prompt between two steps of the running streams: bounds how long a long prompt holds up the others."""


class Engine:
    """Draws tokens for streams until it is closed.

    Args:
        model: a HopeForCausalLM in eval mode.
        max_batch: streams that run at once; more wait.
        max_waiting: streams that may wait; more are refused.
        observe: called after every step with (seconds, streams that drew a token).
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch: int = 32,
        max_waiting: int = 256,
        observe: Callable[[float, int], None] = lambda seconds, rows: None,
    ) -> None:
        self.model, self.max_batch, self.max_waiting, self.observe = model, max_batch, max_waiting, observe
        self.failure: BaseException | None = None
        self._device = next(model.parameters()).device
        self._waiting: deque[Stream] = deque()
        self._reading: deque[Stream] = deque()
        self._running: list[Stream] = []
        self._cache: Any = None  # of the running streams, row by row
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hope-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Streams that have not begun."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Streams that are read or drawn from."""
        return len(self._reading) + len(self._running)

    def submit(self, *streams: Stream) -> None:
        """Queue streams, all or none.

        Raises:
            ServeError: the queue is full (429), or the engine is closed or has failed (503).
        """
        with self._wake:
            if self._closing or self.failure is not None:
                raise ServeError(503, "the server is shutting down; try again elsewhere", code="unavailable")
            if len(self._waiting) + len(streams) > self.max_waiting:
                raise ServeError(
                    429, f"{len(self._waiting)} requests wait already; try again in a second", code="queue_full"
                )
            self._waiting.extend(streams)
            self._wake.notify()

    def close(self, timeout_s: float = 30.0) -> None:
        """Let running streams end, at most `timeout_s`; then stop them."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        for stream in [*self._waiting, *self._reading, *self._running]:
            stream.cancelled = True
        self._thread.join(5.0)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._admit()
                    self._read_some()
                    self._step()
        except BaseException as error:
            log.exception("the engine failed")
            with self._wake:  # no stream may be queued behind this
                self.failure = error
            for stream in [*self._waiting, *self._reading, *self._running]:
                stream.fail(ServeError(500, "the model failed on this server; see its log", code="engine_failed"))
                stream.end(None)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._waiting or self._reading or self._running):
                if self._closing:
                    return False
                self._wake.wait()
        return True

    def _admit(self) -> None:
        with self._wake:
            while self._waiting and self.num_active < self.max_batch:
                self._reading.append(self._waiting.popleft())

    def _read_some(self) -> None:
        """One piece of one prompt. A stream that has one token left joins the running ones."""
        if not self._reading:
            return
        stream = self._reading[0]  # it stays there meanwhile: if the model fails, it is told
        if stream.cancelled:
            stream.finish("cancelled")
            self._reading.popleft().end(stream.cache)
            return
        count = min(len(stream.pending) - 1, PREFILL_TOKENS)
        if count:
            ids, stream.pending = stream.pending[:count], stream.pending[count:]
            stream.cache = self._read(torch.tensor([ids]), stream.cache)[1]
        if not stream.ready:
            self._reading.rotate(-1)  # prompts take turns
        elif stream.options.max_tokens == 0:
            stream.finish("length")
            self._reading.popleft().end(stream.cache)
        else:
            self._join(stream)

    def _join(self, stream: Stream) -> None:
        """One more row: the first that is read. With no state yet to put beside others, its one token is read alone."""
        cache = stream.cache
        if cache is None:
            logits, cache = self._read(torch.tensor([stream.pending]), None)
            stream.draw(logits[0, -1])
            if stream.finished:
                self._reading.popleft().end(cache)
                return
        here, stream.cache = len(self._running), None
        rows = [(torch.arange(here), self._cache), (torch.tensor([here]), cache)]
        self._cache = cache if self._cache is None else cache.join(rows, 0)
        self._running.append(self._reading.popleft())

    def _step(self) -> None:
        """One token for every running stream."""
        for stream in self._running:
            if stream.cancelled:
                stream.finish("cancelled")
        self._let_go()
        if not self._running:
            return
        started = time.monotonic()
        logits, self._cache = self._read(torch.tensor([stream.pending for stream in self._running]), self._cache)
        last = logits[:, -1].float().cpu()
        for stream, row in zip(self._running, last):
            stream.draw(row)
        count = len(self._running)
        self._let_go()
        self.observe(time.monotonic() - started, count)

    def _let_go(self) -> None:
        """Streams that have ended leave with their state."""
        if not any(stream.finished for stream in self._running):
            return
        kept = [row for row, stream in enumerate(self._running) if not stream.finished]
        streams, cache = self._running, self._cache
        self._running = [streams[row] for row in kept]
        self._cache = cache.select(torch.tensor(kept)) if kept else None
        for row, stream in enumerate(streams):
            if stream.finished:
                stream.end(cache.select(torch.tensor([row])))

    def _read(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, 1, V] after ids [B, T] of real tokens, and the state of each row."""
        output = self.model(ids.to(self._device), cache=cache, use_cache=True, logits_to_keep=1)
        return output.logits, output.cache
