"""The forward pass of training is that of inference, for every way in which lanes communicate."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mini_coder.forward import head_product, hidden, token_losses
from mini_coder.recipe import COMMUNICATIONS, LARGEST, flops_per_token, mini_coder, toy
from tiny import random_params

from jax_mono.config import ModelConfig
from jax_mono.models.transformer import Transformer
from jax_mono.plan import GPU, make_plan

TOKENS = np.random.default_rng(0).integers(0, 512, (2, 41)).astype(np.int32)


def expected_losses(config: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    model = Transformer.from_params(config, params)
    logits = jax.jit(jax.vmap(lambda row: model(row)[0]))(jnp.asarray(tokens[:, :-1]))
    logprobs = jax.nn.log_softmax(logits)
    return -np.take_along_axis(np.asarray(logprobs), tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize("communication", COMMUNICATIONS)
def test_losses_equal_inference(communication: str) -> None:
    config = toy(communication)
    params = random_params(config, seed=1)
    found = jax.jit(lambda p: token_losses(config, p, TOKENS, dtype=jnp.float32))(params)
    np.testing.assert_allclose(found, expected_losses(config, params, TOKENS), rtol=2e-5, atol=2e-5)


def test_losses_of_an_untied_model_in_bfloat16() -> None:
    config = toy().replace(tie_word_embeddings=False, num_layers=1, sliding_windows=(16,))
    params = random_params(config, seed=2)
    rounded = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params)
    master = jax.tree.map(lambda array: array.astype(jnp.float32), rounded)
    found = jax.jit(lambda p: token_losses(config, p, TOKENS))(master)
    expected = expected_losses(config, rounded, TOKENS)
    assert np.abs(found - expected).mean() < 0.02 * expected.mean()


def test_recomputing_modules_changes_no_gradient() -> None:
    config = toy().replace(num_layers=1, sliding_windows=(16,))
    params = random_params(config, seed=3)

    def gradient(remat: bool) -> dict:
        loss = lambda p: token_losses(config, p, TOKENS, dtype=jnp.float32, remat=remat).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for one, other in zip(jax.tree.leaves(gradient(False)), jax.tree.leaves(gradient(True)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_gradient_of_the_head() -> None:
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3, 8), (16, 8)))

    def loss(product, x: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(product(x, table)))

    found = jax.grad(loss, argnums=(1, 2))(head_product, x, table)
    expected = jax.grad(loss, argnums=(1, 2))(lambda x, table: x @ table.T, x, table)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_other_heads_are_refused() -> None:
    config = toy().replace(qk_norm=True)
    with pytest.raises(ValueError, match="qk_norm"):
        hidden(config, {}, TOKENS)


def test_mini_coder_fits() -> None:
    config = mini_coder()
    assert 2 * config.num_parameters + 50_000 < LARGEST  # with room for the header of the file
    assert [window > 0 for window in config.sliding_windows].count(True) * 3 == 2 * config.num_layers
    assert (config.hidden_size % 32, config.head_dim % 4, config.num_lanes) == (0, 0, 8)
    for devices in (1, 2, 4, 8):
        make_plan(config, devices=devices, blocks=40, target=GPU)


def test_operations_are_those_of_the_products() -> None:
    config = toy().replace(sliding_windows=(0, 0, 0))
    params = jax.tree.map(lambda array: array.astype(jnp.float32), random_params(config))
    length = 64
    compiled = jax.jit(lambda p, t: token_losses(config, p, t, dtype=jnp.float32)).lower(
        params, jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
    )
    counted = compiled.compile().cost_analysis()["flops"] / length
    # XLA counts all scores, visible or not, and everything that is no product.
    ours = flops_per_token(config, length) / 3.0
    assert 0.9 * ours < counted < 1.6 * ours
    assert flops_per_token(config, 1) == pytest.approx(
        6.0 * (config.num_parameters - config.hidden_size * (2 * config.num_layers + 1) + 2 * 128 * 3)
    )
    assert math.isclose(flops_per_token(toy(), 16), flops_per_token(config, 16))
