"""``generate`` is an ordinary traced function; ``Decoder`` checks what goes into it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from kernel.common import Form, make_decoder, params_of, some_tokens
from tiny import tiny

from jax_mono import decoder as decoder_module
from jax_mono.config import Lanes
from jax_mono.decode import SHORT_PROMPT, Cache, Finish, Generation, generate
from jax_mono.decoder import Decoder
from jax_mono.models.source import ArraySource
from jax_mono.native import TARGET
from jax_mono.sampling import Sampling
from jax_mono.tape import Tapes

PROMPT = some_tokens(12)
ROOM = 16


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder(tiny("llama"), blocks=2)


@pytest.fixture(scope="module")
def meshed() -> Decoder:
    return make_decoder(tiny("laneformer"), devices=2, form="mesh")


def padded(tokens: list[int], length: int = 16) -> np.ndarray:
    return np.array(tokens + [0] * (length - len(tokens)), np.int32)


class Traced:
    """A jitted ``generate`` of one decoder that counts how often it is traced."""

    def __init__(self, decoder: Decoder, **jit_options: Any) -> None:
        self.decoder, self.traces = decoder, 0
        self.run: Callable[..., Generation] = jax.jit(self._generate, **jit_options)

    def _generate(self, tapes: Tapes, cache: Cache, prompt: jax.Array, key: jax.Array, **options: Any) -> Generation:
        self.traces += 1
        return generate(self.decoder.plan, tapes, cache, prompt, key, room=ROOM, mesh=self.decoder.mesh, **options)

    def __call__(self, cache: Cache, prompt: np.ndarray, **options: Any) -> Generation:
        return self.run(self.decoder.tapes, cache, prompt, jax.random.key(0), **options)


@pytest.fixture(scope="module")
def donating(decoder: Decoder) -> Traced:
    return Traced(decoder, donate_argnums=1)


def test_one_trace_serves_a_bucket(donating: Traced, decoder: Decoder) -> None:
    def run(tokens: list[int], budget: int, options: Sampling, bucket: int = 16) -> list[int]:
        prompt = padded(tokens, bucket)
        out = donating(decoder.new_cache(), prompt, length=len(tokens), budget=budget, sampling=options)
        assert int(out.count) == budget and int(out.finish) == Finish.LENGTH
        assert (np.asarray(out.tokens[budget:]) == -1).all() and not np.asarray(out.logprobs[budget:]).any()
        return np.asarray(out.tokens[:budget]).tolist()

    before = donating.traces
    for length, budget, options in (
        (12, 16, Sampling()),
        (1, 1, Sampling(temperature=1.0)),
        (16, 7, Sampling(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2.0)),
        (12, 9, Sampling()),
    ):
        run(some_tokens(length), budget, options)
    assert donating.traces == before + 1
    assert run(PROMPT, 16, Sampling(), bucket=32) == run(PROMPT, 16, Sampling())
    assert donating.traces == before + 2


def test_a_decoder_compiles_once_for_a_bucket(decoder: Decoder) -> None:
    decoder.generate(PROMPT, max_new_tokens=16)
    compiled = decoder_module._generate._cache_size()
    for length, budget in ((1, 1), (16, 16), (7, 3)):
        for options in (Sampling(temperature=1), Sampling(temperature=0.7, top_k=5), Sampling(top_p=1)):
            decoder.generate(some_tokens(length), max_new_tokens=budget, sampling=options, stop=[1, 2, 3])
    continued = decoder.generate(PROMPT, max_new_tokens=5)
    decoder.generate([], max_new_tokens=5, cache=continued.cache)
    assert decoder_module._generate._cache_size() == compiled


@pytest.mark.parametrize("form", ["threads", "mesh"])
def test_a_donated_cache_is_updated_in_place(form: Form, decoder: Decoder, meshed: Decoder, donating: Traced) -> None:
    own = decoder if form == "threads" else meshed
    run = donating if form == "threads" else Traced(meshed, donate_argnums=1)

    def addresses(cache: Cache) -> list[int]:
        arrays = [shard.data for array in (cache.k, cache.v) for shard in array.addressable_shards]
        return [array.unsafe_buffer_pointer() for array in arrays]

    cache = own.new_cache()
    before, replaced = addresses(cache), cache
    out = run(cache, padded(PROMPT), length=len(PROMPT), budget=16, sampling=Sampling())
    assert addresses(out.cache) == before
    assert replaced.k.is_deleted() and replaced.v.is_deleted()
    again = run(out.cache, padded([5]), length=1, budget=4, sampling=Sampling())
    assert addresses(again.cache) == before


def test_a_cache_that_is_kept_stays_as_it_was(decoder: Decoder) -> None:
    keeping = Traced(decoder)
    cache = decoder.new_cache()
    options = {"length": len(PROMPT), "budget": 16, "sampling": Sampling()}
    first = keeping(cache, padded(PROMPT), **options)
    assert not np.asarray(cache.k).any() and int(cache.end) == 0
    second = keeping(cache, padded(PROMPT), **options)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    # One conversation may then go on in two ways.
    branches = [keeping(first.cache, padded([token]), **{**options, "length": 1}) for token in (3, 4, 3)]
    np.testing.assert_array_equal(branches[0].tokens, branches[2].tokens)
    assert (branches[0].tokens != branches[1].tokens).any()


def test_inside_a_bigger_program(decoder: Decoder) -> None:
    """Two turns of a conversation and some arithmetic as one compiled program."""

    @jax.jit
    def program(tapes: Tapes, cache: Cache, prompt: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = generate(decoder.plan, tapes, cache, prompt[:12] % 128, key, room=8)
        question = jnp.flip(first.tokens)[:4]
        second = generate(decoder.plan, tapes, first.cache, question, key, room=8)
        return jnp.concatenate([first.tokens, question, second.tokens]), jnp.sum(second.logprobs)

    tokens, total = program(decoder.tapes, decoder.new_cache(), np.array(PROMPT) + 128, jax.random.key(0))
    first = decoder.generate(PROMPT, max_new_tokens=8)
    question = first.tokens[::-1][:4]
    second = decoder.generate(question, max_new_tokens=8, cache=first.cache)
    assert tokens.tolist() == first.tokens + question + second.tokens
    np.testing.assert_allclose(total, sum(second.logprobs), rtol=1e-5)


def test_inside_a_loop_over_a_mesh(meshed: Decoder) -> None:
    """The devices of every round meet each other, and nobody from another round."""
    prompts = np.array([some_tokens(4, seed=seed) for seed in range(5)], np.int32)

    @jax.jit
    def program(tapes: Tapes, cache: Cache, prompts: jax.Array, key: jax.Array) -> jax.Array:
        def turn(cache: Cache, prompt: jax.Array) -> tuple[Cache, jax.Array]:
            out = generate(meshed.plan, tapes, cache, prompt, key, room=6, mesh=meshed.mesh)
            return out.cache, out.tokens

        return jax.lax.scan(turn, cache, prompts)[1]

    tokens = program(meshed.tapes, meshed.new_cache(), prompts, jax.random.key(0))
    cache = None
    for prompt, answer in zip(prompts.tolist(), np.asarray(tokens).tolist(), strict=True):
        output = meshed.generate(prompt, max_new_tokens=6, cache=cache)
        cache = output.cache
        assert output.tokens == answer


def test_exported_and_called_again(decoder: Decoder) -> None:
    """Plain arrays in and out, as an exported program wants them."""

    def program(layers: jax.Array, head: jax.Array, constants: jax.Array, embed: jax.Array, prompt: jax.Array) -> Any:
        tapes = Tapes(layers, head, constants, embed, decoder.tapes.dtype)
        out = generate(decoder.plan, tapes, decoder.new_cache(), prompt, jnp.zeros(2, jnp.uint32), room=ROOM)
        return out.tokens, out.logprobs

    arguments = (*jax.tree.leaves(decoder.tapes), np.array(PROMPT, np.int32))
    with pytest.raises(ValueError, match=TARGET):  # JAX promises nothing for custom calls that it does not know
        export.export(jax.jit(program))(*arguments)
    allowed = [export.DisabledSafetyCheck.custom_call(TARGET)]
    exported = export.export(jax.jit(program), disabled_checks=allowed)(*arguments)
    if importlib.util.find_spec("flatbuffers") is not None:
        exported = export.deserialize(exported.serialize())
    tokens, logprobs = exported.call(*arguments)
    expected = decoder.generate(PROMPT, max_new_tokens=ROOM)
    assert tokens.tolist() == expected.tokens
    np.testing.assert_allclose(logprobs, expected.logprobs, atol=1e-5)


def test_vmap_is_refused(decoder: Decoder) -> None:
    def run(prompt: jax.Array) -> jax.Array:
        cache = decoder.new_cache()
        return generate(decoder.plan, decoder.tapes, cache, prompt, jax.random.key(0), room=4).tokens

    with pytest.raises(NotImplementedError):
        jax.make_jaxpr(jax.vmap(run))(jnp.zeros((3, 4), jnp.int32))


def test_keys_of_any_kind_seed_with_their_last_64_bits(donating: Traced, decoder: Decoder) -> None:
    """Typed and raw keys are the same keys; equal shapes need no new trace."""

    def tokens(key: jax.Array) -> list[int]:
        sampling = Sampling(temperature=1.0)
        out = donating.run(
            decoder.tapes, decoder.new_cache(), padded(PROMPT), key, length=12, budget=16, sampling=sampling
        )
        return np.asarray(out.tokens).tolist()

    key = jax.random.key(5)
    assert tokens(key) == tokens(jax.random.key_data(key)) == tokens(jnp.array([0, 5], jnp.uint32))
    assert tokens(key) == decoder.generate(PROMPT, max_new_tokens=16, sampling=Sampling(temperature=1.0), seed=5).tokens
    assert tokens(jax.random.fold_in(key, 1)) != tokens(key)


# Stops, budgets and limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["decoder", "meshed"])
def test_a_stop_token_ends_the_generation(which: str, request: pytest.FixtureRequest) -> None:
    decoder: Decoder = request.getfixturevalue(which)
    free = decoder.generate(PROMPT, max_new_tokens=16)
    assert free.finish == Finish.LENGTH and len(free.tokens) == 16
    at = next(i for i in range(3, 16) if free.tokens[i] not in free.tokens[:i])
    unused = [token for token in range(128) if token not in free.tokens][:4]
    stopped = decoder.generate(PROMPT, max_new_tokens=16, stop=[*unused, free.tokens[at]])
    assert stopped.finish == Finish.STOP
    assert stopped.tokens == free.tokens[: at + 1] and stopped.logprobs == free.logprobs[: at + 1]
    # The stop token is part of the conversation.
    assert (int(stopped.cache.end), int(stopped.cache.fed)) == (12 + at + 1, 12 + at)
    goes_on = decoder.generate([], max_new_tokens=15 - at, cache=stopped.cache, stop=[])
    assert stopped.tokens + goes_on.tokens == free.tokens
    # A stop token as the very last one still counts as a stop.
    assert decoder.generate(PROMPT, max_new_tokens=at + 1, stop=[free.tokens[at]]).finish == Finish.STOP


def test_the_models_own_stop_tokens_are_the_default(decoder: Decoder) -> None:
    free = decoder.generate(PROMPT, max_new_tokens=16)
    config = tiny("llama", eos_token_ids=(free.tokens[2], 127))
    ending = make_decoder(config, blocks=2)
    assert ending.generate(PROMPT, max_new_tokens=16).tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    assert ending.generate(PROMPT, max_new_tokens=16, stop=[]).tokens == free.tokens


def test_one_token(decoder: Decoder) -> None:
    one = decoder.generate(PROMPT, max_new_tokens=1)
    assert one.tokens == decoder.generate(PROMPT, max_new_tokens=16).tokens[:1]
    assert one.finish == Finish.LENGTH and len(one.logprobs) == 1 and one.top == [] and one.seconds > 0


def test_a_conversation_may_fill_the_context() -> None:
    short = make_decoder(tiny("llama"), blocks=2, context=24)
    output = short.generate(PROMPT)
    assert len(output.tokens) == 12 and int(output.cache.end) == 24
    with pytest.raises(ValueError, match=r"24 tokens so far .* beyond the context of 24; .*load with a longer context"):
        short.generate([], cache=output.cache)
    with pytest.raises(ValueError, match=r"12 prompt tokens \+ 13 new tokens are beyond the context of 24"):
        short.generate(PROMPT, max_new_tokens=13)
    with pytest.raises(ValueError, match=r"24 prompt tokens \+ 1 new tokens are beyond the context"):
        short.generate(PROMPT * 2)
    assert short.generate(PROMPT).tokens == output.tokens
    with pytest.raises(ValueError, match="25 tokens to score, must be between 2 and the context of 24"):
        short.score(some_tokens(25))


def test_a_program_that_asks_for_too_much_is_refused_when_it_runs(donating: Traced, decoder: Decoder) -> None:
    def run(budget: int, cache: Cache | None = None) -> Generation:
        cache = decoder.new_cache() if cache is None else cache
        out = donating(cache, padded(PROMPT), length=12, budget=budget, sampling=Sampling())
        return jax.block_until_ready(out)

    for budget in (0, -1, ROOM + 1):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"a budget of {budget} tokens for room for {ROOM}"):
            run(budget)
    out = run(16)
    for _ in range(3):
        out = run(16, out.cache)
    assert int(out.cache.end) == 112
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"position 111 \+ 28 tokens is beyond the KV cache's 128"):
        run(16, out.cache)
    assert int(run(16).count) == 16


def test_a_program_without_a_token_to_start_from_is_refused_when_it_runs(donating: Traced, decoder: Decoder) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"0 tokens to feed, must be between 1 and {SHORT_PROMPT}"):
        jax.block_until_ready(donating(decoder.new_cache(), padded([]), length=0, budget=4, sampling=Sampling()))


@pytest.mark.parametrize(
    ("where", "bad"),
    [
        (0, 128),
        (5, 2**31 - 1),
        (11, 128),
        (11, -3),
        (0, -3),
        (5, -1),
    ],
)
def test_a_prompt_with_an_impossible_token_is_refused(donating: Traced, decoder: Decoder, bad: int, where: int) -> None:
    prompt = padded(PROMPT)
    prompt[where] = bad
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"token {bad} is outside the vocabulary of 128"):
        jax.block_until_ready(donating(decoder.new_cache(), prompt, length=12, budget=4, sampling=Sampling()))
    out = donating(decoder.new_cache(), padded(PROMPT), length=12, budget=4, sampling=Sampling())
    assert int(out.count) == 4


def test_an_impossible_token_in_a_long_prompt(donating: Traced, decoder: Decoder) -> None:
    """The Flax layers take the prompt in before anything is checked."""
    prompt = some_tokens(40)
    prompt[3] = -1
    with pytest.raises(jax.errors.JaxRuntimeError, match="token -1 is outside the vocabulary of 128"):
        out = donating(decoder.new_cache(), padded(prompt, 64), length=40, budget=4, sampling=Sampling())
        jax.block_until_ready(out)


def test_tokens_after_the_length_are_ignored(donating: Traced, decoder: Decoder) -> None:
    prompt = padded(PROMPT)
    prompt[12:] = [-9, 500, 2**31 - 1, -(2**31)]
    options = {"length": 12, "budget": 16, "sampling": Sampling(repetition_penalty=1.3)}
    tokens = [donating(decoder.new_cache(), text, **options).tokens for text in (padded(PROMPT), prompt)]
    np.testing.assert_array_equal(*tokens)


def test_a_mesh_of_either_axis_type(meshed: Decoder) -> None:
    mesh = jax.make_mesh((2,), ("devices",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    config = meshed.plan.config
    decoder = Decoder.from_source(ArraySource(config, params_of(config)), dtype=jnp.float32, mesh=mesh, blocks=1)
    assert decoder.generate(PROMPT, max_new_tokens=8).tokens == meshed.generate(PROMPT, max_new_tokens=8).tokens
    np.testing.assert_array_equal(decoder.score(PROMPT).logprobs, meshed.score(PROMPT).logprobs)


def test_blocks_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores of this process, shared among the devices; never more than a small model has work for."""
    config = tiny("llama", num_layers=1)
    source = ArraySource(config, params_of(config))
    for cores, devices, blocks in ((1, 1, 1), (6, 1, 6), (6, 2, 3), (3, 8, 1), (96, 1, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert Decoder.from_source(source, devices=devices).plan.num_blocks == blocks
    monkeypatch.setenv("JAX_MONO_BLOCKS", "5")
    assert Decoder.from_source(source, devices=2).plan.num_blocks == 5


def test_devices_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that need not wait for each other share lanes and cores evenly."""
    delayed, at_once, dense = tiny("laneformer"), tiny("laneformer", lanes=Lanes(count=8, delay=0)), tiny("llama")
    for config, cores, shape in (
        (delayed, 2, (2, 1)),
        (delayed, 3, (1, 3)),
        (delayed, 6, (2, 3)),
        (at_once, 2, (1, 2)),
        (dense, 2, (1, 2)),
    ):
        source = ArraySource(config, params_of(config))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        plan = Decoder.from_source(source).plan
        assert (plan.num_devices, plan.num_blocks) == shape
        plan = Decoder.from_source(source, blocks=2).plan
        assert (plan.num_devices, plan.num_blocks) == (1, 2)
    monkeypatch.setenv("JAX_MONO_BLOCKS", "2")
    plan = Decoder.from_source(ArraySource(delayed, params_of(delayed))).plan
    assert (plan.num_devices, plan.num_blocks) == (1, 2)


@pytest.mark.parametrize("context", [0, -1, 129])
def test_a_context_that_the_model_does_not_have(decoder: Decoder, context: int) -> None:
    with pytest.raises(ValueError, match=f"context is {context}, must be between 1 and the model's 128"):
        Decoder(decoder.plan, decoder.tapes, context=context)
