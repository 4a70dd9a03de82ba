"""A prompt that the Flax layers take in at once leaves what the resident program would have left, token by token."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike
from kernel.common import Form, call_kernel, make_decoder, make_request, some_tokens
from tiny import tiny

from jax_mono import decode
from jax_mono.call import CallResult, Mode
from jax_mono.config import ModelConfig
from jax_mono.decoder import Decoder
from jax_mono.tape import as_weights

SMOL = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 8, "hidden_size": 72, "intermediate_size": 100}


def feed(decoder: Decoder, tokens: list[int]) -> CallResult:
    """Takes all tokens through the resident program, one after the other; keeps its KV cache."""
    request = make_request(budget=len(tokens), forced=np.array(tokens, np.int32))
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
    decoder = make_decoder(tiny(family, **overrides), devices=devices, blocks=blocks, form=form, dtype=dtype)
    prompt = some_tokens(40)
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


@pytest.fixture(scope="module", params=["llama", "laneformer"])
def talker(request: pytest.FixtureRequest) -> Decoder:
    shape = {"llama": {"blocks": 2}, "laneformer": {"devices": 4, "blocks": 2}}[request.param]
    config: ModelConfig = tiny(request.param)
    return make_decoder(config, **shape)


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
    for part, whole in ((continued.cache.k, at_once.cache.k), (continued.cache.v, at_once.cache.v)):
        np.testing.assert_allclose(part, whole, rtol=0, atol=1e-5)


def test_an_empty_prompt_goes_on_where_the_last_answer_ended(talker: Decoder) -> None:
    prompt = some_tokens(12)
    whole = talker.generate(prompt, max_new_tokens=16)
    part = talker.generate(prompt, max_new_tokens=7)
    rest = talker.generate([], max_new_tokens=9, cache=part.cache)
    assert part.tokens + rest.tokens == whole.tokens
    assert part.logprobs + rest.logprobs == whole.logprobs
    assert int(rest.cache.fed) == int(whole.cache.fed) == 27
