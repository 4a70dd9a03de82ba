"""From tapes back to matrices: traceable, so that the Flax layers can run from the tapes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_mono import granules
from jax_mono.compression import expand
from jax_mono.granules import Swizzle
from jax_mono.like_blocks import like_blocks
from jax_mono.plan import DevicePlan, Plan, Stage
from jax_mono.record import constants_layout
from jax_mono.tape import key_span, query_span

Array = jax.Array


def unpack_layer(
    plan: Plan, share: DevicePlan, tape: Array, layer: ArrayLike | None = None, swizzle: Swizzle | None = None
) -> dict[str, dict[str, Array]]:
    """Recovers all matrices that one device holds of one layer.

    Args:
        plan: The plan.
        share: The device's share.
        tape: The layer tapes of the device's blocks, [R, num_layers, layer_words], or without ``layer``
            [R, layer_words], unless they are interleaved.
        layer: Which layer, may be traced.
        swizzle: The device's, see :func:`jax_mono.granules.layers_swizzle`.

    Returns:
        ``attention`` with wq, wk, wv, wo and ``feed_forward`` with w1, w3, w2; see :func:`unpack_matrix`.
    """
    names = {"attention": ("wq", "wk", "wv", "wo"), "feed_forward": ("w1", "w3", "w2")}
    return {
        module: {name: unpack_matrix(plan, share, name, tape, layer, swizzle) for name in members}
        for module, members in names.items()
    }


def unpack_matrix(
    plan: Plan,
    share: DevicePlan,
    name: str,
    tape: Array,
    layer: ArrayLike | None = None,
    swizzle: Swizzle | None = None,
) -> Array:
    """Recovers the part of a matrix that one device holds, bit for bit, as it is stored.

    Args:
        plan: The plan.
        share: The device's share.
        name: wq, wk, wv, wo, w1, w3 or w2.
        tape: As for :func:`unpack_layer`.
        layer: As for :func:`unpack_layer`.
        swizzle: As for :func:`unpack_layer`.

    Returns:
        [lanes, rows, cols], lanes of this device; wo and w2 are cut along their columns, the others along their rows.
    """
    source, stages, half = _Source(plan, tape, layer, swizzle), share.stages, plan.tile.rows // 2
    if name in ("wo", "w2"):
        return _row_matrix(source, stages["o" if name == "wo" else "down"])
    if name in ("w1", "w3"):
        rows = slice(0, half) if name == "w1" else slice(half, 2 * half)
        neurons = share.neurons.count // share.lanes.count
        return _column_matrix(source, stages["up"], rows)[:, :neurons]
    qkv = _column_matrix(source, stages["qkv"])
    queries = query_span(plan, share).count // share.lanes.count
    keys = key_span(plan, share).count // share.lanes.count
    ranges = {"wq": (0, queries), "wk": (queries, queries + keys), "wv": (queries + keys, queries + 2 * keys)}
    return qkv[:, slice(*ranges[name])]


def unpack_head(plan: Plan, share: DevicePlan, tape: Array, swizzle: Swizzle | None = None) -> Array:
    """Recovers the LM head rows [vocabulary share, hidden] of one device from its tapes [R, head_words]."""
    stage = share.stages["head"]
    return _column_matrix(_Source(plan, tape, None, swizzle), stage)[:, : stage.rows].reshape(-1, stage.cols)


def unpack_vectors(plan: Plan, constants: Array, share: DevicePlan) -> dict[str, Array]:
    """Names the parts of one device's constants [floats].

    Returns:
        attention_norm, ffn_norm [layers, hidden], norm [hidden] and, where the model has them, bq, bk, bv
        [layers, lanes, rows] and q_norm, k_norm [layers, head_dim]; all float32.
    """
    config, layout = plan.config, constants_layout(plan)
    layers, hidden = config.num_layers, config.hidden_size

    def part(name: str, length: int) -> Array:
        return jax.lax.slice_in_dim(constants, layout[name], layout[name] + length)

    vectors = {
        "attention_norm": part("attention_norm", layers * hidden).reshape(layers, hidden),
        "ffn_norm": part("ffn_norm", layers * hidden).reshape(layers, hidden),
        "norm": part("final_norm", hidden),
    }
    if config.qkv_bias:
        length = layout["q_norm"] - layout["qkv_bias"]
        bias = part("qkv_bias", length).reshape(layers, -1)
        lanes, rows = share.lanes.count, share.stages["qkv"].rows
        bias = bias[:, : lanes * rows].reshape(layers, lanes, rows)
        queries = rows * config.queries_per_kv // (config.queries_per_kv + 2)
        keys = rows // (config.queries_per_kv + 2)
        vectors["bq"], vectors["bk"], vectors["bv"] = jnp.split(bias, [queries, queries + keys], axis=2)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            vectors[name] = part(name, layers * config.head_dim).reshape(layers, config.head_dim)
    return vectors


@dataclass(frozen=True)
class _Source:
    """Where matrices come from; arguments of :func:`unpack_matrix`."""

    plan: Plan
    tape: Array
    layer: ArrayLike | None
    swizzle: Swizzle | None


def _parts(source: _Source, stage: Stage, lanes: int, rows: slice = slice(None)) -> Array:
    """Some rows of a stage's tiles, which have a part for each of so many lanes: [lanes, tiles, rows, padded cols]."""
    plan, tape, layer = source.plan, source.tape, source.layer
    tile, offsets = plan.tile, stage.offsets
    part = tile.part_words(stage.cols)
    if plan.placement.interleaved:
        tape, offsets = granules.in_one_piece(plan, stage, tape, layer, source.swizzle)
        layer = None
    if layer is None:
        tape, layer = tape[:, None], 0
    runs = []
    for run in like_blocks(stage, offsets):
        shape = (run.blocks, 1, run.tiles * stage.tile_words)
        words = jax.lax.dynamic_slice(tape, (run.block, layer, run.offset), shape)
        parts = words.reshape(-1, lanes, part).swapaxes(0, 1).reshape(-1, part)
        if tile.compressed:
            found = expand(tile, parts, stage.cols, rows)
        else:
            chunks = parts.reshape(len(parts), -1, tile.rows, tile.cols)[:, :, rows].swapaxes(1, 2)
            found = chunks.reshape(*chunks.shape[:2], -1)
        runs.append(found.reshape(lanes, -1, *found.shape[1:]))
    return jnp.concatenate(runs, axis=1)


def _column_matrix(source: _Source, stage: Stage, rows: slice = slice(None)) -> Array:
    """[lanes, rows, cols] of a column parallel stage, of every tile only ``rows``; rows may be padded."""
    if stage.tiles == 0:
        return jnp.zeros((stage.lanes, 0, stage.cols), source.tape.dtype)
    parts = _parts(source, stage, 1, rows)
    return parts.reshape(stage.lanes, -1, parts.shape[-1])[:, :, : stage.cols]


def _row_matrix(source: _Source, stage: Stage) -> Array:
    """[lanes, rows, cols] of a row parallel stage."""
    if stage.cols == 0:
        return jnp.zeros((stage.lanes, stage.rows, 0), source.tape.dtype)
    parts = _parts(source, stage, stage.lanes)
    return parts.reshape(stage.lanes, -1, parts.shape[-1])[:, : stage.rows, : stage.cols]
