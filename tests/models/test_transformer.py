"""The modules: parameter tree, caches, chunks, dtypes, tracing, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_params, tiny

from jax_mono.config import Lanes, ModelConfig
from jax_mono.models.transformer import KVCache, Transformer, abstract_params, params

CONFIGS = {
    "plain": tiny("llama", num_layers=2, sliding_windows=(4, 0)),
    "bias-norm-tied": tiny("qwen3", num_layers=2, sliding_windows=(4, 0), qkv_bias=True),
    "lanes": tiny("laneformer", num_layers=3),
}
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 128, 15))


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> Transformer:
    return Transformer.from_params(config, random_params(config, seed=2))


@nnx.jit
def prefill(model: Transformer, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
    return model(tokens)


@nnx.jit
def step(model: Transformer, tokens: jax.Array, cache: KVCache, start: int | jax.Array) -> tuple[jax.Array, KVCache]:
    return model(tokens, cache, start)


@pytest.fixture(scope="module")
def prefilled(model: Transformer) -> tuple[jax.Array, KVCache]:
    """Logits of all tokens at once, and their cache."""
    return prefill(model, TOKENS)


def test_token_by_token_equals_prefill(
    config: ModelConfig, model: Transformer, prefilled: tuple[jax.Array, KVCache]
) -> None:
    expected, filled = prefilled
    cache = KVCache.zeros(config, 20, jnp.float32)
    for t, token in enumerate(TOKENS):
        logits, cache = step(model, token[None], cache, t)
        np.testing.assert_allclose(logits[0], expected[t], atol=1e-4)
    np.testing.assert_allclose(cache.k[:, :, : len(TOKENS)], filled.k, atol=1e-4)
    np.testing.assert_allclose(cache.v[:, :, : len(TOKENS)], filled.v, atol=1e-4)
    assert not cache.k[:, :, len(TOKENS) :].any()


def test_prefill_in_chunks(config: ModelConfig, model: Transformer, prefilled: tuple[jax.Array, KVCache]) -> None:
    cache = KVCache.zeros(config, len(TOKENS), jnp.float32)
    parts = []
    for start in range(0, len(TOKENS), 5):
        logits, cache = step(model, TOKENS[start : start + 5], cache, start)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts), prefilled[0], atol=1e-4)
    np.testing.assert_allclose(cache.k, prefilled[1].k, atol=1e-4)


def test_what_a_used_cache_holds_at_later_positions_does_not_matter(
    model: Transformer, prefilled: tuple[jax.Array, KVCache]
) -> None:
    used = jax.tree.map(lambda array: jnp.full_like(array, 3.0), prefilled[1])
    np.testing.assert_allclose(step(model, TOKENS[:5], used, 0)[0], prefilled[0][:5], atol=1e-4)


def test_positions_beyond_the_cache_are_dropped(
    config: ModelConfig, model: Transformer, prefilled: tuple[jax.Array, KVCache]
) -> None:
    logits, cache = step(model, TOKENS, KVCache.zeros(config, 10, jnp.float32), 0)
    assert cache.length == 10
    np.testing.assert_allclose(logits[:10], prefilled[0][:10], atol=1e-4)
    np.testing.assert_allclose(cache.k, prefilled[1].k[:, :, :10], atol=1e-4)
    assert np.isfinite(logits).all()


def test_bfloat16_is_close_to_float32(config: ModelConfig) -> None:
    rounded = random_params(config, seed=2, dtype=jnp.bfloat16)
    exact = jax.tree.map(lambda array: array.astype(jnp.float32), rounded)
    expected, _ = prefill(Transformer.from_params(config, exact), TOKENS)
    logits, cache = prefill(Transformer.from_params(config, rounded), TOKENS)
    assert logits.dtype == jnp.float32
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16
    error = np.asarray(logits - expected)
    assert np.abs(error).max() < 0.15 * np.asarray(expected).std() + 0.05
    assert np.sqrt((error**2).mean()) < 0.02 * np.asarray(expected).std()


def test_parameters_are_the_canonical_tree(config: ModelConfig) -> None:
    model = Transformer(config, dtype=jnp.bfloat16)
    assert model.embed.dtype == jnp.bfloat16
    tree = params(model)
    described = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)
    assert described == abstract_params(config, jnp.bfloat16)
    assert sum(array.size for array in jax.tree.leaves(tree)) == config.num_parameters

    lanes = config.num_lanes
    q, kv = config.num_heads // lanes * config.head_dim, config.num_kv_heads // lanes * config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size // lanes
    attention = {
        "wq": (lanes, q, hidden),
        "wk": (lanes, kv, hidden),
        "wv": (lanes, kv, hidden),
        "wo": (lanes, hidden, q),
    }
    if config.qkv_bias:
        attention |= {"bq": (lanes, q), "bk": (lanes, kv), "bv": (lanes, kv)}
    if config.qk_norm:
        attention |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    layer = {
        "attention_norm": (hidden,),
        "attention": attention,
        "ffn_norm": (hidden,),
        "feed_forward": {"w1": (lanes, ffn, hidden), "w3": (lanes, ffn, hidden), "w2": (lanes, hidden, ffn)},
    }
    expected = {
        "embed": (config.vocab_size, hidden),
        "layers": dict.fromkeys(range(config.num_layers), layer),
        "norm": (hidden,),
    }
    if not config.tie_word_embeddings:
        expected["lm_head"] = (config.vocab_size, hidden)
    assert jax.tree.map(lambda array: array.shape, tree) == expected


def test_from_params_shares_arrays_and_gives_them_back(config: ModelConfig) -> None:
    given = random_params(config)
    back = params(Transformer.from_params(config, given))
    assert all(a is b for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(back), strict=True))


def test_from_params_works_on_tracers_and_on_shapes(config: ModelConfig, prefilled: tuple[jax.Array, KVCache]) -> None:
    traced = jax.jit(lambda params, tokens: Transformer.from_params(config, params)(tokens)[0])
    np.testing.assert_allclose(traced(random_params(config, seed=2), TOKENS), prefilled[0], atol=1e-4)
    abstract = abstract_params(config, jnp.bfloat16)
    assert params(Transformer.from_params(config, abstract)) == abstract
    shape = jax.eval_shape(traced, abstract, TOKENS)
    assert (shape.shape, shape.dtype) == ((len(TOKENS), config.vocab_size), jnp.float32)


def test_random_models_are_not_degenerate(config: ModelConfig) -> None:
    model = Transformer(config)
    logits = np.asarray(prefill(model, TOKENS)[0])
    assert 0.3 < logits.std() < 3
    assert logits.std(axis=0).mean() > 0.3, "all positions say the same"
    # Something depends on the past: the same last token after another text gives other logits.
    other = np.asarray(prefill(model, TOKENS.at[:-1].set(TOKENS[:-1][::-1]))[0])
    assert np.abs(other[-1] - logits[-1]).max() > 0.1
    reseeded = np.asarray(prefill(Transformer(config, rngs=nnx.Rngs(1)), TOKENS)[0])
    assert np.abs(reseeded - logits).max() > 0.1


def test_all_parameters_have_gradients(config: ModelConfig) -> None:
    def loss(tree: dict) -> jax.Array:
        logits, _ = Transformer.from_params(config, tree)(TOKENS[:-1])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[1:, None], axis=1))

    gradients = jax.jit(jax.grad(loss))(random_params(config))
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        # A key bias acts through the rotation only: a small gradient, but not zero.
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


def test_unsuitable_parameters_are_named() -> None:
    config = tiny("llama")
    given = random_params(config)
    del given["layers"][1]["ffn_norm"]
    given["layers"][0]["attention"]["bq"] = jnp.zeros((1, 64))
    given["lm_head"] = given["lm_head"][:, :-1]
    with pytest.raises(ValueError) as error:
        Transformer.from_params(config, given)
    assert "['layers'][1]['ffn_norm'] is missing" in str(error.value)
    assert "['layers'][0]['attention']['bq'] is not part" in str(error.value)
    assert "['lm_head'] has shape (128, 63), must be (128, 64)" in str(error.value)


def test_unsuitable_inputs_are_refused() -> None:
    config = tiny("llama")
    model = Transformer.from_params(config, random_params(config))
    with pytest.raises(ValueError, match="one sequence"):
        model(TOKENS[None])
    with pytest.raises(ValueError, match=r"cache\.k has shape .* needs \(3, 2, 8, 16\)"):
        model(TOKENS, KVCache.zeros(config.replace(head_dim=32), 8, jnp.float32))


def test_cache_is_a_pytree() -> None:
    config = tiny("laneformer", lanes=Lanes(count=2))
    cache = KVCache.zeros(config, 9, jnp.bfloat16)
    assert cache.length == 9
    doubled = jax.tree.map(lambda array: array[None], cache)
    assert isinstance(doubled, KVCache) and doubled.v.shape == (1, 5, 8, 9, 8)
