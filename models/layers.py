"""The mathematics of a layer, as pure functions on arrays.

All functions keep the lane axis, which is 1 long for dense models, and take the number of lanes and of heads
per lane from the weights: a device may hold only some of them. Heads and lanes of zeros add nothing.

Numerics: activations are float32. A matrix product rounds its activation to the dtype of the weights and
accumulates in float32. Queries are rounded to the dtype of the keys; attention probabilities stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from jax_mono.config import ModelConfig
from jax_mono.models.rope import apply_rope, rope_table

__all__ = [
    "apply_rope",
    "attend",
    "attention",
    "feed_forward",
    "logits",
    "mix",
    "project",
    "project_heads",
    "queries_keys_values",
    "rms_norm",
    "rope_table",
    "visible",
]

# Finite, so that a query that sees nothing (a position beyond the cache) gives a useless number and not NaN.
_HIDDEN = float(jnp.finfo(jnp.float32).min)


def _product(equation: str, activation: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation,
        activation.astype(weight.dtype),
        weight,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Divides by the root mean square of the last axis.

    Args:
        x: float32 [..., H].
        scale: [H], any floating dtype.
        eps: Added to the mean square.

    Returns:
        float32 [..., H].
    """
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * scale.astype(jnp.float32)


def project(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Applies every lane's matrix to the lane's activations.

    Args:
        x: float32 [lanes, T, in].
        weight: [lanes, out, in].
        bias: [lanes, out], or None.

    Returns:
        float32 [lanes, T, out].
    """
    y = _product("lti,loi->lto", x, weight)
    return y if bias is None else y + bias[:, None].astype(jnp.float32)


def visible(positions: jax.Array, length: int, window: int | jax.Array) -> jax.Array:
    """Which keys some queries see: that at position p if ``p <= t`` and, with a window, ``t - p < window``.

    Args:
        positions: int32 [T], positions t of the queries.
        length: Positions of the cache, S.
        window: How many positions (the own one included) are visible, may be traced; 0 means all.

    Returns:
        bool [T, S].
    """
    distance = positions[:, None] - jnp.arange(length, dtype=jnp.int32)
    return (distance >= 0) & ((window == 0) | (distance < window))


class Attend(Protocol):
    """A function that computes what :func:`attend` does."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | jax.Array, /
    ) -> jax.Array: ...


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, window: int | jax.Array) -> jax.Array:
    """Causal attention of some positions to a cache.

    Args:
        q: [T, Hq, hd], queries; heads that share a key/value head are neighbours.
        k: [Hkv, S, hd], keys by position; those of ``positions`` are already written.
        v: [Hkv, S, hd], values by position.
        positions: int32 [T], positions of the queries.
        window: As for :func:`visible`.

    Returns:
        float32 [T, Hq, hd].
    """
    tokens, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    scores = _product("tkgd,ksd->kgts", grouped, k) * head_dim**-0.5
    probabilities = jax.nn.softmax(jnp.where(visible(positions, length, window), scores, _HIDDEN), axis=-1)
    return _product("kgts,ksd->tkgd", probabilities, v.astype(jnp.float32)).reshape(q.shape)


def queries_keys_values(
    weights: Mapping[str, jax.Array], config: ModelConfig, x: jax.Array, rope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects the activations of all lanes present to heads, and rotates queries and keys.

    Args:
        weights: ``wq`` [lanes, heads * hd, H], ``wk`` and ``wv`` [lanes, kv_heads * hd, H]; if the model has them
            ``bq``, ``bk``, ``bv`` [lanes, rows] and ``q_norm``, ``k_norm`` [hd].
        config: The model; only ``head_dim``, ``norm_eps`` and ``rope_interleaved`` are used.
        x: float32 [lanes, T, H], already normalised.
        rope: float32 [T, hd / 2, 2], rotations at the tokens' positions.

    Returns:
        Queries, keys and values, float32 [T, lanes * heads, hd], heads lane-major.
    """

    def heads(name: str) -> jax.Array:
        y = project(x, weights[f"w{name}"], weights.get(f"b{name}"))
        lanes, tokens, width = y.shape
        y = y.reshape(lanes, tokens, width // config.head_dim, config.head_dim)
        return y.swapaxes(0, 1).reshape(tokens, -1, config.head_dim)

    q, k, v = heads("q"), heads("k"), heads("v")
    if "q_norm" in weights:
        q = rms_norm(q, weights["q_norm"], config.norm_eps)
        k = rms_norm(k, weights["k_norm"], config.norm_eps)
    return apply_rope(q, rope, config.rope_interleaved), apply_rope(k, rope, config.rope_interleaved), v


def project_heads(o: jax.Array, weight: jax.Array) -> jax.Array:
    """Applies every lane's output matrix to what its heads found.

    Args:
        o: float32 [T, lanes * heads, hd], heads lane-major.
        weight: ``wo``, [lanes, H, heads * hd].

    Returns:
        float32 [lanes, T, H].
    """
    return project(o.reshape(len(o), len(weight), -1).swapaxes(0, 1), weight)


def attention(
    weights: Mapping[str, jax.Array],
    config: ModelConfig,
    x: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    positions: jax.Array,
    rope: jax.Array,
    window: int | jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The attention module of all lanes present: projections, rotation, cache update, attention, output.

    Args:
        weights: As for :func:`queries_keys_values`, and ``wo`` [lanes, H, heads * hd].
        config: As for :func:`queries_keys_values`.
        x: float32 [lanes, T, H], already normalised.
        cache: Keys and values, each [lanes * kv_heads, S, hd] in the dtype of the weights.
        positions: int32 [T], where the tokens stand; those at or beyond S are not written.
        rope: float32 [T, hd / 2, 2], rotations at ``positions``.
        window: As for :func:`visible`.

    Returns:
        The module's output, float32 [lanes, T, H], and the updated cache.
    """
    q, k, v = queries_keys_values(weights, config, x, rope)
    keys = cache[0].at[:, positions].set(k.swapaxes(0, 1).astype(cache[0].dtype), mode="drop")
    values = cache[1].at[:, positions].set(v.swapaxes(0, 1).astype(cache[1].dtype), mode="drop")
    return project_heads(attend(q, keys, values, positions, window), weights["wo"]), (keys, values)


def feed_forward(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """The SwiGLU module of all lanes present: ``w2 (silu(w1 x) * w3 x)``.

    Args:
        weights: ``w1`` and ``w3`` [lanes, F, H], ``w2`` [lanes, H, F].
        x: float32 [lanes, T, H], already normalised.

    Returns:
        float32 [lanes, T, H].
    """
    return project(jax.nn.silu(project(x, weights["w1"])) * project(x, weights["w3"]), weights["w2"])


def mix(x: jax.Array, own: jax.Array, arriving: jax.Array | None, own_scale: float) -> jax.Array:
    """Adds to every lane its own output and what the other lanes sent.

    Args:
        x: float32 [lanes, T, H], residual streams.
        own: float32 [lanes, T, H], the module's outputs in this layer.
        arriving: float32 [lanes, T, H], the module's outputs in the layer that arrives now, or None.
        own_scale: Factor on a lane's own output.

    Returns:
        float32 [lanes, T, H].
    """
    x = x + own_scale * own
    return x if arriving is None else x + (jnp.sum(arriving, axis=0) - arriving)


def logits(config: ModelConfig, scale: jax.Array, table: jax.Array, x: jax.Array) -> jax.Array:
    """The final norm and the LM head, in the way that the model joins its lanes.

    Args:
        config: The model; ``norm_eps`` and ``lanes.head`` matter.
        scale: [H], the final norm.
        table: [V, H], the LM head or the tied embedding.
        x: float32 [lanes, T, H], residual streams after the last layer.

    Returns:
        float32 [T, V].
    """
    lanes, tokens, hidden = x.shape
    head = "mean_of_norms" if config.lanes is None else config.lanes.head
    if head == "per_lane":
        normed = rms_norm(x, scale, config.norm_eps)
        return _product("lth,lvh->tlv", normed, table.reshape(lanes, -1, hidden)).reshape(tokens, -1)
    if head == "norm_of_sum":
        joined = rms_norm(jnp.sum(x, axis=0), scale, config.norm_eps)
    else:
        joined = jnp.mean(rms_norm(x, scale, config.norm_eps), axis=0)
    return _product("th,vh->tv", joined, table)
