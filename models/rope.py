"""Rotary position embedding: a table of angles made once on the host, and the rotation that uses it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono.config import ModelConfig, RopeScaling


def rope_table(config: ModelConfig, length: int) -> np.ndarray:
    """Computes the rotation of every pair of head channels at every position.

    Angles are computed in float64, because float32 loses their fraction at long contexts.

    Args:
        config: The model; ``head_dim``, ``rope_theta`` and ``rope_scaling`` matter.
        length: Number of positions, counted from 0.

    Returns:
        float32 [length, head_dim / 2, 2]: cosine and sine, under ``yarn`` times the attention factor.
    """
    pairs = np.arange(config.head_dim // 2, dtype=np.float64)
    frequencies = config.rope_theta ** (-2.0 * pairs / config.head_dim)  # radians per position
    magnitude = 1.0
    scaling = config.rope_scaling
    if scaling is not None:
        if scaling.kind == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling.kind == "llama3":
            frequencies = _llama3(frequencies, scaling)
        else:
            frequencies = _yarn(frequencies, scaling, config)
            magnitude = scaling.attention_factor
            if magnitude is None:
                magnitude = 0.1 * math.log(scaling.factor) + 1.0
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    return (magnitude * np.stack([np.cos(angles), np.sin(angles)], axis=-1)).astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divides low frequencies by the factor, keeps high ones, blends linearly in between."""
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.where(rotations >= high, 1.0, 0.0)
    if high > low:
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (kept + (1.0 - kept) / scaling.factor) * frequencies


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, config: ModelConfig) -> np.ndarray:
    """Like :func:`_llama3`, but the blend is linear in the number of the pair, between whole numbers."""

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first = max(math.floor(pair_with(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_with(scaling.beta_slow)), config.head_dim - 1)
    # Equal ends make a step; the published implementation widens it by the same small number.
    width = last - first or 0.001
    interpolated = np.clip((np.arange(len(frequencies)) - first) / width, 0.0, 1.0)
    return (1.0 - interpolated + interpolated / scaling.factor) * frequencies


def apply_rope(x: jax.Array, table: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates the channel pairs of every head.

    Args:
        x: float32 [T, heads, head_dim].
        table: float32 [T, head_dim / 2, 2], the rows of :func:`rope_table` at the positions of ``x``.
        interleaved: True rotates channels (2i, 2i + 1), False channels (i, i + head_dim / 2).

    Returns:
        float32 [T, heads, head_dim].
    """
    axis = -1 if interleaved else -2
    pairs = x.reshape(*x.shape[:-1], -1, 2) if interleaved else x.reshape(*x.shape[:-1], 2, -1)
    cos, sin = (jnp.expand_dims(table[:, None, :, part], axis) for part in (0, 1))
    signs = jnp.expand_dims(jnp.array([-1.0, 1.0], x.dtype), -2 if interleaved else -1)
    # Pairs as a whole, not taken apart and put together, which XLA does in passes of their own.
    return (pairs * cos + jnp.flip(pairs, axis) * (sin * signs)).reshape(x.shape)
