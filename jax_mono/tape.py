"""The tape: every block's share of the weights, stored in the order in which it will be read.

``Tapes`` are ordinary arrays with a leading device axis, so that they shard and save like any others. Packing copies
one stage of one layer at a time on the host, and :mod:`jax_mono.unpacking` recovers matrices. Nothing ever needs two
copies of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_mono import granules
from jax_mono.compression import compress
from jax_mono.config import ConfigError
from jax_mono.plan import DevicePlan, Plan, Stage, StageName
from jax_mono.record import constants_layout
from jax_mono.spans import Span
from jax_mono.tile import TileFormat

Array = jax.Array
AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)

STORAGE = {
    "float32": jnp.dtype(jnp.float32),
    "bfloat16": jnp.dtype(jnp.uint16),
    "float16": jnp.dtype(jnp.uint16),
}
"""How weights and KV caches are stored, in the order of ``WeightType`` in ffi/host/variant.h: 16 bits as bit patterns.

XLA for CPU computes in float32 wherever it meets bfloat16, even to cut a slice, and then widens the whole array ahead
of the loop. It leaves integers alone.
"""


def storage(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which weights of a dtype are stored.

    Raises:
        ConfigError: Weights cannot have this dtype.
    """
    name = jnp.dtype(dtype).name
    if name not in STORAGE:
        raise ConfigError(f"weights cannot be {name}, only {', '.join(STORAGE)}")
    return STORAGE[name]


def tape_storage(tile: TileFormat, dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which tapes store weights of a dtype.

    Raises:
        ConfigError: Weights cannot have this dtype, or not on compressed tapes.
    """
    if tile.compressed and jnp.dtype(dtype) != jnp.bfloat16:
        raise ConfigError(f"only bfloat16 weights can be compressed, not {jnp.dtype(dtype).name}")
    return storage(dtype)


def as_weights(stored: Array, dtype: DTypeLike) -> Array:
    """Reads stored bits as the dtype they mean; free."""
    return stored if stored.dtype == dtype else jax.lax.bitcast_convert_type(stored, dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "head", "constants", "embed"),
    meta_fields=("dtype",),
)
@dataclass(frozen=True)
class Tapes:
    """All weights of a model, cut for a plan. D devices, B blocks.

    Attributes:
        layers: [D, R, num_layers, layer_words], the layer tapes, as :data:`STORAGE` says. R is B, and row b belongs to
            block b; unless the plan's placement interleaves tapes, see :class:`jax_mono.placement.Placement`.
        head: [D, R, head_words], the LM head's tapes, likewise.
        constants: [D, floats] float32: norms and biases, and the tapes' swizzle, see
            :func:`jax_mono.record.constants_layout`.
        embed: [vocab, hidden], stored like the tapes, the same on every device.
        dtype: The weight dtype.
    """

    layers: Array
    head: Array
    constants: Array
    embed: Array
    dtype: jnp.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


# Packing ------------------------------------------------------------------------------------------------------------

STAGE_WEIGHTS: dict[StageName, tuple[str, ...]] = {
    "qkv": ("attention.wq", "attention.wk", "attention.wv"),
    "o": ("attention.wo",),
    "up": ("feed_forward.w1", "feed_forward.w3"),
    "down": ("feed_forward.w2",),
    "head": ("lm_head",),
}
"""The matrices that a stage streams, by their path within a layer (or the model, for the head)."""


def own_weights(plan: Plan, device: int, name: StageName, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Cuts one device's share out of the matrices of a stage.

    Args:
        plan: The plan.
        device: The device.
        name: The stage.
        weights: Its full matrices in the order of :data:`STAGE_WEIGHTS`: [lanes, out, in], the head [vocab, hidden].

    Returns:
        Views of them, [lanes of the device, rows, cols].
    """
    share = plan.devices[device]
    if name == "head":
        return [_lanes_of(weights[0][share.vocab.first : share.vocab.stop], share.stages["head"].lanes)]
    if name == "o":
        return [_own_cols(plan, share, weights[0], query_span(plan, share))]
    if name == "down":
        return [_own_cols(plan, share, weights[0], share.neurons)]
    if name == "up":
        return [_own_rows(share, weight, share.neurons) for weight in weights]
    spans = (query_span(plan, share), *(key_span(plan, share),) * 2)
    return [_own_rows(share, weight, span) for weight, span in zip(weights, spans, strict=True)]


def stage_tiles(tile: TileFormat, name: StageName, own: Sequence[AnyArray]) -> AnyArray:
    """Cuts one device's share of a stage into tiles.

    Args:
        tile: The format of the plan's tiles.
        name: The stage.
        own: What :func:`own_weights` gave, on the host or on a device.

    Returns:
        [tiles, ...] in the order of the tape; on the host a view of the matrices wherever they need no padding.
    """
    if name in ("o", "down"):
        return _row_tiles(own[0], tile)
    if name == "up":
        return _column_tiles(_pair(own[0], own[1], tile.rows // 2), tile)
    return _column_tiles(own[0] if name == "head" else own[0].__array_namespace__().concatenate(own, axis=1), tile)


def stored_words(tile: TileFormat, cols: int, tiles: Array) -> tuple[Array, Array]:
    """Tiles as they lie on a tape; traceable.

    Args:
        tile: Their format.
        cols: Columns of a part, without padding.
        tiles: [tiles, ...] from :func:`stage_tiles`.

    Returns:
        [tiles, words], and how much of it could not be compressed, see :func:`jax_mono.compression.compress`.
    """
    if not tile.compressed:
        return tiles.reshape(len(tiles), -1), jnp.zeros((), jnp.int32)
    words, spoiled = compress(tile, tiles.reshape(-1, *tiles.shape[-3:]), cols)
    return words.reshape(len(tiles), -1), spoiled


def store_tiles(plan: Plan, stage: Stage, tiles: np.ndarray, tapes: np.ndarray, layer: int | None) -> None:
    """Copies a stage's tiles into the tapes of a device's blocks.

    Args:
        plan: The plan.
        stage: The stage.
        tiles: [tiles, ...] from :func:`stage_tiles`.
        tapes: The device's :class:`Tapes`: [R, num_layers, layer_words], or [R, head_words]. Written in place.
        layer: Which layer; None for the head.
    """
    for block, (share, offset) in enumerate(zip(stage.shares, stage.offsets, strict=True)):
        run = tiles[share.first : share.stop]
        if plan.placement.interleaved:
            granules.store(granules.block_tape(plan, tapes, block, layer), offset, run.reshape(-1))
        else:
            tape = tapes[block] if layer is None else tapes[block, layer]
            tape[offset : offset + run.size].reshape(run.shape)[...] = run


def pack_constants(plan: Plan, device: int, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Packs norms and biases of one device into [floats] float32; exact, since that holds all narrower weights.

    Packing lays tapes without a swizzle, so that is zero.

    Args:
        plan: The plan.
        device: The device.
        vectors: By path, such as ``layers.0.attention_norm``, ``layers.0.attention.bq`` and ``norm``.
    """
    config, share = plan.config, plan.devices[device]
    layers = range(config.num_layers)
    found = [vectors[f"layers.{layer}.attention_norm"] for layer in layers]
    found += [vectors[f"layers.{layer}.ffn_norm"] for layer in layers]
    found.append(vectors["norm"])
    if config.qkv_bias:
        widest = (constants_layout(plan)["q_norm"] - constants_layout(plan)["qkv_bias"]) // config.num_layers
        spans = {"bq": query_span(plan, share), "bk": key_span(plan, share), "bv": key_span(plan, share)}
        for layer in layers:
            own = [
                vectors[f"layers.{layer}.attention.{name}"]
                .reshape(-1)[span.first : span.stop]
                .reshape(share.lanes.count, -1)
                for name, span in spans.items()
            ]
            bias = np.concatenate(own, axis=1).reshape(-1)
            found.append(np.pad(bias, (0, widest - bias.size)))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            found += [vectors[f"layers.{layer}.attention.{name}"] for layer in layers]
    layout = constants_layout(plan)
    found.append(np.zeros(layout["floats"] - layout["layers_swizzle"]))
    return np.concatenate([vector.astype(np.float32).reshape(-1) for vector in found])


def _column_tiles(matrix: AnyArray, tile: TileFormat) -> AnyArray:
    """[lanes, rows, cols] to [lanes * row tiles, chunks, rows, cols]; every tile belongs to one lane."""
    chunks = _chunks(matrix, tile)
    return chunks.reshape(-1, *chunks.shape[2:])


def _row_tiles(matrix: AnyArray, tile: TileFormat) -> AnyArray:
    """[lanes, rows, cols] to [row tiles, lanes, chunks, rows, cols]; every tile holds all lanes in turn."""
    return _chunks(matrix, tile).swapaxes(0, 1)


def _chunks(matrix: AnyArray, tile: TileFormat) -> AnyArray:
    """[lanes, rows, cols] to [lanes, row tiles, chunks, tile rows, tile cols], padded with zeros."""
    lanes, rows, cols = matrix.shape
    padded = _pad(matrix, tile.row_tiles(rows) * tile.rows, tile.padded_cols(cols))
    shape = (lanes, tile.row_tiles(rows), tile.rows, tile.padded_cols(cols) // tile.cols, tile.cols)
    return padded.reshape(shape).swapaxes(2, 3)


def query_span(plan: Plan, share: DevicePlan) -> Span:
    """A device's range of query channels over all lanes: rows of wq, columns of wo."""
    keys = key_span(plan, share)
    return Span(keys.first * plan.config.queries_per_kv, keys.count * plan.config.queries_per_kv)


def key_span(plan: Plan, share: DevicePlan) -> Span:
    """A device's range of key (and value) channels over all lanes."""
    return Span(share.kv_heads.first * plan.config.head_dim, share.kv_heads.count * plan.config.head_dim)


def _own_rows(share: DevicePlan, weight: np.ndarray, span: Span) -> np.ndarray:
    """[all lanes, rows, cols] to the device's [lanes, rows, cols]."""
    flat = weight.reshape(-1, weight.shape[-1])[span.first : span.stop]
    return _lanes_of(flat, share.lanes.count)


def _own_cols(plan: Plan, share: DevicePlan, weight: np.ndarray, span: Span) -> np.ndarray:
    """[all lanes, rows, cols] to the device's [lanes, rows, cols], cut along the columns."""
    if plan.config.lanes is not None:
        return weight[share.lanes.first : share.lanes.stop]
    return weight[:, :, span.first : span.stop]


def _lanes_of(rows: np.ndarray, lanes: int) -> np.ndarray:
    return rows.reshape(lanes, rows.shape[0] // lanes, rows.shape[1])


def _pair(gate: AnyArray, up: AnyArray, half: int) -> AnyArray:
    """Alternates ``half`` gate rows and ``half`` up rows, padding the neurons to a multiple of ``half``."""
    lanes, neurons, cols = gate.shape
    padded = -(-neurons // half) * half
    both = gate.__array_namespace__().stack(
        [_pad(part, padded, cols).reshape(lanes, -1, half, cols) for part in (gate, up)], axis=2
    )
    return both.reshape(lanes, 2 * padded, cols)


def _pad(matrix: AnyArray, rows: int, cols: int) -> AnyArray:
    missing = (rows - matrix.shape[1], cols - matrix.shape[2])
    return (
        matrix.__array_namespace__().pad(matrix, ((0, 0), (0, missing[0]), (0, missing[1]))) if any(missing) else matrix
    )
