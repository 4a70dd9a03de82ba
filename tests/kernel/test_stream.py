"""Tokens come out while the call runs, and everybody can stop it: the consumer, Ctrl-C, a deadline, the interpreter."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from kernel.common import Form, make_decoder, some_tokens
from tiny import tiny

from jax_mono import native, stream
from jax_mono.call import LostHandoff
from jax_mono.decode import Finish
from jax_mono.decoder import Decoder
from jax_mono.sampling import Sampling

PROMPT = some_tokens(12)
LONG = 2000
"""Tokens that take seconds, on a model big enough that one token takes about a millisecond."""

BUSY = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_layers": 4,
    "num_kv_heads": 1,
    "num_heads": 8,
    "max_position_embeddings": 2100,
    "sliding_windows": (16,) * 4,
}


@pytest.fixture(scope="module")
def busy() -> Decoder:
    decoder = make_decoder(tiny("llama", **BUSY))
    decoder.generate(PROMPT, max_new_tokens=LONG, deadline=0.01)  # compiles
    return decoder


@pytest.fixture(scope="module")
def quick() -> Decoder:
    return make_decoder(tiny("llama"), blocks=2)


@pytest.fixture(autouse=True)
def nothing_is_left_over() -> Iterator[None]:
    opened = native.library().mono_sessions_open()
    yield
    wait_until(lambda: not stream._running, "a call is still running")
    gc.collect()
    assert native.library().mono_sessions_open() == opened


def wait_until(condition: Callable[[], bool], complaint: str, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, complaint
        time.sleep(0.002)


def take(source: Iterator[stream.Token], count: int) -> list[int]:
    return [next(source).id for _ in range(count)]


def test_a_reader_is_woken_for_each_token(busy: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look for tokens may last a minute here, so only who has one can end it sooner."""
    monkeypatch.setattr(stream, "_POLL_MS", 60_000)
    start = time.monotonic()
    with busy.stream(PROMPT, max_new_tokens=200) as tokens:
        assert len(take(tokens, 200)) == 200
    assert time.monotonic() - start < 30


def test_tokens_arrive_while_the_call_runs(busy: Decoder) -> None:
    with busy.stream(PROMPT, max_new_tokens=LONG) as tokens:
        for _ in range(20):
            next(tokens)
            assert not tokens._call.done.is_set()
    assert len(tokens.result().tokens) < LONG / 2


def test_batches_leave_time_between_them(busy: Decoder) -> None:
    batches, moments = [], []
    with busy.stream(PROMPT, max_new_tokens=300, stop=[]) as running:
        while tokens := running.batch(0.05):
            batches.append(tokens)
            moments.append(time.monotonic())
        assert [token.id for batch in batches for token in batch] == running.result().tokens
    assert len(batches) < 150
    assert (np.diff(moments)[:-1] > 0.049).all()  # the last one does not wait when the call has ended


def test_the_stream_yields_what_the_call_returns(quick: Decoder) -> None:
    options = {"max_new_tokens": 16, "sampling": Sampling(temperature=1.0), "seed": 3}
    with quick.stream(PROMPT, **options) as tokens:
        streamed = list(tokens)
        output = tokens.result()
    assert [token.id for token in streamed] == output.tokens
    assert [token.logprob for token in streamed] == output.logprobs
    assert output.finish == Finish.LENGTH and output.seconds > 0
    assert quick.generate(PROMPT, **options).tokens == output.tokens
    with pytest.raises(StopIteration):
        next(tokens)


def test_result_first_tokens_later(quick: Decoder) -> None:
    with quick.stream(PROMPT, max_new_tokens=16) as tokens:
        output = tokens.result()
        assert [token.id for token in tokens] == output.tokens


def test_a_mesh_streams_too() -> None:
    decoder = make_decoder(tiny("laneformer"), devices=2, form="mesh")
    with decoder.stream(PROMPT, max_new_tokens=16) as tokens:
        streamed = [token.id for token in tokens]
    assert streamed == tokens.result().tokens and len(streamed) == 16


@pytest.mark.parametrize("form", ["threads", "mesh"])
def test_two_streams_at_once(form: Form, quick: Decoder) -> None:
    """Calls on threads of their own run together, those of a mesh one after the other."""
    decoder = quick if form == "threads" else make_decoder(tiny("laneformer"), devices=2, form="mesh")
    alone = [decoder.generate(PROMPT[:length], max_new_tokens=16).tokens for length in (12, 5)]
    with contextlib.ExitStack() as stack:
        streams = [decoder.stream(PROMPT[:length], max_new_tokens=16) for length in (12, 5)]
        together = list(zip(*[stack.enter_context(tokens) for tokens in streams], strict=True))
    assert [[pair[i].id for pair in together] for i in (0, 1)] == alone


def test_cancelling_keeps_the_tokens_so_far(busy: Decoder) -> None:
    tokens = busy.stream(PROMPT, max_new_tokens=LONG)
    streamed = take(tokens, 5)
    tokens.cancel()
    streamed += [token.id for token in tokens]
    output = tokens.result()
    assert output.finish == Finish.CANCELLED
    assert output.tokens == streamed and 5 <= len(streamed) < LONG / 2
    tokens.close()
    # The conversation is intact: it goes on as if nobody had interrupted it.
    assert int(output.cache.end) == len(PROMPT) + len(streamed)
    with busy.stream([], max_new_tokens=LONG - 500, cache=output.cache) as more:
        streamed += take(more, 5)
    with busy.stream(PROMPT, max_new_tokens=LONG) as uninterrupted:
        assert take(uninterrupted, len(streamed)) == streamed


def test_a_cancel_ends_the_call_within_one_token(busy: Decoder) -> None:
    """Whether to go on is asked before the LM head: the token at work ends, and with bad luck one more."""
    late = []
    for _ in range(8):
        with busy.stream(PROMPT, max_new_tokens=LONG) as tokens:
            take(tokens, 3)
            tokens._take(0)
            produced = 3 + len(tokens._ready)
            tokens.cancel()
            late.append(len(tokens.result().tokens) - produced)
    assert min(late) <= 1 and sorted(late)[4] <= 3  # a busy machine may keep this thread from cancelling at once


def test_leaving_the_block_ends_the_call(busy: Decoder) -> None:
    with busy.stream(PROMPT, max_new_tokens=LONG) as tokens:
        first = take(tokens, 2)
    assert tokens._call.done.is_set()
    tokens.close()  # a second time
    # What had been produced but not taken can still be taken.
    rest = [token.id for token in tokens]
    assert tokens.result().finish == Finish.CANCELLED
    assert tokens.result().tokens == first + rest
    tokens.cancel()  # means nothing any more


def test_an_exception_in_the_consumer_ends_the_call(busy: Decoder) -> None:
    with pytest.raises(ZeroDivisionError), busy.stream(PROMPT, max_new_tokens=LONG) as tokens:
        for token in tokens:
            token.id // 0
    assert tokens._call.done.is_set()


def test_a_deadline_ends_the_call_with_what_it_has(busy: Decoder) -> None:
    started = time.monotonic()
    output = busy.generate(PROMPT, max_new_tokens=LONG, deadline=0.4)
    assert 0.4 <= time.monotonic() - started < 3
    assert output.finish == Finish.DEADLINE and 1 <= len(output.tokens) < LONG
    longer = busy.generate(PROMPT, max_new_tokens=LONG, deadline=0.8)
    assert longer.tokens[: len(output.tokens)] == output.tokens[: len(longer.tokens)]


def test_a_deadline_that_is_not_reached_changes_nothing(quick: Decoder) -> None:
    output = quick.generate(PROMPT, max_new_tokens=16, deadline=60.0)
    assert output.finish == Finish.LENGTH and len(output.tokens) == 16


@contextlib.contextmanager
def ctrl_c(after: float) -> Iterator[None]:
    """Sends SIGINT to this process after a while, as a terminal would; it must arrive inside."""
    timer = threading.Timer(after, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.join()


def test_ctrl_c_while_waiting_for_a_token(busy: Decoder) -> None:
    tokens = busy.stream(PROMPT, max_new_tokens=LONG)
    streamed = []
    with ctrl_c(0.1):
        for token in tokens:
            streamed.append(token.id)
    output = tokens.result()
    assert output.finish == Finish.CANCELLED and len(output.tokens) < LONG
    streamed += [token.id for token in tokens]
    # A token may have been taken off the stream in the moment of the interrupt.
    assert len(output.tokens) - len(streamed) <= 1
    tokens.close()


def test_ctrl_c_while_waiting_for_the_result(busy: Decoder) -> None:
    started = time.monotonic()
    tokens = busy.stream(PROMPT, max_new_tokens=LONG)
    with ctrl_c(0.1):
        tokens.result()
    assert tokens.result().finish == Finish.CANCELLED
    tokens.close()
    with ctrl_c(0.1):
        busy.generate(PROMPT, max_new_tokens=LONG)
    assert time.monotonic() - started < 6


def test_a_forgotten_stream_ends_its_call(busy: Decoder) -> None:
    for token in busy.stream(PROMPT, max_new_tokens=LONG):
        assert token.id >= 0
        break
    gc.collect()
    wait_until(lambda: not stream._running, "a forgotten call runs on", seconds=2.0)
    # Even one that had not begun: its session is gone when it looks for it.
    busy.stream(PROMPT, max_new_tokens=LONG)
    gc.collect()
    wait_until(lambda: not stream._running, "a forgotten call runs on", seconds=2.0)
    assert busy.generate(PROMPT, max_new_tokens=LONG, deadline=0.05).finish == Finish.DEADLINE


def test_an_error_in_the_call_reaches_the_consumer(quick: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    quick.generate(PROMPT, max_new_tokens=16)
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "300")
    lost = LostHandoff(device=0, block=1, layer=1, channel="activations")
    with quick.stream(PROMPT, max_new_tokens=16, lost=lost) as tokens:
        for attempt in (lambda: next(tokens), lambda: next(tokens), tokens.result):
            with pytest.raises(jax.errors.JaxRuntimeError, match="waited longer than 300 ms for 'activations'"):
                attempt()
    assert len(quick.generate(PROMPT, max_new_tokens=16).tokens) == 16


def test_a_closed_session() -> None:
    session = native.Session(4)
    assert session.read(0) == []
    session.close()
    session.close()
    session.cancel()
    assert session.read(0) == []
    library = native.library()
    assert library.mono_session_read(session.id, 0, 4, 0, None, None) == -1
    library.mono_session_cancel(session.id)
    library.mono_session_close(session.id)


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.slow
def test_200_cancels_under_load_leave_nothing_behind(busy: Decoder) -> None:
    enough = threading.Event()

    def load() -> None:
        matrix = np.ones((300, 300), np.float32)
        while not enough.is_set():
            matrix @ matrix

    worker = threading.Thread(target=load)
    worker.start()
    rng = np.random.default_rng(0)

    def cancel_one() -> None:
        tokens = busy.stream(PROMPT, max_new_tokens=LONG)
        taken = take(tokens, int(rng.integers(0, 3)))
        tokens.cancel()
        taken += [token.id for token in tokens]
        output = tokens.result()
        assert output.finish == Finish.CANCELLED and output.tokens == taken
        tokens.close()

    try:
        for _ in range(20):
            cancel_one()
        wait_until(lambda: not stream._running, "a call is still running")
        sessions, before, running = native.library().mono_sessions_open(), memory(), threads()
        for _ in range(200):
            cancel_one()
        wait_until(lambda: threads() <= running, f"{threads()} threads, {running} before")
        assert native.library().mono_sessions_open() == sessions
        assert memory() - before < 32 << 20  # 200 KV caches would be 200
    finally:
        enough.set()
        worker.join()


SCRIPT = """
import sys, time
from kernel.common import Form, make_decoder, some_tokens
from kernel.test_stream import BUSY, LONG, PROMPT
from tiny import tiny

decoder = make_decoder(tiny("llama", **BUSY))
tokens = decoder.stream(PROMPT, max_new_tokens=LONG)
next(tokens)
print("running", flush=True)
"""


def start(script: str) -> subprocess.Popen[str]:
    """Runs a script in an interpreter of its own that finds the tests' helpers; waits until its call runs."""
    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + script],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n", process.communicate()
    return process


def test_the_interpreter_may_exit_while_a_call_runs() -> None:
    """Of its own accord, and by a Ctrl-C that nobody catches."""
    leaving, interrupted = start("del sys\n"), start("for token in tokens: pass\n")
    interrupted.send_signal(signal.SIGINT)
    for process, codes in ((leaving, (0,)), (interrupted, (-signal.SIGINT, 128 + signal.SIGINT))):
        _, errors = process.communicate(timeout=60)
        assert process.returncode in codes, errors
        assert ("KeyboardInterrupt" in errors) == (process is interrupted)
        assert "Fatal" not in errors and "terminate called" not in errors
