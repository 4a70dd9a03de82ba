"""Errors as OpenAI's clients expect them: a status, and an object that says what was wrong and where."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class APIError(Exception):
    """An error to answer with.

    Args:
        status: The HTTP status.
        message: What was wrong, and what to do.
        param: The field that was wrong.
        code: A word for programs.
        headers: More headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return Response(encode(self.body), self.status, self.headers, media_type="application/json")


def encode(record: Any) -> bytes:
    """Strict JSON in UTF-8."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> APIError:
    """A request that makes no sense."""
    return APIError(400, message, param=param, code=code)


def from_validation(error: ValidationError) -> APIError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    field = path[0] if path else None
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        name = ".".join(path)
        return bad_request(f"this server does not know the field {name!r}; remove it", name, "unknown_parameter")
    if first["type"] == "missing":
        name = ".".join(path)
        return bad_request(f"the field {name!r} is missing", name, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{field}: {message}" if field else f"the body: {message}", field)


async def answer_error(request: Request, error: Exception) -> Response:
    """Exception handler for :class:`APIError` and for everything unforeseen."""
    if not isinstance(error, APIError):
        error = APIError(500, "the server failed; its log says why", code="internal_error")
    return error.response()


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Exception handler for what routing refuses."""
    status = getattr(error, "status_code", 500)
    messages = {
        404: f"there is nothing at {request.url.path}; see /openapi.json",
        405: f"{request.url.path} does not take {request.method}",
    }
    headers = getattr(error, "headers", None)
    return APIError(status, messages.get(status, str(error)), headers=headers).response()
