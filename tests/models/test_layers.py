"""Single functions: norms, rotation, masks, cache writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, tiny

from jax_mono.config import RopeScaling
from jax_mono.models import layers


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_rms_norm() -> None:
    x, scale = normal(0, 2, 3, 8), normal(1, 8)
    expected = np.asarray(x, np.float64)
    expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    np.testing.assert_allclose(layers.rms_norm(x, scale, 1e-5), expected, atol=1e-6)
    assert layers.rms_norm(x, scale.astype(jnp.bfloat16), 1e-5).dtype == jnp.float32


def test_rope_table_keeps_its_precision_far_out() -> None:
    table = layers.rope_table(tiny("llama", rope_theta=1e6), 100_000)
    assert table.shape == (100_000, 8, 2)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[99_999, 0], [np.cos(99_999.0), np.sin(99_999.0)], atol=1e-7)


def test_linear_scaling_divides_positions() -> None:
    plain = layers.rope_table(tiny("llama"), 20)
    stretched = layers.rope_table(tiny("llama", rope_scaling=RopeScaling(kind="linear", factor=4.0)), 80)
    np.testing.assert_allclose(stretched[::4], plain, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotated_scores_depend_on_distance_only(interleaved: bool) -> None:
    table = jnp.asarray(layers.rope_table(tiny("llama"), 64))
    q, k = normal(0, 1, 1, 16), normal(1, 1, 1, 16)

    def score(t: int, p: int) -> float:
        rotated = (
            layers.apply_rope(q, table[t : t + 1], interleaved),
            layers.apply_rope(k, table[p : p + 1], interleaved),
        )
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(40, 33) == pytest.approx(score(7, 0), abs=1e-5)
    assert score(40, 33) != pytest.approx(score(8, 0), abs=1e-2)


def test_interleaved_rotation_is_the_other_one_on_permuted_channels() -> None:
    table = jnp.asarray(layers.rope_table(tiny("llama"), 5))
    x = normal(0, 5, 3, 16)
    permuted = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    halves = layers.apply_rope(permuted, table, interleaved=False)
    expected = jnp.stack([halves[..., :8], halves[..., 8:]], axis=-1).reshape(x.shape)
    np.testing.assert_allclose(layers.apply_rope(x, table, interleaved=True), expected, atol=1e-6)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("traced", [True, False])
def test_attend_sees_exactly_the_window(window: int, traced: bool) -> None:
    """Changing a key or value changes the output if and only if its position is visible."""
    positions = jnp.asarray([4, 7])
    q, k, v = normal(0, 2, 4, 8), normal(1, 2, 10, 8), normal(2, 2, 10, 8)
    attend = jax.jit(layers.attend) if traced else layers.attend
    base = attend(q, k, v, positions, window)
    for p in range(10):
        changed = np.asarray(attend(q, k.at[:, p].add(1.0), v.at[:, p].add(1.0), positions, window) != base)
        for row, t in enumerate([4, 7]):
            assert changed[row].any() == (p <= t and (window == 0 or t - p < window)), (p, t)


def test_attend_groups_neighbouring_query_heads() -> None:
    q, k, v = normal(0, 3, 6, 8), normal(1, 2, 3, 8), normal(2, 2, 3, 8)
    repeated = layers.attend(q, jnp.repeat(k, 3, axis=0), jnp.repeat(v, 3, axis=0), jnp.arange(3), 0)
    np.testing.assert_allclose(layers.attend(q, k, v, jnp.arange(3), 0), repeated, atol=1e-6)


def test_attention_writes_the_cache_at_its_positions_and_drops_the_rest() -> None:
    config = tiny("qwen3")
    weights = random_params(config)["layers"][0]["attention"]
    rope = jnp.asarray(layers.rope_table(config, 16))
    x, full = normal(0, 1, 5, config.hidden_size), jnp.full((2, 8, config.head_dim), 9.0)
    positions = jnp.arange(6, 11)  # 8, 9 and 10 do not fit
    o, (k, v) = layers.attention(weights, config, x, (full, full), positions, rope[positions], 3)
    assert np.isfinite(o).all()
    for cache in (k, v):
        np.testing.assert_array_equal(cache[:, :6], 9.0)
        assert (np.asarray(cache[:, 6:]) != 9.0).all()
    roomy = jnp.full((2, 16, config.head_dim), 9.0)
    expected, (k_roomy, _) = layers.attention(weights, config, x, (roomy, roomy), positions, rope[positions], 3)
    np.testing.assert_array_equal(k, k_roomy[:, :8])
    np.testing.assert_allclose(o[:, :2], expected[:, :2], atol=1e-6)


def test_products_round_activations_to_the_weights() -> None:
    """A bfloat16 product equals a float32 one of rounded operands, up to the order of the sum."""
    x, weight = normal(0, 2, 3, 64), normal(1, 2, 16, 64).astype(jnp.bfloat16)
    rounded = x.astype(jnp.bfloat16).astype(jnp.float32)
    expected = layers.project(rounded, weight.astype(jnp.float32))
    actual = layers.project(x, weight)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert float(jnp.abs(actual - layers.project(x, weight.astype(jnp.float32))).max()) > 1e-3
