"""Routes. Every answer, errors too, has OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from hope_megatron.serve.answers import ChatAnswer, CompletionAnswer
from hope_megatron.serve.errors import ServeError
from hope_megatron.serve.respond import done, endpoint, generate, read_body
from hope_megatron.serve.schemas import ChatRequest, CompletionRequest, ForkRequest, parse
from hope_megatron.serve.service import Service
from hope_megatron.serve.settings import client_of


def build_app(service: Service) -> FastAPI:
    """The application of one model. The service is closed when the application stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="hope serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app, service)
    _add_generation(app, service)
    _add_sessions(app, service)
    _add_status(app, service)
    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    def answered(request: Request, error: ServeError) -> JSONResponse:
        service.metrics.requests.labels(endpoint(request), str(error.status)).inc()
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(ServeError)
    async def known(request: Request, error: ServeError) -> JSONResponse:
        return answered(request, error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}; see docs/serve.md for what there is"
        return answered(request, ServeError(error.status_code, text, code="not_found"))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return answered(request, ServeError(500, "the server has a fault; its log has more", code="internal"))


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(service, request, CompletionRequest, service.complete, CompletionAnswer)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await generate(service, request, ChatRequest, service.answer, ChatAnswer)


def _add_sessions(app: FastAPI, service: Service) -> None:
    sessions = service.sessions

    @app.get("/v1/sessions")
    async def listed(request: Request) -> Response:
        client = _client(service, request)
        data = await asyncio.to_thread(lambda: [sessions.describe(client, name) for name in sessions.names(client)])
        return done(service, request, {"object": "list", "data": data})

    @app.get("/v1/sessions/{name}")
    async def described(request: Request, name: str) -> Response:
        return done(service, request, sessions.describe(_client(service, request), name))

    @app.post("/v1/sessions/{name}/fork")
    async def forked(request: Request, name: str) -> Response:
        client = _client(service, request)
        to = parse(ForkRequest, await read_body(request, service.settings)).to
        await asyncio.to_thread(sessions.fork, client, name, to)
        return done(service, request, sessions.describe(client, to))

    @app.post("/v1/sessions/{name}/save")
    async def saved(request: Request, name: str) -> Response:
        client = _client(service, request)
        await asyncio.to_thread(sessions.save, client, name)
        return done(service, request, {**sessions.describe(client, name), "saved": True})

    @app.delete("/v1/sessions/{name}")
    async def deleted(request: Request, name: str) -> Response:
        await asyncio.to_thread(sessions.delete, _client(service, request), name)
        return done(service, request, {"id": name, "object": "session", "deleted": True})


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _client(service, request)
        return done(service, request, {"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        _client(service, request)
        if name != service.settings.model_name:
            raise ServeError(404, f"model {name!r} is not here", code="model_not_found")
        return done(service, request, _model(service))

    @app.get("/health")
    async def health() -> Response:
        failed = service.engine.failure is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(service.metrics.text), media_type="text/plain; version=0.0.4")


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.settings.model_name, "object": "model", "created": 0, "owned_by": "hope_megatron"}


def _client(service: Service, request: Request) -> str:
    return client_of(request.headers.get("authorization"), service.settings.tokens)
