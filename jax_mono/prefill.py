"""Prefill: a prompt's keys and values, computed by the Flax layers from the tapes.

Each layer's matrices are unpacked when they are needed, so the tapes stay the only copy of the weights. The function
serves one device's share; ``jax.vmap`` runs it for all devices of a JAX device, and ``jax.shard_map`` on several of
these: partial sums cross named axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono.granules import layers_swizzle
from jax_mono.handoffs import MODULES
from jax_mono.models import layers as reference
from jax_mono.plan import LAYER_STAGES, DevicePlan, Plan
from jax_mono.tape import as_weights
from jax_mono.unpacking import unpack_matrix, unpack_vectors

Array = jax.Array

AXIS = "devices"
"""The mesh axis over which a model is shared."""

GROUPS = "groups"
"""The vmap axis of the plan's devices that share a JAX device."""


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
    attend: reference.Attend = reference.attend,
    *,
    axes: tuple[str, ...],
    index: Array,
) -> tuple[Array, Array]:
    """Writes the keys and values of some tokens, on one device of the plan.

    Args:
        plan: The plan.
        layers: [R, num_layers, layer_words], the device's layer tapes.
        constants: float32 [floats], the device's constants.
        embed: [vocab, hidden].
        rope: float32 [S, head_dim / 2, 2], rotations by position.
        k_cache: [num_layers, max_kv_heads, S, head_dim], the device's keys.
        v_cache: The same for values.
        tokens: int32 [T].
        positions: int32 [T]; a token at position S or beyond is padding and leaves no trace.
        dtype: The weight dtype; tapes, embedding and caches are stored as :data:`jax_mono.tape.STORAGE` says.
        attend: What joins queries, keys and values.
        axes: The named axes over which the devices of the plan are spread.
        index: int32 [], which of them this is.

    Returns:
        The updated caches.
    """
    config = plan.config
    lanes = plan.devices[0].lanes.count
    rotation = rope.at[positions].get(mode="clip")
    x = jnp.repeat(as_weights(embed[tokens], dtype).astype(jnp.float32)[None], lanes, axis=0)
    delay = 0 if config.lanes is None else config.lanes.delay
    # Per module what the other lanes add after one of the last `delay` + 1 layers. A layer's place is its number modulo
    # that.
    coming = jnp.zeros((len(MODULES), delay + 1, *x.shape), jnp.float32)
    rules = _mixing_rules(plan)
    swizzle = layers_swizzle(plan, constants)
    vectors = _local_weights(plan, lambda share: unpack_vectors(plan, constants, share), index)

    def weights(layer: Array, needed_by: Array, *names: str) -> dict[str, Array]:
        # A dependence that is real to the compiler but never taken: without one it unpacks all matrices of a layer
        # ahead of time, and XLA for CPU drops optimization barriers before it orders instructions.
        layer = jnp.where(needed_by[(0,) * needed_by.ndim] > jnp.inf, 0, layer)

        def unpack(share: DevicePlan) -> dict[str, Array]:
            return {name: unpack_matrix(plan, share, name, layers, layer, swizzle) for name in names}

        return {name: as_weights(stored, dtype) for name, stored in _local_weights(plan, unpack, index).items()}

    def run_layer(carry: tuple[Array, ...], scanned: dict[str, Any]) -> tuple[tuple[Array, ...], None]:
        x, coming, k_cache, v_cache = carry
        layer = scanned["layer"]
        normed = reference.rms_norm(x, scanned["attention_norm"], config.norm_eps)
        projections = weights(layer, normed, "wq", "wk", "wv", "wo")
        cache = [as_weights(_at(part, layer), dtype) for part in (k_cache, v_cache)]
        o, cache = reference.attention(
            {**projections, **scanned["vectors"]},
            config,
            normed,
            tuple(cache),
            positions,
            rotation,
            scanned["window"],
            attend=attend,
        )
        k_cache, v_cache = (
            jax.lax.dynamic_update_index_in_dim(whole, as_weights(part, whole.dtype), layer, 0)
            for whole, part in zip((k_cache, v_cache), cache, strict=True)
        )
        x, coming = _mix(x, o, jax.lax.psum(jnp.sum(o, axis=0), axes), coming, 0, layer, scanned["rules"])
        normed = reference.rms_norm(x, scanned["ffn_norm"], config.norm_eps)
        # reference.feed_forward, but with one matrix unpacked at a time.
        gate = reference.project(normed, weights(layer, normed, "w1")["w1"])
        up = reference.project(normed, weights(layer, gate, "w3")["w3"])
        o = reference.project(jax.nn.silu(gate) * up, weights(layer, up, "w2")["w2"])
        x, coming = _mix(x, o, jax.lax.psum(jnp.sum(o, axis=0), axes), coming, 1, layer, scanned["rules"])
        return (x, coming, k_cache, v_cache), None

    scanned = {
        "layer": jnp.arange(config.num_layers),
        "window": jnp.asarray(config.sliding_windows, jnp.int32),
        "rules": rules,
        "attention_norm": vectors.pop("attention_norm"),
        "ffn_norm": vectors.pop("ffn_norm"),
    }
    vectors.pop("norm")
    scanned["vectors"] = vectors
    return jax.lax.scan(run_layer, (x, coming, k_cache, v_cache), scanned)[0][2:]


def _at(array: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


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
    x: Array, o: Array, total: Array, coming: Array, module: int, layer: Array, rules: dict[str, Array]
) -> tuple[Array, Array]:
    """Adds what arrives after a module, of which ``total`` is the sum over all lanes; see ``ModelConfig.mixing``."""
    newest, oldest = layer % coming.shape[1], (layer + 1) % coming.shape[1]
    coming = coming.at[module, newest].set(total - o)
    arriving = jnp.where(rules["later"][module], coming[module, oldest], 0.0)
    delayed = x + rules["own_scale"][module] * o + arriving
    return jnp.where(rules["at_once"][module], x + total, delayed), coming


def _local_weights(plan: Plan, unpack: Callable[[DevicePlan], dict[str, Array]], index: Array) -> dict[str, Array]:
    """One device's matrices or biases of a layer; padded with zeros where devices hold unequal shares."""
    first = plan.devices[0].stages
    if all(share.stages[name] == first[name] for share in plan.devices for name in LAYER_STAGES):
        return unpack(plan.devices[0])
    keys = plan.max_kv_heads * plan.config.head_dim
    queries = keys * plan.config.queries_per_kv
    neurons = max(share.neurons.count for share in plan.devices)
    rows = {"wq": queries, "wk": keys, "wv": keys, "w1": neurons, "w3": neurons}
    cols = {"wo": queries, "w2": neurons, "bq": queries, "bk": keys, "bv": keys}

    def padded(share: DevicePlan) -> dict[str, Array]:
        weights = unpack(share)
        for axis, lengths in ((1, rows), (2, cols)):
            for name in lengths.keys() & weights.keys():
                weights[name] = _pad_axis(weights[name], axis, lengths[name])
        return weights

    return jax.lax.switch(index, [functools.partial(padded, share) for share in plan.devices])


def _pad_axis(array: Array, axis: int, length: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths)
