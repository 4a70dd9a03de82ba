"""Attention by cuDNN's kernel computes what the reference does; here XLA's takes its place, which needs no GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mono import fused_attention
from jax_mono.models.layers import attend

ATTEND = fused_attention.attend_within((0, 7, 6, 100))

HEADS, KV_HEADS, SIZE, CAPACITY = 4, 2, 8, 64


@pytest.fixture(autouse=True)
def xla_in_its_place(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns lengths of the caches that were attended to, as they are traced."""
    lengths, original = [], jax.nn.dot_product_attention

    def stand_in(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        lengths.append(key.shape[1])
        return original(query, key, value, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return lengths


def operands(devices: int, tokens: int, first: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (devices, tokens, HEADS, SIZE))
    k, v = (jax.random.normal(key, (devices, KV_HEADS, CAPACITY, SIZE)) for key in keys[1:])
    return q, k, v, jnp.arange(first, first + tokens)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("first", [0, 5, 20, 40])
def test_it_is_the_reference(first: int, window: int) -> None:
    """Whatever part of the cache is attended to."""
    q, k, v, positions = operands(1, 8, first)
    found = ATTEND(q[0], k[0], v[0], positions, jnp.int32(window))
    np.testing.assert_allclose(found, attend(q[0], k[0], v[0], positions, window), atol=1e-6)


def test_devices_stand_side_by_side() -> None:
    q, k, v, positions = operands(3, 8, 9)
    fused, reference = (
        jax.vmap(function, in_axes=(0, 0, 0, None, None))(q, k, v, positions, jnp.int32(6))
        for function in (ATTEND, attend)
    )
    np.testing.assert_allclose(fused, reference, atol=1e-6)


def test_a_short_conversation_is_not_attended_to_as_a_long_one(xla_in_its_place: list[int]) -> None:
    """Every half is compiled for, as far as the tokens fit; padding beyond the cache does not count."""
    q, k, v, positions = operands(1, 16, 0)
    padded = jnp.where(positions < 10, positions, CAPACITY)
    found = ATTEND(q[0], k[0], v[0], padded, 0)
    assert xla_in_its_place == [64, 32, 16, 16, 16, 16]  # the last three for what begins a conversation
    np.testing.assert_allclose(found[:10], attend(q[0], k[0], v[0], positions, 0)[:10], atol=1e-6)


@pytest.mark.parametrize("window", [0, 7])
def test_more_tokens_than_the_cache_has_room_for(window: int) -> None:
    """Those beyond it are padding, and keep to themselves."""
    q, k, v, positions = operands(1, CAPACITY + 8, 0)
    found = ATTEND(q[0], k[0], v[0], jnp.minimum(positions, CAPACITY), jnp.int32(window))[:CAPACITY]
    expected = attend(q[0, :CAPACITY], k[0], v[0], positions[:CAPACITY], window)
    np.testing.assert_allclose(found, expected, atol=1e-6)
