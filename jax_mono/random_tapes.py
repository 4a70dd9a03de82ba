"""Tapes of random weights, made on the device in the tape's own layout: a model of any size is there at once.

Packing reads weights on the host and copies them to the device, which for a large model takes minutes on a GPU machine.
To measure speed, random weights do; they have the statistics of :class:`jax_mono.models.random_source.RandomSource`, so
that activations and logits stay of order one, and zeros wherever packing pads.

Every tile of a tape is a row of *chunks* of ``tile.rows`` x ``tile.cols`` weights. A small table says of each chunk how
its weights are drawn: their standard deviation, which of its rows are real, and how many of its columns.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_mono.device_tapes import DeviceTapes
from jax_mono.models.random_source import RandomSource
from jax_mono.models.source import weight_dtype
from jax_mono.noise import noise
from jax_mono.packing import finish, home, mesh_devices
from jax_mono.plan import STAGES, DevicePlan, Plan, Stage
from jax_mono.tape import Tapes, storage

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
    devices = [home()] if mesh is None else mesh_devices(mesh, plan.num_devices)
    whole = SingleDeviceSharding(devices[0]) if mesh is None else NamedSharding(mesh, P())
    tapes = DeviceTapes(plan, target, devices)
    seeds = np.random.SeedSequence(seed).generate_state(1 + plan.num_devices * len(STAGES) * config.num_layers)
    numbers, tile = iter(seeds.tolist()), (plan.tile.rows, plan.tile.cols)
    for index, share in enumerate(plan.devices):
        for name in STAGES:
            if share.stages[name].empty:
                continue
            table = _stage_chunks(plan, share, share.stages[name])
            names = _CHUNK.names or ()
            fields = [jax.device_put(np.ascontiguousarray(table[field]), tapes.device(index)) for field in names]
            for layer in [None] if name == "head" else range(config.num_layers):
                drawn = _draw_tiles(*fields, np.uint32(next(numbers)), tile=tile, dtype=target.name)
                tapes.place(index, name, drawn, layer)
    tapes.interleave()
    shape = (config.vocab_size, config.hidden_size)
    embed = jax.jit(functools.partial(_draw_embed, shape=shape, dtype=target.name), out_shardings=whole)(
        np.uint32(next(numbers))
    )
    source = RandomSource(config, seed)
    vectors = {path: source.tensor(path) for path in source.paths() if _is_vector(path)}
    return finish(plan, tapes, devices, mesh, embed, vectors, target)


def _is_vector(path: str) -> bool:
    name = path.rpartition(".")[2]
    return "norm" in name or name.startswith("b")


@functools.partial(jax.jit, static_argnames=("tile", "dtype"))
def _draw_tiles(deviation: Array, rows: Array, cols: Array, seed: Array, *, tile: tuple[int, int], dtype: str) -> Array:
    """[tiles, chunks] tables to [tiles, chunks, rows, cols]."""
    shape = (*deviation.shape, *tile)
    row = jax.lax.broadcasted_iota(jnp.uint32, shape, 2)
    col = jax.lax.broadcasted_iota(jnp.uint32, shape, 3)
    table = [field[..., None, None] for field in (deviation, rows, cols)]
    real = ((table[1] >> row & 1) == 1) & (col < table[2])
    return _stored(jnp.where(real, noise(shape, seed) * table[0], 0.0), dtype)


def _draw_embed(seed: Array, *, shape: tuple[int, int], dtype: str) -> Array:
    return _stored(noise(shape, seed) * shape[1] ** -0.5, dtype)


def _stored(values: Array, dtype: str) -> Array:
    weights = values.astype(dtype)
    kind = storage(dtype)
    return weights if kind == weights.dtype else jax.lax.bitcast_convert_type(weights, kind)


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
