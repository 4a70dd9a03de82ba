"""The tape: every block's share of the weights, stored in the order in which it will be read.

``Tapes`` are ordinary arrays with a leading device axis, so that they shard, donate and save like any others. Packing
and unpacking are pure, jit-able functions of one layer at a time; nothing ever needs two copies of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_mono.plan import LAYER_STAGES, DevicePlan, Plan, Span, Stage, TileFormat
from jax_mono.record import constants_layout

Array = jax.Array
LayerParams = Mapping[str, Any]
"""One entry of ``params["layers"]``: attention_norm, attention, ffn_norm, feed_forward."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tapes:
    """All weights of a model, cut for a plan. D devices, B blocks.

    Attributes:
        layers: [D, B, num_layers, layer_words] in the weight dtype: the layer tapes.
        head: [D, B, head_words] in the weight dtype: the LM head's tapes.
        constants: [D, floats] float32: norms and biases, see :func:`jax_mono.record.constants_layout`.
        embed: [vocab, hidden] in the weight dtype, the same on every device.
    """

    layers: Array
    head: Array
    constants: Array
    embed: Array

    @property
    def dtype(self) -> jnp.dtype:
        """The weight dtype."""
        return self.layers.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


# Packing ------------------------------------------------------------------------------------------------------------


def pack_layer(plan: Plan, layer: LayerParams) -> Array:
    """Packs the matrices of one layer.

    Args:
        plan: The plan.
        layer: One layer's parameters, full size.

    Returns:
        [D, B, layer_words] in the dtype of the matrices.
    """
    return jnp.stack([_pack_device_layer(plan, share, layer) for share in plan.devices])


def pack_head(plan: Plan, head: Array) -> Array:
    """Packs the LM head [vocab, hidden] into [D, B, head_words]."""
    packed = []
    for share in plan.devices:
        stage = share.stages["head"]
        tiles = _column_tiles(_lanes_of(head[share.vocab.first : share.vocab.stop], stage.lanes), plan.tile)
        packed.append(_cut([(stage, tiles)], plan.num_blocks, plan.head_words))
    return jnp.stack(packed)


def pack_constants(plan: Plan, layers: Sequence[LayerParams], norm: Array) -> Array:
    """Packs norms and biases into [D, floats] float32; exact, since float32 holds every bfloat16."""
    packed = []
    for share in plan.devices:
        vectors = [
            *(layer["attention_norm"] for layer in layers),
            *(layer["ffn_norm"] for layer in layers),
            norm,
        ]
        if plan.config.qkv_bias:
            widest = (constants_layout(plan)["q_norm"] - constants_layout(plan)["qkv_bias"]) // len(layers)
            for layer in layers:
                bias = _qkv_bias(plan, share, layer["attention"]).reshape(-1)
                vectors.append(jnp.pad(bias, (0, widest - bias.size)))
        if plan.config.qk_norm:
            vectors += [layer["attention"]["q_norm"] for layer in layers]
            vectors += [layer["attention"]["k_norm"] for layer in layers]
        packed.append(jnp.concatenate([jnp.asarray(vector, jnp.float32).reshape(-1) for vector in vectors]))
    return jnp.stack(packed)


def _pack_device_layer(plan: Plan, share: DevicePlan, layer: LayerParams) -> Array:
    attention, mlp, tile = layer["attention"], layer["feed_forward"], plan.tile
    q, k, v = (_own_rows(plan, share, attention[name], name) for name in ("wq", "wk", "wv"))
    gate, up = (_own_rows(plan, share, mlp[name], name) for name in ("w1", "w3"))
    tiles = {
        "qkv": _column_tiles(jnp.concatenate([q, k, v], axis=1), tile),
        "o": _row_tiles(_own_cols(plan, share, attention["wo"], "wo"), tile),
        "up": _column_tiles(_pair(gate, up, tile.rows // 2), tile),
        "down": _row_tiles(_own_cols(plan, share, mlp["w2"], "w2"), tile),
    }
    pieces = [(share.stages[name], tiles[name]) for name in LAYER_STAGES]
    return _cut(pieces, plan.num_blocks, plan.layer_words)


def _cut(pieces: Sequence[tuple[Stage, Array]], blocks: int, length: int) -> Array:
    """Hands every block its tiles of every stage, one stage after the other, padded to ``length``."""
    tapes = []
    for block in range(blocks):
        runs = [
            tiles[stage.shares[block].first : stage.shares[block].stop].reshape(-1) for stage, tiles in pieces
        ]
        tape = jnp.concatenate(runs)
        tapes.append(jnp.pad(tape, (0, length - tape.size)))
    return jnp.stack(tapes)


def _column_tiles(matrix: Array, tile: TileFormat) -> Array:
    """[lanes, rows, cols] to [lanes * row tiles, words]; every tile belongs to one lane."""
    lanes, rows, cols = matrix.shape
    padded = _pad(matrix, tile.row_tiles(rows) * tile.rows, tile.padded_cols(cols))
    chunks = padded.reshape(lanes, tile.row_tiles(rows), tile.rows, tile.padded_cols(cols) // tile.cols, tile.cols)
    return chunks.transpose(0, 1, 3, 2, 4).reshape(lanes * tile.row_tiles(rows), tile.rows * padded.shape[2])


def _row_tiles(matrix: Array, tile: TileFormat) -> Array:
    """[lanes, rows, cols] to [row tiles, words]; every tile holds all lanes, one after the other."""
    lanes, rows, _ = matrix.shape
    tiles = _column_tiles(matrix, tile)
    return tiles.reshape(lanes, tile.row_tiles(rows), -1 if tiles.size else 0).transpose(1, 0, 2).reshape(
        tile.row_tiles(rows), -1 if tiles.size else 0
    )


# Unpacking ----------------------------------------------------------------------------------------------------------


def unpack_layer(plan: Plan, share: DevicePlan, tape: Array) -> dict[str, dict[str, Array]]:
    """Recovers the matrices that one device holds of one layer, bit for bit.

    Args:
        plan: The plan.
        share: The device's share.
        tape: [B, layer_words], the layer tapes of the device's blocks.

    Returns:
        ``attention`` with wq, wk, wv, wo and ``feed_forward`` with w1, w3, w2, each with the axis of the device's
        lanes first.
    """
    stages, tile = share.stages, plan.tile
    tiles = {name: _join(stages[name], tape) for name in LAYER_STAGES}
    qkv = _column_matrix(tiles["qkv"], stages["qkv"], tile)
    query_rows = share.kv_heads.count // share.lanes.count * plan.config.queries_per_kv * plan.config.head_dim
    kv_rows = query_rows // plan.config.queries_per_kv
    gate, up = _unpair(_column_matrix(tiles["up"], stages["up"], tile), tile.rows // 2)
    neurons = share.neurons.count // share.lanes.count
    return {
        "attention": {
            "wq": qkv[:, :query_rows],
            "wk": qkv[:, query_rows : query_rows + kv_rows],
            "wv": qkv[:, query_rows + kv_rows :],
            "wo": _row_matrix(tiles["o"], stages["o"], tile),
        },
        "feed_forward": {
            "w1": gate[:, :neurons],
            "w3": up[:, :neurons],
            "w2": _row_matrix(tiles["down"], stages["down"], tile),
        },
    }


def unpack_head(plan: Plan, share: DevicePlan, tape: Array) -> Array:
    """Recovers the LM head rows [vocabulary share, hidden] of one device from its tapes [B, head_words]."""
    stage = share.stages["head"]
    return _column_matrix(_join(stage, tape), stage, plan.tile).reshape(-1, stage.cols)


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


def _join(stage: Stage, tape: Array) -> Array:
    """Collects the tiles of a stage from the blocks' tapes [B, words] into [tiles, tile_words]."""
    runs = []
    for block, (share, offset) in enumerate(zip(stage.shares, stage.offsets, strict=True)):
        run = jax.lax.slice_in_dim(tape[block], offset, offset + share.count * stage.tile_words)
        runs.append(run.reshape(share.count, stage.tile_words))
    return jnp.concatenate(runs)


def _column_matrix(tiles: Array, stage: Stage, tile: TileFormat) -> Array:
    if stage.tiles == 0:
        return jnp.zeros((stage.lanes, 0, stage.cols), tiles.dtype)
    chunks = tiles.reshape(stage.lanes, stage.tiles_per_lane, -1, tile.rows, tile.cols)
    matrix = chunks.transpose(0, 1, 3, 2, 4).reshape(stage.lanes, stage.tiles_per_lane * tile.rows, -1)
    return matrix[:, : stage.rows, : stage.cols]


def _row_matrix(tiles: Array, stage: Stage, tile: TileFormat) -> Array:
    if stage.cols == 0:
        return jnp.zeros((stage.lanes, stage.rows, 0), tiles.dtype)
    chunks = tiles.reshape(stage.tiles, stage.lanes, -1, tile.rows, tile.cols)
    matrix = chunks.transpose(1, 0, 3, 2, 4).reshape(stage.lanes, stage.tiles * tile.rows, -1)
    return matrix[:, : stage.rows, : stage.cols]


# Cutting full matrices ----------------------------------------------------------------------------------------------


def _local(plan: Plan, share: DevicePlan, name: str) -> Span:
    """The device's range of the partitioned axis of a matrix, in rows (or columns) over all lanes."""
    if name in ("w1", "w2", "w3"):
        return share.neurons
    scale = plan.config.head_dim * (plan.config.queries_per_kv if name in ("wq", "wo", "bq") else 1)
    return Span(share.kv_heads.first * scale, share.kv_heads.count * scale)


def _own_rows(plan: Plan, share: DevicePlan, weight: Array, name: str) -> Array:
    """[all lanes, rows, cols] to the device's [lanes, rows, cols]."""
    weight, span = jnp.asarray(weight), _local(plan, share, name)
    flat = weight.reshape(-1, weight.shape[-1])[span.first : span.stop]
    return _lanes_of(flat, share.lanes.count)


def _own_cols(plan: Plan, share: DevicePlan, weight: Array, name: str) -> Array:
    """[all lanes, rows, cols] to the device's [lanes, rows, cols], cut along the columns."""
    weight = jnp.asarray(weight)
    if plan.config.lanes is not None:
        return weight[share.lanes.first : share.lanes.stop]
    span = _local(plan, share, name)
    return weight[:, :, span.first : span.stop]


def _qkv_bias(plan: Plan, share: DevicePlan, attention: Mapping[str, Array]) -> Array:
    parts = []
    for name in ("bq", "bk", "bv"):
        span = _local(plan, share, name)
        own = jnp.asarray(attention[name]).reshape(-1)[span.first : span.stop]
        parts.append(own.reshape(share.lanes.count, -1))
    return jnp.concatenate(parts, axis=1)


def _lanes_of(rows: Array, lanes: int) -> Array:
    return rows.reshape(lanes, rows.shape[0] // lanes, rows.shape[1])


def _pair(gate: Array, up: Array, half: int) -> Array:
    """Alternates ``half`` gate rows and ``half`` up rows, padding the neurons to a multiple of ``half``."""
    lanes, neurons, cols = gate.shape
    padded = -(-neurons // half) * half
    both = jnp.stack([_pad(part, padded, cols).reshape(lanes, -1, half, cols) for part in (gate, up)], axis=2)
    return both.reshape(lanes, 2 * padded, cols)


def _unpair(rows: Array, half: int) -> tuple[Array, Array]:
    lanes, count, cols = rows.shape
    both = rows.reshape(lanes, count // (2 * half), 2, half, cols)
    gate, up = (both[:, :, part].reshape(lanes, count // 2, cols) for part in (0, 1))
    return gate, up


def _pad(matrix: Array, rows: int, cols: int) -> Array:
    return jnp.pad(matrix, ((0, 0), (0, rows - matrix.shape[1]), (0, cols - matrix.shape[2])))
