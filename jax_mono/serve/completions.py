"""``/v1/completions``: text or tokens in, text out; with ``echo`` and ``logprobs`` also how likely the prompt was."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from jax_mono.serve.answers import EventStream, Exchange
from jax_mono.serve.errors import bad_request, encode
from jax_mono.serve.replies import FINISH, Answer, Reply, gather, sampling_of, seed_of
from jax_mono.serve.schemas import MOST_CHOICES, CompletionRequest
from jax_mono.serve.service import Service
from jax_mono.serve.text import Entry, echo_entries, token_text
from jax_mono.serve.work import Generate, Score
from jax_mono.stream import Token
from jax_mono.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0
"""Stands for the logarithm of zero, which JSON cannot say."""


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        tokens: At least one.
        text: As it was given, or None if it was given as tokens.
        hidden: Tokens at its start that are not in the text.
    """

    tokens: list[int]
    text: str | None
    hidden: int


async def completions(request: Request) -> Response | ASGIApp:
    """The endpoint."""
    service: Service = request.app.state.service
    body = await service.read(request, CompletionRequest)
    _check(body)
    started = time.monotonic()
    prompts = await run_in_threadpool(_prompts, body, service)
    encode_s = time.monotonic() - started
    plan = _Plan(body, service, prompts)
    options = bool(body.stream_options and body.stream_options.include_usage)
    reply = CompletionReply(service, body, plan, sum(len(prompt.tokens) for prompt in prompts), encode_s, options)
    if not plan.works:
        return Response(encode(reply.whole(reply.choices([]), [])), media_type="application/json")
    exchange = Exchange(service.engine, request, body.user, plan.works, service.seconds(body))
    if body.stream:
        return EventStream(reply.stream(exchange))
    answers = await gather(exchange)
    return Response(encode(reply.whole(reply.choices(answers), answers)), media_type="application/json")


def _check(body: CompletionRequest) -> None:
    """Refuses combinations that make no sense."""
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n:
        raise bad_request(f"best_of is {best_of}, must be at least n, which is {n}", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens is 0: without echo there would be no answer", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream", "stream_options")
    if body.stream and best_of > n:
        raise bad_request("best_of beyond n cannot stream: the best is known at the end", "best_of")
    if body.stream and body.logprobs:
        raise bad_request(
            "alternatives (logprobs above 0) are known when a generation has ended; send stream false, or logprobs 0",
            "logprobs",
        )
    if body.stream and body.echo and (body.logprobs is not None or not body.max_tokens):
        raise bad_request("echo with logprobs, or without new tokens, cannot stream; set stream to false", "stream")


def _prompts(body: CompletionRequest, service: Service) -> list[Prompt]:
    """Turns what was given into tokens."""
    given = body.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    tokenizer, prompts = service.engine.tokenizer, []
    most = MOST_CHOICES // (body.best_of or body.n or 1)
    if several and len(given) > most:
        raise bad_request(f"{len(given)} prompts, at most {most} with so many choices each", "prompt")
    for one in given if several else [given]:
        if isinstance(one, str):
            tokens = tokenizer.encode(one)
            if not tokens and tokenizer.bos_id is not None:
                tokens = [tokenizer.bos_id]
            hidden = len(tokens) - len(tokenizer.encode(one, add_special_tokens=False))
            prompts.append(Prompt(tokens, one, hidden))
        else:
            service.check_tokens(one, "prompt")
            prompts.append(Prompt(one, None, 0))
    return prompts


class _Plan:
    """Which work answers which part of the request: for each prompt one score, if wanted, and its generations."""

    def __init__(self, body: CompletionRequest, service: Service, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.works: list[Score | Generate] = []
        self.scores: list[int | None] = []
        self.candidates: list[list[int]] = []
        self.prompt_of: list[int] = []
        self.choice_of: list[int] = []
        sampling, stops, top = sampling_of(body), service.stops(body), body.logprobs or 0
        best_of = body.best_of or body.n or 1
        wanted = 16 if body.max_tokens is None else body.max_tokens
        # Scores end with the alternatives of what comes next, so one greedy token needs no generation.
        self.greedy_ends = stops
        one_greedy = wanted == 1 and best_of == 1 and sampling.temperature == 0 and sampling.repetition_penalty == 1.0
        for place, prompt in enumerate(prompts):
            budget = service.budget(len(prompt.tokens), wanted, "prompt", strict="max_tokens" in body.model_fields_set)
            score = bool(body.echo) and body.logprobs is not None and len(prompt.tokens) > 1
            self.scores.append(self._add(place, 0, Score(prompt.tokens, max(1, top))) if score else None)
            self.candidates.append([])
            if budget == 0 or (score and one_greedy):
                continue
            for index in range(best_of):
                work = Generate(
                    prompt.tokens,
                    budget,
                    sampling,
                    seed_of(body, index),
                    stops,
                    tuple(body.stop_list),
                    top,
                    body.cache_prompt is not False,
                )
                self.candidates[-1].append(self._add(place, index, work))
        self.from_score = one_greedy

    def _add(self, prompt: int, choice: int, work: Score | Generate) -> int:
        self.works.append(work)
        self.prompt_of.append(prompt)
        self.choice_of.append(choice)
        return len(self.works) - 1


class CompletionReply(Reply):
    """The form of a completion."""

    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        plan: _Plan,
        prompt_tokens: int,
        encode_s: float,
        usage_wanted: bool,
    ) -> None:
        super().__init__("cmpl", service.model, prompt_tokens, encode_s, usage_wanted, bool(body.return_token_ids))
        self._tokenizer, self._body, self._plan = service.engine.tokenizer, body, plan
        self._n = body.n or 1

    def first_choice(self, index: int) -> dict[str, Any] | None:
        """The prompt, if it is to be echoed."""
        prompt = self._plan.prompts[self._plan.prompt_of[index]]
        return self._choice(index, _text(self._tokenizer, prompt), None) if self._body.echo else None

    def delta_choice(self, index: int, text: str, entries: Sequence[Entry]) -> dict[str, Any]:
        """More text."""
        wanted = self._body.logprobs is not None
        return self._choice(index, text, _logprobs(self._tokenizer, entries, []) if wanted else None)

    def last_choice(self, index: int, finish: str) -> dict[str, Any]:
        """Why it ended."""
        return self._choice(index, "", None) | {"finish_reason": finish}

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        place = self._plan.prompt_of[index] * self._n + self._plan.choice_of[index]
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": None}

    def choices(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """All choices, those of the first prompt first, the best of each first if there were more."""
        found: list[dict[str, Any]] = []
        for prompt, score, candidates in zip(self._plan.prompts, self._plan.scores, self._plan.candidates, strict=True):
            scored = None if score is None else answers[score]
            if candidates:
                some = [answers[index] for index in candidates]
                if len(some) > self._n:
                    some = sorted(some, key=lambda answer: answer.likelihood, reverse=True)[: self._n]
            else:
                some = [self._next(prompt, scored)] * self._n
            found += [self._whole_choice(prompt, scored, answer) for answer in some]
        return [{"index": index, **choice} for index, choice in enumerate(found)]

    def _next(self, prompt: Prompt, scored: Answer | None) -> Answer:
        """The one greedy token that scores tell, or nothing."""
        if scored is None or scored.scores is None or not self._plan.from_score:
            return Answer()
        row = scored.scores.top[len(prompt.tokens) - 1]
        token = row[0]
        scored.timings.tokens = 1
        if token.id in self._plan.greedy_ends:
            return Answer(ended_by="stop")
        text = self._tokenizer.decode([token.id])
        stop = [at for string in self._body.stop_list if (at := text.find(string)) >= 0]
        ended_by = "stop" if stop else "length"
        return Answer(text[: min(stop, default=len(text))], [Entry(token.id, token.logprob, 0)], [row], ended_by)

    def _whole_choice(self, prompt: Prompt, scored: Answer | None, answer: Answer) -> dict[str, Any]:
        text, entries, top = answer.text, list(answer.entries), answer.top
        if self._body.echo:
            scores = scored.scores if scored else None
            known = [] if scores is None else scores.logprobs.tolist()
            echoed, before = echo_entries(self._tokenizer, prompt.tokens, known, prompt.hidden)
            echoed = echoed if prompt.text is None else prompt.text
            entries = [*before, *(Entry(e.id, e.logprob, e.start + len(echoed)) for e in entries)]
            top = [[], *(scores.top[: len(before) - 1] if scores else []), *top]
            text = echoed + text
        record = None
        if self._body.logprobs is not None:
            record = _logprobs(self._tokenizer, entries, [row[: self._body.logprobs] for row in top])
        choice = {"text": text, "logprobs": record, "finish_reason": FINISH[answer.ended_by]}
        return choice | self.token_ids(answer.entries)


def _text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    return prompt.text if prompt.text is not None else echo_entries(tokenizer, prompt.tokens, [], prompt.hidden)[0]


def _logprobs(tokenizer: Tokenizer, entries: Sequence[Entry], top: Sequence[Sequence[Token]]) -> dict[str, Any]:
    """Four lists, one entry per token; the first token of a text has no probability."""
    aligned = itertools.zip_longest(entries, top[: len(entries)], fillvalue=())
    rows = [_alternatives(tokenizer, entry, row) for entry, row in aligned]
    return {
        "tokens": [token_text(tokenizer, entry.id) for entry in entries],
        "token_logprobs": [None if entry.logprob is None else finite(entry.logprob) for entry in entries],
        "top_logprobs": rows,
        "text_offset": [entry.start for entry in entries],
    }


def _alternatives(tokenizer: Tokenizer, entry: Entry, row: Sequence[Token]) -> dict[str, float] | None:
    """The most likely tokens, and always the one that stands there."""
    if entry.logprob is None:
        return None
    found: dict[str, float] = {}
    for token in row:
        # The same number as in ``token_logprobs``: evaluations compare the two to see whether a token was the best.
        logprob = entry.logprob if token.id == entry.id else token.logprob
        found.setdefault(token_text(tokenizer, token.id), finite(logprob))
    found.setdefault(token_text(tokenizer, entry.id), finite(entry.logprob))
    return found


def finite(logprob: float) -> float:
    """A log-probability as a number that JSON knows."""
    return max(logprob, IMPOSSIBLE)
