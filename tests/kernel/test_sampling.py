"""The resident program draws the tokens that an independent implementation draws, with the right frequencies."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel.common import make_decoder, params_of, some_tokens
from reference import sampling_numpy
from reference.sampling_numpy import Options
from scipy import stats
from tiny import tiny

from jax_mono.config import ModelConfig
from jax_mono.decoder import Decoder
from jax_mono.models.source import Params
from jax_mono.sampling import Sampling

PROMPT = some_tokens(5, seed=4)
LENGTH = 48
"""Of prompt and generated tokens together, so that one compiled ``score`` serves every test."""


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_reference_generator_gives_the_published_numbers(key: str, counter: str, expected: str) -> None:
    """Known answers of the Random123 distribution."""
    parse = [tuple(int(word, 16) for word in words.split()) for words in (key, counter, expected)]
    assert sampling_numpy.philox4x32(parse[0], parse[1]) == parse[2]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder(tiny("llama"), devices=2, blocks=2)


def sampling(options: Options) -> Sampling:
    return Sampling(**dataclasses.asdict(options))


OPTIONS = [
    Options(temperature=1.0),
    Options(temperature=0.3),
    Options(temperature=2.5),
    Options(temperature=1.0, top_k=5),
    Options(temperature=0.8, top_k=1),
    Options(temperature=1.0, top_p=0.6),
    Options(temperature=1.5, top_p=0.95),
    Options(temperature=1.0, min_p=0.2),
    Options(temperature=1.0, repetition_penalty=1.8),
    Options(repetition_penalty=1.3),
    Options(temperature=0.9, top_k=40, top_p=0.9),
    Options(temperature=1.2, top_k=20, min_p=0.05),
    Options(temperature=1.1, top_p=0.8, min_p=0.1),
    Options(temperature=0.7, top_k=30, top_p=0.85, min_p=0.02, repetition_penalty=1.2),
    Options(temperature=3.0, top_k=100, top_p=0.99, min_p=0.001, repetition_penalty=0.7),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_token_is_the_one_that_the_reference_draws(decoder: Decoder, options: Options) -> None:
    """On the kernel's own logits, which the reference rounds differently: a near-tie may go either way."""
    draws, near_ties = 0, 0
    for seed in (1, 2**40 + 7):
        output = decoder.generate(PROMPT, max_new_tokens=LENGTH - len(PROMPT), sampling=sampling(options), seed=seed)
        text = PROMPT + output.tokens
        logits = decoder.score(text, logits=True).logits
        for position in range(len(PROMPT) - 1, LENGTH - 1):
            case = (logits[position], text[: position + 1], options, seed, position)
            token = text[position + 1]
            draws += 1
            if sampling_numpy.draw(*case) != token:
                assert sampling_numpy.is_near_tie(token, *case, slack=2e-5), position
                near_ties += 1
    assert near_ties <= draws // 40


def test_seeds_make_the_difference(decoder: Decoder) -> None:
    def tokens(seed: int | None) -> list[int]:
        return decoder.generate(
            PROMPT, max_new_tokens=LENGTH - len(PROMPT), sampling=Sampling(temperature=1.0), seed=seed
        ).tokens

    assert tokens(3) == tokens(3)
    # Both halves of the seed count, and without one every call draws another.
    assert len({tuple(tokens(seed)) for seed in (3, 4, 3 + 2**32, None, None)}) == 5


@pytest.mark.parametrize(
    "options", [Sampling(temperature=1.0), Sampling(temperature=0.9, top_k=30, top_p=0.9)], ids=["plain", "filtered"]
)
def test_the_same_seed_gives_the_same_tokens_on_every_machine(options: Sampling) -> None:
    config = tiny("laneformer")
    outputs = [
        make_decoder(config, devices=devices, blocks=blocks, form=form).generate(
            some_tokens(12), max_new_tokens=16, sampling=options, seed=11
        )
        for devices, blocks, form in ((1, 1, "threads"), (4, 2, "threads"), (8, 1, "mesh"))
    ]
    assert outputs[0].tokens == outputs[1].tokens == outputs[2].tokens
    np.testing.assert_allclose(outputs[1].logprobs, outputs[0].logprobs, atol=1e-5)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_log_probabilities_are_those_of_the_unmodified_distribution(decoder: Decoder) -> None:
    options = Sampling(temperature=1.7, top_k=50, repetition_penalty=1.5)
    output = decoder.generate(PROMPT, max_new_tokens=LENGTH - len(PROMPT), sampling=options, seed=9)
    text = PROMPT + output.tokens
    scores = decoder.score(text, logits=True)
    expected = log_softmax(scores.logits)[np.arange(LENGTH - 1), text[1:]]
    np.testing.assert_allclose(scores.logprobs, expected, atol=5e-6)
    np.testing.assert_allclose(output.logprobs, expected[len(PROMPT) - 1 :], atol=2e-5)


def test_alternatives_are_the_most_likely_tokens_in_order(decoder: Decoder) -> None:
    output = decoder.generate(PROMPT, max_new_tokens=LENGTH - len(PROMPT), top_logprobs=5)
    text = PROMPT + output.tokens
    scores = decoder.score(text, logits=True, top_logprobs=5)
    logprobs = log_softmax(scores.logits)
    for position in range(LENGTH):
        expected = np.argsort(-scores.logits[position], kind="stable")[:5]
        assert [token.id for token in scores.top[position]] == expected.tolist()
        np.testing.assert_allclose(
            [token.logprob for token in scores.top[position]], logprobs[position, expected], atol=5e-6
        )
    generated = output.top
    assert len(generated) == len(output.tokens)
    for token, logprob, top, scored in zip(
        output.tokens, output.logprobs, generated, scores.top[len(PROMPT) - 1 :], strict=False
    ):
        assert [other.id for other in top] == [other.id for other in scored]
        assert (top[0].id, top[0].logprob) == (token, logprob)  # greedy takes the first


# A model whose logits are the same at every position, so that many draws come from one known distribution -----------

VOCAB, DRAWS = 24, 20_480


def constant_model(logits: np.ndarray) -> tuple[ModelConfig, Params]:
    """All layers add nothing and all embeddings are alike: the LM head alone decides."""
    config = tiny(
        "llama",
        vocab_size=len(logits),
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        max_position_embeddings=DRAWS + 8,
        sliding_windows=(1,),
        norm_eps=1e-30,
    )
    params = jax.tree.map(jnp.zeros_like, params_of(config))
    head = jnp.zeros((len(logits), 16)).at[:, 3].set(jnp.asarray(logits, jnp.float32))
    ones = jnp.ones(16)
    return config, params | {"embed": jnp.ones_like(params["embed"]), "norm": ones, "lm_head": head}


LOGITS = np.linspace(-2.0, 2.0, VOCAB)[np.random.default_rng(0).permutation(VOCAB)].astype(np.float32)


@pytest.fixture(scope="module")
def constant() -> Decoder:
    config, params = constant_model(LOGITS)
    return make_decoder(config, devices=2, params=params)


def test_the_constant_model_is_constant(constant: Decoder) -> None:
    logits = constant.score([0, 5, 9, 3], logits=True).logits
    np.testing.assert_array_equal(logits, np.tile(LOGITS, (4, 1)))


@pytest.mark.parametrize(
    "options",
    [Options(temperature=1.0), Options(temperature=1.6, top_k=12, top_p=0.9), Options(temperature=0.8, min_p=0.1)],
    ids=str,
)
def test_draws_have_the_right_frequencies(constant: Decoder, options: Options) -> None:
    """One long generation: every position draws anew from the same distribution."""
    tokens = constant.generate([0], max_new_tokens=DRAWS, sampling=sampling(options), seed=2).tokens
    assert len(tokens) == DRAWS
    expected = sampling_numpy.distribution(LOGITS, (), options) * DRAWS
    counts = np.bincount(tokens, minlength=VOCAB)
    possible = expected > 0
    assert not counts[~possible].any()
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3
    # And knows nothing of the draw before.
    pairs = np.zeros((VOCAB, VOCAB))
    np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
    often = expected > DRAWS / VOCAB / 2
    assert stats.chi2_contingency(pairs[np.ix_(often, often)]).pvalue > 1e-3


def test_frequencies_over_seeds(constant: Decoder) -> None:
    """The first draw of many short calls: seeds are as good as positions."""
    calls = 300
    first = [
        constant.generate([0], max_new_tokens=1, sampling=Sampling(temperature=1.0), seed=seed).tokens[0]
        for seed in range(calls)
    ]
    likely = np.argsort(-LOGITS)
    groups = [likely[:2], likely[2:5], likely[5:10], likely[10:]]
    expected = [sampling_numpy.distribution(LOGITS, (), Options(temperature=1.0))[group].sum() for group in groups]
    counts = [np.isin(first, group).sum() for group in groups]
    assert stats.chisquare(counts, np.array(expected) * calls).pvalue > 1e-3


def test_the_repetition_penalty_covers_the_prompt_and_what_was_generated() -> None:
    """With positive logits and a huge penalty nothing is said twice: tokens come in order of their logits."""
    config, params = constant_model(LOGITS + 3.0)
    decoder = make_decoder(config, devices=2, params=params)
    order = np.argsort(-LOGITS).tolist()
    prompt = [order[1], order[4], order[1]]
    left = [token for token in order if token not in prompt]
    strict = Sampling(repetition_penalty=1e6)
    output = decoder.generate(prompt, max_new_tokens=6, sampling=strict)
    assert output.tokens == left[:6]
    # Also what was said in earlier calls of a conversation.
    more = decoder.generate([order[2]], max_new_tokens=5, sampling=strict, cache=output.cache)
    assert more.tokens == left[6:11]


def test_equal_logits_stay_together_and_the_lower_token_goes_first() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[3, 9, 17]] = 2.0
    config, params = constant_model(logits)
    decoder = make_decoder(config, devices=2, params=params)
    assert decoder.generate([0], max_new_tokens=4).tokens == [3] * 4
    # Three tokens share the first place; a top-k of 1 or 2 cannot tell them apart.
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
        Sampling(temperature=1e-38),
        Sampling(temperature=1e-45),
    ],
    ids=str,
)
def test_extreme_options_take_the_most_likely_token(constant: Decoder, options: Sampling) -> None:
    tokens = constant.generate([0], max_new_tokens=16, sampling=options, seed=1).tokens
    assert tokens == [int(np.argmax(LOGITS))] * 16


@pytest.mark.parametrize(
    ("options", "shift"),
    [
        (Sampling(temperature=2e-38), 10.0),
        (Sampling(temperature=2e-38), -10.0),
        (Sampling(repetition_penalty=1e38), -10.0),
    ],
    ids=str,
)
def test_options_that_make_scores_overflow_still_choose_a_token(options: Sampling, shift: float) -> None:
    config, params = constant_model(LOGITS + shift)
    output = make_decoder(config, devices=2, params=params).generate([0], max_new_tokens=30, sampling=options, seed=1)
    assert len(output.tokens) == 30 and all(0 <= token < VOCAB for token in output.tokens)
    if options.temperature > 0:
        assert set(output.tokens) == {int(np.argmax(LOGITS))}


def test_options_that_keep_everything_change_nothing(constant: Decoder) -> None:
    def tokens(**changes: float) -> list[int]:
        options = Sampling(temperature=1.0, **changes)
        return constant.generate([0], max_new_tokens=64, sampling=options, seed=6).tokens

    plain = tokens()
    assert tokens(top_k=VOCAB) == tokens(top_k=10**6) == tokens(top_p=1.0) == tokens(min_p=0.0) == plain
    assert tokens(min_p=1e-6) == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, must be >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1, must be a whole number >= 0"),
        ({"top_k": 2.5}, "top_k is 2.5, must be a whole number >= 0"),
        ({"top_p": 0.0}, "top_p is 0.0, must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.5}, "min_p is -0.5, must be between 0 and 1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, must be above 0"),
    ],
)
def test_options_that_make_no_sense(constant: Decoder, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        constant.generate([0], max_new_tokens=1, sampling=Sampling(**options))


def test_all_pairs_of_options_were_compared() -> None:
    """The list above would be blind to an interplay that it does not hold."""
    off = dataclasses.asdict(Options())
    on = [{name for name, value in dataclasses.asdict(options).items() if value != off[name]} for options in OPTIONS]
    for pair in itertools.combinations(off, 2):
        assert any(set(pair) <= names for names in on), pair
