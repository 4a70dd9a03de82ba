"""On GPUs whatever goes wrong ends in one clear error, in time, and the next call works."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import rehearsal
from gpu.rehearsal import KernelError
from gpu.specs import WIDE, Spec, decoder_of, laneformer, make
from kernel.common import call_kernel, make_decoder, make_request, params_of, some_tokens
from kernel.test_faults import LOST, _call_on_some
from tiny import tiny

from jax_mono import gpus, native
from jax_mono.call import LostHandoff, Mode
from jax_mono.config import ConfigError
from jax_mono.decode import Finish
from jax_mono.decoder import Decoder
from jax_mono.models.source import ArraySource
from jax_mono.packing import home
from jax_mono.sampling import Sampling

TEXT = some_tokens(4)
LIMIT_MS = rehearsal.amount(300, 2000)
"""Of a wait whose word never comes."""
SLACK = rehearsal.amount(2, 30)
"""Seconds that a call may take beyond that."""

THREADS = Spec(tiny("laneformer"), 2, 2)
MESH = Spec(tiny("laneformer"), 2, 2, form="mesh")
LLAMA = Spec(tiny("llama"), 1, 4)
TOO_MANY = Spec(laneformer(overrides={"hidden_size": WIDE["hidden_size"], "num_layers": 1}), 8, 132)
"""More blocks than there is room for on any GPU."""


@pytest.fixture(scope="module", params=[THREADS, MESH], ids=["threads", "mesh"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Two devices of two blocks that use every hand-off there is."""
    decoder = decoder_of(request.param)
    decoder.score(TEXT, top_logprobs=2)
    return decoder


def assert_works(decoder: Decoder) -> None:
    assert np.isfinite(decoder.score(TEXT, top_logprobs=2).logprobs).all()


# Hand-offs that get lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", LOST, ids=lambda lost: lost.channel.replace(" ", "-"))
def test_a_lost_hand_off(decoder: Decoder, lost: LostHandoff, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the very hand-off that got lost."""
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", str(LIMIT_MS))
    once_per_token = native.CHANNELS.index(lost.channel) >= native.CHANNELS.index("final inbox")
    where = "after the last layer" if once_per_token else f"in layer {lost.layer}"
    message = (
        f"device [01], block [01] waited longer than {LIMIT_MS} ms for '{lost.channel}' {where}, epoch 1. A block stopp"
    )
    started = time.monotonic()
    with pytest.raises(KernelError, match=message):
        decoder.score(TEXT, top_logprobs=2, lost=lost)
    assert time.monotonic() - started < 10 + SLACK  # XLA's compiling included
    monkeypatch.undo()
    assert_works(decoder)


def test_the_bound_holds_while_tokens_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, lost = decoder_of(LLAMA), LostHandoff(device=0, block=1, layer=1, channel="activations")
    expected = decoder.generate(TEXT, max_new_tokens=16).tokens
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", str(LIMIT_MS))
    for _ in range(2):  # the first one compiles
        started = time.monotonic()
        with decoder.stream(TEXT, max_new_tokens=16, lost=lost) as tokens:
            for attempt in (lambda: next(tokens), tokens.result):
                with pytest.raises(KernelError, match="for 'activations' in layer 1, epoch 1"):
                    attempt()
    assert LIMIT_MS / 1000 <= time.monotonic() - started < LIMIT_MS / 1000 + SLACK
    monkeypatch.undo()
    assert decoder.generate(TEXT, max_new_tokens=16).tokens == expected


def test_a_gpu_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device of a mesh never makes the call; the other gives up, and both can be used again."""
    decoder = decoder_of(MESH)
    monkeypatch.setenv("JAX_MONO_MEETING_LIMIT_MS", "2000")
    run = jax.jit(_call_on_some(decoder), static_argnums=0)
    started = time.monotonic()
    with pytest.raises(KernelError, match="only 1 of 2 devices joined the call within 2000 ms; run one generation at"):
        jax.block_until_ready(run(1))
    assert time.monotonic() - started < 20
    monkeypatch.undo()
    assert_works(decoder)


# What does not fit --------------------------------------------------------------------------------------------------


def test_one_token(decoder: Decoder) -> None:
    """The smallest budget."""
    whole = decoder.generate(TEXT, max_new_tokens=8)
    for _ in range(3):
        output = decoder.generate(TEXT, max_new_tokens=1)
        assert (output.tokens, output.logprobs) == (whole.tokens[:1], whole.logprobs[:1])
        assert output.finish == Finish.LENGTH and int(output.cache.end) == len(TEXT) + 1
    full = decoder.generate(some_tokens(decoder.context - 1), max_new_tokens=1)
    assert len(full.tokens) == 1 and int(full.cache.end) == decoder.context


REFUSED = [
    ({"forced": np.array([128], np.int32)}, "token 128 is outside the vocabulary of 128"),
    ({"num_forced": 0}, "0 tokens to feed, must be between 1 and 1"),
    ({"history": np.array([-1, 7], np.int32)}, "token -1 is outside the vocabulary of 128"),
    ({"budget": 0}, "a budget of 0 tokens for room for 4"),
    ({"budget": 5}, "a budget of 5 tokens for room for 4"),
    ({"position": 125, "budget": 4}, "position 125 + 4 tokens is beyond the KV cache's 128 positions"),
    ({"session": 2**30}, "session 1073741824 is closed"),
    ({"temperature": -1.0}, "temperature >= 0, 0 < top_p <= 1"),
    ({"top_p": np.nan}, "temperature >= 0, 0 < top_p <= 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_operands_are_checked_before_the_launch(changes: dict[str, Any], message: str) -> None:
    decoder = decoder_of(THREADS)
    with pytest.raises(KernelError, match="jax_mono: " + re.escape(message)):
        call_kernel(decoder, make_request(**changes), mode=Mode.GENERATE, room=4)
    status = call_kernel(decoder, make_request(budget=4), mode=Mode.GENERATE, room=4).status
    assert np.asarray(status).tolist() == [4, Finish.LENGTH]


def test_tapes_of_another_plan() -> None:
    decoder, other = decoder_of(THREADS), decoder_of(LLAMA)
    with pytest.raises(KernelError, match="jax_mono: layers has shape"):
        call_kernel(decoder, make_request(), tapes=other.tapes, mode=Mode.GENERATE, room=1)
    assert_works(decoder)


def test_a_cache_is_consumed_by_the_call_that_continues_it() -> None:
    decoder = decoder_of(LLAMA)
    output = decoder.generate(TEXT, max_new_tokens=5)
    after = decoder.generate([1], max_new_tokens=5, cache=output.cache)
    if rehearsal.KIND != "fibers":  # whose call copies
        with pytest.raises(ValueError, match="this cache was consumed by an earlier call; use the one in that call's"):
            decoder.generate([1], max_new_tokens=5, cache=output.cache)
    assert len(decoder.generate([1], max_new_tokens=5, cache=after.cache).tokens) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    """A weight that only token 7 meets: the text is fine until it comes up."""
    good = params_of(LLAMA.config, jnp.bfloat16)
    params = good | {"embed": good["embed"].at[7, 3].set(bad)}
    decoder = make_decoder(
        LLAMA.config, blocks=LLAMA.blocks, dtype=jnp.bfloat16, params=params, target=rehearsal.target()
    )
    with pytest.raises(KernelError, match="logits of token 2 are not finite; check the checkpoint, or use a wider"):
        decoder.score([1, 2, 7, 4])
    assert np.isfinite(decoder.score([1, 2, 3, 4]).logprobs).all()
    with pytest.raises(KernelError, match="logits of token 0 are not finite"):
        decoder.generate([1, 2, 7], max_new_tokens=4)
    assert len(decoder.generate([1, 2, 3], max_new_tokens=4, sampling=Sampling(temperature=1.0), seed=1).tokens) == 4


# Programs and launches ----------------------------------------------------------------------------------------------

needs_program = pytest.mark.skipif(rehearsal.KIND == "cpu", reason="programs of the CPU are not compiled at run time")


@needs_program
def test_more_blocks_than_fit() -> None:
    decoder = make(TOO_MANY)
    with pytest.raises(
        KernelError, match=r"the plan runs 1056 blocks on one GPU, and .* holds \d+ of them at once; pl"
    ):
        decoder.score(TEXT)
    assert_works(decoder_of(THREADS))


@needs_program
def test_a_program_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler's own words are shown, and the same plan works as soon as the sources do."""
    named = gpus.gpu_of(home()).architecture if not rehearsal.KIND else "fibers"
    for name, text in sources().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    entry = tmp_path / "kernel" / "entry" / f"{named}.h"
    good = entry.read_text()
    entry.write_text(good + "\n#error broken on purpose\n")
    monkeypatch.setenv("JAX_MONO_KERNELS", str(tmp_path))
    decoder = make(Spec(tiny("llama", num_layers=1, norm_eps=3e-5), 1, 2))
    for _ in range(2):
        with pytest.raises(KernelError, match=rf"could not compile mono_{named} with(.|\n)*broken on purpose"):
            decoder.score(TEXT)
    entry.write_text(good)
    assert_works(decoder)
    monkeypatch.undo()
    assert_works(decoder_of(THREADS))


def sources() -> dict[str, str]:
    """The sources that programs are compiled from here, by their names."""
    if not rehearsal.KIND:
        return native.kernel_sources()
    kernels = Path(os.environ["JAX_MONO_KERNELS"])
    return {path.relative_to(kernels).as_posix(): path.read_text() for path in kernels.rglob("*.h")}


@pytest.mark.skipif(bool(rehearsal.KIND), reason="needs JAX to run on a GPU")
def test_weights_that_gpus_do_not_take() -> None:
    config = tiny("llama")
    source = ArraySource(config, params_of(config))
    with pytest.raises(ConfigError, match="GPUs take bfloat16 and float16 weights, not float32; use one of these"):
        Decoder.from_source(source, dtype=jnp.float32)
    assert Decoder.from_source(source, context=16).plan.num_blocks > 1
