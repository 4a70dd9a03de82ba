"""On GPUs tokens come out while the call runs, and whoever waits for it can stop it at any moment."""

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
from gpu import rehearsal
from gpu.specs import Spec, decoder_of
from kernel.common import some_tokens
from tiny import tiny

from jax_mono import native, stream
from jax_mono.decode import Finish
from jax_mono.decoder import Decoder
from jax_mono.sampling import Sampling
from jax_mono.stream import Token

PROMPT = some_tokens(12)
LONG = 60_000
"""Tokens that take seconds."""
SOON = rehearsal.amount(1, 10)
"""Seconds within which a call ends that was stopped, or comes to its first tokens."""

BUSY = Spec(tiny("llama", max_position_embeddings=1 << 16, sliding_windows=(16,) * 3), 2, 2)
QUICK = Spec(tiny("llama", sliding_windows=(7, 0, 20)), 1, 4)
LANEFORMER = Spec(tiny("laneformer"), 4, 2)
MESH = Spec(tiny("laneformer"), 2, 2, form="mesh")


@pytest.fixture(scope="module")
def busy() -> Decoder:
    decoder = decoder_of(BUSY)
    decoder.generate(PROMPT, max_new_tokens=LONG, deadline=0.01)  # compiles
    return decoder


def take(source: Iterator[Token], count: int) -> list[int]:
    return [next(source).id for _ in range(count)]


def wait_until(condition: Callable[[], bool], complaint: str, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, complaint
        time.sleep(0.002)


def test_tokens_arrive_while_the_call_runs(busy: Decoder) -> None:
    with busy.stream(PROMPT, max_new_tokens=LONG) as tokens:
        for _ in range(20):
            next(tokens)
            assert not tokens._call.done.is_set()
    assert len(tokens.result().tokens) < LONG / 2


@pytest.mark.parametrize("spec", [QUICK, LANEFORMER, MESH], ids=str)
def test_the_stream_yields_what_the_call_returns(spec: Spec) -> None:
    decoder, options = decoder_of(spec), {"max_new_tokens": 16, "sampling": Sampling(temperature=1.0), "seed": 3}
    with decoder.stream(PROMPT, **options) as tokens:
        streamed = list(tokens)
        output = tokens.result()
    assert [token.id for token in streamed] == output.tokens and len(streamed) == 16
    assert [token.logprob for token in streamed] == output.logprobs
    assert output.finish == Finish.LENGTH
    assert decoder.generate(PROMPT, **options).tokens == output.tokens


@pytest.mark.parametrize("spec", [QUICK, LANEFORMER], ids=str)
def test_two_streams_at_once(spec: Spec) -> None:
    """Whether or not a GPU runs their calls one after the other."""
    decoder, lengths = decoder_of(spec), (12, 5)
    alone = [decoder.generate(PROMPT[:length], max_new_tokens=16).tokens for length in lengths]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(decoder.stream(PROMPT[:length], max_new_tokens=16)) for length in lengths]
        assert [[token.id for token in tokens] for tokens in streams] == alone


@pytest.mark.parametrize("spec", [QUICK, LANEFORMER], ids=str)
def test_stop_tokens_end_a_generation(spec: Spec) -> None:
    decoder = decoder_of(spec)
    tokens = decoder.generate(PROMPT, max_new_tokens=16, stop=[]).tokens
    unused = [token for token in range(spec.config.vocab_size) if token not in tokens][:2]
    for stop in (tokens[0], tokens[9], tokens[15]):
        output = decoder.generate(PROMPT, max_new_tokens=16, stop=[unused[0], stop, unused[1]])
        assert output.tokens == tokens[: tokens.index(stop) + 1]
        assert output.finish == Finish.STOP
    output = decoder.generate(PROMPT, max_new_tokens=16, stop=unused)
    assert (output.tokens, output.finish) == (tokens, Finish.LENGTH)


# Cancelling ---------------------------------------------------------------------------------------------------------


def test_cancelling_keeps_the_conversation(busy: Decoder) -> None:
    """It goes on as if nobody had interrupted it."""
    tokens = busy.stream(PROMPT, max_new_tokens=LONG)
    streamed = take(tokens, 5)
    tokens.cancel()
    streamed += [token.id for token in tokens]
    output = tokens.result()
    tokens.close()
    assert output.finish == Finish.CANCELLED
    assert output.tokens == streamed and 5 <= len(streamed) < LONG / 2
    assert int(output.cache.end) == len(PROMPT) + len(streamed)
    with busy.stream([], max_new_tokens=LONG // 2, cache=output.cache) as more:
        streamed += take(more, 5)
    with busy.stream(PROMPT, max_new_tokens=LONG) as uninterrupted:
        assert take(uninterrupted, len(streamed)) == streamed


def test_a_cancel_ends_the_call_at_once(busy: Decoder) -> None:
    """The token at work ends, and at most one more, but this thread and the bus have their say in when it is seen."""
    late, seconds = [], []
    for _ in range(rehearsal.amount(8, 3)):
        with busy.stream(PROMPT, max_new_tokens=LONG) as tokens:
            take(tokens, 3)
            tokens._take(0)
            produced = 3 + len(tokens._ready)
            started = time.monotonic()
            tokens.cancel()
            late.append(len(tokens.result().tokens) - produced)
            seconds.append(time.monotonic() - started)
    print(f"tokens after the cancel {sorted(late)}, seconds to the result at most {max(seconds):.3f}")
    assert sorted(late)[len(late) // 2] <= 200 and max(seconds) <= SOON


def test_leaving_the_block_ends_the_call(busy: Decoder) -> None:
    with busy.stream(PROMPT, max_new_tokens=LONG) as tokens:
        first = take(tokens, 2)
    assert tokens._call.done.is_set()
    rest = [token.id for token in tokens]  # produced but not taken
    assert tokens.result().finish == Finish.CANCELLED
    assert tokens.result().tokens == first + rest
    with pytest.raises(ZeroDivisionError), busy.stream(PROMPT, max_new_tokens=LONG) as tokens:
        for token in tokens:
            token.id // 0
    assert tokens._call.done.is_set()


def test_a_forgotten_stream_ends_its_call(busy: Decoder) -> None:
    for token in busy.stream(PROMPT, max_new_tokens=LONG):
        assert token.id >= 0
        break
    gc.collect()
    wait_until(lambda: not stream._running, "a forgotten call runs on", SOON)
    assert busy.generate(PROMPT, max_new_tokens=LONG, deadline=0.05).finish == Finish.DEADLINE


def test_ctrl_c_ends_the_call(busy: Decoder) -> None:
    tokens = busy.stream(PROMPT, max_new_tokens=LONG)
    timer = threading.Timer(0.1, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        tokens.result()
    timer.join()
    assert tokens.result().finish == Finish.CANCELLED
    tokens.close()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def device_memory() -> int:
    """Bytes of JAX's arrays on the device, as far as it says."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_in_use", 0)


def test_200_cancels_at_random_moments_leave_nothing_behind(busy: Decoder) -> None:
    rng = np.random.default_rng(0)

    def cancel_one() -> int:
        """Now before the program is launched, now after some tokens."""
        tokens = busy.stream(PROMPT, max_new_tokens=LONG)
        time.sleep(float(rng.choice([0, rng.uniform(0, 0.002), rng.uniform(0, 0.03)])))
        taken = take(tokens, int(rng.integers(0, 3)))
        tokens.cancel()
        taken += [token.id for token in tokens]
        output = tokens.result()
        assert output.finish == Finish.CANCELLED and output.tokens == taken
        tokens.close()
        return len(taken)

    times = rehearsal.amount(200, 6)
    for _ in range(times // 10):
        cancel_one()
    wait_until(lambda: not stream._running, "a call is still running")
    sessions, running, memory = native.library().mono_sessions_open(), threads(), device_memory()
    lengths = [cancel_one() for _ in range(times)]
    print(f"tokens: {min(lengths)} to {max(lengths)}, {lengths.count(0)} times none")
    wait_until(lambda: threads() <= running + 2, f"{threads()} threads, {running} before")
    gc.collect()
    assert native.library().mono_sessions_open() == sessions
    assert device_memory() - memory < 64 << 20  # the KV caches of all these calls would be gigabytes
    whole = busy.generate(PROMPT, max_new_tokens=64).tokens
    assert len(whole) == 64 == len(busy.generate(PROMPT, max_new_tokens=64).tokens)


# Deadlines ----------------------------------------------------------------------------------------------------------


def test_a_deadline_ends_the_call_with_what_it_has(busy: Decoder) -> None:
    limit = rehearsal.amount(1, 40) * 0.2
    started = time.monotonic()
    output = busy.generate(PROMPT, max_new_tokens=LONG, deadline=limit)
    assert limit <= time.monotonic() - started < limit + SOON
    assert output.finish == Finish.DEADLINE and 1 <= len(output.tokens) < LONG
    longer = busy.generate(PROMPT, max_new_tokens=LONG, deadline=2 * limit)
    both = min(len(output.tokens), len(longer.tokens))
    assert longer.tokens[:both] == output.tokens[:both]


def test_a_deadline_that_passed_before_the_first_token(busy: Decoder) -> None:
    output = busy.generate(PROMPT, max_new_tokens=LONG, deadline=1e-6)
    assert output.finish == Finish.DEADLINE and output.tokens == []
    more = busy.generate([], max_new_tokens=4, cache=output.cache)
    assert more.tokens == busy.generate(PROMPT, max_new_tokens=4).tokens


def test_a_deadline_that_is_not_reached_changes_nothing() -> None:
    output = decoder_of(QUICK).generate(PROMPT, max_new_tokens=16, deadline=60.0)
    assert output.finish == Finish.LENGTH and len(output.tokens) == 16


# The end of the process ---------------------------------------------------------------------------------------------

SCRIPT = """
from gpu.specs import decoder_of
from gpu.test_stream import BUSY, LONG, PROMPT

tokens = decoder_of(BUSY).stream(PROMPT, max_new_tokens=LONG)
next(tokens)
print("running", flush=True)
"""


@pytest.mark.skipif(rehearsal.KIND == "fibers", reason="its process has no stand-in")
def test_the_interpreter_may_exit_while_a_call_runs() -> None:
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert process.stdout == "running\n", process.stderr
    assert process.returncode == 0, process.stderr
    assert "Fatal" not in process.stderr and "terminate called" not in process.stderr
