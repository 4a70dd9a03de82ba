"""The model for training: many sequences at once, all positions at once, no cache.

The same parameters and the same mathematics as ``jax_mono.models.transformer``; in float32 the logits agree to rounding
(``tests/train/test_forward.py``). What differs: the projections of a module that read the same activations are one
product, attention never stores the matrix of scores where a fused kernel is there, and in bfloat16 the outputs of
products, and the gradients that enter them, are rounded to bfloat16.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_mono.config import ModelConfig, Module
from jax_mono.models import layers
from jax_mono.models.rope import apply_rope, rope_table

Weights = Mapping[str, jax.Array]


def _einsum(equation: str, one: jax.Array, other: jax.Array, result: DTypeLike) -> jax.Array:
    # GPUs would round float32 operands; bfloat16 ones are exact as they are.
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jnp.einsum(equation, one, other, precision=precision, preferred_element_type=result)


def _product(equation: str, activation: jax.Array, weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    return _einsum(equation, activation.astype(dtype), weight.astype(dtype), dtype)


def attention(
    weights: Weights,
    config: ModelConfig,
    x: jax.Array,
    rope: jax.Array,
    window: int,
    *,
    dtype: DTypeLike,
    implementation: Literal["cudnn", "xla"],
) -> jax.Array:
    """The attention module of all lanes; see :func:`jax_mono.models.layers.attention`.

    Args:
        weights: ``wq``, ``wk``, ``wv`` and ``wo`` [lanes, out, in].
        config: The model.
        x: float32 [lanes, B, T, H], already normalised.
        rope: float32 [T, hd / 2, 2].
        window: How many positions are visible; 0 means all.
        dtype: Of products.
        implementation: Of :func:`jax.nn.dot_product_attention`.

    Returns:
        [lanes, B, T, H] in ``dtype``.
    """
    lanes, batch, length, _ = x.shape
    stacked = jnp.concatenate([weights["wq"], weights["wk"], weights["wv"]], axis=1)
    y = _product("lbti,loi->btlo", x, stacked, dtype)
    q_width, k_width = weights["wq"].shape[1], weights["wk"].shape[1]

    def heads(first: int, stop: int) -> jax.Array:
        return y[..., first:stop].reshape(batch, length, -1, config.head_dim)

    q = apply_rope(heads(0, q_width).astype(jnp.float32), rope, config.rope_interleaved).astype(dtype)
    k = heads(q_width, q_width + k_width).astype(jnp.float32)
    k = apply_rope(k, rope, config.rope_interleaved).astype(dtype)
    v = heads(q_width + k_width, y.shape[-1])
    o = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=implementation,
    )
    return _product("btli,loi->lbto", o.reshape(batch, length, lanes, -1), weights["wo"], dtype)


def feed_forward(weights: Weights, x: jax.Array, *, dtype: DTypeLike) -> jax.Array:
    """The SwiGLU module of all lanes; see :func:`jax_mono.models.layers.feed_forward`.

    Args:
        weights: ``w1``, ``w3`` and ``w2`` [lanes, out, in].
        x: float32 [lanes, B, T, H], already normalised.
        dtype: Of products.

    Returns:
        [lanes, B, T, H] in ``dtype``.
    """
    both = _product("lbti,loi->lbto", x, jnp.concatenate([weights["w1"], weights["w3"]], axis=1), dtype)
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    return _product("lbti,loi->lbto", jax.nn.silu(gate) * up, weights["w2"], dtype)


def hidden(
    config: ModelConfig,
    params: Mapping[Any, Any],
    tokens: jax.Array,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Literal["cudnn", "xla"] = "xla",
    remat: bool = False,
) -> jax.Array:
    """Runs all layers and joins the lanes.

    Args:
        config: A model whose head is ``mean_of_norms``.
        params: The canonical tree, float32.
        tokens: int32 [B, T].
        dtype: Of products: float32 or bfloat16.
        implementation: Of :func:`jax.nn.dot_product_attention`.
        remat: Whether modules are computed again for their gradients.

    Returns:
        float32 [B, T, H], what the LM head multiplies.

    Raises:
        ValueError: The model has another head, or biases or norms that training does not know.
    """
    if (config.lanes and config.lanes.head != "mean_of_norms") or config.qkv_bias or config.qk_norm:
        raise ValueError("training knows models with the head mean_of_norms, without qkv_bias and qk_norm")
    rope = jnp.asarray(rope_table(config, tokens.shape[1]))
    delay = 0 if config.lanes is None else config.lanes.delay
    past: dict[Module, deque[jax.Array]] = {name: deque(maxlen=delay + 1) for name in ("attention", "mlp")}

    def mix(x: jax.Array, own: jax.Array, module: Module, layer: int) -> jax.Array:
        mixing = config.mixing(module, layer)
        past[module].append(own)
        arriving = None if mixing.source is None else past[module][mixing.source - layer - 1]
        arriving = None if arriving is None else arriving.astype(jnp.float32)
        return layers.mix(x, own.astype(jnp.float32), arriving, mixing.own_scale)

    embedded = params["embed"][tokens]
    x = jnp.broadcast_to(embedded, (config.num_lanes, *embedded.shape))
    for index in range(config.num_layers):
        layer, window = params["layers"][index], config.sliding_windows[index]

        def attend(layer: Weights, x: jax.Array, window: int = window) -> jax.Array:
            normed = layers.rms_norm(x, layer["attention_norm"], config.norm_eps)
            return attention(
                layer["attention"], config, normed, rope, window, dtype=dtype, implementation=implementation
            )

        def feed(layer: Weights, x: jax.Array) -> jax.Array:
            normed = layers.rms_norm(x, layer["ffn_norm"], config.norm_eps)
            return feed_forward(layer["feed_forward"], normed, dtype=dtype)

        x = mix(x, (jax.checkpoint(attend) if remat else attend)(layer, x), "attention", index)
        x = mix(x, (jax.checkpoint(feed) if remat else feed)(layer, x), "mlp", index)
    return jnp.mean(layers.rms_norm(x, params["norm"], config.norm_eps), axis=0)


@jax.custom_vjp
def head_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """Logits in float32 of activations and a table of the same dtype; their gradient is rounded to that dtype.

    Args:
        x: [..., H].
        table: [V, H].

    Returns:
        float32 [..., V].
    """
    return _einsum("...i,vi->...v", x, table, jnp.float32)


def _head_forward(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return head_product(x, table), (x, table)


def _head_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, table = kept
    gradient = gradient.astype(table.dtype)
    to_x = _einsum("...v,vi->...i", gradient, table, jnp.float32)
    to_table = _einsum("...v,...i->vi", gradient, x, jnp.float32)
    return to_x.astype(x.dtype), to_table.astype(table.dtype)


head_product.defvjp(_head_forward, _head_backward)


def token_losses(config: ModelConfig, params: Mapping[Any, Any], tokens: jax.Array, **options: Any) -> jax.Array:
    """Negative log-likelihoods of a batch.

    Args:
        config: The model.
        params: The canonical tree, float32.
        tokens: int32 [B, T + 1]; the first T are read, the last T predicted.
        **options: See :func:`hidden`.

    Returns:
        float32 [B, T], nats.
    """
    x = hidden(config, params, tokens[:, :-1], **options)
    dtype = options.get("dtype", jnp.bfloat16)
    table = params["embed" if config.tie_word_embeddings else "lm_head"]
    logits = head_product(x.astype(dtype), table.astype(dtype))
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
