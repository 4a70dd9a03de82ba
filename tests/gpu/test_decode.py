"""On GPUs prompts, caches, windows and conversations fit together, from one position to thousands."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu.specs import Spec, decoder_of, exact_logits, laneformer
from kernel.common import some_tokens
from kernel.test_prefill import feed, last_logprobs, values
from tiny import tiny

from jax_mono import decode
from jax_mono.decode import Cache
from jax_mono.decoder import Decoder

CACHE_BOUND = {"bfloat16": 2**-5, "float16": 2**-8}
"""Keys and values are of order 1 to 4; another order of additions rounds some of them, the other way."""
LOGPROB_BOUND = {"bfloat16": 2**-3, "float16": 2**-6}

LLAMA = Spec(tiny("llama", sliding_windows=(7, 0, 20)), 1, 4)
LLAMA16 = replace(LLAMA, dtype="float16")
QWEN = Spec(tiny("qwen2"), 3, 2)
LANEFORMER = Spec(laneformer(), 4, 2)
TALKERS = [LLAMA, LLAMA16, QWEN, LANEFORMER]

LONG = Spec(tiny("llama", max_position_embeddings=4096, sliding_windows=(3, 0, 500)), 2, 4)
"""Crosses its windows, and every split of the KV cache takes over many times."""


def assert_same_caches(found: Cache, expected: tuple[jax.Array, jax.Array], length: int, dtype: str) -> None:
    for part, wanted in zip((found.k, found.v), expected, strict=True):
        np.testing.assert_allclose(
            values(part, length, jnp.dtype(dtype)),
            values(wanted, length, jnp.dtype(dtype)),
            rtol=CACHE_BOUND[dtype],
            atol=CACHE_BOUND[dtype],
        )


def assert_chosen(token: int, logprobs: np.ndarray, bound: float) -> None:
    """A token is the likeliest one, or as good as that."""
    assert logprobs[token] >= logprobs.max() - bound, (token, int(np.argmax(logprobs)))


# Prompts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", TALKERS, ids=str)
def test_prefill_equals_feeding_token_by_token(spec: Spec) -> None:
    decoder, prompt = decoder_of(spec), some_tokens(40)
    assert len(prompt) > decode.SHORT_PROMPT
    output, fed = decoder.generate(prompt, max_new_tokens=1), feed(decoder, prompt)
    assert (int(output.cache.fed), int(output.cache.end)) == (40, 41)
    assert_same_caches(output.cache, (fed.k_cache, fed.v_cache), 40, spec.dtype)
    for part in (output.cache.k, output.cache.v):
        assert not values(part, decoder.context, jnp.dtype(spec.dtype))[:, :, :, 40:].any(), "padding left a trace"
    logprobs = last_logprobs(decoder, fed)
    assert_chosen(output.tokens[0], logprobs, LOGPROB_BOUND[spec.dtype])
    np.testing.assert_allclose(output.logprobs, logprobs[output.tokens], atol=LOGPROB_BOUND[spec.dtype])


@pytest.mark.parametrize("spec", TALKERS, ids=str)
@pytest.mark.parametrize("length", [1, 2, decode.SHORT_PROMPT - 1, decode.SHORT_PROMPT])
def test_a_short_prompt_is_fed_by_the_resident_program(spec: Spec, length: int) -> None:
    """To the last bit what scoring leaves, which feeds every token."""
    decoder, prompt = decoder_of(spec), some_tokens(length, seed=length)
    output, fed = decoder.generate(prompt, max_new_tokens=1), feed(decoder, prompt)
    np.testing.assert_array_equal(output.cache.k, fed.k_cache)
    np.testing.assert_array_equal(output.cache.v, fed.v_cache)
    assert (int(output.cache.end), int(output.cache.fed)) == (length + 1, length)
    assert output.tokens == [int(np.argmax(last_logprobs(decoder, fed)))]


@pytest.mark.parametrize("spec", TALKERS, ids=str)
def test_decoding_continues_a_prefilled_prompt_as_scoring_would(spec: Spec) -> None:
    decoder, prompt = decoder_of(spec), some_tokens(40)
    output = decoder.generate(prompt, max_new_tokens=24)
    scores = decoder.score(prompt + output.tokens)
    np.testing.assert_allclose(output.logprobs, scores.logprobs[39:], atol=LOGPROB_BOUND[spec.dtype])


# Conversations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", TALKERS, ids=str)
def test_a_conversation_continues_as_if_it_were_one_text(spec: Spec) -> None:
    """All turns are short, so the resident program feeds every token and nothing may differ by a bit."""
    decoder = decoder_of(spec)
    first, second = some_tokens(12), some_tokens(9, seed=8)
    answer = decoder.generate(first, max_new_tokens=10)
    assert (int(answer.cache.end), int(answer.cache.fed)) == (22, 21)
    np.testing.assert_array_equal(answer.cache.tokens[:22], first + answer.tokens)
    continued = decoder.generate(second, max_new_tokens=10, cache=answer.cache)
    assert (int(continued.cache.end), int(continued.cache.fed)) == (41, 40)
    text = first + answer.tokens + second
    fed = feed(decoder, [*text, *continued.tokens[:-1]])
    for part, expected in ((continued.cache.k, fed.k_cache), (continued.cache.v, fed.v_cache)):
        np.testing.assert_array_equal(part, expected)
    scored = decoder.score([*text, *continued.tokens]).logprobs[len(text) - 1 :]
    np.testing.assert_allclose(continued.logprobs, scored, atol=2e-5)


@pytest.mark.parametrize("spec", TALKERS, ids=str)
def test_an_empty_prompt_goes_on_where_the_last_answer_ended(spec: Spec) -> None:
    decoder, prompt = decoder_of(spec), some_tokens(12)
    whole = decoder.generate(prompt, max_new_tokens=16)
    part = decoder.generate(prompt, max_new_tokens=7)
    rest = decoder.generate([], max_new_tokens=9, cache=part.cache)
    assert part.tokens + rest.tokens == whole.tokens
    assert part.logprobs + rest.logprobs == whole.logprobs


# Long texts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long() -> Decoder:
    return decoder_of(LONG)


@pytest.fixture(scope="module")
def long_text() -> list[int]:
    return some_tokens(4096, seed=2)


@pytest.fixture(scope="module")
def long_logits(long: Decoder, long_text: list[int]) -> np.ndarray:
    logits = long.score(long_text, logits=True).logits
    assert logits is not None
    return logits


def test_contexts_from_1_to_4096(long_logits: np.ndarray, long_text: list[int]) -> None:
    """Every position has its own context."""
    expected = exact_logits(LONG.config, LONG.dtype, tuple(long_text))
    error = np.sqrt(np.mean((long_logits - expected) ** 2, axis=1))
    print(f"rms by position: median {np.median(error):.2e}, most {error.max():.2e} at {error.argmax()}")
    assert np.sqrt(np.mean(error**2)) <= 2**-6 and error.max() <= 2**-4
    assert np.abs(long_logits - expected).max() <= 2**-2  # of half a million


@pytest.mark.parametrize("length", [2, 3, 64, 65, 129, 1000])
def test_what_comes_later_does_not_matter(
    long: Decoder, long_text: list[int], long_logits: np.ndarray, length: int
) -> None:
    logits = long.score(long_text[:length], logits=True).logits
    np.testing.assert_array_equal(logits, long_logits[:length])


@pytest.mark.parametrize("length", [129, 700, 4000])
def test_long_prompts(long: Decoder, long_text: list[int], long_logits: np.ndarray, length: int) -> None:
    """Many chunks of prefill; then the resident program goes on alone."""
    output = long.generate(long_text[:length], max_new_tokens=4)
    shifted = long_logits[length - 1] - long_logits[length - 1].max()
    assert_chosen(output.tokens[0], shifted, LOGPROB_BOUND[LONG.dtype])
    scores = long.score([*long_text[:length], *output.tokens])
    np.testing.assert_allclose(output.logprobs, scores.logprobs[-4:], atol=LOGPROB_BOUND[LONG.dtype])


def test_a_conversation_may_fill_the_context(long: Decoder, long_text: list[int]) -> None:
    output = long.generate(long_text[:4000])
    assert len(output.tokens) == 96 and int(output.cache.end) == 4096
    assert all(math.isfinite(logprob) for logprob in output.logprobs)
    with pytest.raises(ValueError, match=r"4096 tokens so far .* beyond the context of 4096"):
        long.generate([], cache=output.cache)
