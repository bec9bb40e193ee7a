"""Generation over HTTP: a request's body, its answer whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from hope_megatron.serve.answers import Answer
from hope_megatron.serve.errors import ServeError
from hope_megatron.serve.schemas import Sampling, parse
from hope_megatron.serve.service import Job, Service
from hope_megatron.serve.settings import Settings, client_of
from hope_megatron.serve.streams import Piece

_LOOK_S = 0.25
"""How often a request that waits for its whole answer is asked whether its client is still there."""


def endpoint(request: Request) -> str:
    """A label without anything of the client's in it."""
    return getattr(request.scope.get("route"), "path", "other")


def done(service: Service, request: Request, value: dict[str, Any]) -> JSONResponse:
    """An answer of status 200, counted."""
    service.metrics.requests.labels(endpoint(request), "200").inc()
    return JSONResponse(value)


async def read_body(request: Request, settings: Settings) -> bytes:
    """The body, given up as soon as it is too long, or takes too long."""
    found, most = bytearray(), settings.max_body_bytes

    async def read() -> None:
        async for part in request.stream():
            found.extend(part)
            if len(found) > most:
                text = f"the body has more than {most} bytes; send the text in several requests of a session"
                raise ServeError(413, text, code="too_large")

    try:
        await asyncio.wait_for(read(), settings.request_timeout_s)
    except TimeoutError:
        raise ServeError(408, f"the body took longer than {settings.request_timeout_s:g} s", code="timeout") from None
    return bytes(found)


Begin = Callable[[str, Any], Awaitable[Job]]


async def generate(
    service: Service, request: Request, schema: type[Sampling], begin: Begin, kind: type[Answer]
) -> Response:
    """Both kinds of generation, whole or streamed."""
    client, started = client_of(request.headers.get("authorization"), service.settings.tokens), time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.slot(client))
        asked = parse(schema, await read_body(request, service.settings))
        job = await begin(client, asked)
        stack.callback(job.cancel)
        stack.callback(service.count, endpoint(request), job, started)
        with_logprobs = asked.logprobs is not None and asked.logprobs is not False
        answer = kind(service.settings.model_name, service.tokenizer, job, len(job.streams), with_logprobs)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            service.metrics.requests.labels(endpoint(request), "200").inc()
            return _Events(_events(service, answer, job, usage, started), stack.pop_all())
        pieces: list[list[Piece]] = [[] for _ in job.streams]
        await _collect(service, request, job, pieces)
        return done(service, request, answer.whole(pieces))


async def _collect(service: Service, request: Request, job: Job, pieces: list[list[Piece]]) -> None:
    """Wait for everything; stop when the client has left."""

    async def gather() -> None:
        async for index, piece in job.pieces(service.settings.request_timeout_s):
            pieces[index].append(piece)

    work = asyncio.ensure_future(gather())
    try:
        while not work.done():
            await asyncio.wait([work], timeout=_LOOK_S)
            if not work.done() and await request.is_disconnected():
                raise ServeError(499, "the client has left", code="cancelled")
        await work
    finally:
        work.cancel()


class _Events(StreamingResponse):
    """Server-sent events. What the request holds is let go when the client goes, however early."""

    def __init__(self, events: AsyncIterator[bytes], stack: contextlib.ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        with self.stack:
            await super().__call__(scope, receive, send)


async def _events(service: Service, answer: Answer, job: Job, usage: bool, started: float) -> AsyncIterator[bytes]:
    """What is said, as it is said."""
    try:
        for chunk in answer.first():
            yield _event(chunk)
        waiting = True
        async for index, piece in job.pieces(service.settings.request_timeout_s):
            if waiting:
                service.metrics.first.observe(time.monotonic() - started)
                waiting = False
            yield _event(answer.chunk(index, piece))
        if usage:
            yield _event(answer.usage_chunk())
    except ServeError as error:
        yield _event(error.body())
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
