"""Streaming: tokens out of a call that is still running, and ways to stop it."""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from jax_mono import native

Result = TypeVar("Result")

_POLL_MS = 20
"""How long one look for new tokens may block; bounds how late Ctrl-C is seen."""


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        id: Its number in the vocabulary.
        logprob: Natural logarithm of its probability under the model's unmodified distribution.
    """

    id: int
    logprob: float


class _Call(Generic[Result]):
    """The running call. It does not know its stream, so that a forgotten stream can be collected and end it."""

    def __init__(self, launch: Callable[[int], Result], session: native.Session) -> None:
        self.session = session
        self.outcome: Result | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        # A daemon: the interpreter must not wait for a call that nobody stops. _stop_all stops it at exit.
        thread = threading.Thread(target=self._run, args=(launch,), name=_THREAD_NAME, daemon=True)
        _running.add(self)
        thread.start()

    def _run(self, launch: Callable[[int], Result]) -> None:
        try:
            self.outcome = launch(self.session.id)
        except BaseException as error:
            self.error = error
        finally:
            _running.discard(self)
            self.done.set()


_THREAD_NAME = "jax_mono call"
_running: set[_Call[Any]] = set()


@atexit.register
def _stop_all() -> None:
    """Ends all threads before the interpreter goes: it would kill them within XLA, which aborts the process."""
    for call in list(_running):
        call.session.cancel()
    for thread in threading.enumerate():  # also those that still clean up after their call
        if thread.name == _THREAD_NAME:
            thread.join()


class TokenStream(Iterator[Token], Generic[Result]):
    """Yields each token as soon as it exists, while the call is still running.

    Closing the stream, leaving its ``with`` block, Ctrl-C in its consumer or the deadline stop the call within one
    token; the tokens so far are kept. :meth:`result` returns what the call returned.

    Args:
        launch: Runs the call to its end, given the number of a session.
        capacity: Tokens the call may produce.
        deadline: Seconds after which the call ends with what it has, or None.
    """

    def __init__(self, launch: Callable[[int], Result], capacity: int, deadline: float | None = None) -> None:
        self._session = native.Session(capacity, deadline)
        self._ready: deque[Token] = deque()
        self._batched = -math.inf  # when the last batch was taken
        self._call = _Call(launch, self._session)

    def __next__(self) -> Token:
        """Waits for the next token.

        Raises:
            StopIteration: The call has ended.
            jax.errors.JaxRuntimeError: The call has failed.
        """
        try:
            while not self._ready:
                ended = self._call.done.is_set()  # before the look, so that nothing is missed
                self._take(0 if ended else _POLL_MS)
                if ended and not self._ready:
                    if self._call.error is not None:
                        raise self._call.error
                    raise StopIteration
        except KeyboardInterrupt:
            self.cancel()
            raise
        return self._ready.popleft()

    def batch(self, spacing: float = 0.0) -> list[Token]:
        """Waits for new tokens and returns all that are ready, at least one; none once the call has ended.

        Args:
            spacing: Seconds between two batches at least, while the call is running. Every look for tokens takes time
                from a processor that may be decoding.

        Raises:
            jax.errors.JaxRuntimeError: The call has failed.
        """
        try:
            self._call.done.wait(max(0.0, self._batched + spacing - time.monotonic()))
            first = next(self)
        except StopIteration:
            return []
        except KeyboardInterrupt:
            self.cancel()
            raise
        self._take(0)
        tokens = [first, *self._ready]
        self._ready.clear()
        self._batched = time.monotonic()
        return tokens

    def _take(self, milliseconds: int) -> None:
        self._ready += [Token(*pair) for pair in self._session.read(milliseconds)]

    def cancel(self) -> None:
        """Asks the call to stop after the token it is working on; returns at once."""
        self._session.cancel()

    def result(self) -> Result:
        """Waits for the end of the call and returns its outcome. Tokens not yet taken stay available.

        Raises:
            jax.errors.JaxRuntimeError: The call has failed.
        """
        try:
            while not self._call.done.wait(_POLL_MS / 1000):
                pass
        except KeyboardInterrupt:
            self.cancel()
            raise
        if self._call.error is not None:
            raise self._call.error
        return cast(Result, self._call.outcome)

    def close(self) -> None:
        """Stops the call and waits for it; tokens not yet taken stay available. Safe to call twice."""
        self.cancel()
        self._call.done.wait()
        self._take(0)
        self._session.close()

    def __enter__(self) -> TokenStream[Result]:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the stream."""
        self.close()

    def __del__(self) -> None:
        """Stops a call whose stream was forgotten, without waiting for it."""
        if hasattr(self, "_session"):
            self._session.cancel()
            self._session.close()
