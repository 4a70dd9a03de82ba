"""Tapes under construction on the devices that will read them: the host only hands matrices over."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_mono.granules import interleave
from jax_mono.like_blocks import LikeBlocks, like_blocks
from jax_mono.plan import Plan, StageName
from jax_mono.tape import own_weights, stage_tiles, stored_words, tape_storage
from jax_mono.tile import TileFormat

Array = jax.Array


class DeviceTapes:
    """Tapes of some JAX devices, each with its rows of the plan's devices.

    Attributes:
        layers: Per JAX device [D, B, num_layers, layer_words]; see :class:`jax_mono.tape.Tapes`.
        spoiled: Per JAX device, how much could not be compressed.
    """

    def __init__(self, plan: Plan, dtype: np.dtype, devices: Sequence[jax.Device]) -> None:
        self.plan, self.devices, self.rows = plan, devices, plan.num_devices // len(devices)
        shape, stored = (self.rows, plan.num_blocks), tape_storage(plan.tile, dtype)
        self.layers = [
            jnp.zeros((*shape, plan.config.num_layers, plan.layer_words), stored, device=device) for device in devices
        ]
        self._head = [jnp.zeros((*shape, 1, plan.head_words), stored, device=device) for device in devices]
        self.spoiled = [jnp.zeros((), jnp.int32, device=device) for device in devices]

    @property
    def head(self) -> list[Array]:
        """Per JAX device [D, B, head_words]."""
        return [tapes[:, :, 0] for tapes in self._head]

    def store(self, name: StageName, matrices: Sequence[np.ndarray], layer: int | None) -> None:
        """Puts a stage's matrices, of one layer or of the head, into the tapes."""
        jax.block_until_ready(self._head if layer is None else self.layers)  # no more than one stage is on its way
        for index, share in enumerate(self.plan.devices):
            if not share.stages[name].empty:
                own = jax.device_put(own_weights(self.plan, index, name, matrices), self.device(index))
                self.place(index, name, _tiles(self.plan.tile, name, own), layer)

    def device(self, index: int) -> jax.Device:
        """Where the tapes of a device of the plan are."""
        return self.devices[index // self.rows]

    def interleave(self) -> None:
        """Puts complete tapes where the plan has them, if that is not in one piece; takes twice their memory."""
        if self.plan.placement.interleaved:
            self.layers = [_interleave(self.plan, tapes) for tapes in self.layers]
            self._head = [_interleave(self.plan, tapes) for tapes in self._head]

    def place(self, index: int, name: StageName, tiles: Array, layer: int | None) -> None:
        """Puts tiles into a device's tapes.

        Args:
            index: The plan's device.
            name: The stage.
            tiles: [tiles, ...] as :func:`jax_mono.tape.stage_tiles` gives them, where the tapes are.
            layer: Which layer; None for the head.
        """
        arrays = self._head if layer is None else self.layers
        at, stage = index // self.rows, self.plan.devices[index].stages[name]
        arrays[at], self.spoiled[at] = _place(
            arrays[at],
            self.spoiled[at],
            tiles,
            index % self.rows,
            layer or 0,
            tile=self.plan.tile,
            cols=stage.cols,
            runs=like_blocks(stage, stage.offsets),
        )


_interleave = jax.jit(interleave, static_argnums=0)
_tiles = jax.jit(stage_tiles, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnames=("tile", "cols", "runs"), donate_argnums=(0, 1))
def _place(
    tapes: Array,
    spoiled: Array,
    tiles: Array,
    row: Array,
    layer: Array,
    *,
    tile: TileFormat,
    cols: int,
    runs: tuple[LikeBlocks, ...],
) -> tuple[Array, Array]:
    """Writes tiles into [D, B, layers, words]; counts what could not be compressed."""
    stored, more = stored_words(tile, cols, tiles)
    for run in runs:
        words = stored[run.tile : run.tile + run.blocks * run.tiles].reshape(1, run.blocks, 1, -1)
        tapes = jax.lax.dynamic_update_slice(tapes, words, (row, run.block, layer, run.offset))
    return tapes, spoiled + more
