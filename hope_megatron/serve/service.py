"""From a request to streams and back: prompts, sessions, limits. Knows neither HTTP nor the shape of answers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import TokenizerError
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.serve.chat import ChatTemplate
from hope_megatron.serve.engine import Engine
from hope_megatron.serve.errors import ServeError, bad_request
from hope_megatron.serve.metrics import Metrics
from hope_megatron.serve.schemas import ChatRequest, CompletionRequest, Sampling
from hope_megatron.serve.session_file import model_identity
from hope_megatron.serve.sessions import Session, SessionStore
from hope_megatron.serve.settings import Settings
from hope_megatron.serve.streams import Piece, Stream, StreamOptions

_OK = ("stop", "length")


class Job:
    """The streams of one request, as the event loop sees them."""

    def __init__(self, num_prompt: int) -> None:
        self.num_prompt, self.num_drawn = num_prompt, 0
        self.streams: list[Stream] = []
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

    def take(self, index: int, piece: Piece) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever waited
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def pieces(self, timeout_s: float) -> AsyncIterator[tuple[int, Piece]]:
        """Numbers of streams and what they say, until all have ended.

        Raises:
            ServeError: a stream failed, or they took longer than `timeout_s` in all (504).
        """
        running, deadline = len(self.streams), time.monotonic() + timeout_s
        while running:
            try:
                index, piece = await asyncio.wait_for(self._queue.get(), deadline - time.monotonic())
            except TimeoutError:
                text = f"no answer within {timeout_s:g} s; ask for fewer tokens"
                raise ServeError(504, text, code="timeout") from None
            if piece.error is not None:
                raise piece.error
            if piece.finish is not None:
                running -= 1
                self.num_drawn += piece.num_tokens
            yield index, piece

    def cancel(self) -> None:
        """Nobody waits any more. Harmless at the end."""
        for stream in self.streams:
            stream.cancelled = True


class Service:
    """One model, its engine, its sessions. `run` is a library.Run."""

    def __init__(self, run: Any, settings: Settings) -> None:
        self.settings, self.tokenizer, self.metrics = settings, run.tokenizer, Metrics()
        self.chat = ChatTemplate.of(Path(run.reference))
        model = run.model
        with torch.no_grad():
            like = model(torch.tensor([[self.tokenizer.eos_id]], device=run.device), use_cache=True).cache
        self.sessions = SessionStore(
            model_identity(model),
            like,
            directory=settings.session_dir,
            max_bytes=settings.session_bytes,
            max_disk_bytes=settings.session_disk_bytes,
            idle_s=settings.session_idle_s,
            max_per_client=settings.max_client_sessions,
        )
        self.engine = Engine(
            model, max_batch=settings.max_batch, max_waiting=settings.max_waiting, observe=self.metrics.observe_step
        )
        self._active: Counter[str] = Counter()
        gauges = (
            ("sessions", "sessions"),
            ("session_memory_bytes", "memory_bytes"),
            ("session_disk_bytes", "disk_bytes"),
        )
        for name, key in gauges:
            self.metrics.gauge(f"hope_{name}", f"{key} of sessions", partial(self._total, key))
        self.metrics.gauge("hope_streams_running", "streams in the batch", lambda: self.engine.num_active)
        self.metrics.gauge("hope_streams_waiting", "streams that wait", lambda: self.engine.num_waiting)

    def _total(self, key: str) -> float:
        return self.sessions.totals()[key]

    def close(self) -> None:
        """Let running streams end, then keep the sessions."""
        self.engine.close()
        self.sessions.close()

    @contextlib.contextmanager
    def slot(self, client: str) -> Iterator[None]:
        """One of the requests that a client may have at once."""
        if self._active[client] >= self.settings.max_client_requests:
            most = self.settings.max_client_requests
            raise ServeError(
                429, f"you have {most} requests running, the most; wait for one", code="rate_limit_exceeded"
            )
        self._active[client] += 1
        try:
            yield
        finally:
            self._active[client] -= 1
            if not self._active[client]:
                del self._active[client]

    async def complete(self, client: str, request: CompletionRequest) -> Job:
        """Begin the streams of a completion."""
        self._check(request)
        prompts = [self._ids(prompt) for prompt in request.prompts()]
        return await self._start(client, request, prompts, request.max_tokens, request.logprobs)

    async def answer(self, client: str, request: ChatRequest) -> Job:
        """Begin the streams of a chat."""
        self._check(request)
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        text = self.chat.render(messages)
        asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        if not request.stops and self.chat.plain_stops:
            request = request.model_copy(update={"stop": list(self.chat.plain_stops)})
        top = (request.top_logprobs or 0) if request.logprobs else None
        return await self._start(client, request, [text], asked, top)

    def _check(self, request: Sampling) -> None:
        if request.model not in (None, self.settings.model_name):
            raise ServeError(
                404,
                f"model {request.model!r} is not here; this server has {self.settings.model_name!r}",
                code="model_not_found",
            )

    async def _start(
        self, client: str, request: Sampling, prompts: list[Any], max_tokens: int | None, top_logprobs: int | None
    ) -> Job:
        """prompts: token ids; or a chat's text, whose beginning depends on the session."""
        most = self.settings.max_tokens
        if max_tokens is not None and max_tokens > most:
            raise bad_request(
                f"max_tokens is {max_tokens}; this server draws at most {most} for a request", "max_tokens"
            )
        if not 0 < len(prompts) * request.n <= self.settings.max_prompts:
            raise bad_request(
                f"{len(prompts)} prompts with n={request.n}; give 1 to {self.settings.max_prompts} in all", "prompt"
            )
        if request.session_id is not None and len(prompts) > 1:
            raise bad_request("a session is one stream: give one prompt with session_id", "prompt")
        options = StreamOptions(
            max_tokens=most if max_tokens is None else max_tokens,
            sampling=SamplingOptions(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p),
            stop=request.stops,
            top_logprobs=top_logprobs,
            ignore_end=request.ignore_eos,
            whole=not request.stream,
        )
        seed = secrets.randbits(62) if request.seed is None else request.seed
        if request.session_id is None:
            return self._fresh(prompts, request.n, options, seed)
        session = await asyncio.to_thread(self.sessions.begin, client, request.session_id)
        try:
            return self._going_on(client, request.session_id, session, prompts[0], options, seed)
        except BaseException:
            self.sessions.release(client, request.session_id)
            raise

    def _fresh(self, prompts: list[Any], n: int, options: StreamOptions, seed: int) -> Job:
        rows = [[self.tokenizer.eos_id, *self._as_ids(prompt)] for prompt in prompts for _ in range(n)]
        job = Job(sum(map(len, rows)))
        job.streams = [
            Stream(self.tokenizer, ids, _seeded(options, seed + i), partial(job.take, i), keep_state=False)
            for i, ids in enumerate(rows)
        ]
        self.engine.submit(*job.streams)
        return job

    def _going_on(
        self, client: str, name: str, session: Session, prompt: Any, options: StreamOptions, seed: int
    ) -> Job:
        begun = session.cache is not None or bool(session.pending)
        if isinstance(prompt, str):
            prompt = _next_turn(prompt, session.hidden) if begun else prompt
        new = self._as_ids(prompt)
        ids = [*session.pending, *new] if begun else [self.tokenizer.eos_id, *new]
        if not ids:
            raise bad_request("a session that has read everything needs at least one token to go on with", "prompt")
        num_new = len(ids) - len(session.pending)
        job = Job(num_new)

        def on_end(stream: Stream) -> None:
            if stream.finished in _OK:
                self.sessions.commit(
                    client, name, stream.cache, stream.pending, num_new + stream.num_drawn, stream.hidden
                )
            else:
                self.sessions.release(client, name)

        stream = Stream(
            self.tokenizer,
            ids,
            _seeded(options, seed),
            lambda piece: job.take(0, piece),
            cache=session.cache,
            on_end=on_end,
        )
        job.streams = [stream]
        self.engine.submit(stream)
        return job

    def _as_ids(self, prompt: Any) -> list[int]:
        return self._ids(prompt) if isinstance(prompt, str) else list(prompt)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ServeError: 400, for ids that the model does not have and text that is no Unicode.
        """
        if isinstance(prompt, str):
            try:
                return self.tokenizer.encode(prompt).tolist()
            except TokenizerError as error:
                raise bad_request(str(error), "prompt") from None
        wrong = [token for token in prompt if not 0 <= token < self.tokenizer.vocab_size]
        if wrong:
            raise bad_request(f"token {wrong[0]} is outside the vocabulary of {self.tokenizer.vocab_size}", "prompt")
        return prompt

    def count(self, endpoint: str, job: Job, started: float) -> None:
        """Note a finished request."""
        self.metrics.tokens.labels("prompt").inc(job.num_prompt)
        self.metrics.tokens.labels("completion").inc(job.num_drawn)
        self.metrics.seconds.labels(endpoint).observe(time.monotonic() - started)


def _seeded(options: StreamOptions, seed: int) -> StreamOptions:
    return StreamOptions(**{**vars(options), "seed": seed % 2**63})


def _next_turn(text: str, hidden: str) -> str:
    """New messages behind an answer. Where the model has begun the next turn itself (a stop string), it is not begun twice."""
    begun = hidden.lstrip("\n")
    if begun and text.startswith(begun):
        return text.removeprefix(begun)
    return text if hidden.endswith("\n") else "\n" + text
