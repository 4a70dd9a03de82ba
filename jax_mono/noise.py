"""Random weights made where they are needed: element by element, without a host and without temporary memory.

``jax.random`` would do, but on GPUs its generator holds several 32-bit words per value in memory, which for billions of
16-bit weights is many times their size. A hash of the element's number is part of whatever XLA fuses it with, and each
device of a sharding computes its own part.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

_SQRT_12 = 12.0**0.5
"""One over the standard deviation of a uniform distribution of width one."""


def mix(words: Array) -> Array:
    """The finaliser of MurmurHash3 (Austin Appleby, public domain): every bit of the input reaches every bit.

    Args:
        words: uint32, any shape.

    Returns:
        uint32 of the same shape.
    """
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def noise(shape: Sequence[int], seed: int | Array) -> Array:
    """Uniform random numbers of mean zero and unit variance, none of them zero.

    Elements are numbered along all axes but the first; every index of that has a seed of its own. So the first axis may
    be long, and the others together have up to 2^32 elements.

    Args:
        shape: At least two axes.
        seed: Same seed, same numbers; may be traced.

    Returns:
        float32 of that shape.
    """
    first = jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    number = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape[1:], 1):
        number = number * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    row = mix(mix(jnp.asarray(seed, jnp.uint32) + jnp.uint32(0x9E3779B9)) + first)
    bits = mix(mix(number ^ row) + row)
    # An odd number of 2^-24ths, moved by half, is never zero, and exact in float32.
    return ((bits >> 8 | 1).astype(jnp.float32) * 2.0**-24 - 0.5) * _SQRT_12
