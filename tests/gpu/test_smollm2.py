"""On GPUs the real weights of SmolLM2-135M-Instruct give the tokens that the Flax model gives, up to near-ties."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import rehearsal
from gpu.specs import truth_device

from jax_mono.checkpoint import open_checkpoint
from jax_mono.decoder import Decoder
from jax_mono.models.source import read_params
from jax_mono.models.transformer import Transformer

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf"),
    pytest.mark.skipif(rehearsal.KIND == "fibers", reason="too large for fibers"),
]

PROMPT = [
    *(1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198),
    *(1, 4093, 198, 19161, 253, 5905, 1517, 338, 6765, 260, 4186, 409, 282, 304, 30, 2, 198, 1, 520, 9531, 198),
]
"""The chat that asks: Write a Python function that returns the factorial of n. As tokens, so that no tokenizer is
needed."""
FUNCTION = [4186, 409, 24, 94]
"""What any good answer holds: factorial(n"""
NEW = 64
NEAR_TIE = {"bfloat16": 0.5, "float16": 0.06}
"""Logit difference below which rounded activations may decide otherwise; logits have a standard deviation of several
units, and 30 layers round to 8 or 11 bits."""


@dataclass(frozen=True)
class Real:
    """A decoder, its answer, and the logits [NEW, V] that the Flax model in float32 gives at every step of it."""

    decoder: Decoder
    answer: list[int]
    truth: np.ndarray


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def real(request: pytest.FixtureRequest, smollm2_gguf: Path) -> Real:
    dtype = jnp.dtype(request.param)
    if rehearsal.KIND and dtype == jnp.float16:
        pytest.skip("float16 weights run on GPUs only")
    source = open_checkpoint(smollm2_gguf)
    decoder = Decoder.from_source(source, dtype=dtype, context=256)
    answer = decoder.generate(PROMPT, max_new_tokens=NEW, stop=[]).tokens
    device = truth_device()
    with jax.default_device(device):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), read_params(source, dtype))
        model = Transformer.from_params(source.config, jax.device_put(params, device))
        logits = jax.jit(lambda tokens: model(tokens)[0])(jnp.asarray(PROMPT + answer, jnp.int32))
    return Real(decoder, answer, np.asarray(logits)[len(PROMPT) - 1 : -1])


def test_greedy_tokens_equal_flax_up_to_near_ties(real: Real) -> None:
    dtype, ties = real.decoder.tapes.dtype.name, []
    for step, token in enumerate(real.answer):
        best = int(real.truth[step].argmax())
        margin = float(real.truth[step, best] - real.truth[step, token])
        if token != best:
            ties.append(f"token {step}: {token} for {best}, {margin:.2e} behind")
        assert margin < NEAR_TIE[dtype], f"{dtype}: {ties[-1]}"
    print(f"{dtype}: {NEW - len(ties)} of {NEW} tokens are Flax's; near-ties: {ties or 'none'}")


def test_the_answer_is_the_function_asked_for(real: Real) -> None:
    length = len(FUNCTION)
    assert FUNCTION in [real.answer[start : start + length] for start in range(NEW)]


def test_logits_stay_close_and_are_the_same_again(real: Real) -> None:
    text = PROMPT + real.answer
    scores = real.decoder.score(text, logits=True)
    found = scores.logits[len(PROMPT) - 1 : -1]
    error, scale = np.abs(found - real.truth), float(real.truth.std())
    rms, most = float(np.sqrt(np.mean(error**2))), float(error.max())
    print(f"{real.decoder.tapes.dtype}: rms {rms:.2e}, most {most:.2e}, standard deviation {scale:.2f}")
    assert rms < NEAR_TIE[real.decoder.tapes.dtype.name] / 4
    np.testing.assert_array_equal(real.decoder.score(text, logits=True).logits, scores.logits)
    again = real.decoder.generate(PROMPT, max_new_tokens=NEW, stop=[])
    assert again.tokens == real.answer
