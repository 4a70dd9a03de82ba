"""Tapes under construction on the devices that will read them: the host only hands matrices over."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono.like_blocks import LikeBlocks, like_blocks
from jax_mono.plan import Plan, StageName, TileFormat
from jax_mono.tape import own_weights, stage_tiles, storage

Array = jax.Array


class DeviceTapes:
    """Tapes of some JAX devices, each with its rows of the plan's devices.

    Attributes:
        layers: Per JAX device [D, B, num_layers, layer_words]; see :class:`jax_mono.tape.Tapes`.
    """

    def __init__(self, plan: Plan, dtype: np.dtype, devices: Sequence[jax.Device]) -> None:
        self.plan, self.devices, self.rows = plan, devices, plan.num_devices // len(devices)
        shape, stored = (self.rows, plan.num_blocks), storage(dtype)
        self.layers = [
            jnp.zeros((*shape, plan.config.num_layers, plan.layer_words), stored, device=device) for device in devices
        ]
        self._head = [jnp.zeros((*shape, 1, plan.head_words), stored, device=device) for device in devices]

    @property
    def head(self) -> list[Array]:
        """Per JAX device [D, B, head_words]."""
        return [tapes[:, :, 0] for tapes in self._head]

    def store(self, name: StageName, matrices: Sequence[np.ndarray], layer: int | None) -> None:
        """Puts a stage's matrices, of one layer or of the head, into the tapes."""
        arrays = self._head if layer is None else self.layers
        jax.block_until_ready(arrays)  # so that no more than one stage's matrices are on their way
        for index, share in enumerate(self.plan.devices):
            at, stage = index // self.rows, share.stages[name]
            if stage.tile_words == 0:  # a device without heads
                continue
            own = jax.device_put(own_weights(self.plan, index, name, matrices), self.devices[at])
            arrays[at] = _place(
                arrays[at],
                own,
                index % self.rows,
                layer or 0,
                name=name,
                tile=self.plan.tile,
                tile_words=stage.tile_words,
                runs=like_blocks(stage, stage.offsets),
            )


@functools.partial(jax.jit, static_argnames=("name", "tile", "tile_words", "runs"), donate_argnums=0)
def _place(
    tapes: Array,
    own: list[Array],
    row: Array,
    layer: Array,
    *,
    name: StageName,
    tile: TileFormat,
    tile_words: int,
    runs: tuple[LikeBlocks, ...],
) -> Array:
    """Writes tiles into [D, B, layers, words]."""
    tiles = stage_tiles(tile, name, own).reshape(-1, tile_words)
    for run in runs:
        words = tiles[run.tile : run.tile + run.blocks * run.tiles].reshape(1, run.blocks, 1, -1)
        tapes = jax.lax.dynamic_update_slice(tapes, words, (row, run.block, layer, run.offset))
    return tapes
