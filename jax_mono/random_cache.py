"""A conversation that nobody held: keys and values to measure decoding behind, without computing a prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jax_mono.decode import Cache
from jax_mono.decoder import Decoder
from jax_mono.noise import noise

Array = jax.Array


def random_cache(decoder: Decoder, length: int, seed: int = 0) -> Cache:
    """Makes a cache in which a conversation stands at a position.

    Args:
        decoder: Whose cache.
        length: Tokens of the conversation, all of them fed; below the decoder's context.
        seed: Same seed, same cache.

    Returns:
        The cache; keys and values are random numbers of unit variance.

    Raises:
        ValueError: No token would fit behind so many.
    """
    if not 0 <= length < decoder.context:
        raise ValueError(f"a conversation of {length} tokens must be shorter than the context of {decoder.context}")
    empty = decoder.new_cache()
    where, tree = jax.tree.flatten(jax.tree.map(lambda array: array.sharding, empty))
    fill = _filler(decoder.tapes.dtype.name, decoder.plan.config.vocab_size, tuple(where), tree)
    return fill(empty, np.int32(length), np.uint32(seed))


@functools.lru_cache(maxsize=8)
def _filler(dtype: str, vocab: int, where: tuple[Sharding, ...], tree: jax.tree_util.PyTreeDef) -> Callable[..., Cache]:
    """One function for all lengths and seeds; kept, so that it is compiled once."""
    return jax.jit(functools.partial(_fill, dtype=dtype, vocab=vocab), out_shardings=jax.tree.unflatten(tree, where))


def _fill(empty: Cache, length: Array, seed: Array, *, dtype: str, vocab: int) -> Cache:
    def drawn(like: Array, number: int) -> Array:
        values = noise(like.shape, 2 * seed + number).astype(dtype)
        return values if like.dtype == dtype else jax.lax.bitcast_convert_type(values, like.dtype)

    places = jnp.arange(empty.capacity, dtype=jnp.int32)
    tokens = jnp.where(places < length, places % vocab, -1)
    return replace(empty, k=drawn(empty.k, 0), v=drawn(empty.v, 1), tokens=tokens, end=length, fed=length)
