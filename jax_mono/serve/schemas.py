"""What requests may say. Whatever is not listed here is refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

MOST_CHOICES = 128
"""Generations that one request may ask for."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _only(*neutral: Any) -> AfterValidator:
    """Accepts values that change nothing; the field exists for clients that always send it."""

    def check(value: Any) -> Any:
        if value not in neutral and value is not None:
            raise ValueError(f"is not supported here; remove it or send {neutral[0]!r}")
        return value

    return AfterValidator(check)


def _prompts(value: Any) -> Any:
    """One message for the four kinds of prompts, instead of one error for each."""
    if isinstance(value, list) and not value:
        raise ValueError("is empty; it needs at least one token")
    one = value if isinstance(value, list) else [value]
    if len({type(entry) for entry in one}) == 1 and type(one[0]) in (str, int):
        return value
    if all(isinstance(entry, list) and entry and all(type(token) is int for token in entry) for entry in one):
        return value
    raise ValueError("must be a string, a list of strings, a list of tokens or a list of lists of tokens")


def _stop_strings(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return None
    fine = isinstance(strings, list) and all(isinstance(entry, str) for entry in strings)
    if not fine or len(strings) > 16 or any(not 1 <= len(entry) <= 1000 for entry in strings):
        raise ValueError("must be a string or up to 16 strings, each of 1 to 1000 characters")
    return value


def _contents(value: Any) -> Any:
    """One message for all kinds of contents that are not text."""
    if isinstance(value, list):
        fine = all(isinstance(part, dict) and part.get("type") == "text" and "text" in part for part in value)
    else:
        fine = isinstance(value, str)
    if not fine:
        raise ValueError("content must be a string or a list of text parts; this model reads text only")
    return value


def _whole(value: Any) -> Any:
    """To JSON, 5.0 is a whole number too."""
    return int(value) if type(value) is float and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Zero = Annotated[float | None, _only(0.0), WithJsonSchema({"enum": [0, None]})]
Nothing = Annotated[Any, _only(None, [], {}), WithJsonSchema({"enum": [None, [], {}]})]
Token = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**31)]


class StreamOptions(_Model):
    """What a stream holds besides text."""

    include_usage: bool | None = Field(None, description="End with a chunk that has usage and timings.")
    include_obfuscation: Annotated[bool | None, _only(False), WithJsonSchema({"enum": [False, None]})] = None


class _Common(_Model):
    """Fields of both kinds of requests."""

    model: str | None = Field(None, description="One of /v1/models; the one there is if absent.")
    temperature: float | None = Field(1.0, ge=0.0, le=100.0, description="0 takes the most likely token.")
    top_p: float | None = Field(1.0, gt=0.0, le=1.0)
    top_k: Whole | None = Field(0, ge=0, lt=2**31, description="Keeps the most likely tokens; 0 keeps all.")
    min_p: float | None = Field(0.0, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(1.0, gt=0.0, le=100.0)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    n: Whole | None = Field(1, ge=1, le=MOST_CHOICES)
    stop: Annotated[
        str | list[str] | None,
        BeforeValidator(_stop_strings),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1, "maxLength": 1000},
                    {
                        "type": "array",
                        "maxItems": 16,
                        "items": {"type": "string", "minLength": 1, "maxLength": 1000},
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = None
    stop_token_ids: list[Token] | None = Field(None, max_length=64)
    ignore_eos: bool | None = Field(False, description="Do not end at the model's own end-of-text tokens.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    deadline: float | None = Field(None, gt=0.0, description="Seconds, at most the server's own deadline.")
    return_token_ids: bool | None = Field(False, description="Choices, and their parts in a stream, carry token_ids.")
    cache_prompt: bool | None = Field(True, description="Whether what a cache holds of the prompt is used.")
    user: str | None = Field(None, description="Whose turn it is: users take turns.")
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Nothing = None

    @property
    def stop_list(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Common):
    """The body of ``/v1/completions``."""

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        BeforeValidator(_prompts),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                    {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
                    },
                ]
            }
        ),
    ]
    max_tokens: Whole | None = Field(16, ge=0, lt=2**31, description="0 only with echo.")
    echo: bool | None = False
    logprobs: Whole | None = Field(None, ge=0, le=5)
    best_of: Whole | None = Field(None, ge=1, le=MOST_CHOICES)
    suffix: Annotated[str | None, _only(""), WithJsonSchema({"enum": ["", None]})] = None


class TextPart(_Model):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], BeforeValidator(_contents, json_schema_input_type=str | list[TextPart])]
    name: Annotated[str | None, _only(""), WithJsonSchema({"enum": ["", None]})] = None
    refusal: Annotated[str | None, _only(""), WithJsonSchema({"enum": ["", None]})] = None

    @property
    def text(self) -> str:
        """What was said."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(_Model):
    """The form of an answer; only free text."""

    type: Annotated[str, _only("text"), WithJsonSchema({"const": "text"})]


class ChatRequest(_Common):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_tokens: Whole | None = Field(None, ge=1, lt=2**31, description="As many as fit if absent.")
    max_completion_tokens: Whole | None = Field(None, ge=1, lt=2**31, description="The newer name of max_tokens.")
    logprobs: bool | None = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Nothing = None
    tool_choice: Annotated[str | None, _only("none"), WithJsonSchema({"enum": ["none", None]})] = None
    parallel_tool_calls: bool | None = Field(None, description="Accepted: there are no tool calls.")
    store: Annotated[bool | None, _only(False), WithJsonSchema({"enum": [False, None]})] = None
