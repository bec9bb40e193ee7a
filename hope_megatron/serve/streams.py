"""One text that is being continued: what is still to be read, how tokens are drawn, where it stops."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hope_megatron.generation.sampling import SamplingOptions, sample
from hope_megatron.generation.text import TextStream
from hope_megatron.serve.errors import ServeError

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TokenLogprob(NamedTuple):
    """A drawn token, its log-probability before filters and temperature, and the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """What a step adds to a stream's text; the last one has a finish reason."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    num_tokens: int = 0
    finish: FinishReason | None = None
    error: ServeError | None = None


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is continued."""

    max_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    """None: no log-probabilities."""
    ignore_end: bool = False
    whole: bool = False
    """Everything is said at the end: what nobody reads as it comes need not wake anybody up."""


class Stream:
    """A continuation. The engine's thread steps it.

    Args:
        emit: takes pieces to whoever waits.
        on_end: called once with the stream, before the last piece is emitted: what it stores is there when a client reads on.
        keep_state: whether `cache` is wanted at the end; cutting it out of a batch costs time.

    Attributes:
        pending: ids that belong to the stream and that the model has not read yet; at least one while it runs.
        cache: state after everything before `pending`; None at the beginning.
        finished: why it has ended; `cache` and `pending` are then where it stands.
        hidden: end of the stream's text that nobody was told: a stop string.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: list[int],
        options: StreamOptions,
        emit: Callable[[Piece], None],
        *,
        cache: Any = None,
        on_end: Callable[[Stream], None] = lambda stream: None,
        keep_state: bool = True,
    ) -> None:
        assert prompt, "a stream begins with at least one token"
        self.pending, self.cache, self.options = list(prompt), cache, options
        self._emit, self._on_end, self.keep_state = emit, on_end, keep_state
        self.num_prompt, self.num_drawn = len(prompt), 0
        self.cancelled = False
        self.finished: FinishReason | None = None
        self._end_id = tokenizer.eos_id
        self._rng = torch.Generator().manual_seed(options.seed)
        self._text, self._held = TextStream(tokenizer), ""
        self._waiting: list[TokenLogprob] = []
        self._last = Piece("")
        self.hidden = ""

    @property
    def ready(self) -> bool:
        """Whether one token is pending: the next step draws."""
        return len(self.pending) == 1

    def draw(self, logits: Tensor, *, finite: bool, best: int) -> None:
        """Draw the next token, the pending one having been read. It may be the last: see `finished`.

        Args:
            logits: [V] float32 on the CPU.
            finite: whether all of them are.
            best: the largest one's token.
        """
        if not finite:
            self.fail(
                ServeError(500, "the model computed logits that are not finite; begin a new session", code="not_finite")
            )
            return
        sampling = self.options.sampling
        token = best if sampling.temperature == 0 else int(sample(logits[None], sampling, self._rng)[0])
        self.pending = [token]
        self.num_drawn += 1
        if self.options.top_logprobs is not None:
            self._waiting.append(_logprob(logits, token, self.options.top_logprobs))
        if token == self._end_id and not self.options.ignore_end:
            self._waiting = [entry for entry in self._waiting if entry.token != self._end_id]
            self.finish("stop")
            return
        self._held += self._text.push(token)
        if (cut := self._stops_at()) is not None:
            self.hidden = self._held[cut:]
            self._leave("stop", self._held[:cut])
        elif self.num_drawn >= self.options.max_tokens:
            self.finish("length")
        elif not self.options.whole:
            self._send(len(self._held) - _could_begin(self._held, self.options.stop))

    def finish(self, reason: FinishReason) -> None:
        """The end; what was held back is said."""
        self._held += self._text.flush()
        cut = self._stops_at()
        self.hidden = "" if cut is None else self._held[cut:]
        self._leave(reason if cut is None else "stop", self._held[:cut])

    def fail(self, error: ServeError) -> None:
        """The end, by an error."""
        self._leave("error", "", error)

    def _leave(self, reason: FinishReason, text: str, error: ServeError | None = None) -> None:
        self.finished, self._held = reason, ""
        self._last = Piece(text, tuple(self._waiting), self.num_drawn, reason, error)

    def end(self, cache: Any) -> None:
        """Hand over: `finished` says why, `cache` is the state before `pending`."""
        self.cache = cache
        try:
            self._on_end(self)
        except Exception:  # a full disk must not end everybody's streams
            log.exception("a session could not be kept")
            error = ServeError(
                500, "the session could not be kept on this server; see its log", code="session_not_kept"
            )
            self._last = Piece("", (), self.num_drawn, "error", error)
        self._emit(self._last)

    def _send(self, length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text or (self._waiting and not self._held):
            self._emit(Piece(text, tuple(self._waiting), self.num_drawn))
            self._waiting = []

    def _stops_at(self) -> int | None:
        """Where the first stop string begins in the text that is held."""
        found = [at for stop in self.options.stop if (at := self._held.find(stop)) >= 0]
        return min(found) if found else None


def draw_all(streams: Sequence[Stream], logits: Tensor) -> None:
    """A token for each stream from logits [B, V]; what needs no stream is computed for all rows at once."""
    logits = logits.float().cpu()
    finite, best = logits.isfinite().all(1).tolist(), logits.argmax(1).tolist()
    for stream, row, is_finite, token in zip(streams, logits, finite, best):
        stream.draw(row, finite=is_finite, best=token)


def _could_begin(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a stop string may begin with."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


def _logprob(logits: Tensor, token: int, top: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(top, len(logprobs)))
    likeliest = tuple((int(i), _finite(float(v))) for i, v in zip(ids, values))
    return TokenLogprob(token, _finite(float(logprobs[token])), likeliest)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -9999.0
