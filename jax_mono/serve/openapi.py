"""The description of the API, made from the models that requests are checked with."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from jax_mono import __version__
from jax_mono.serve.schemas import ChatRequest, CompletionRequest
from jax_mono.serve.service import Service

_NUMBER_OR_NULL = {"type": ["number", "null"]}


def _object(required: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": required, "required": list(required)}


_ERROR = _object(
    {
        "error": _object(
            {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            }
        )
    }
)
_MODEL = _object({"id": {"type": "string"}, "object": {"const": "model"}, "jax_mono": {"type": "object"}})
_FINISH = {"enum": ["stop", "length"]}
_LOGPROBS = {"type": ["object", "null"]}


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    count = {"type": "integer", "minimum": 0}
    return _object(
        {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "minItems": 1, "items": _object(choice)},
            "usage": _object({"prompt_tokens": count, "completion_tokens": count, "total_tokens": count}),
            "timings": _object({"queue_s": {"type": "number"}, "tokens_per_s": _NUMBER_OR_NULL}),
        }
    )


_COMPLETION = _answer(
    "text_completion",
    {"index": {"type": "integer"}, "text": {"type": "string"}, "logprobs": _LOGPROBS, "finish_reason": _FINISH},
)
_CHAT = _answer(
    "chat.completion",
    {
        "index": {"type": "integer"},
        "message": _object({"role": {"const": "assistant"}, "content": {"type": "string"}}),
        "logprobs": _LOGPROBS,
        "finish_reason": _FINISH,
    },
)


def _content(schema: dict[str, Any], media: str = "application/json") -> dict[str, Any]:
    return {"content": {media: {"schema": schema}}}


def _get(about: str, response: dict[str, Any], **more: Any) -> dict[str, Any]:
    refused = {"description": "Refused", **_content({"$ref": "#/components/schemas/Error"})}
    responses = {"200": {"description": about, **response}, "401": refused, "404": refused, "421": refused}
    return {"get": {"summary": about, "responses": responses, **more}}


def _post(about: str, request: str, answer: dict[str, Any]) -> dict[str, Any]:
    refused = {"description": "Refused", **_content({"$ref": "#/components/schemas/Error"})}
    media = {"application/json": {"schema": answer}, "text/event-stream": {}}
    responses = {"200": {"description": "The answer, or events if stream is true", "content": media}}
    statuses = ("400", "401", "404", "408", "413", "415", "421", "429", "500", "503")
    responses |= dict.fromkeys(statuses, refused)
    body = {"required": True, **_content({"$ref": f"#/components/schemas/{request}"})}
    return {"post": {"summary": about, "requestBody": body, "responses": responses}}


def document(service: Service) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    kinds = [(CompletionRequest, "validation"), (ChatRequest, "validation")]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    parts = schemas["$defs"] | {"Error": _ERROR}
    for request in ("CompletionRequest", "ChatRequest"):
        parts[request]["properties"]["model"] = {"enum": [service.model, None]}
    named = {"name": "name", "in": "path", "required": True, "schema": {"const": service.model}}
    models = _object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}})
    health = _object({"status": {"type": "string"}, "busy": {"type": "boolean"}, "queue": {"type": "integer"}})
    return {
        "openapi": "3.1.0",
        "info": {"title": "jax_mono", "version": __version__},
        "paths": {
            "/v1/models": _get("The model", _content(models)),
            "/v1/models/{name}": _get("The model by name", _content(_MODEL), parameters=[named]),
            "/v1/completions": _post("Continues a text", "CompletionRequest", _COMPLETION),
            "/v1/chat/completions": _post("Continues a conversation", "ChatRequest", _CHAT),
            "/health": _get("Whether requests are answered", _content(health)),
            "/metrics": _get("Counters for Prometheus", _content({"type": "string"}, "text/plain")),
        },
        "components": {"schemas": parts, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }
