"""A decoder without a model: it says what it is told to, as fast as it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from cli.conftest import END, TEMPLATE, make_tokenizer

from jax_mono.decode import Finish
from jax_mono.stream import Token
from jax_mono.tokenizer import Tokenizer


@dataclass(frozen=True)
class Cache:
    """Remembers how much of a conversation there is, and all tokens that were ever fed to it."""

    tokens: tuple[int, ...] = ()

    @property
    def fed(self) -> int:
        return len(self.tokens)

    def keep(self, length: int) -> Cache:
        return replace(self, tokens=self.tokens[:length])

    def copy(self) -> Cache:
        return replace(self)


class Stream:
    """Tokens at a fixed rate, until cancelled or the deadline."""

    def __init__(self, tokens: Sequence[int], rate: float, cache: Cache, deadline: float | None) -> None:
        self._tokens, self._rate, self._cache = tokens, rate, cache
        self._started, self._read, self._cancelled = time.monotonic(), 0, threading.Event()
        self._deadline = None if deadline is None else self._started + deadline
        self.finish = Finish.LENGTH

    def batch(self, spacing: float = 0.0) -> list[Token]:
        left = (len(self._tokens) - self._read) / self._rate
        if self._read and left > 0:
            self._cancelled.wait(min(spacing, left))
        while self._read < len(self._tokens) and not self._cancelled.is_set():
            now = time.monotonic()
            if self._deadline is not None and now > self._deadline:
                self.finish = Finish.DEADLINE
                return []
            ready = min(len(self._tokens), int((now - self._started) * self._rate))
            if ready > self._read:
                tokens = [Token(token, -1.0) for token in self._tokens[self._read : ready]]
                self._read = ready
                return tokens
            self._cancelled.wait(min(0.02, (self._read + 1) / self._rate - (now - self._started)))
        return []

    def cancel(self) -> None:
        self._cancelled.set()

    def result(self) -> Any:
        tokens = list(self._tokens[: self._read])
        # The last token is never fed.
        cache = replace(self._cache, tokens=(*self._cache.tokens, *tokens[:-1]))
        return SimpleNamespace(tokens=tokens, logprobs=[-1.0] * len(tokens), finish=self.finish, top=[], cache=cache)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.cancel()


def say_letters(prompt: Sequence[int]) -> list[int]:
    """Endless text."""
    return [65 + index % 26 for index in range(100_000)]


@dataclass
class SyntheticDecoder:
    """Looks like a decoder to the engine.

    Attributes:
        say: From a conversation to the tokens that follow.
        rate: Tokens per second.
        context: As a decoder has it.
    """

    say: Callable[[Sequence[int]], Sequence[int]] = say_letters
    rate: float = 1000.0
    context: int = 4096
    calls: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer(
            make_tokenizer(), eos_ids=[END], chat_template=TEMPLATE, special_tokens={"eos_token": "<|end|>"}
        )
        self.plan = SimpleNamespace(config=SimpleNamespace(vocab_size=320, eos_token_ids=(END,)))

    def new_cache(self) -> Cache:
        return Cache()

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        cache: Cache | None = None,
        deadline: float | None = None,
        stop: Sequence[int] = (),
        **options: Any,
    ) -> Stream:
        before = Cache() if cache is None else cache
        self.calls.append((len(before.tokens), len(prompt)))
        whole = replace(before, tokens=(*before.tokens, *prompt))
        tokens = list(self.say(whole.tokens))[:max_new_tokens]
        ends = [index for index, token in enumerate(tokens) if token in stop]
        return Stream(tokens[: min(ends, default=len(tokens)) + 1], self.rate, whole, deadline)

    def generate(self, prompt: Sequence[int], **options: Any) -> Any:
        stream = self.stream(prompt, **options)
        while stream.batch():
            pass
        return stream.result()
