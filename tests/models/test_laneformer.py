"""The Laneformer computes what an independent float64 implementation computes, for every switch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import laneformer_numpy
from tiny import random_params, tiny

from jax_mono.config import Lanes, ModelConfig
from jax_mono.models import layers
from jax_mono.models.source import Params
from jax_mono.models.transformer import Transformer

TOKENS = np.random.default_rng(7).integers(0, 32, 9)


def small(lanes: Lanes, **overrides: object) -> ModelConfig:
    """Small enough for loops in Python; windows are shorter than the text."""
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "head_dim": 4,
        "max_position_embeddings": 32,
    }
    windows = {"sliding_windows": (4, 1, 0, 3, 0), "num_layers": 5}
    return tiny("laneformer", lanes=lanes, **(sizes | windows | overrides))


@functools.cache
def weights(config: ModelConfig) -> Params:
    """Weights that depend on shapes only, so that a switch cannot hide behind other weights."""
    return random_params(config, seed=3)


def switches() -> Iterator[Lanes]:
    """All of count, delay, early switches and scale; heads and communication take turns.

    With one lane, and with a delay of 0, the early switches and the scale mean nothing.
    """
    communication = itertools.cycle([(True, True), (True, False), (True, True), (False, True), (False, False)])
    heads = itertools.cycle(["mean_of_norms", "norm_of_sum", "per_lane"])
    every = itertools.product((1, 2, 4, 8), (0, 1, 2, 3), (True, False), (True, False), ("sqrt_lanes", "one"))
    for count, delay, early, broadcast, scale in every:
        if (count == 1 or delay == 0) and (early, broadcast, scale) != (False, False, "sqrt_lanes"):
            continue
        attention_comm, mlp_comm = next(communication)
        yield Lanes(
            count=count,
            delay=delay,
            early_comm=early,
            early_layers_broadcast=broadcast,
            own_scale=scale,
            attention_comm=attention_comm,
            mlp_comm=mlp_comm,
            head=next(heads),
        )


def assert_equal_to_reference(config: ModelConfig) -> None:
    params = weights(config)
    expected_logits, expected_streams = laneformer_numpy.forward(config, params, TOKENS)
    model = Transformer.from_params(config, params)
    streams, _ = model.residual_streams(jnp.asarray(TOKENS))
    np.testing.assert_allclose(streams, expected_streams, atol=1e-4)
    np.testing.assert_allclose(model.head(streams[-1]), expected_logits, atol=1e-4)


@pytest.mark.parametrize(("count", "cases"), [(1, 4), (2, 25), (4, 25), (8, 25)])
def test_every_switch(count: int, cases: int) -> None:
    selected = [lanes for lanes in switches() if lanes.count == count]
    assert len(selected) == cases
    for lanes in selected:
        assert_equal_to_reference(small(lanes))


def test_the_cases_hold_every_combination_of_two_switches() -> None:
    values = [dataclasses.asdict(lanes) for lanes in switches() if lanes.count > 1 and lanes.delay > 0]
    for a, b in itertools.combinations(values[0], 2):
        expected = len({value[a] for value in values}) * len({value[b] for value in values})
        assert len({(value[a], value[b]) for value in values}) == expected, (a, b)


@pytest.mark.parametrize("head", ["mean_of_norms", "norm_of_sum", "per_lane"])
@pytest.mark.parametrize("tied", [True, False])
def test_heads(head: str, tied: bool) -> None:
    assert_equal_to_reference(small(Lanes(count=4, head=head), tie_word_embeddings=tied))


def test_half_rotation_and_full_attention() -> None:
    assert_equal_to_reference(small(Lanes(count=2), rope_interleaved=False, sliding_windows=(0,) * 5))


def test_delay_beyond_the_last_layer() -> None:
    assert_equal_to_reference(small(Lanes(count=2, delay=9)))


def test_switches_change_the_result() -> None:
    """The comparison above would be blind to a switch that did nothing in both implementations."""

    def logits(**changes: object) -> np.ndarray:
        config = small(Lanes(count=4, delay=2, **changes))
        return laneformer_numpy.forward(config, weights(config), TOKENS)[0]

    base = logits()
    alone = logits(early_comm=False)
    assert np.abs(base - alone).max() > 0.1
    assert np.abs(alone - logits(early_comm=False, own_scale="one")).max() > 0.1
    for change in (
        {"early_layers_broadcast": False},
        {"attention_comm": False},
        {"mlp_comm": False},
        {"head": "norm_of_sum"},
        {"head": "per_lane"},
    ):
        assert np.abs(base - logits(**change)).max() > 0.1, change


def test_delay_zero_equals_the_dense_model() -> None:
    """Lanes that exchange everything at once are one model, cut in pieces."""
    lanes = small(Lanes(count=4, delay=0))
    params = weights(lanes)
    dense = lanes.replace(family="llama", lanes=None)

    def whole(name: str, matrix: jax.Array) -> jax.Array:
        if name in ("wo", "w2"):
            matrix = matrix.swapaxes(0, 1)
            return matrix.reshape(1, matrix.shape[0], -1)
        return matrix.reshape(1, -1, matrix.shape[-1])

    dense_params = params | {
        "layers": {
            n: layer
            | {
                module: {name: whole(name, matrix) for name, matrix in layer[module].items()}
                for module in ("attention", "feed_forward")
            }
            for n, layer in params["layers"].items()
        }
    }
    tokens = jnp.asarray(TOKENS)
    expected, _ = Transformer.from_params(dense, dense_params)(tokens)
    actual, _ = Transformer.from_params(lanes, params)(tokens)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_a_device_may_hold_some_lanes_filled_up_with_zeros() -> None:
    config = small(Lanes(count=4))
    attention = weights(config)["layers"][0]["attention"]
    tokens, length, head_dim = len(TOKENS), 16, config.head_dim
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, tokens, config.hidden_size)), jnp.float32)
    positions = jnp.arange(tokens)
    rope = jnp.asarray(layers.rope_table(config, tokens))

    def run(part: Params, x: jax.Array, kv_heads: int) -> jax.Array:
        empty = jnp.zeros((kv_heads, length, head_dim), jnp.float32)
        return jax.jit(layers.attention, static_argnums=1)(part, config, x, (empty, empty), positions, rope, 4)[0]

    everything = run(attention, x, config.num_kv_heads)
    two = {name: array[1:3] for name, array in attention.items()}
    np.testing.assert_allclose(run(two, x[1:3], config.num_kv_heads // 2), everything[1:3], atol=1e-6)

    # One more head group per lane and one more lane, all of zeros.
    group = config.num_heads // config.num_kv_heads * head_dim
    padding = {"wq": (group, 0), "wk": (head_dim, 0), "wv": (head_dim, 0), "wo": (0, group)}
    padded = {name: jnp.pad(two[name], ((0, 1), (0, rows), (0, columns))) for name, (rows, columns) in padding.items()}
    kv_heads = padded["wk"].shape[0] * padded["wk"].shape[1] // head_dim
    result = run(padded, x[1:4], kv_heads)
    np.testing.assert_allclose(result[:2], everything[1:3], atol=1e-6)
    np.testing.assert_array_equal(result[2], 0)
