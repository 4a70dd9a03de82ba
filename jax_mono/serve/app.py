"""The ASGI application: routes, error handlers, and the engine's life."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from jax_mono.serve import metrics, openapi, playground
from jax_mono.serve.answers import GoneError
from jax_mono.serve.chat import chat
from jax_mono.serve.completions import completions
from jax_mono.serve.errors import APIError, answer_error, answer_http_error, encode
from jax_mono.serve.guard import Guard
from jax_mono.serve.service import Service


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    hosts: Collection[str] = (),
) -> Starlette:
    """Puts the application together.

    Args:
        service: What is served. Its engine must have been started; the application closes it when it ends.
        api_key: See :class:`jax_mono.serve.guard.Guard`.
        hosts: See there.

    Returns:
        The application.
    """
    engine = service.engine
    engine.metrics.watch("queue_length", "Requests in line", lambda: len(engine.queue))
    engine.metrics.watch("busy", "Whether the decoder works", lambda: engine.busy)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        engine.close()

    routes = [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", show_metrics),
        Route("/openapi.json", show_openapi),
        Route("/", playground.page),
    ]
    guard = Middleware(
        Guard, metrics=engine.metrics, api_key=api_key, hosts=hosts, paths=[route.path for route in routes]
    )
    app = Starlette(
        routes=routes,
        middleware=[guard],
        lifespan=life,
        exception_handlers={
            APIError: answer_error,
            HTTPException: answer_http_error,
            GoneError: answer_nobody,
            ClientDisconnect: answer_nobody,
            Exception: answer_error,
        },
    )
    app.state.service = service
    app.state.page = playground.Page(service, key_needed=api_key is not None)
    app.state.openapi = openapi.document(service)
    return app


async def answer_nobody(request: Request, error: Exception) -> Response:
    """The client went away; the status is for the log only."""
    return Response(status_code=499)


def _json(record: Any, status: int = 200) -> Response:
    return Response(encode(record), status, media_type="application/json")


def _model_record(service: Service) -> dict[str, Any]:
    context = service.engine.decoder.context
    record = {"id": service.model, "object": "model", "created": 0, "owned_by": "jax_mono", "max_model_len": context}
    return record | {"jax_mono": {**service.facts, "context": context}}


async def models(request: Request) -> Response:
    """The one model that there is."""
    return _json({"object": "list", "data": [_model_record(request.app.state.service)]})


async def model(request: Request) -> Response:
    """That model by name."""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    if name != service.model:
        raise APIError(404, f"there is no model {name!r}, only {service.model!r}", code="model_not_found")
    return _json(_model_record(service))


async def health(request: Request) -> Response:
    """Whether requests are being answered."""
    engine = request.app.state.service.engine
    status = "ok" if engine.alive else "the decoder's thread has ended; restart the server"
    record = {"status": status, "busy": engine.busy, "queue": len(engine.queue), "capacity": engine.queue.capacity}
    return _json(record, 200 if engine.alive else 503)


async def show_metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    text = request.app.state.service.engine.metrics.text()
    return Response(text, headers={"content-type": metrics.CONTENT_TYPE})


async def show_openapi(request: Request) -> Response:
    """The description of this API."""
    return _json(request.app.state.openapi)
