"""The engine: one thread that owns the decoder and does one piece of work after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from jax_mono.decode import Finish
from jax_mono.decoder import Decoder
from jax_mono.serve.fair import FairQueue, Group
from jax_mono.serve.metrics import Metrics
from jax_mono.serve.prefixes import Prefixes
from jax_mono.serve.text import TextRun
from jax_mono.serve.work import DeadlineError, Generate, Generated, Score, Scored, ShutdownError, Ticket, Timings
from jax_mono.tokenizer import Tokenizer

PREFILL_SLICE = 256
"""Prompt tokens that are computed before somebody looks whether they are still wanted."""

EVENT_SPACING = 0.025
"""Seconds between two looks for tokens: events follow each other faster than eyes do, and a look takes its time from a
processor that decodes."""

TOP_SIZES = (0, 5, 20)
"""Numbers of alternatives that programs are compiled for."""

_log = logging.getLogger(__name__)


class _CancelledError(Exception):
    """Nobody wants this any more."""


class Engine:
    """Runs work on a decoder, in the fair order of its queue.

    Args:
        decoder: With a tokenizer. From now on nobody else uses it.
        metrics: Where to count.
        queue: Requests that may wait.
        conversations: Caches to keep for prompts that continue or share a beginning.
    """

    def __init__(self, decoder: Decoder, metrics: Metrics, *, queue: int = 64, conversations: int = 2) -> None:
        if decoder.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, and a server needs one; add tokenizer.json to it")
        self.decoder, self.metrics = decoder, metrics
        self.tokenizer: Tokenizer = decoder.tokenizer
        self.queue: FairQueue[Ticket] = FairQueue(queue)
        self._prefixes = Prefixes(decoder, conversations)
        self._current: Ticket | None = None
        self._recent_s = 1.0
        self._thread = threading.Thread(target=self._run, name="jax_mono engine", daemon=True)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text or a turn of this model."""
        return tuple(dict.fromkeys((*self.decoder.plan.config.eos_token_ids, *self.tokenizer.eos_ids)))

    @property
    def alive(self) -> bool:
        """Whether work is being done."""
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether the decoder works."""
        return self._current is not None

    def retry_after(self) -> int:
        """Seconds after which a place in line may be free, judging by the latest work."""
        return max(1, min(600, round(self._recent_s)))

    def start(self) -> None:
        """Compiles what every request needs, then begins to work."""
        cache = None
        for _ in range(2):  # the second one continues a cache, which over a mesh is another program
            cache = self.decoder.generate([0], max_new_tokens=1, padded=True, stop=[], cache=cache).cache.keep(0)
        self._prefixes.put([], cache)
        self._thread.start()

    def submit(self, client: str, tickets: Iterable[Ticket]) -> Group[Ticket]:
        """Gets in line.

        Args:
            client: Clients take turns.
            tickets: The parts of one request.

        Returns:
            What :meth:`cancel` takes.

        Raises:
            QueueFullError: There is no room.
        """
        group = Group(client, tickets)
        self.queue.put(group)
        return group

    def cancel(self, group: Group[Ticket], tickets: Iterable[Ticket]) -> None:
        """Ends a request, wherever it is; one that has ended is not touched."""
        self.queue.discard(group)
        for ticket in tickets:
            ticket.cancel()

    def close(self) -> None:
        """Ends everything; those in line are told."""
        for ticket in self.queue.close():
            ticket.tell(ShutdownError())
        current = self._current
        if current is not None:
            current.tell(ShutdownError())
            current.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while (ticket := self.queue.get()) is not None:
            self._current = ticket
            started = time.monotonic()
            try:
                self._do(ticket, started)
            except _CancelledError:
                self.metrics.cancelled.inc()
            except Exception as error:
                if not isinstance(error, DeadlineError):
                    _log.exception("a piece of work failed")
                ticket.tell(error)
            finally:
                self._current = None
                self._recent_s += 0.2 * (time.monotonic() - started - self._recent_s)

    def _do(self, ticket: Ticket, started: float) -> None:
        timings = Timings(queue_s=started - ticket.entered)
        self.metrics.queue_seconds.observe(timings.queue_s)
        if isinstance(ticket.work, Generate):
            self._generate(ticket, ticket.work, timings)
        else:
            self._score(ticket, ticket.work, timings)

    def _generate(self, ticket: Ticket, work: Generate, timings: Timings) -> None:
        started = time.monotonic()
        prompt = list(work.prompt)
        cache, known = self._prefixes.take(prompt if work.reuse else [])
        timings.cached_tokens = known
        self.metrics.prompt_tokens.inc(len(prompt))
        self.metrics.cached_tokens.inc(known)
        while True:
            try:
                left = _left(ticket)
            except (DeadlineError, _CancelledError):
                self._prefixes.put(prompt, cache)
                raise
            if len(prompt) - known <= PREFILL_SLICE:
                break
            # The token that the call generates is cut away again.
            part = prompt[known : known + PREFILL_SLICE]
            known += len(part)
            cache = self.decoder.generate(part, max_new_tokens=1, stop=[], cache=cache, padded=True).cache.keep(known)
        run = TextRun(self.tokenizer, work.stops, work.strings)
        first = last = None
        with self.decoder.stream(
            prompt[known:],
            max_new_tokens=work.max_tokens,
            sampling=work.sampling,
            seed=work.seed,
            stop=work.stops,
            top_logprobs=_top_size(work.top),
            cache=cache,
            deadline=left,
            padded=True,
        ) as stream:
            ticket.attach(stream)
            while tokens := stream.batch(EVENT_SPACING):
                now = time.monotonic()
                if last is None:
                    first = now
                    timings.prompt_s = now - started
                    self.metrics.first_token_seconds.observe(now - ticket.entered)
                else:
                    self.metrics.token_seconds.observe((now - last) / len(tokens))
                    timings.steps += len(tokens)
                last = now
                delta = run.feed(tokens)
                if delta.text or delta.entries:
                    ticket.tell(delta)
                timings.text_s += time.monotonic() - now
                if run.stopped or ticket.cancelled:
                    stream.cancel()
                    break
            ticket.attach(None)
            output = stream.result()
        self._prefixes.put([*prompt, *output.tokens], output.cache)
        timings.decode_s = (last or 0.0) - (first or 0.0)
        timings.tokens = run.count
        self.metrics.tokens.inc(run.count)
        if ticket.cancelled:
            raise _CancelledError
        rest = run.flush()
        if rest.text or rest.entries:
            ticket.tell(rest)
        if run.count == 0:
            raise DeadlineError
        ended_by = "stop" if run.stopped else "deadline" if output.finish is Finish.DEADLINE else "length"
        top = [row[: work.top] for row in output.top[: run.count]]
        ticket.tell(Generated(ended_by, top, timings))

    def _score(self, ticket: Ticket, work: Score, timings: Timings) -> None:
        started = time.monotonic()
        self.metrics.prompt_tokens.inc(len(work.tokens))
        with self.decoder.score_stream(
            work.tokens, top_logprobs=_top_size(work.top), deadline=_left(ticket), padded=True
        ) as stream:
            ticket.attach(stream)
            scored = 0
            while tokens := stream.batch(EVENT_SPACING):
                scored += len(tokens)
            ticket.attach(None)
            scores = stream.result()
        timings.prompt_s = time.monotonic() - started
        if ticket.cancelled:
            raise _CancelledError
        if scored < len(work.tokens):
            raise DeadlineError
        ticket.tell(Scored(scores, timings))


def _left(ticket: Ticket) -> float:
    """Seconds until the deadline.

    Raises:
        DeadlineError: There are none.
        _CancelledError: Nobody wants the work any more.
    """
    if ticket.cancelled:
        raise _CancelledError
    left = ticket.deadline - time.monotonic()
    if left <= 0:
        raise DeadlineError
    return left


def _top_size(wanted: int) -> int:
    return next(size for size in TOP_SIZES if size >= wanted)
