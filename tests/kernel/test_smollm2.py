"""The main job on real weights: SmolLM2-135M-Instruct answers a coding prompt, and three implementations agree."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jax_mono.checkpoint import open_checkpoint
from jax_mono.decoder import Decoder
from jax_mono.loading import load
from jax_mono.models.hf import export_hf
from jax_mono.models.source import read_params
from jax_mono.models.transformer import Transformer

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]

QUESTION = "Write a Python function that returns the factorial of n."
NEW = 64
NEAR_TIE = 1e-3
"""Logit difference below which float32 implementations may disagree on the best token."""


@pytest.fixture(scope="module")
def decoder(smollm2_gguf: Path) -> Decoder:
    return load(smollm2_gguf, dtype=jnp.float32, context=256)


@pytest.fixture(scope="module")
def prompt(decoder: Decoder) -> list[int]:
    assert decoder.tokenizer is not None
    return decoder.tokenizer.chat([{"role": "user", "content": QUESTION}])


@pytest.fixture(scope="module")
def answer(decoder: Decoder, prompt: list[int]) -> list[int]:
    return decoder.generate(prompt, max_new_tokens=NEW, stop=[]).tokens


def test_the_answer_is_the_function_asked_for(decoder: Decoder, answer: list[int]) -> None:
    assert decoder.tokenizer is not None
    text = decoder.tokenizer.decode(answer)
    assert "def factorial(n" in text
    assert "return" in text


def assert_greedy(answer: list[int], logits: np.ndarray, name: str) -> None:
    """``logits`` [NEW, V] are another implementation's, given the answer so far at every step."""
    top = np.sort(logits, axis=1)[:, -2:]
    for step, token in enumerate(answer):
        best = int(logits[step].argmax())
        margin = float(top[step, 1] - top[step, 0])
        assert token == best or margin < NEAR_TIE, (
            f"{name} diverges at token {step}: {best} instead of {token}, top-2 margin {margin:.2e}"
        )


def test_sixty_four_greedy_tokens_equal_flax(smollm2_gguf: Path, prompt: list[int], answer: list[int]) -> None:
    source = open_checkpoint(smollm2_gguf)
    model = Transformer.from_params(source.config, read_params(source, np.float32))
    text = jnp.asarray(prompt + answer, jnp.int32)
    logits = np.asarray(jax.jit(lambda tokens: model(tokens)[0])(text))[len(prompt) - 1 : -1]
    assert answer == logits.argmax(axis=1).tolist()


def test_sixty_four_greedy_tokens_equal_transformers(
    smollm2_gguf: Path, prompt: list[int], answer: list[int], tmp_path: Path
) -> None:
    source = open_checkpoint(smollm2_gguf)
    export_hf(source.config, source, tmp_path / "hf", dtype=np.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].numpy()[len(prompt) - 1 : -1]
    assert_greedy(answer, logits, "transformers")


def test_bfloat16_logits_stay_close(smollm2_gguf: Path, decoder: Decoder, prompt: list[int]) -> None:
    narrow = load(smollm2_gguf, dtype=jnp.bfloat16, context=256)
    exact = decoder.score(prompt, logits=True).logits
    rounded = narrow.score(prompt, logits=True).logits
    assert exact is not None
    assert rounded is not None
    # 30 layers round their activations to 8 bits of mantissa; logits have a standard deviation of several units.
    assert np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
    assert np.mean(exact.argmax(1) == rounded.argmax(1)) > 0.9
