"""Whatever goes wrong ends in one clear error, in time, and the next call works."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel.common import Form, call_kernel, make_decoder, make_mesh, make_request, params_of, some_tokens
from tiny import tiny

from jax_mono import native
from jax_mono.call import CallRequest, LostHandoff, Mode, resident_call
from jax_mono.config import ConfigError
from jax_mono.decode import Finish
from jax_mono.decoder import Decoder
from jax_mono.models.rope import rope_table
from jax_mono.models.source import ArraySource, CheckpointError
from jax_mono.packing import pack
from jax_mono.plan import make_plan
from jax_mono.prefill import AXIS

TEXT = some_tokens(4)
KernelError = jax.errors.JaxRuntimeError


@pytest.fixture(scope="module", params=["threads", "mesh"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """Two devices of two blocks that use every hand-off there is. Its good program waits as long as usual."""
    decoder = make_decoder(tiny("laneformer"), devices=2, blocks=2, form=request.param)
    decoder.score(TEXT, top_logprobs=2)
    return decoder


def assert_works(decoder: Decoder) -> None:
    assert np.isfinite(decoder.score(TEXT, top_logprobs=2).logprobs).all()


LOST = [
    LostHandoff(device=1, block=1, layer=2, channel="qkv rows"),
    LostHandoff(device=0, block=0, layer=1, channel="attention parts"),
    LostHandoff(device=0, block=1, layer=2, channel="attention inbox"),
    LostHandoff(device=1, block=0, layer=3, channel="residual after attention"),
    LostHandoff(device=0, block=1, layer=0, channel="activations"),
    LostHandoff(device=1, block=0, layer=1, channel="mlp inbox"),
    LostHandoff(device=1, block=1, layer=4, channel="residual after mlp"),
    LostHandoff(device=1, block=1, layer=0, channel="final inbox"),
    LostHandoff(device=0, block=0, layer=0, channel="final sum"),
    LostHandoff(device=1, block=1, layer=0, channel="summary"),
    LostHandoff(device=0, block=1, layer=0, channel="logits"),
    LostHandoff(device=1, block=0, layer=0, channel="choice"),
]


def test_every_hand_off_gets_lost_once() -> None:
    assert [lost.channel for lost in LOST] == list(native.CHANNELS)


@pytest.mark.parametrize("lost", LOST, ids=lambda lost: lost.channel.replace(" ", "-"))
def test_a_lost_hand_off(decoder: Decoder, lost: LostHandoff, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the very hand-off that got lost, also where its victims' waits began earlier."""
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "300")
    once_per_token = native.CHANNELS.index(lost.channel) >= native.CHANNELS.index("final inbox")
    where = "after the last layer" if once_per_token else f"in layer {lost.layer}"
    message = (
        f"device [01], block [01] waited longer than 300 ms for '{lost.channel}' {where}, epoch 1. A block stopped"
    )
    started = time.monotonic()
    with pytest.raises(KernelError, match=message):
        decoder.score(TEXT, top_logprobs=2, lost=lost)
    assert time.monotonic() - started < 10  # compiling included; without the setting it would be 20
    assert_works(decoder)


def test_the_bound_holds_and_the_conversation_before_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tiny("llama"), blocks=2)
    prompt, lost = some_tokens(12), LostHandoff(device=0, block=1, layer=1, channel="activations")
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", "300")
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(KernelError, match="for 'activations' in layer 1, epoch 1"):
            decoder.generate(prompt, max_new_tokens=16, lost=lost)
    assert 0.3 <= time.monotonic() - started < 2
    monkeypatch.undo()
    assert len(decoder.generate(prompt, max_new_tokens=16).tokens) == 16


def test_a_device_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device of a mesh never makes the call; the others give up together."""
    decoder = make_decoder(tiny("laneformer"), devices=4, form="mesh")
    monkeypatch.setenv("JAX_MONO_MEETING_LIMIT_MS", "400")
    run = jax.jit(_call_on_some(decoder), static_argnums=0)
    started = time.monotonic()
    with pytest.raises(KernelError, match="only 3 of 4 devices joined the call within 400 ms; run one generation at"):
        jax.block_until_ready(run(3))
    assert time.monotonic() - started < 8
    assert np.asarray(run(4))[:, 0].tolist() == [1] * 4
    assert np.isfinite(decoder.score(TEXT).logprobs).all()


def _call_on_some(decoder: Decoder) -> Callable[[int], jax.Array]:
    """A program in which only the first devices of a mesh call the kernel; gives each one's status [D, 2]."""
    from jax_mono.call import _local_call

    plan, tapes = decoder.plan, decoder.tapes
    ints, floats = make_request().words()
    nothing = np.full(1, -1, np.int32)
    rope = jnp.asarray(rope_table(plan.config, decoder.context))
    shared = (tapes.embed, rope, ints, floats, nothing, nothing, np.ones(1, np.int32))

    def program(some: int) -> jax.Array:
        def on_device(own: tuple[jax.Array, ...], shared: tuple[jax.Array, ...]) -> jax.Array:
            index = jax.lax.axis_index(AXIS).astype(jnp.int32)
            options = {"room": 1, "top_n": 0, "want_logits": False, "lost": None}
            call = partial(_local_call, plan=plan, dtype=tapes.dtype, mode=Mode.GENERATE, **options)
            absent = jnp.zeros((1, 2), jnp.int32)
            return jax.lax.cond(index < some, lambda: call(index[None], own, shared)[4], lambda: absent)

        specs = {"in_specs": (P(AXIS), P()), "out_specs": P(AXIS)}
        run = jax.shard_map(on_device, mesh=decoder.mesh, **specs, check_vma=False)
        return run((tapes.layers, tapes.head, tapes.constants), shared)

    return program


# What Decoder refuses before anything is launched -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [1, 128, 2]}, "token 128 at index 1 is outside the vocabulary of 128"),
        ({"prompt": [1, 2, -3]}, "token -3 at index 2 is outside the vocabulary of 128"),
        ({"prompt": []}, "the prompt is empty; it needs at least one token"),
        ({"prompt": "text"}, "this decoder has no tokenizer; pass token ids"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, must be at least 1"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5, must be at least 1"),
        ({"max_new_tokens": 125}, r"4 prompt tokens \+ 125 new tokens are beyond the context of 128"),
        ({"stop": [5, 200]}, "stop token 200 at index 1 is outside the vocabulary of 128"),
        ({"top_logprobs": -1}, "top_logprobs is -1, must be between 0 and the vocabulary's size"),
        ({"top_logprobs": 129}, "top_logprobs is 129"),
        ({"deadline": 0.0}, "deadline is 0.0 s, must be positive"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(decoder: Decoder, arguments: dict[str, Any], message: str) -> None:
    opened = native.library().mono_sessions_open()
    with pytest.raises(ValueError, match=message):
        decoder.generate(**{"prompt": TEXT, "max_new_tokens": 4, **arguments})
    assert native.library().mono_sessions_open() == opened
    assert_works(decoder)


def test_texts_that_cannot_be_scored(decoder: Decoder) -> None:
    for text, message in (([1], "1 tokens to score, must be between 2 and"), ([1, 400], "token 400 at index 1")):
        with pytest.raises(ValueError, match=message):
            decoder.score(text)
    assert_works(decoder)


def test_a_cache_is_consumed_by_the_call_that_continues_it() -> None:
    decoder = make_decoder(tiny("llama"), blocks=2)
    output = decoder.generate(some_tokens(12), max_new_tokens=5)
    after = decoder.generate([1], max_new_tokens=5, cache=output.cache)
    with pytest.raises(ValueError, match="this cache was consumed by an earlier call; use the one in that call's out"):
        decoder.generate([1], max_new_tokens=5, cache=output.cache)
    assert len(decoder.generate([1], max_new_tokens=5, cache=after.cache).tokens) == 5


def test_shapes_of_machines_that_do_not_fit() -> None:
    config = tiny("laneformer")
    source = ArraySource(config, params_of(config))
    with pytest.raises(ConfigError, match="8 lanes do not divide over 3 devices"):
        Decoder.from_source(source, mesh=make_mesh(3))
    with pytest.raises(ConfigError, match="2 devices do not divide over the 4 of the mesh"):
        Decoder.from_source(source, devices=2, mesh=make_mesh(4))
    with pytest.raises(ConfigError, match="9 blocks are too many for hidden_size 64"):
        Decoder.from_source(source, blocks=9)
    with pytest.raises(ConfigError, match="devices is 17, must be between 1 and 16"):
        Decoder.from_source(source, devices=17)
    with pytest.raises(CheckpointError, match="int8; ask for float32, bfloat16 or float16"):
        Decoder.from_source(source, dtype=jnp.int8)
    plan = make_plan(config, devices=4)
    tapes = pack(plan, source, dtype=jnp.float32)
    for mesh in (make_mesh(3), jax.make_mesh((4,), ("model",)), jax.make_mesh((2, 2), ("devices", "more"))):
        with pytest.raises(ConfigError, match="the plan needs one axis 'devices' of 4 devices"):
            Decoder(plan, tapes, mesh=mesh)


@pytest.mark.parametrize("value", ["soon", "-5", "0", "1.5", "4294967296"])
def test_settings_that_are_no_numbers(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tiny("llama", norm_eps=1e-3))
    monkeypatch.setenv("JAX_MONO_WAIT_LIMIT_MS", value)
    with pytest.raises(ValueError, match=f"JAX_MONO_WAIT_LIMIT_MS is '{value}', must be a positive whole number"):
        decoder.score(TEXT)
    monkeypatch.undo()
    assert_works(decoder)


# What the native side refuses when it runs --------------------------------------------------------------------------


def words(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.fixture(scope="module", params=["threads", "mesh"])
def kernel(request: pytest.FixtureRequest) -> Callable[..., jax.Array]:
    """The resident program of two devices on its own, all of its request traced; returns its tokens."""
    form: Form = request.param
    decoder = make_decoder(tiny("laneformer"), devices=2, blocks=2, form=form)
    rope = jnp.asarray(rope_table(decoder.plan.config, decoder.context))

    @jax.jit
    def run(request: CallRequest) -> jax.Array:
        call = partial(resident_call, decoder.plan, decoder.tapes, rope, None, mesh=decoder.mesh)
        return call(request, mode=Mode.GENERATE, room=4).tokens

    def tokens(**changes: object) -> list[int]:
        fields = {"history": words(1, 7, -1, -1), "forced": words(1, 7, 500, -1), "num_forced": 2, "budget": 4}
        return np.asarray(run(make_request(**(fields | changes)))).tolist()

    return tokens


NO_SAMPLING = "temperature >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0 and top_k >= 0 are needed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forced": words(-1, 7, 7, 7)}, "token -1 is outside the vocabulary of 128"),
        ({"forced": words(1, 128, 7, 7)}, "token 128 is outside the vocabulary of 128"),
        ({"num_forced": 3}, "token 500 is outside the vocabulary of 128"),
        ({"num_forced": 0}, "0 tokens to feed, must be between 1 and 4"),
        ({"num_forced": -1}, "-1 tokens to feed, must be between 1 and 4"),
        ({"num_forced": 5}, "5 tokens to feed, must be between 1 and 4"),
        ({"history": words(1, 2**31 - 1, -1, -1)}, "token 2147483647 is outside the vocabulary of 128"),
        ({"history": words(-1, 7, -1, -1)}, "token -1 is outside the vocabulary of 128"),
        ({"budget": 0}, "a budget of 0 tokens for room for 4"),
        ({"budget": 5}, "a budget of 5 tokens for room for 4"),
        ({"position": -1}, "position -1 + 5 tokens is beyond the KV cache's 128 positions"),
        ({"position": 124}, "position 124 + 5 tokens is beyond the KV cache's 128 positions"),
        ({"position": 2**31 - 1}, "position 2147483647 + 5 tokens is beyond the KV cache's 128 positions"),
        ({"session": 2**30}, "session 1073741824 is closed"),
        ({"temperature": -1.0}, NO_SAMPLING),
        ({"temperature": np.nan}, NO_SAMPLING),
        ({"top_p": 0.0}, NO_SAMPLING),
        ({"top_p": 1.5}, NO_SAMPLING),
        ({"top_p": np.nan}, NO_SAMPLING),
        ({"min_p": -0.1}, NO_SAMPLING),
        ({"min_p": 1.1}, NO_SAMPLING),
        ({"top_k": -1}, NO_SAMPLING),
        ({"repetition_penalty": 0.0}, NO_SAMPLING),
        ({"repetition_penalty": np.nan}, NO_SAMPLING),
    ],
    ids=str,
)
def test_traced_values_are_checked_when_the_call_runs(
    kernel: Callable[..., list[int]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(KernelError, match="jax_mono: " + re.escape(message)):
        kernel(**changes)
    assert len(kernel()) == 4


def test_what_comes_after_the_tokens_to_feed_does_not_matter(kernel: Callable[..., list[int]]) -> None:
    tokens = kernel()
    assert kernel(forced=words(1, 7, -(2**31), 3)) == tokens
    assert kernel(forced=words(1, 8, 500, -1)) != tokens
    assert len(kernel(position=123)) == 4  # fills the cache to its end


def test_padding_of_stops_stops_nothing(kernel: Callable[..., list[int]]) -> None:
    tokens = kernel()
    assert kernel(stops=np.array([-1, -7, 500, -1], np.int32)) == tokens


@pytest.fixture(scope="module")
def small() -> Decoder:
    return make_decoder(tiny("llama", num_layers=1), devices=2, blocks=2)


def test_every_one_of_the_stops_counts(small: Decoder) -> None:
    def run(stops: list[int]) -> tuple[list[int], list[int]]:
        request = make_request(budget=4, stops=np.array(stops, np.int32))
        result = call_kernel(small, request, mode=Mode.GENERATE, room=4)
        return np.asarray(result.tokens).tolist(), np.asarray(result.status).tolist()

    tokens, status = run([-1, -1, -1])
    assert status == [4, Finish.LENGTH]
    unused = next(token for token in range(128) if token not in tokens)
    for place in range(3):
        stops = [unused] * 3
        stops[place] = tokens[1]
        assert run(stops)[1] == [tokens.index(tokens[1]) + 1, Finish.STOP]


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        (
            "layers",
            lambda a: a[..., :-1],
            "layers has shape [2, 2, 1, {words}], the plan needs [2, 2, 1, {plan_words}]",
        ),
        ("layers", lambda a: a[:, :1], "layers has shape [2, 1, 1, "),
        ("layers", lambda a: a[0], "wrong rank of layers, rope or tokens"),
        ("head", lambda a: a[:1], "head has shape [1, 2, "),
        ("constants", lambda a: a[:, 1:], "constants has shape [2, 191], the plan needs [2, 192]"),
        ("embed", lambda a: a.T, "embed has shape [64, 128], the plan needs [128, 64]"),
        ("embed", lambda a: a.astype(jnp.float16), "tapes, embedding and KV cache must all be stored as"),
        ("head", lambda a: a.astype(jnp.bfloat16), "tapes, embedding and KV cache must all be stored as"),
        ("layers", lambda a: a.view(jnp.uint32), "tapes, embedding and KV cache must all be stored as"),
    ],
    ids=str,
)
def test_tapes_of_another_shape(small: Decoder, field: str, change: Callable[..., jax.Array], message: str) -> None:
    tapes = dataclasses.replace(small.tapes, **{field: change(getattr(small.tapes, field))})
    words = small.plan.layer_words
    message = message.replace("{words}", str(words - 1)).replace("{plan_words}", str(words))
    with pytest.raises(KernelError, match="jax_mono: " + re.escape(message)):
        call_kernel(small, make_request(), tapes, mode=Mode.GENERATE, room=1)
    assert np.asarray(call_kernel(small, make_request(), mode=Mode.GENERATE, room=1).status).tolist() == [1, 0]


def test_other_operands_of_another_shape(small: Decoder) -> None:
    cache = small.new_cache()
    rope = jnp.asarray(rope_table(small.plan.config, cache.capacity))

    def run(rope: jax.Array = rope, k: jax.Array = cache.k, v: jax.Array = cache.v, **request: object) -> None:
        call = partial(resident_call, small.plan, small.tapes, mode=Mode.GENERATE, room=1)
        jax.block_until_ready(call(rope, (k, v), make_request(**request)))

    for wrong, message in (
        ({"rope": rope[:, :3]}, "rope has shape [128, 3, 2], the plan needs [128, 8, 2]"),
        ({"rope": rope[:100]}, "k_cache has shape [2, 1, 1, 128, 16], the plan needs [2, 1, 1, 100, 16]"),
        ({"k": cache.k[..., :8]}, "k_cache has shape [2, 1, 1, 128, 8]"),
        ({"v": cache.v[:, :, :, :64]}, "v_cache has shape [2, 1, 1, 64, 16]"),
        ({"v": cache.v.view(jnp.uint32)}, "tapes, embedding and KV cache must all be stored as"),
    ):
        with pytest.raises(KernelError, match="jax_mono: " + re.escape(message)):
            run(**wrong)
    run()
