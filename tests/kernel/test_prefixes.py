"""Conversations that share a beginning: caches cut short, caches copied, and calls that share one program."""

from __future__ import annotations

import numpy as np
import pytest
from kernel.common import Form, make_decoder, some_tokens
from tiny import tiny

from jax_mono import decoder as decoder_module
from jax_mono.decoder import Decoder
from jax_mono.sampling import Sampling

PROMPT = some_tokens(20)
OTHER = some_tokens(9, seed=3)


@pytest.fixture(scope="module", params=["llama", "laneformer"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(tiny(request.param), blocks=2)


def test_a_cut_conversation_goes_on_as_if_the_rest_had_not_been(decoder: Decoder) -> None:
    fresh = decoder.generate([*PROMPT, *OTHER], max_new_tokens=12)
    cut = decoder.generate(PROMPT, max_new_tokens=30).cache.keep(len(PROMPT))
    assert (int(cut.end), int(cut.fed)) == (len(PROMPT), len(PROMPT))
    assert np.asarray(cut.tokens).tolist() == PROMPT + [-1] * (cut.capacity - len(PROMPT))
    assert decoder.generate(OTHER, max_new_tokens=12, cache=cut).tokens == fresh.tokens


def test_the_repetition_penalty_forgets_what_was_cut(decoder: Decoder) -> None:
    penalty = {"sampling": Sampling(repetition_penalty=5.0), "max_new_tokens": 12}
    fresh = decoder.generate([*PROMPT, *OTHER], **penalty)
    cut = decoder.generate(PROMPT, max_new_tokens=30).cache.keep(len(PROMPT))
    assert decoder.generate(OTHER, cache=cut, **penalty).tokens == fresh.tokens


def test_a_copied_conversation_outlives_the_original(decoder: Decoder) -> None:
    cache = decoder.generate(PROMPT, max_new_tokens=4).cache
    copy = cache.copy()
    one = decoder.generate(OTHER, max_new_tokens=8, cache=cache)
    assert cache.k.is_deleted() and not copy.k.is_deleted()
    assert decoder.generate(OTHER, max_new_tokens=8, cache=copy).tokens == one.tokens


@pytest.mark.parametrize("form", ["threads", "mesh"])
def test_padded_calls_share_one_program(form: Form) -> None:
    decoder = make_decoder(tiny("llama", max_position_embeddings=120), form=form, devices=2, blocks=1)
    cache = None
    sizes = []
    for length, budget in ((3, 1), (50, 30), (1, 20)):
        prompt = some_tokens(length, seed=length)
        expected = decoder.generate(prompt, max_new_tokens=budget, cache=None if cache is None else cache.copy())
        before = decoder_module._generate._cache_size()
        output = decoder.generate(prompt, max_new_tokens=budget, cache=cache, padded=True)
        sizes.append(decoder_module._generate._cache_size() - before)
        assert output.tokens == expected.tokens
        cache = output.cache.keep(int(output.cache.end) - 1)
    # Over a mesh, a cache that a call returned is laid out by another name than a new one.
    assert sizes == ([1, 0, 0] if form == "threads" else [1, 1, 0])


def test_padded_scores_are_the_same(decoder: Decoder) -> None:
    sizes = []
    for tokens in (PROMPT, OTHER):
        plain = decoder.score(tokens, top_logprobs=3)
        before = decoder_module._score._cache_size()
        padded = decoder.score(tokens, top_logprobs=3, padded=True)
        sizes.append(decoder_module._score._cache_size() - before)
        np.testing.assert_array_equal(padded.logprobs, plain.logprobs)
        assert padded.top == plain.top and padded.logits is None
        assert padded.logprobs.shape == (len(tokens) - 1,)
    assert sizes == [1, 0]


def test_scores_stream_and_can_be_stopped(decoder: Decoder) -> None:
    with decoder.score_stream(PROMPT) as stream:
        seen = list(stream)
        scores = stream.result()
    assert len(seen) == len(PROMPT)
    np.testing.assert_array_equal([token.logprob for token in seen[:-1]], scores.logprobs)
    with decoder.score_stream(PROMPT, deadline=1e-9) as stream:
        assert len(list(stream)) < len(PROMPT)


def test_batches_hold_every_token_once(decoder: Decoder) -> None:
    with decoder.stream(PROMPT, max_new_tokens=40) as stream:
        batches = list(iter(stream.batch, []))
        output = stream.result()
    assert all(batches)
    assert [token.id for batch in batches for token in batch] == output.tokens
