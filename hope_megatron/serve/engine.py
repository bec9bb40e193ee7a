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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.serve.errors import ServeError
from hope_megatron.serve.streams import Stream, draw_all

log = logging.getLogger(__name__)

PREFILL_TOKENS = 256
"""Tokens of a prompt between two steps of the running streams: bounds how long a long prompt holds up the others."""
MAX_READ_TOKENS = 16 * PREFILL_TOKENS
"""Of all prompts that are read together: bounds the same, and the memory that reading takes."""


class _Row(NamedTuple):
    """A stream's state, still among those that it was read with."""

    cache: Any
    row: int

    def alone(self) -> Any:
        return self.cache.select(torch.tensor([self.row]))


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
        """One piece of prompts that stand at one position. A stream that has one token left joins the running ones.

        Streams stay in their list meanwhile: if the model fails, they are told.
        """
        for stream in [stream for stream in self._reading if stream.cancelled]:
            stream.finish("cancelled")
            self._reading.remove(stream)
            _end(stream, stream.cache)
        if not self._reading:
            return
        place = _position(self._reading[0])
        group = [stream for stream in self._reading if not stream.ready and _position(stream) == place]
        if group:
            self._read_together(group)
        self._begin([stream for stream in self._reading if stream.ready or stream.finished])
        self._reading.rotate(-1)  # prompts take turns

    def _read_together(self, group: list[Stream]) -> None:
        """As much of each as the shortest has, without its last token; with it, where all end there: that draws already."""
        shortest = min(len(stream.pending) for stream in group)
        count = min(PREFILL_TOKENS, shortest - 1)
        group = group[: max(1, MAX_READ_TOKENS // (count + 1))]
        whole = shortest <= PREFILL_TOKENS and all(len(s.pending) == shortest and s.options.max_tokens for s in group)
        count += whole
        before = None if group[0].cache is None else _joined([stream.cache for stream in group])
        logits, cache = self._read(torch.tensor([stream.pending[:count] for stream in group]), before)
        for row, stream in enumerate(group):
            stream.pending = stream.pending[count:]
            stream.cache = cache if len(group) == 1 else _Row(cache, row)
        if whole:
            draw_all(group, logits[:, -1])

    def _begin(self, streams: list[Stream]) -> None:
        """Rows of the batch for streams with one token left. With no state yet to put beside others, that token is read alone."""
        for stream in streams:
            if stream.options.max_tokens == 0:
                stream.finish("length")
            elif stream.cache is None and not stream.finished:
                logits, stream.cache = self._read(torch.tensor([stream.pending]), None)
                draw_all([stream], logits[:, -1])
            if stream.finished:
                self._reading.remove(stream)
                _end(stream, stream.cache)
        new = [stream for stream in streams if not stream.finished]
        if not new:
            return
        running = [_Row(self._cache, row) for row in range(len(self._running))]
        self._cache = _joined([*running, *(stream.cache for stream in new)])
        for stream in new:
            self._reading.remove(stream)
            self._running.append(stream)
            stream.cache = None  # the batch has it

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
        draw_all(self._running, logits[:, -1])
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
                _end(stream, _Row(cache, row))

    def _read(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits [B, 1, V] after ids [B, T] of real tokens, and the state of each row."""
        output = self.model(ids.to(self._device), cache=cache, use_cache=True, logits_to_keep=1)
        return output.logits, output.cache


def _end(stream: Stream, state: Any) -> None:
    """Hand over the state, if anybody keeps it."""
    stream.end((state.alone() if isinstance(state, _Row) else state) if stream.keep_state else None)


def _joined(states: list[Any]) -> Any:
    """One batch of states, in their order. Those that lie in one cache come out of it together."""
    members: dict[int, list[tuple[int, _Row]]] = {}
    for place, state in enumerate(states):
        row = state if isinstance(state, _Row) else _Row(state, 0)
        members.setdefault(id(row.cache), []).append((place, row))
    parts = []
    for found in members.values():
        cache, rows = found[0][1].cache, [row.row for _, row in found]
        whole = rows == list(range(cache.batch_size))
        parts.append(
            (torch.tensor([place for place, _ in found]), cache if whole else cache.select(torch.tensor(rows)))
        )
    return parts[0][1] if len(parts) == 1 else parts[0][1].join(parts, 0)


def _position(stream: Stream) -> int:
    """Tokens that a stream has read in all."""
    if stream.cache is None:
        return 0
    cache, row = stream.cache if isinstance(stream.cache, _Row) else (stream.cache, 0)
    return int(torch.as_tensor(cache.position).expand(cache.batch_size)[row])
