"""Prefill: a prompt's keys and values, computed by the Flax layers from the tapes.

Each layer's matrices are unpacked when they are needed, so the tapes stay the only copy of the weights. The function
serves one device's share; ``jax.vmap`` runs it for all devices of a JAX device, and ``jax.shard_map`` on several of
these: partial sums cross named axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

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
    unroll: bool = False,
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
        positions: int32 [T], which follow each other; a token at position S or beyond is padding and leaves no trace.
        dtype: The weight dtype; tapes, embedding and caches are stored as :data:`jax_mono.tape.STORAGE` says.
        attend: What joins queries, keys and values.
        axes: The named axes over which the devices of the plan are spread.
        index: int32 [], which of them this is.
        unroll: Whether what layers send stays where it is until it arrives, which takes longer to compile.

    Returns:
        The updated caches.
    """
    config = plan.config
    lanes = plan.devices[0].lanes.count
    rotation = rope.at[positions].get(mode="clip")
    x = jnp.repeat(as_weights(embed[tokens], dtype).astype(jnp.float32)[None], lanes, axis=0)
    delay = 0 if config.lanes is None else config.lanes.delay
    nothing = _Sent(jnp.zeros_like(x), jnp.zeros_like(x[0]))
    sent = ((nothing,) * len(MODULES),) * delay
    rules = _mixing_rules(plan)
    swizzle = layers_swizzle(plan, constants)
    vectors = _local_weights(plan, lambda share: unpack_vectors(plan, constants, share), index)

    def weights(layer: Array, needed_by: Array, *names: str) -> dict[str, Array]:
        # A dependence that is real to the compiler but never taken: without one it unpacks all matrices of a layer
        # ahead of time, and XLA for CPU drops optimization barriers before it orders instructions. A sum over devices,
        # because a number that differed from device to device would have their tapes gathered.
        first = jax.lax.psum(needed_by[(0,) * needed_by.ndim], axes[-1])
        layer = jnp.where(first > jnp.inf, 0, layer)

        def unpack(share: DevicePlan) -> dict[str, Array]:
            return {name: unpack_matrix(plan, share, name, layers, layer, swizzle) for name in names}

        return {name: as_weights(stored, dtype) for name, stored in _local_weights(plan, unpack, index).items()}

    def norm(x: Array, scale: Array) -> Array:
        return reference.rms_norm(x, scale, config.norm_eps).astype(dtype)

    def run_layer(carry: tuple[Array, ...], scanned: dict[str, Any]) -> tuple[tuple[Array, ...], None]:
        x, normed, sent, k_cache, v_cache = carry
        layer = scanned["layer"]
        projections = weights(layer, normed, "wq", "wk", "wv", "wo")
        # reference.attention, but with no more of the caches written than changes.
        q, k, v = reference.queries_keys_values({**projections, **scanned["vectors"]}, config, normed, rotation)
        k_cache, v_cache = (
            _write(cache, layer, positions, as_weights(new.astype(dtype), cache.dtype))
            for cache, new in ((k_cache, k), (v_cache, v))
        )
        keys, values = (as_weights(_at(cache, layer), dtype) for cache in (k_cache, v_cache))
        o = reference.project_heads(attend(q, keys, values, positions, scanned["window"]), projections["wo"])
        x, attended = _mix(x, o, sent, 0, scanned["rules"], axes)
        normed = norm(x, scanned["ffn_norm"])
        # reference.feed_forward, but with w2 unpacked after its input is there.
        matrices = weights(layer, normed, "w1", "w3")
        gate, up = reference.project(normed, matrices["w1"]), reference.project(normed, matrices["w3"])
        o = reference.project(jax.nn.silu(gate) * up, weights(layer, up, "w2")["w2"])
        x, fed = _mix(x, o, sent, 1, scanned["rules"], axes)
        # The next layer's norm, where what it reads has just been made.
        normed = norm(x, scanned["next_norm"])
        return (x, normed, (*sent, (attended, fed))[1:], k_cache, v_cache), None

    attention_norm = vectors.pop("attention_norm")
    scanned = {
        "layer": jnp.arange(config.num_layers),
        "window": jnp.asarray(config.sliding_windows, jnp.int32),
        "rules": rules,
        "next_norm": jnp.roll(attention_norm, -1, axis=0),
        "ffn_norm": vectors.pop("ffn_norm"),
    }
    vectors.pop("norm")
    scanned["vectors"] = vectors
    carry = (x, norm(x, attention_norm[0]), sent, k_cache, v_cache)
    # With one layer more than are kept to a step, what a layer sends takes the memory of what has arrived: else XLA
    # moves all of it, layer by layer.
    return jax.lax.scan(run_layer, carry, scanned, unroll=delay + 1 if unroll else 1)[0][3:]


def _at(array: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)


def _write(cache: Array, layer: Array, positions: Array, new: Array) -> Array:
    """Writes keys or values [T, heads, head_dim] of tokens that follow each other into a layer of a cache.

    As ``cache[layer, :, positions] = new`` would, without what is beyond the cache, but nothing else is touched.

    Args:
        cache: [num_layers, heads, S, head_dim].
        layer: int32 [].
        positions: int32 [T].
        new: [T, heads, head_dim].
    """
    capacity = cache.shape[2]
    count = min(len(new), capacity)
    start = jnp.minimum(positions[0], capacity - count)
    places = start + jnp.arange(count, dtype=jnp.int32)
    token = jnp.clip(places - positions[0], 0, len(new) - 1)
    written = positions[token] == places  # neither before the first token nor where there is padding
    at, shape = (layer, 0, start, 0), (1, cache.shape[1], count, cache.shape[3])
    old = jax.lax.dynamic_slice(cache, at, shape)
    rows = jnp.where(written[:, None], new[token].swapaxes(0, 1)[None], old)
    # As the resident program has them: XLA would turn them around for the attention kernel before all layers, and back.
    return _laid_out(jax.lax.dynamic_update_slice(cache, rows, at), 0, 1, 2, 3)


def _mixing_rules(plan: Plan) -> dict[str, np.ndarray]:
    """Per layer and module: whether the sum of this layer or of an earlier one arrives, and the own scale."""
    config = plan.config
    found = [[config.mixing(module, layer) for module in MODULES] for layer in range(config.num_layers)]
    sources = np.array([[-1 if rule.source is None else rule.source for rule in row] for row in found])
    current = np.arange(config.num_layers)[:, None]
    at_once, scales = sources == current, np.array([[rule.own_scale for rule in row] for row in found])
    return {
        "at_once": at_once,
        "later": (sources >= 0) & (sources < current),
        "own_scale": np.where(at_once, 0.0, scales).astype(np.float32),  # the sum has the lane's own
    }


class _Sent(NamedTuple):
    """What a module of a layer has sent: its outputs, float32 [lanes, T, H], and their sum over all lanes, [T, H]."""

    outputs: Array
    total: Array


def _mix(
    x: Array,
    o: Array,
    sent: tuple[tuple[_Sent, ...], ...],
    module: int,
    rules: dict[str, Array],
    axes: tuple[str, ...],
) -> tuple[Array, _Sent]:
    """Adds what arrives after a module; see ``ModelConfig.mixing``.

    Args:
        x: float32 [lanes, T, H].
        o: float32 [lanes, T, H], the module's outputs.
        sent: Of as many layers as sums are delayed, the oldest first, what each module has sent.
        module: Which module.
        rules: Of this layer, see :func:`_mixing_rules`.
        axes: As for :func:`prefill_chunk`.

    Returns:
        The new ``x``, and what the module sends.
    """
    now = _Sent(o, jax.lax.psum(jnp.sum(o, axis=0), axes))
    at_once, later = rules["at_once"][module], rules["later"][module]
    if not sent:
        return x + rules["own_scale"][module] * o + jnp.where(at_once, now.total, 0.0), now
    past = sent[0][module]
    # Chosen before lanes are looked at: every lane reads it once more.
    arriving = jax.lax.optimization_barrier(jnp.where(at_once, now.total, jnp.where(later, past.total, 0.0)))
    x = x + rules["own_scale"][module] * o + (arriving - later * past.outputs)
    # A token's lanes side by side, so that what all of them read comes from a cache.
    return _laid_out(x, 1, 0, 2), now


def _laid_out(x: Array, *axes: int) -> Array:
    """Has a GPU keep an array with its axes in that order, the one with the longest strides first."""
    return jax.lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: with_layout_constraint(x, Layout(axes)))


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
