"""Prefill: a prompt's keys and values, computed by the Flax layers from the tapes.

Each layer's matrices are unpacked when they are needed, so the tapes stay the only copy of the weights. The same
function serves one device's share under ``jax.shard_map`` and all devices' shares under ``jax.vmap``: partial sums
cross a named axis.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono.handoffs import MODULES
from jax_mono.models import layers as reference
from jax_mono.plan import LAYER_STAGES, DevicePlan, Plan
from jax_mono.tape import as_weights, unpack_layer, unpack_vectors

Array = jax.Array

AXIS = "devices"
"""The mesh (or vmap) axis over which a model is shared."""


def prefill_chunk(
    plan: Plan,
    layers: Array,
    constants: Array,
    embed: Array,
    rope: Array,
    k_cache: Array,
    v_cache: Array,
    tokens: Array,
    positions: Array,
    dtype: jnp.dtype,
) -> tuple[Array, Array]:
    """Writes the keys and values of some tokens, on one device of the named axis ``AXIS``.

    Args:
        plan: The plan.
        layers: [B, num_layers, layer_words], the device's layer tapes.
        constants: float32 [floats], the device's constants.
        embed: [vocab, hidden].
        rope: float32 [S, head_dim / 2, 2], rotations by position.
        k_cache: [num_layers, max_kv_heads, S, head_dim], the device's keys.
        v_cache: The same for values.
        tokens: int32 [T].
        positions: int32 [T]; a token at position S or beyond is padding and leaves no trace.
        dtype: The weight dtype; tapes, embedding and caches are stored as :data:`jax_mono.tape.STORAGE` says.

    Returns:
        The updated caches.
    """
    config = plan.config
    index = jax.lax.axis_index(AXIS)
    lanes = plan.devices[0].lanes.count
    rotation = rope.at[positions].get(mode="clip")
    x = jnp.repeat(as_weights(embed[tokens], dtype).astype(jnp.float32)[None], lanes, axis=0)
    delay = 0 if config.lanes is None else config.lanes.delay
    # Per module, outputs of this layer and of the `delay` layers before it: own lanes, and the sum of all lanes.
    own_past = jnp.zeros((len(MODULES), delay + 1, *x.shape), jnp.float32)
    sum_past = jnp.zeros((len(MODULES), delay + 1, *x.shape[1:]), jnp.float32)
    rules = _mixing_rules(plan)
    vectors = _vectors(plan, constants, index)

    def run_layer(carry: tuple[Array, ...], scanned: dict[str, Any]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        x, own_past, sum_past = carry
        weights = _local_weights(
            plan, jax.lax.dynamic_index_in_dim(layers, scanned["layer"], 1, keepdims=False), index
        )
        weights = jax.tree.map(lambda stored: as_weights(stored, dtype), weights)
        attention = {**weights["attention"], **scanned["vectors"]}
        normed = reference.rms_norm(x, scanned["attention_norm"], config.norm_eps)
        cache = (as_weights(scanned["k"], dtype), as_weights(scanned["v"], dtype))
        o, cache = reference.attention(
            attention, config, normed, cache, positions, rotation, scanned["window"]
        )
        x, own_past, sum_past = _mix(x, o, own_past, sum_past, 0, scanned["rules"])
        normed = reference.rms_norm(x, scanned["ffn_norm"], config.norm_eps)
        o = reference.feed_forward(weights["feed_forward"], normed)
        x, own_past, sum_past = _mix(x, o, own_past, sum_past, 1, scanned["rules"])
        stored = tuple(as_weights(part, k_cache.dtype) for part in cache)
        return (x, own_past, sum_past), stored

    scanned = {
        "layer": jnp.arange(config.num_layers),
        "window": jnp.asarray(config.sliding_windows, jnp.int32),
        "rules": rules,
        "attention_norm": vectors.pop("attention_norm"),
        "ffn_norm": vectors.pop("ffn_norm"),
        "k": k_cache,
        "v": v_cache,
    }
    vectors.pop("norm")
    scanned["vectors"] = vectors
    _, (k_cache, v_cache) = jax.lax.scan(run_layer, (x, own_past, sum_past), scanned)
    return k_cache, v_cache


def _mixing_rules(plan: Plan) -> dict[str, np.ndarray]:
    """Per layer and module: whether the sum of this layer or of an earlier one arrives, and the own scale."""
    config = plan.config
    found = [[config.mixing(module, layer) for module in MODULES] for layer in range(config.num_layers)]
    sources = np.array([[-1 if rule.source is None else rule.source for rule in row] for row in found])
    current = np.arange(config.num_layers)[:, None]
    return {
        "at_once": sources == current,
        "later": (sources >= 0) & (sources < current),
        "own_scale": np.array([[rule.own_scale for rule in row] for row in found], np.float32),
    }


def _mix(
    x: Array, o: Array, own_past: Array, sum_past: Array, module: int, rules: dict[str, Array]
) -> tuple[Array, Array, Array]:
    """Adds what arrives after a module; see :meth:`jax_mono.config.ModelConfig.mixing`."""
    total = jax.lax.psum(jnp.sum(o, axis=0), AXIS)
    own_past = own_past.at[module].set(jnp.concatenate([own_past[module, 1:], o[None]]))
    sum_past = sum_past.at[module].set(jnp.concatenate([sum_past[module, 1:], total[None]]))
    arriving = jnp.where(rules["later"][module], sum_past[module, 0] - own_past[module, 0], 0.0)
    delayed = x + rules["own_scale"][module] * o + arriving
    return jnp.where(rules["at_once"][module], x + total, delayed), own_past, sum_past


def _local_weights(plan: Plan, tape: Array, index: Array) -> dict[str, dict[str, Array]]:
    """One device's matrices of a layer; padded with zeros where devices hold unequal shares."""
    if _alike(plan):
        return unpack_layer(plan, plan.devices[0], tape)
    queries = plan.max_kv_heads * plan.config.queries_per_kv * plan.config.head_dim
    keys = plan.max_kv_heads * plan.config.head_dim
    neurons = max(share.neurons.count for share in plan.devices)
    padded = {"wq": queries, "wk": keys, "wv": keys, "wo": queries, "w1": neurons, "w3": neurons, "w2": neurons}

    def unpack(share: DevicePlan) -> dict[str, dict[str, Array]]:
        weights = unpack_layer(plan, share, tape)
        return {
            module: {
                name: _pad_axis(matrix, 2 if name in ("wo", "w2") else 1, padded[name])
                for name, matrix in matrices.items()
            }
            for module, matrices in weights.items()
        }

    return jax.lax.switch(index, [lambda share=share: unpack(share) for share in plan.devices])


def _vectors(plan: Plan, constants: Array, index: Array) -> dict[str, Array]:
    if _alike(plan) or not plan.config.qkv_bias:
        return unpack_vectors(plan, constants, plan.devices[0])
    keys = plan.max_kv_heads * plan.config.head_dim
    padded = {"bq": keys * plan.config.queries_per_kv, "bk": keys, "bv": keys}

    def unpack(share: DevicePlan) -> dict[str, Array]:
        vectors = unpack_vectors(plan, constants, share)
        return {
            name: _pad_axis(vector, 2, padded[name]) if name in padded else vector
            for name, vector in vectors.items()
        }

    return jax.lax.switch(index, [lambda share=share: unpack(share) for share in plan.devices])


def _alike(plan: Plan) -> bool:
    first = plan.devices[0].stages
    return all(share.stages[name] == first[name] for share in plan.devices for name in LAYER_STAGES)


def _pad_axis(array: Array, axis: int, length: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths)
