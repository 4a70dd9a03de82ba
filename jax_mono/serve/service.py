"""What all endpoints share: the engine, the model's name, and the limits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from jax_mono.serve.engine import Engine
from jax_mono.serve.errors import APIError, bad_request, from_validation
from jax_mono.serve.schemas import ChatRequest, CompletionRequest

Body = TypeVar("Body", CompletionRequest, ChatRequest)

_BODY_SECONDS = 30.0


@dataclass(frozen=True)
class Limits:
    """What a request may take.

    Attributes:
        body_bytes: Size of its body.
        deadline_s: Seconds from its arrival to its end.
    """

    body_bytes: int = 2 << 20
    deadline_s: float = 600.0


@dataclass(frozen=True)
class Service:
    """A served model.

    Attributes:
        engine: Who does the work.
        model: The name under which it is served.
        facts: What ``/v1/models`` tells about it, such as parameters, dtype and the speed that memory allows.
        limits: Of requests.
    """

    engine: Engine
    model: str
    facts: dict[str, Any] = field(default_factory=dict)
    limits: Limits = Limits()

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """Reads and checks a body.

        Raises:
            APIError: It is not JSON, too large, too slow, or says something that is not understood.
        """
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":  # also keeps other sites' pages out: browsers ask before they send this
            raise APIError(415, "send the body as application/json", code="unsupported_media_type")
        limit = self.limits.body_bytes
        too_large = APIError(413, f"the body is beyond the limit of {limit} bytes", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        raw = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    raw += chunk
                    if len(raw) > limit:
                        raise too_large
        except TimeoutError:
            raise APIError(408, f"the body took longer than {_BODY_SECONDS:.0f} s", code="body_too_slow") from None
        try:
            body = kind.model_validate_json(bytes(raw))
        except ValidationError as error:
            raise from_validation(error) from None
        if body.model is not None and body.model != self.model:
            raise APIError(
                404, f"there is no model {body.model!r}, only {self.model!r}", param="model", code="model_not_found"
            )
        return body

    def seconds(self, body: CompletionRequest | ChatRequest) -> float:
        """Until a request's deadline."""
        return min(body.deadline or self.limits.deadline_s, self.limits.deadline_s)

    def stops(self, body: CompletionRequest | ChatRequest) -> tuple[int, ...]:
        """Tokens that end a generation."""
        self.check_tokens(body.stop_token_ids or (), "stop_token_ids")
        ends = () if body.ignore_eos else self.engine.ends
        return tuple(dict.fromkeys((*ends, *(body.stop_token_ids or ()))))

    def check_tokens(self, tokens: list[int] | tuple[int, ...], param: str) -> None:
        """Refuses tokens outside the vocabulary.

        Raises:
            APIError: Naming the first of them.
        """
        vocab = self.engine.decoder.plan.config.vocab_size
        for token in tokens:
            if not 0 <= token < vocab:
                raise bad_request(f"{param}: token {token} is outside the vocabulary of {vocab}", param)

    def budget(self, prompt: int, wanted: int | None, param: str, *, strict: bool) -> int:
        """New tokens that a generation may have.

        Args:
            prompt: Tokens of the prompt.
            wanted: New ones asked for; None means as many as fit.
            param: The field that holds the prompt.
            strict: Whether ``wanted`` was said by the client, and must fit.

        Raises:
            APIError: The prompt is empty, or does not fit.
        """
        context = self.engine.decoder.context
        if prompt == 0:
            raise bad_request(f"{param}: is empty; it needs at least one token", param)
        left = context - prompt
        needed = (wanted or 0) if strict else min(1, 1 if wanted is None else wanted)
        if left < needed:
            raise bad_request(
                f"this model's context is {context} tokens; {prompt} in the {param} and {needed} new ones are more",
                param,
                "context_length_exceeded",
            )
        return left if wanted is None else min(wanted, left)
