"""A prompt leaves the same whether the Flax layers take it in at once or the resident program token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike
from kernel.common import Form, call_kernel, make_decoder, make_request, some_tokens
from tiny import tiny

from jax_mono import decode, fused_attention, native
from jax_mono import decoder as decoder_module
from jax_mono.call import CallResult, Mode
from jax_mono.config import Lanes, ModelConfig
from jax_mono.decode import Cache, Finish, Generation
from jax_mono.decoder import Decoder
from jax_mono.models import layers as reference
from jax_mono.tape import as_weights

SMOL = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 8, "hidden_size": 72, "intermediate_size": 100}


def feed(decoder: Decoder, tokens: list[int]) -> CallResult:
    """Takes all tokens through the resident program, one after the other; keeps its KV cache."""
    request = make_request(budget=len(tokens), num_forced=len(tokens), forced=np.array(tokens, np.int32))
    return call_kernel(decoder, request, mode=Mode.SCORE, room=len(tokens), want_logits=True)


def last_logprobs(decoder: Decoder, result: CallResult) -> np.ndarray:
    """Log-probabilities of what follows the last token, [V]."""
    rows = [result.logits[index, -1, : share.vocab.count] for index, share in enumerate(decoder.plan.devices)]
    return np.asarray(jax.nn.log_softmax(jnp.concatenate(rows)))


def values(cache: jax.Array, length: int, dtype: DTypeLike) -> np.ndarray:
    """The first positions of a cache [D, num_layers, heads, S, head_dim], as float32."""
    return np.asarray(as_weights(cache, dtype)[:, :, :, :length]).astype(np.float32)


CASES = [
    ("llama", {"sliding_windows": (7, 0, 20)}, 1, 2, "threads", jnp.float32),
    ("llama", SMOL, 3, 2, "threads", jnp.float32),
    ("qwen2", {}, 3, 1, "mesh", jnp.float32),  # a device without heads, biases of unequal length
    ("qwen3", {}, 2, 1, "threads", jnp.bfloat16),
    ("laneformer", {}, 4, 2, "threads", jnp.float32),
    ("laneformer", {}, 2, 1, "mesh", jnp.float32),
    ("laneformer", {}, 4, 1, "threads", jnp.bfloat16),
    ("laneformer", {"lanes": Lanes(count=8, delay=0, attention_comm=False)}, 2, 1, "threads", jnp.float32),
    ("laneformer", {"lanes": Lanes(count=8, delay=1, mlp_comm=False, early_comm=False)}, 8, 1, "threads", jnp.float32),
    ("laneformer", {"lanes": Lanes(count=8, delay=3, early_layers_broadcast=False)}, 2, 1, "threads", jnp.float32),
]


@pytest.mark.parametrize(("family", "overrides", "devices", "blocks", "form", "dtype"), CASES)
def test_prefill_equals_feeding_token_by_token(
    family: str,
    overrides: dict[str, object],
    devices: int,
    blocks: int,
    form: Form,
    dtype: DTypeLike,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks of 16, so that windows and the delay reach across their edges and the last one is not full."""
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 16)
    check_prefill(
        make_decoder(tiny(family, **overrides), devices=devices, blocks=blocks, form=form, dtype=dtype), dtype
    )


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Prefill as where attention has a kernel of its own."""
    monkeypatch.setattr(decode, "FUSED_PREFILL_CHUNK", 16)
    monkeypatch.setattr(fused_attention, "available", lambda *_: True)
    monkeypatch.setattr(fused_attention, "attend_within", lambda _: reference.attend)
    decoder_module._generate.clear_cache()
    yield
    decoder_module._generate.clear_cache()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("delay", [0, 1, 2, 3])
def test_several_layers_in_a_step(delay: int) -> None:
    """Five layers in steps of one to four."""
    config = tiny("laneformer", lanes=Lanes(count=8, delay=delay))
    check_prefill(make_decoder(config, devices=2), jnp.float32)


def check_prefill(decoder: Decoder, dtype: DTypeLike) -> None:
    prompt = some_tokens(40)
    assert len(prompt) > decode.SHORT_PROMPT
    output, fed = decoder.generate(prompt, max_new_tokens=1), feed(decoder, prompt)
    assert int(output.cache.fed) == len(prompt) and int(output.cache.end) == len(prompt) + 1
    # A bfloat16 cache holds values of order 1 and may be rounded the other way.
    bound = 1e-5 if dtype == jnp.float32 else 2**-6
    for filled, expected in ((output.cache.k, fed.k_cache), (output.cache.v, fed.v_cache)):
        expected = values(expected, len(prompt), dtype)
        assert np.abs(expected).max() > 1
        np.testing.assert_allclose(values(filled, len(prompt), dtype), expected, rtol=0, atol=bound)
        assert not values(filled, decoder.context, dtype)[:, :, :, len(prompt) :].any(), "padding left a trace"
    logprobs = last_logprobs(decoder, fed)
    assert output.tokens == [int(np.argmax(logprobs))]
    np.testing.assert_allclose(output.logprobs, [logprobs.max()], atol=2 * bound)


def test_prompts_longer_than_a_chunk() -> None:
    config = tiny("llama", num_layers=2, sliding_windows=(0, 30), max_position_embeddings=600)
    decoder = make_decoder(config, blocks=2)
    prompt = some_tokens(decode.PREFILL_CHUNK + 70)
    output, fed = decoder.generate(prompt, max_new_tokens=4), feed(decoder, prompt)
    for filled, expected in ((output.cache.k, fed.k_cache), (output.cache.v, fed.v_cache)):
        expected = values(expected, len(prompt), jnp.float32)
        np.testing.assert_allclose(values(filled, len(prompt), jnp.float32), expected, rtol=0, atol=1e-5)
    assert output.tokens[0] == int(np.argmax(last_logprobs(decoder, fed)))


def test_a_chunk_that_reaches_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before it stays, to the last position."""
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 32)
    config = tiny("laneformer", max_position_embeddings=64)
    decoder, prompt = make_decoder(config, devices=2, context=64), some_tokens(62)
    first = decoder.generate(prompt[:39], max_new_tokens=1)
    cache = first.cache.keep(39)
    rest = decoder.generate(prompt[39:], max_new_tokens=1, cache=cache)  # positions 39 to 70 in one chunk
    at_once = decoder.generate(prompt, max_new_tokens=1)
    assert int(rest.cache.fed) == 62 and rest.tokens == at_once.tokens
    assert_same_caches(rest.cache, at_once.cache, 1e-5)


@pytest.fixture(scope="module", params=["llama", "laneformer", "laneformer over a mesh"])
def talker(request: pytest.FixtureRequest) -> Decoder:
    shape = {
        "llama": {"blocks": 2},
        "laneformer": {"devices": 4, "blocks": 2},
        "laneformer over a mesh": {"devices": 2, "form": "mesh"},
    }[request.param]
    config: ModelConfig = tiny(request.param.split()[0])
    return make_decoder(config, **shape)


@pytest.fixture
def flax_takes_prompts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of a prompt but its last token goes through the Flax layers, however short it is."""
    monkeypatch.setattr(decode, "SHORT_PROMPT", 1)
    decoder_module._generate.clear_cache()
    yield
    decoder_module._generate.clear_cache()


@pytest.fixture(params=["kernel", "flax"])
def taken_in_by(request: pytest.FixtureRequest) -> None:
    if request.param == "flax":
        request.getfixturevalue("flax_takes_prompts")


@pytest.mark.usefixtures("taken_in_by")
def test_a_conversation_continues_as_if_it_were_one_text(talker: Decoder) -> None:
    first, second = some_tokens(12), some_tokens(9, seed=8)
    answer = talker.generate(first, max_new_tokens=10)
    # The last token was chosen but not fed: it waits for the next call.
    assert (int(answer.cache.end), int(answer.cache.fed)) == (22, 21)
    np.testing.assert_array_equal(answer.cache.tokens[:22], first + answer.tokens)
    assert (np.asarray(answer.cache.tokens[22:]) == -1).all()

    # What was fed is not looked at again: only the waiting token and the new ones are taken in.
    forgotten = jnp.where(jnp.arange(talker.context) < 21, 0, answer.cache.tokens)
    cache = replace(answer.cache, tokens=jax.device_put(forgotten, answer.cache.tokens.sharding))
    continued = talker.generate(second, max_new_tokens=10, cache=cache)
    at_once = talker.generate(first + answer.tokens + second, max_new_tokens=10)
    assert continued.tokens == at_once.tokens
    np.testing.assert_allclose(continued.logprobs, at_once.logprobs, atol=2e-5)
    assert (int(continued.cache.end), int(continued.cache.fed)) == (41, 40)
    assert_same_caches(continued.cache, at_once.cache, 1e-5)


@pytest.mark.usefixtures("taken_in_by")
def test_an_empty_prompt_goes_on_where_the_last_answer_ended(talker: Decoder) -> None:
    prompt = some_tokens(12)
    whole = talker.generate(prompt, max_new_tokens=16)
    part = talker.generate(prompt, max_new_tokens=7)
    rest = talker.generate([], max_new_tokens=9, cache=part.cache)
    assert part.tokens + rest.tokens == whole.tokens
    assert part.logprobs + rest.logprobs == whole.logprobs
    assert int(rest.cache.fed) == int(whole.cache.fed) == 27


def assert_same_caches(actual: Cache, expected: Cache, bound: float) -> None:
    for filled, wanted in ((actual.k, expected.k), (actual.v, expected.v)):
        np.testing.assert_allclose(filled, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("length", [1, 2, decode.SHORT_PROMPT - 1, decode.SHORT_PROMPT])
def test_a_short_prompt_is_fed_by_the_resident_program(talker: Decoder, length: int) -> None:
    """To the last bit what scoring leaves, which feeds every token; the Flax layers round differently."""
    prompt = some_tokens(length, seed=length)
    assert length <= decode.SHORT_PROMPT
    output, fed = talker.generate(prompt, max_new_tokens=1), feed(talker, prompt)
    np.testing.assert_array_equal(output.cache.k, fed.k_cache)
    np.testing.assert_array_equal(output.cache.v, fed.v_cache)
    assert (int(output.cache.end), int(output.cache.fed)) == (length + 1, length)


def test_short_prompts_give_the_same_by_either_way(talker: Decoder, request: pytest.FixtureRequest) -> None:
    first, second = some_tokens(12), some_tokens(9, seed=8)

    def talk() -> list[decoder_module.Output]:
        answer = talker.generate(first, max_new_tokens=8)
        kept = jax.tree.map(jnp.copy, answer.cache)
        again = talker.generate(second, max_new_tokens=8, cache=answer.cache)
        return [replace(answer, cache=kept), again]

    by_kernel = talk()
    request.getfixturevalue("flax_takes_prompts")
    for fed, prefilled in zip(by_kernel, talk(), strict=True):
        assert fed.tokens == prefilled.tokens
        np.testing.assert_allclose(fed.logprobs, prefilled.logprobs, atol=2e-5)
        assert_same_caches(fed.cache, prefilled.cache, 1e-5)
        for name in ("tokens", "end", "fed"):
            np.testing.assert_array_equal(getattr(fed.cache, name), getattr(prefilled.cache, name))
    assert (np.asarray(by_kernel[0].cache.k) != np.asarray(prefilled.cache.k)).any(), "both went the same way"


def stopped_at_once(talker: Decoder, cache: Cache, prompt: list[int], deadline: float | None) -> Generation:
    """A call that finds its deadline passed, or without one itself cancelled, when it starts."""
    session = native.Session(16, deadline)
    if deadline is None:
        session.cancel()
    out = decoder_module._generate(
        talker.plan, talker.tapes, cache, np.array(prompt, np.int32), np.zeros(2, np.uint32), room=16,
        session=session.id, mesh=talker.mesh,
    )  # fmt: skip
    jax.block_until_ready(out)
    assert session.read(0) == []
    session.close()
    return out


@pytest.mark.parametrize(("deadline", "finish"), [(None, Finish.CANCELLED), (1e-9, Finish.DEADLINE)])
def test_stopped_within_a_prompt(talker: Decoder, deadline: float | None, finish: Finish) -> None:
    """No token comes out, and the conversation goes on as if nobody had stopped it."""
    prompt, more = some_tokens(12), some_tokens(24, seed=8)
    out = stopped_at_once(talker, talker.new_cache(), prompt, deadline)
    assert (int(out.count), int(out.finish)) == (0, finish)
    assert (np.asarray(out.tokens) == -1).all() and not np.asarray(out.logprobs).any()
    assert (int(out.cache.end), int(out.cache.fed)) == (12, 0)
    whole = talker.generate(prompt, max_new_tokens=8)
    rest = talker.generate([], max_new_tokens=8, cache=out.cache)
    assert rest.tokens == whole.tokens and rest.logprobs == whole.logprobs

    # The same in a second turn, whose prompt is too long for the resident program when it comes again with more.
    second = stopped_at_once(talker, whole.cache, prompt, deadline)
    assert (int(second.count), int(second.finish)) == (0, finish)
    assert (int(second.cache.end), int(second.cache.fed)) == (32, 19)
    continued = talker.generate(more, max_new_tokens=8, cache=second.cache)
    at_once = talker.generate(prompt + whole.tokens + prompt + more, max_new_tokens=8)
    assert continued.tokens == at_once.tokens
    assert_same_caches(continued.cache, at_once.cache, 1e-5)


def test_a_deadline_that_passes_while_a_prompt_is_fed() -> None:
    """The call ends with the token at work, long before the prompt is in."""
    config = tiny("llama", hidden_size=512, intermediate_size=4096, num_layers=6, vocab_size=4096)
    decoder = make_decoder(config)
    prompt = some_tokens(decode.SHORT_PROMPT)
    decoder.generate(prompt, max_new_tokens=4)  # compiles
    whole = decoder.generate(prompt, max_new_tokens=4)
    stopped = decoder.generate(prompt, max_new_tokens=4, deadline=0.2 * whole.seconds)
    assert stopped.finish == Finish.DEADLINE and stopped.tokens == []
    assert int(stopped.cache.fed) == 0
    assert decoder.generate([], max_new_tokens=4, cache=stopped.cache).tokens == whole.tokens
