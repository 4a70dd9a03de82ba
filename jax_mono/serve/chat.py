"""``/v1/chat/completions``: a conversation in, the assistant's turn out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from jax_mono.serve.answers import EventStream, Exchange
from jax_mono.serve.completions import finite
from jax_mono.serve.errors import bad_request, encode
from jax_mono.serve.replies import FINISH, Answer, Reply, gather, sampling_of, seed_of
from jax_mono.serve.schemas import ChatRequest
from jax_mono.serve.service import Service
from jax_mono.serve.text import Entry, token_text
from jax_mono.serve.work import Generate
from jax_mono.stream import Token
from jax_mono.tokenizer import Tokenizer, TokenizerError


async def chat(request: Request) -> Response | ASGIApp:
    """The endpoint."""
    service: Service = request.app.state.service
    body = await service.read(request, ChatRequest)
    _check(body)
    started = time.monotonic()
    prompt = await run_in_threadpool(_prompt, body, service.engine.tokenizer)
    encode_s = time.monotonic() - started
    wanted = body.max_completion_tokens or body.max_tokens
    budget = service.budget(len(prompt), wanted, "messages", strict=wanted is not None)
    sampling, stops = sampling_of(body), service.stops(body)
    works = [
        Generate(
            prompt,
            budget,
            sampling,
            seed_of(body, index),
            stops,
            tuple(body.stop_list),
            body.top_logprobs or 0,
            body.cache_prompt is not False,
        )
        for index in range(body.n or 1)
    ]
    options = bool(body.stream_options and body.stream_options.include_usage)
    reply = ChatReply(service, body, len(prompt), encode_s, options)
    exchange = Exchange(service.engine, request, body.user, works, service.seconds(body))
    if body.stream:
        return EventStream(reply.stream(exchange))
    answers = await gather(exchange)
    choices = [reply.whole_choice(index, answer) for index, answer in enumerate(answers)]
    return Response(encode(reply.whole(choices, answers)), media_type="application/json")


def _check(body: ChatRequest) -> None:
    """Refuses combinations that make no sense."""
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream", "stream_options")
    if body.stream and body.top_logprobs:
        raise bad_request(
            "alternatives (top_logprobs) are known when a generation has ended; set stream to false, or leave them out",
            "top_logprobs",
        )


def _prompt(body: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    roles = {"developer": "system"}
    turns = [{"role": roles.get(turn.role, turn.role), "content": turn.text} for turn in body.messages]
    try:
        return tokenizer.chat(turns)
    except TokenizerError as error:
        raise bad_request(str(error), "messages") from None


class ChatReply(Reply):
    """The form of an assistant's turn."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self, service: Service, body: ChatRequest, prompt_tokens: int, encode_s: float, usage_wanted: bool
    ) -> None:
        super().__init__("chatcmpl", service.model, prompt_tokens, encode_s, usage_wanted, bool(body.return_token_ids))
        self._tokenizer, self._wanted = service.engine.tokenizer, bool(body.logprobs)

    def first_choice(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        return self._choice(index, {"role": "assistant", "content": ""}, None)

    def delta_choice(self, index: int, text: str, entries: Sequence[Entry]) -> dict[str, Any]:
        """More text."""
        return self._choice(index, {"content": text}, self._logprobs(entries, []))

    def last_choice(self, index: int, finish: str) -> dict[str, Any]:
        """Why it ended."""
        return self._choice(index, {}, None) | {"finish_reason": finish}

    def whole_choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A choice that does not stream."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.entries, answer.top),
            "finish_reason": FINISH[answer.ended_by],
            **self.token_ids(answer.entries),
        }

    def _choice(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, entries: Sequence[Entry], top: Sequence[Sequence[Token]]) -> dict[str, Any] | None:
        if not self._wanted:
            return None
        rows = [*top[: len(entries)], *[[]] * (len(entries) - len(top))]
        content = [
            self._token(entry.id, entry.logprob or 0.0)
            | {"top_logprobs": [self._token(token.id, token.logprob) for token in row]}
            for entry, row in zip(entries, rows, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self._tokenizer, token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(self._tokenizer.token_bytes(token))}
