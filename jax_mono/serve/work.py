"""What the decoder is asked to do, and what the asker hears of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jax_mono.output import Scores
from jax_mono.sampling import GREEDY, Sampling
from jax_mono.serve.text import Delta
from jax_mono.stream import Token, TokenStream


@dataclass(frozen=True)
class Generate:
    """A generation.

    Attributes:
        prompt: Tokens, at least one.
        max_tokens: New ones at most.
        sampling: How to draw them.
        seed: Of the random numbers; None draws one.
        stops: Tokens that end it.
        strings: Strings that end it.
        top: Alternatives to report per token.
        reuse: Whether caches of earlier prompts may serve this one.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    seed: int | None = None
    stops: Sequence[int] = ()
    strings: Sequence[str] = ()
    top: int = 0
    reuse: bool = True


@dataclass(frozen=True)
class Score:
    """A text to score.

    Attributes:
        tokens: At least two.
        top: Alternatives to report per token.
    """

    tokens: Sequence[int]
    top: int = 0


@dataclass
class Timings:
    """Where the time of one piece of work went, in seconds.

    Attributes:
        queue_s: In line.
        prompt_s: From the decoder's start to the first token.
        decode_s: From the first token to the last.
        text_s: Of both, what turning tokens into text and handing them on took.
        cached_tokens: Tokens of the prompt that were already in a cache.
        tokens: Tokens that were generated.
        steps: Those of them that came in ``decode_s``: all but the first, and what was ready together with it.
    """

    queue_s: float = 0.0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    text_s: float = 0.0
    cached_tokens: int = 0
    tokens: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Generated:
    """The end of a generation.

    Attributes:
        ended_by: ``stop``, ``length`` or ``deadline``.
        top: Per token the most likely alternatives, if asked for; a stop token's are the last.
        timings: Where the time went.
    """

    ended_by: str
    top: list[list[Token]]
    timings: Timings


@dataclass(frozen=True)
class Scored:
    """The end of a scoring."""

    scores: Scores
    timings: Timings


class DeadlineError(Exception):
    """The request's time was over before there was anything to answer with."""


class ShutdownError(Exception):
    """The server goes down."""


Event = Delta | Generated | Scored | Exception


@dataclass(eq=False)
class Ticket:
    """One piece of work in line.

    Attributes:
        work: What to do.
        deadline: ``time.monotonic()`` at which it ends with what it has.
        listener: Is told each event, the last one being an end or an error, on the engine's thread.
        entered: ``time.monotonic()`` at which it got in line.
    """

    work: Generate | Score
    deadline: float
    listener: Callable[[Ticket, Event], None]
    entered: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    _stream: TokenStream | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """Nobody wants it any more: the decoder stops after the token it is working on. From any thread."""
        with self._lock:
            self.cancelled = True
            if self._stream is not None:
                self._stream.cancel()

    def attach(self, stream: TokenStream | None) -> None:
        """Tells which call a cancel has to stop; None once it is over."""
        with self._lock:
            self._stream = stream
            if stream is not None and self.cancelled:
                stream.cancel()

    def tell(self, event: Event) -> None:
        """Passes an event on, unless nobody listens any more."""
        if not self.cancelled:
            self.listener(self, event)


class Mailbox:
    """Brings events from the engine's thread to a coroutine.

    However many events come in before the coroutine looks, it is woken once and takes them all: this is what keeps a
    fast decoder from being slowed down by one wake-up, one message and one write per token.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._events: list[tuple[Ticket, Event]] = []
        self._ready = asyncio.Event()

    def post(self, ticket: Ticket, event: Event) -> None:
        """Puts an event in. From any thread."""
        with self._lock:
            self._events.append((ticket, event))
            first = len(self._events) == 1
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self) -> list[tuple[Ticket, Event]]:
        """Waits for events and returns all there are, at least one."""
        await self._ready.wait()
        self._ready.clear()
        with self._lock:
            events, self._events = self._events, []
        return events
