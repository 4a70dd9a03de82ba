"""What every request passes first: who may ask, under which name of this host, and what is counted."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jax_mono.serve.errors import APIError
from jax_mono.serve.metrics import Metrics

OPEN = ("/", "/health")
"""Answered without a key: the page asks for it, and probes have none."""


class Guard:
    """ASGI middleware.

    Args:
        app: What is behind it.
        metrics: Where to count.
        api_key: What clients must know, or None.
        hosts: Names that this host answers to; empty for any. A page of another site could otherwise reach a server on
            this machine by giving its own name this machine's address.
        paths: Known paths, for counting.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, api_key: str | None, hosts: Collection[str], paths: Collection[str]
    ) -> None:
        self._app, self._metrics, self._hosts, self._paths = app, metrics, frozenset(hosts), frozenset(paths)
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
                MutableHeaders(scope=message).setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            self._check(scope)
        except APIError as error:
            await error.response()(scope, receive, counting)
            return
        await self._app(scope, receive, counting)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if headers.get("host", "").endswith("]"):
            host = headers["host"]
        if self._hosts and host.lower() not in self._hosts:
            raise APIError(421, f"this server is not {host!r}; start it with --allow-host {host}", code="unknown_host")
        if self._key is None or scope["path"] in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
            raise APIError(
                401,
                "this server needs its API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
