"""Tapes of random weights, made on the device in the tape's own layout: a model of any size is there at once.

Packing reads weights on the host and copies them to the device, which for a large model takes minutes on a GPU machine.
To measure speed, random weights do; they have the statistics of :class:`jax_mono.models.random_source.RandomSource`, so
that activations and logits stay of order one, and zeros wherever packing pads.

Every tile of a tape is a row of *chunks* of ``tile.rows`` x ``tile.cols`` weights. A small table says of each chunk how
its weights are drawn: their standard deviation, which of its rows are real, and how many of its columns.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_mono.granules import interleave
from jax_mono.models.random_source import RandomSource
from jax_mono.models.source import weight_dtype
from jax_mono.noise import noise
from jax_mono.packing import home
from jax_mono.plan import LAYER_STAGES, DevicePlan, Plan, Stage, StageName
from jax_mono.prefill import AXIS
from jax_mono.tape import Tapes, pack_constants, storage

Array = jax.Array

_CHUNK = np.dtype([("deviation", np.float32), ("rows", np.uint32), ("cols", np.uint32)])
"""How a chunk is drawn: ``rows`` has a bit for every real row, ``cols`` counts real columns."""


def random_tapes(plan: Plan, *, dtype: DTypeLike = jnp.bfloat16, mesh: Mesh | None = None, seed: int = 0) -> Tapes:
    """Makes tapes of random weights for a plan. Where embeddings are tied, table and LM head differ all the same.

    Args:
        plan: The plan.
        dtype: float32, bfloat16 or float16.
        mesh: As for :func:`jax_mono.packing.pack`.
        seed: Same seed and plan, same weights.

    Returns:
        The tapes.
    """
    config, target = plan.config, weight_dtype(dtype)
    whole = SingleDeviceSharding(home()) if mesh is None else NamedSharding(mesh, P())
    cut = whole if mesh is None else NamedSharding(mesh, P(AXIS))
    tile = plan.tile

    def draw(table: np.ndarray, layers: int, number: int) -> Array:
        fields = [jax.device_put(np.ascontiguousarray(table[name]), cut) for name in _CHUNK.names or ()]

        def made(*drawn: Array) -> Array:
            return interleave(plan, _draw_tapes(*drawn, layers=layers, tile=(tile.rows, tile.cols), dtype=target.name))

        return jax.jit(made, out_shardings=cut)(*fields, np.uint32(3 * seed + number))

    layers = draw(_chunks(plan, LAYER_STAGES, plan.layer_words), config.num_layers, 0)
    head = draw(_chunks(plan, ("head",), plan.head_words), 1, 1)[:, :, 0]
    shape = (config.vocab_size, config.hidden_size)
    embed = jax.jit(functools.partial(_draw_embed, shape=shape, dtype=target.name), out_shardings=whole)(
        np.uint32(3 * seed + 2)
    )
    source = RandomSource(config, seed)
    vectors = {path: source.tensor(path) for path in source.paths() if _is_vector(path)}
    constants = np.stack([pack_constants(plan, device, vectors) for device in range(plan.num_devices)])
    return Tapes(layers, head, jax.device_put(constants, cut), embed, dtype=target)


def _is_vector(path: str) -> bool:
    name = path.rpartition(".")[2]
    return "norm" in name or name.startswith("b")


def _draw_tapes(
    deviation: Array, rows: Array, cols: Array, seed: Array, *, layers: int, tile: tuple[int, int], dtype: str
) -> Array:
    """[D, B, chunks] tables to tapes [D, B, layers, words]."""
    devices, blocks, chunks = deviation.shape
    shape = (layers, devices, blocks, chunks, *tile)
    row = jax.lax.broadcasted_iota(jnp.uint32, shape, 4)
    col = jax.lax.broadcasted_iota(jnp.uint32, shape, 5)
    table = [field[None, ..., None, None] for field in (deviation, rows, cols)]
    real = ((table[1] >> row & 1) == 1) & (col < table[2])
    values = jnp.where(real, noise(shape, seed) * table[0], 0.0)
    return _stored(values, dtype).transpose(1, 2, 0, 3, 4, 5).reshape(devices, blocks, layers, -1)


def _draw_embed(seed: Array, *, shape: tuple[int, int], dtype: str) -> Array:
    return _stored(noise(shape, seed) * shape[1] ** -0.5, dtype)


def _stored(values: Array, dtype: str) -> Array:
    weights = values.astype(dtype)
    kind = storage(dtype)
    return weights if kind == weights.dtype else jax.lax.bitcast_convert_type(weights, kind)


def _chunks(plan: Plan, names: tuple[StageName, ...], words: int) -> np.ndarray:
    """The table of some stages' tapes, [D, B, words / chunk]; chunks behind the end of a tape are all zero."""
    per_chunk = plan.tile.rows * plan.tile.cols
    table = np.zeros((plan.num_devices, plan.num_blocks, math.ceil(words / per_chunk)), _CHUNK)
    for device, share in enumerate(plan.devices):
        for name in names:
            stage = share.stages[name]
            tiles = _stage_chunks(plan, share, stage)
            for block, (run, offset) in enumerate(zip(stage.shares, stage.offsets, strict=True)):
                entries = tiles[run.first : run.stop].reshape(-1)
                table[device, block, offset // per_chunk :][: len(entries)] = entries
    return table


def _stage_chunks(plan: Plan, share: DevicePlan, stage: Stage) -> np.ndarray:
    """The chunks of a stage's tiles, [tiles, chunks per tile]."""
    config, tile = plan.config, plan.tile
    # All lanes' (and devices') parts of a row parallel product add up, so the sum has the columns of all of them.
    widths = {"o": config.num_heads * config.head_dim, "down": config.intermediate_size}

    per_lane = np.arange(tile.padded_cols(stage.cols) // tile.cols)
    cols = np.clip(stage.cols - per_lane * tile.cols, 0, tile.cols)
    in_lane = np.arange(stage.tiles) % max(1, stage.tiles_per_lane)
    row = np.arange(tile.rows)
    if stage.name == "up":  # gate and up rows of the same neurons, half a tile each
        half = tile.rows // 2
        real = in_lane[:, None] * half + row % half < share.neurons.count // share.lanes.count
    else:
        real = in_lane[:, None] * tile.rows + row < stage.rows
    found = np.zeros((stage.tiles, len(cols) * (stage.lanes if stage.row_parallel else 1)), _CHUNK)
    found["deviation"] = widths.get(stage.name, config.hidden_size) ** -0.5
    found["rows"] = (real << row).sum(axis=1)[:, None]
    found["cols"] = np.tile(cols, stage.lanes) if stage.row_parallel else cols
    return found
