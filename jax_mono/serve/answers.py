"""Answers: waiting for the decoder, sending events as they come, and noticing that a client went away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from jax_mono.serve.engine import Engine
from jax_mono.serve.errors import APIError, encode
from jax_mono.serve.fair import QueueFullError
from jax_mono.serve.work import (
    DeadlineError,
    Event,
    Generate,
    Generated,
    Mailbox,
    Score,
    Scored,
    ShutdownError,
    Ticket,
    Timings,
)

DONE = b"data: [DONE]\n\n"


class Exchange:
    """The work of one request, from getting in line to its end.

    Args:
        engine: Who does it.
        request: Who asks; a client is an address and what it calls its user.
        user: The request's own word for that.
        works: The parts, in order.
        seconds: Until its deadline.

    Raises:
        APIError: 429, the queue is full.
    """

    def __init__(
        self, engine: Engine, request: Request, user: str | None, works: Sequence[Generate | Score], seconds: float
    ) -> None:
        self._engine, self._request, self._mailbox = engine, request, Mailbox()
        deadline = time.monotonic() + seconds
        self.tickets = [Ticket(work, deadline, self._mailbox.post) for work in works]
        self._places = {ticket: index for index, ticket in enumerate(self.tickets)}
        client = f"{request.client.host if request.client else ''} {user or ''}"
        try:
            self._group = engine.submit(client, self.tickets)
        except QueueFullError:
            wait = engine.retry_after()
            raise APIError(
                429,
                f"{engine.queue.capacity} requests are waiting already; try again in {wait} s",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            ) from None
        self._watcher = asyncio.create_task(self._watch())
        self.gone = False

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._engine.cancel(self._group, self.tickets)
        self._mailbox.post(self.tickets[0], GoneError())

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yields what is ready, as (index of the part, event) pairs, until all parts have ended.

        Raises:
            APIError: A part failed, or the deadline came first.
            GoneError: The client went away.
        """
        left = len(self.tickets)
        try:
            while left:
                ready: list[tuple[int, Event]] = []
                for ticket, event in await self._mailbox.take():
                    if isinstance(event, Exception):
                        raise _as_api_error(event)
                    left -= isinstance(event, Generated | Scored)
                    ready.append((self._places[ticket], event))
                yield ready
        finally:
            self.close()

    def close(self) -> None:
        """Ends what has not ended. Safe to call twice."""
        self._watcher.cancel()
        self._engine.cancel(self._group, self.tickets)


class GoneError(Exception):
    """The client went away."""


def _as_api_error(error: Exception) -> Exception:
    if isinstance(error, DeadlineError):
        return APIError(408, "the deadline came before the first token; allow more time", code="deadline")
    if isinstance(error, ShutdownError):
        return APIError(503, "the server is shutting down", code="shutdown", headers={"Retry-After": "10"})
    if isinstance(error, GoneError):
        return error
    return APIError(500, "the decoder failed; the server's log says why", code="decoder_failed")


def server_event(record: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(record) + b"\n\n"


class EventStream:
    """A response of server-sent events; its headers wait for the first one, so that errors before it have a status.

    Args:
        chunks: Bytes to send.
    """

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything."""
        started = False
        async with contextlib.aclosing(self._chunks) as chunks:
            try:
                async for chunk in chunks:
                    if not started:
                        await send(_START)
                        started = True
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except GoneError:
                pass
            except APIError as error:
                if not started:
                    raise
                await send({"type": "http.response.body", "body": server_event(error.body), "more_body": True})
            except OSError:  # the connection is gone
                return
        if not started:
            await send(_START)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # proxies would collect events
    ],
}


def usage(prompt_tokens: int, all_timings: Sequence[Timings]) -> dict:
    """OpenAI's count of tokens.

    Args:
        prompt_tokens: Of all prompts.
        all_timings: Of all generations.
    """
    generated = sum(timings.tokens for timings in all_timings)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": max((t.cached_tokens for t in all_timings), default=0)},
    }


def timings_record(all_timings: Sequence[Timings], encode_s: float, ended_by: str) -> dict:
    """Where the time of a request went, in seconds; several generations are added up.

    Args:
        all_timings: Of all parts of the request.
        encode_s: What turning the prompt into tokens took.
        ended_by: How the last generation ended.
    """
    decode_s = sum(t.decode_s for t in all_timings)
    steps = sum(t.steps for t in all_timings)
    return {
        "encode_s": encode_s,
        "queue_s": min((t.queue_s for t in all_timings), default=0.0),
        "prompt_s": sum(t.prompt_s for t in all_timings),
        "decode_s": decode_s,
        "text_s": sum(t.text_s for t in all_timings),
        "tokens_per_s": steps / decode_s if steps and decode_s > 0 else None,
        "cached_tokens": max((t.cached_tokens for t in all_timings), default=0),
        "ended_by": ended_by,
    }
