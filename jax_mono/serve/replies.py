"""What completions and chats have in common: gathering a whole answer, or passing it on as it appears."""

from __future__ import annotations

import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_mono.output import Scores
from jax_mono.sampling import Sampling
from jax_mono.serve.answers import DONE, Exchange, server_event, timings_record, usage
from jax_mono.serve.schemas import ChatRequest, CompletionRequest
from jax_mono.serve.text import Delta, Entry
from jax_mono.serve.work import Generated, Scored, Timings
from jax_mono.stream import Token

FINISH = {"stop": "stop", "length": "length", "deadline": "length"}
"""What clients know of how a generation may end; ``timings.ended_by`` says it exactly."""


@dataclass
class Answer:
    """One part of a request, as far as it has come: a generation or scores.

    Attributes:
        text: Generated text.
        entries: Its tokens.
        top: Alternatives per token.
        ended_by: See :class:`jax_mono.serve.work.Generated`.
        scores: Of a prompt.
        timings: Where the time went.
    """

    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    top: list[list[Token]] = field(default_factory=list)
    ended_by: str = "length"
    scores: Scores | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens."""
        return sum(entry.logprob or 0.0 for entry in self.entries) / max(1, len(self.entries))


async def gather(exchange: Exchange) -> list[Answer]:
    """Waits for all parts of a request."""
    answers = [Answer() for _ in exchange.tickets]
    async for batch in exchange.events():
        for index, event in batch:
            answer = answers[index]
            if isinstance(event, Delta):
                answer.text += event.text
                answer.entries += event.entries
            elif isinstance(event, Generated):
                answer.top, answer.ended_by, answer.timings = event.top, event.ended_by, event.timings
            elif isinstance(event, Scored):
                answer.scores, answer.timings = event.scores, event.timings
    return answers


def sampling_of(body: CompletionRequest | ChatRequest) -> Sampling:
    """How to draw tokens; null stands for a default."""
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )


def seed_of(body: CompletionRequest | ChatRequest, index: int) -> int | None:
    """The seed of one of several generations: the request's, counted on."""
    return None if body.seed is None else (body.seed + index) % 2**64


class Reply(ABC):
    """The form of an answer.

    Args:
        prefix: Of its identifier.
        model: The model's name.
        prompt_tokens: Of all prompts.
        encode_s: Seconds that it took to make them.
        usage_wanted: Whether a stream ends with a chunk of usage.
        ids_wanted: Whether choices carry their generated tokens.
    """

    kind: str
    chunk_kind: str

    def __init__(
        self, prefix: str, model: str, prompt_tokens: int, encode_s: float, usage_wanted: bool, ids_wanted: bool
    ) -> None:
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._prompt_tokens, self._encode_s = prompt_tokens, encode_s
        self._usage_wanted, self._ids_wanted = usage_wanted, ids_wanted

    @abstractmethod
    def first_choice(self, index: int) -> dict[str, Any] | None:
        """What opens the stream of a choice, if anything does."""

    @abstractmethod
    def delta_choice(self, index: int, text: str, entries: Sequence[Entry]) -> dict[str, Any]:
        """More of a choice."""

    @abstractmethod
    def last_choice(self, index: int, finish: str) -> dict[str, Any]:
        """The end of a choice."""

    def token_ids(self, entries: Sequence[Entry]) -> dict[str, list[int]]:
        """The tokens of a choice, or of a part of it, if they are wanted; a token that ends the text is not one."""
        return {"token_ids": [entry.id for entry in entries]} if self._ids_wanted else {}

    def whole(self, choices: list[dict[str, Any]], answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer that does not stream."""
        spent = [answer.timings for answer in answers]
        ended_by = answers[-1].ended_by if answers else "length"
        return {
            **self._head,
            "object": self.kind,
            "choices": choices,
            "usage": usage(self._prompt_tokens, spent),
            "timings": timings_record(spent, self._encode_s, ended_by),
        }

    async def stream(self, exchange: Exchange) -> AsyncIterator[bytes]:
        """Server-sent events; tokens that are ready together share one."""
        spent: list[Timings] = []
        opened: set[int] = set()
        ended_by = "length"
        async with contextlib.aclosing(exchange.events()) as batches:
            async for batch in batches:
                out: list[bytes] = []
                text, entries = "", []
                for place, (index, event) in enumerate(batch):
                    if index not in opened:
                        opened.add(index)
                        if (first := self.first_choice(index)) is not None:
                            out.append(self._chunk(first))
                    if isinstance(event, Delta):
                        text += event.text
                        entries += event.entries
                    goes_on = place + 1 < len(batch) and batch[place + 1][0] == index
                    if (text or entries) and not (goes_on and isinstance(event, Delta)):
                        choice = self.delta_choice(index, text, entries) | self.token_ids(entries)
                        out.append(self._chunk(choice, len(entries)))
                        text, entries = "", []
                    if isinstance(event, Generated):
                        spent.append(event.timings)
                        ended_by = event.ended_by
                        out.append(self._chunk(self.last_choice(index, FINISH[ended_by])))
                yield b"".join(out)
        if self._usage_wanted:
            about = {"usage": usage(self._prompt_tokens, spent)}
            about["timings"] = timings_record(spent, self._encode_s, ended_by)
            yield server_event({**self._head, "object": self.chunk_kind, "choices": [], **about})
        yield DONE

    def _chunk(self, choice: dict[str, Any], tokens: int = 0) -> bytes:
        record = {**self._head, "object": self.chunk_kind, "choices": [choice], "tokens": tokens}
        if self._usage_wanted:
            record["usage"] = None
        return server_event(record)
