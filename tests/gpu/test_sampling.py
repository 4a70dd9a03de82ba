"""On GPUs tokens are drawn as by the NumPy reference from the same logits, and with the right frequencies."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import rehearsal
from gpu.specs import Spec, decoder_of
from kernel.common import make_decoder, params_of, some_tokens
from kernel.test_sampling import LOGITS, OPTIONS, VOCAB, log_softmax, sampling
from reference import sampling_numpy
from reference.sampling_numpy import Options
from scipy import stats
from tiny import tiny

from jax_mono.config import ModelConfig
from jax_mono.decoder import Decoder
from jax_mono.sampling import Sampling

PROMPT = some_tokens(5, seed=4)
LENGTH = rehearsal.amount(48, 16)
DRAWS = rehearsal.amount(100_000, 4000)
LLAMA = Spec(tiny("llama", sliding_windows=(7, 0, 20)), 2, 2)
LLAMA16 = replace(LLAMA, dtype="float16")
LANEFORMER = Spec(tiny("laneformer"), 4, 2)
SLACK = 1e-4
"""Scores are float32, and the GPU's exponentials and logarithms are good to about 2^-21 of their value."""


def free(**options: object) -> dict[str, object]:
    return {"max_new_tokens": LENGTH - len(PROMPT)} | options


@pytest.mark.parametrize("spec", [LLAMA, LLAMA16, LANEFORMER], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_token_is_the_one_that_the_reference_draws(spec: Spec, options: Options) -> None:
    """On the GPU's own logits."""
    decoder, draws, near_ties = decoder_of(spec), 0, 0
    for seed in (1, 2**40 + 7):
        output = decoder.generate(PROMPT, **free(sampling=sampling(options), seed=seed))
        text = PROMPT + output.tokens
        logits = decoder.score(text, logits=True).logits
        for position in range(len(PROMPT) - 1, LENGTH - 1):
            case = (logits[position], text[: position + 1], options, seed, position)
            token = text[position + 1]
            draws += 1
            if sampling_numpy.draw(*case) != token:
                assert sampling_numpy.is_near_tie(token, *case, slack=SLACK), position
                near_ties += 1
    assert near_ties <= draws // 40


def test_seeds_make_the_difference() -> None:
    decoder = decoder_of(LLAMA)

    def tokens(seed: int | None) -> list[int]:
        return decoder.generate(PROMPT, **free(sampling=Sampling(temperature=1.0), seed=seed)).tokens

    assert tokens(3) == tokens(3)
    assert len({tuple(tokens(seed)) for seed in (3, 4, 3 + 2**32, None, None)}) == 5


@pytest.mark.parametrize("spec", [LLAMA, LANEFORMER], ids=str)
def test_log_probabilities_are_those_of_the_unmodified_distribution(spec: Spec) -> None:
    decoder, options = decoder_of(spec), Sampling(temperature=1.7, top_k=50, repetition_penalty=1.5)
    output = decoder.generate(PROMPT, **free(sampling=options, seed=9))
    text = PROMPT + output.tokens
    scores = decoder.score(text, logits=True)
    expected = log_softmax(scores.logits)[np.arange(LENGTH - 1), text[1:]]
    np.testing.assert_allclose(scores.logprobs, expected, atol=2e-5)
    np.testing.assert_allclose(output.logprobs, expected[len(PROMPT) - 1 :], atol=2e-5)


@pytest.mark.parametrize("spec", [LLAMA, LANEFORMER], ids=str)
@pytest.mark.parametrize("top_n", [1, 5, 128])
def test_alternatives_are_the_most_likely_tokens_in_order(spec: Spec, top_n: int) -> None:
    decoder = decoder_of(spec)
    output = decoder.generate(PROMPT, **free(top_logprobs=top_n))
    text = PROMPT + output.tokens
    scores = decoder.score(text, logits=True, top_logprobs=top_n)
    logprobs = log_softmax(scores.logits)
    for position in range(LENGTH):
        expected = np.argsort(-scores.logits[position], kind="stable")[:top_n]
        top = scores.top[position]
        assert [token.id for token in top] == expected.tolist()
        np.testing.assert_allclose([token.logprob for token in top], logprobs[position, expected], atol=2e-5)
    assert len(output.top) == len(output.tokens)
    scored = scores.top[len(PROMPT) - 1 :]
    for token, logprob, top, other in zip(output.tokens, output.logprobs, output.top, scored, strict=False):
        assert [one.id for one in top] == [one.id for one in other]
        assert (top[0].id, top[0].logprob) == (token, logprob)  # greedy takes the first


# A model whose logits are the same at every position, so that many draws come from one known distribution -----------


def constant_config(room: int = 128) -> ModelConfig:
    return tiny(
        "llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=4, max_position_embeddings=room, sliding_windows=(1,), norm_eps=1e-30,
    )  # fmt: skip


CONSTANT = Spec(constant_config(DRAWS + 8), 2, 1)
"""Named for its program; its decoders have weights of their own."""


def constant_decoder(logits: np.ndarray, room: int = DRAWS + 8) -> Decoder:
    """All layers add nothing and all embeddings are alike: the LM head alone decides."""
    config = constant_config(room)
    params = jax.tree.map(jnp.zeros_like, params_of(config, jnp.bfloat16))
    head = jnp.zeros((VOCAB, 16)).at[:, 3].set(jnp.asarray(logits, jnp.float32)).astype(jnp.bfloat16)
    params |= {"embed": jnp.ones_like(params["embed"]), "norm": jnp.ones_like(params["norm"]), "lm_head": head}
    return make_decoder(config, devices=2, params=params, dtype=jnp.bfloat16, target=rehearsal.target())


@pytest.fixture(scope="module")
def constant() -> Decoder:
    return constant_decoder(LOGITS)


@pytest.fixture(scope="module")
def constant_logits(constant: Decoder) -> np.ndarray:
    logits = constant.score([0, 5, 9, 3], logits=True).logits
    assert logits is not None
    np.testing.assert_array_equal(logits, np.tile(logits[0], (4, 1)))
    np.testing.assert_allclose(logits[0], LOGITS, atol=2**-6)
    return logits[0]


@pytest.mark.parametrize(
    "options",
    [Options(temperature=1.0), Options(temperature=1.6, top_k=12, top_p=0.9), Options(temperature=0.8, min_p=0.1)],
    ids=str,
)
def test_draws_have_the_right_frequencies(constant: Decoder, constant_logits: np.ndarray, options: Options) -> None:
    """One long generation: every position draws anew from the same distribution."""
    tokens = constant.generate([0], max_new_tokens=DRAWS, sampling=sampling(options), seed=2).tokens
    assert len(tokens) == DRAWS
    expected = sampling_numpy.distribution(constant_logits, (), options) * DRAWS
    counts = np.bincount(tokens, minlength=VOCAB)
    possible = expected > 0
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3
    # And knows nothing of the draw before.
    pairs = np.zeros((VOCAB, VOCAB))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    often = expected > DRAWS / VOCAB / 2
    assert stats.chi2_contingency(pairs[np.ix_(often, often)]).pvalue > 1e-3


def test_frequencies_over_seeds(constant: Decoder, constant_logits: np.ndarray) -> None:
    """The first draw of many short calls: seeds are as good as positions."""
    calls, options = rehearsal.amount(300, 60), Options(temperature=1.0)
    first = [
        constant.generate([0], max_new_tokens=1, sampling=sampling(options), seed=seed).tokens[0]
        for seed in range(calls)
    ]
    likely = np.argsort(-LOGITS)
    groups = [likely[:2], likely[2:5], likely[5:10], likely[10:]]
    share = sampling_numpy.distribution(constant_logits, (), options)
    expected = np.array([share[group].sum() for group in groups])
    counts = [np.isin(first, group).sum() for group in groups]
    assert stats.chisquare(counts, expected * calls).pvalue > 1e-3


def test_the_repetition_penalty_covers_the_prompt_and_what_was_generated() -> None:
    """With positive logits and a huge penalty nothing is said twice: tokens come in order of their logits."""
    decoder = constant_decoder(LOGITS + 3.0)
    order = np.argsort(-LOGITS).tolist()
    prompt = [order[1], order[4], order[1]]
    left = [token for token in order if token not in prompt]
    strict = Sampling(repetition_penalty=1e6)
    output = decoder.generate(prompt, max_new_tokens=6, sampling=strict)
    assert output.tokens == left[:6]
    more = decoder.generate([order[2]], max_new_tokens=5, sampling=strict, cache=output.cache)
    assert more.tokens == left[6:11]


def test_equal_logits_stay_together_and_the_lower_token_goes_first() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[3, 9, 17]] = 2.0
    decoder = constant_decoder(logits)
    assert decoder.generate([0], max_new_tokens=4).tokens == [3] * 4
    for options in (Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_k=2, min_p=1.0)):
        tokens = decoder.generate([0], max_new_tokens=200, sampling=options, seed=1).tokens
        assert set(tokens) == {3, 9, 17}
    scored = decoder.score([0, 5, 9, 3], top_logprobs=5)
    assert [token.id for token in scored.top[0]] == [3, 9, 17, 0, 1]


@pytest.mark.parametrize(
    "options",
    [
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1e-4),
        Sampling(temperature=1e-30),
    ],
    ids=str,
)
def test_extreme_options_take_the_most_likely_token(constant: Decoder, options: Sampling) -> None:
    tokens = constant.generate([0], max_new_tokens=16, sampling=options, seed=1).tokens
    assert tokens == [int(np.argmax(LOGITS))] * 16


def test_options_that_keep_everything_change_nothing(constant: Decoder) -> None:
    def tokens(**changes: float) -> list[int]:
        options = Sampling(temperature=1.0, **changes)
        return constant.generate([0], max_new_tokens=64, sampling=options, seed=6).tokens

    plain = tokens()
    assert tokens(top_k=VOCAB) == tokens(top_k=10**6) == tokens(top_p=1.0) == tokens(min_p=0.0) == plain
    assert tokens(min_p=1e-6) == plain
